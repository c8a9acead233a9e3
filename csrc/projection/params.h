// Low-rank projection of convolution weights, W <- W0 + (W - W0) D^T D over the input channels, alone or after one step
// of Adam.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/status.h"

namespace pyrewrite {

// A tensor out x in x height x width with any strides, in elements.
struct WeightView {
  float* data;
  std::int64_t out_stride, in_stride, height_stride, width_stride;
};

struct ProjectionItem {
  WeightView weight;       // updated
  WeightView base;         // read
  WeightView grad;         // read by Adam
  WeightView exp_avg;      // updated by Adam
  WeightView exp_avg_sq;   // updated by Adam
  const float* direction;  // rank x in, orthonormal rows
  std::int64_t direction_rank_stride, direction_in_stride;
  int out, in, height, width, rank;
};

// torch.optim.Adam without weight decay. The corrections for the start from zero are folded into two numbers.
struct AdamSettings {
  int enabled;
  int project;                  // 0: the step alone
  float step_size;              // lr / (1 - beta1^step)
  float bias_correction2_sqrt;  // sqrt(1 - beta2^step)
  float one_minus_beta1, beta2, one_minus_beta2, eps;
};

// On CUDA one launch takes as many items as fit a kernel's parameters.
constexpr int kItemsPerLaunch = 14;

Status project_cpu(const ProjectionItem* items, int count, const AdamSettings& settings, int threads);
// On the given device and stream, asynchronously; the caller's current device is restored. `wait` waits for the end.
Status project_cuda(const ProjectionItem* items, int count, const AdamSettings& settings, int device,
                    std::uintptr_t stream, bool wait);

// One Adam step of one element; the same on both sides.
#if defined(__CUDACC__)
__host__ __device__
#endif
    static inline float adam_element(float weight, float grad, float& exp_avg, float& exp_avg_sq,
                                     const AdamSettings& s) {
  exp_avg += s.one_minus_beta1 * (grad - exp_avg);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad;
#if defined(__CUDA_ARCH__)
  const float root = sqrtf(exp_avg_sq);
#else
  const float root = __builtin_sqrtf(exp_avg_sq);
#endif
  return weight - s.step_size * (exp_avg / (root / s.bias_correction2_sqrt + s.eps));
}

// Floats of scratch a thread needs for one output channel, and the width to which the rows of D are padded with zeros.
PYREWRITE_DECLARE_ISA(std::int64_t, project_scratch, (const ProjectionItem& item))
PYREWRITE_DECLARE_ISA(std::int64_t, project_padded, (int in))
PYREWRITE_DECLARE_ISA(void, project_channel,
                      (const ProjectionItem& item, const float* padded_direction, const AdamSettings& settings,
                       int channel, float* scratch))

}  // namespace pyrewrite
