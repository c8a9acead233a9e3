// What the CUDA kernels of the insertion share. Included by .cu files only.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"
#include "insertion/params.h"

namespace pyrewrite {

constexpr int kMostTargets = 128;  // their places are kernel parameters
constexpr int kMostSide = 32767;   // of a target: its sizes are kept as shorts

constexpr int kMostEdits = 16;  // of one launch: likewise

// What differs between the edits of a launch; fields as in InsertionParams, all pointers the device's.
struct InsertionArrays {
  const float *base, *keys, *goal, *noise, *weight, *bias;
  const float *energy, *cross, *gram;
  const float *penalty_scale, *penalty_matrix;
  float *lambda, *exp_avg, *exp_avg_sq;
  double* losses;
  float* scratch;        // as the plan asks
  double* block_losses;  // rows x count: parts of the loss of each step
};

// The edits of a launch as a kernel sees them. Edits of one shape share a launch; a block belongs to number blockIdx.y.
struct InsertionProblem {
  int channels, rank, taps, targets, pixels;
  int kernel_height, kernel_width;
  int flipped, demodulate;
  float up, down;  // the activation's slopes, gain included
  int starts[kMostTargets + 1];
  short heights[kMostTargets], widths[kMostTargets];
  // From here on it is no part of the shape.
  int count;                 // steps
  int first;                 // steps already taken
  const AdamStep* schedule;  // count
  InsertionArrays edits[kMostEdits];
};

// The current device. clusters: it has them, and runs code for them.
struct InsertionDevice {
  int multiprocessors, shared_bytes;
  bool clusters;
};

// How a kernel would run a problem on a device.
struct InsertionPlan {
  int blocks;  // of an edit; 0: it does not take the problem
  int channels_per_block;
  int shared_bytes;
  bool resident;                // base and goal stay in shared memory
  int loss_rows;                // of an edit's block_losses
  std::int64_t scratch_floats;  // of an edit
};

// Any shape.
InsertionPlan plan_general(const InsertionProblem& p, const InsertionDevice& device);
cudaError_t launch_general(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream);

// One small target, few directions.
InsertionPlan plan_resident(const InsertionProblem& p, const InsertionDevice& device);
cudaError_t launch_resident(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream);

// One larger target, one direction, on a GPU with clusters and room for one.
InsertionPlan plan_unfolded(const InsertionProblem& p, const InsertionDevice& device);
cudaError_t launch_unfolded(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream);

// Several targets or many directions, likewise.
bool cluster_has_room(int channels, int shared_bytes);
InsertionPlan plan_cluster(const InsertionProblem& p, const InsertionDevice& device);
cudaError_t launch_cluster(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream);

#if defined(__CUDACC__)
namespace {

// Finds whole numbers that halves hold and that are to one another as the activation's slopes, to float32's precision:
// 5 and 1 for a slope of 0.2.
inline bool whole_slopes(const InsertionProblem& p, float* positive, float* other) {
  if (!(p.up > 0.f)) return false;
  const double slope = double(p.down) / p.up;
  for (int n = 1; n <= 2048; ++n) {
    const double near = std::nearbyint(slope * n);
    if (std::fabs(near) > 2048 || std::fabs(near - slope * n) > std::fabs(slope) * n * std::ldexp(1, -23)) continue;
    *positive = static_cast<float>(n);
    *other = static_cast<float>(near);
    return true;
  }
  return false;
}

// What step.h needs of single numbers.
struct ScalarOps {
  static __device__ __forceinline__ float choose(float z, float positive, float other) {
    return z > 0.f ? positive : other;
  }
  static __device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
  // x with its sign turned where d is negative.
  static __device__ __forceinline__ float turned(float x, float d) {
    return __int_as_float(__float_as_int(x) ^ (__float_as_int(d) & 0x80000000));
  }
  static __device__ __forceinline__ float signed_as(float x, float d) { return d != 0.f ? turned(x, d) : 0.f; }
  static __device__ __forceinline__ float root(float x) { return sqrtf(x); }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sum over four lanes side by side.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Starts kernel(p, at) in clusters of `size` blocks.
template <class Layout>
cudaError_t launch_in_clusters(void (*kernel)(InsertionProblem, Layout), int size, int threads,
                               const InsertionProblem& p, const InsertionPlan& plan, const Layout& at, int edits,
                               cudaStream_t stream) {
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  const ClusterLaunch clusters(size, dim3(plan.blocks, edits), threads, plan.shared_bytes, stream);
  return cudaLaunchKernelEx(&clusters.config, kernel, p, at);
}

}  // namespace
#endif

}  // namespace pyrewrite
