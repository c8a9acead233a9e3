// K3: the low-rank insertion, all steps of Adam over Lambda (Bau et al., ECCV 2020, section 3.3). Shapes: O output
// channels, r directions, `taps` = kh kw, K = r taps, N pixels of all B targets side by side. All arrays are
// contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu.h"
#include "common/status.h"
#include "insertion/step.h"

namespace pyrewrite {

struct InsertionParams {
  int channels;                // O
  int rank;                    // r
  int taps;                    // kh kw
  int targets;                 // B
  std::int64_t pixels;         // N
  const std::int64_t* starts;  // B + 1: first pixel of each target, and N

  // Where the keys come from, for kernels that store each key once: row (d, ty, tx) of `keys` at pixel (y, x) of target
  // b is map_d[y + ty][x + tx], or map_d[y + kh - 1 - ty][x + kw - 1 - tx] where `flipped`.
  int kernel_height, kernel_width;  // kh, kw
  const int* shapes;                // B x 2   height and width of each target
  bool flipped;

  const float* base;    // O x N   scale * conv(key, W0)
  const float* keys;    // K x N   scale * the unfolded D key
  const float* goal;    // O x N
  const float* noise;   // N
  const float* weight;  // N       of a pixel in the loss; they sum to 1
  const float* bias;    // O

  // |filter|^2 of target b, channel o: energy + 2 <Lambda_o, cross> + <Lambda_o, gram Lambda_o>. Null: no demodulation.
  const float* energy;  // B x O
  const float* cross;   // B x O x K
  const float* gram;    // B x r x r

  // Adds mean_o q_o <Lambda_o, P Lambda_o>. Null: no penalty.
  const float* penalty_scale;   // O      q
  const float* penalty_matrix;  // r x r  P, symmetric

  float negative_slope;
  float gain;

  double lr, beta1, beta2, eps;
  int first;  // steps already taken
  int count;  // steps to take

  float* lambda;      // O x K
  float* exp_avg;     // O x K
  float* exp_avg_sq;  // O x K
  double* losses;     // count: the loss before each step, without the penalty
};

Status insertion_cpu(const InsertionParams& params, int threads);

// Several edits, independent of one another, that take the same steps with the same settings of Adam. All pointers but
// `starts` and `shapes` are the device's. What becomes of an edit does not depend on those beside it.
//
// Bytes of scratch on the device that insertion_cuda needs for them.
Status insertion_workspace(const InsertionParams* edits, int count, int device, std::size_t* bytes);
// On the given device and stream, asynchronously; the caller's current device is restored. `wait` waits for the end.
// workspace: aligned to 256 bytes.
Status insertion_cuda(const InsertionParams* edits, int count, void* workspace, int device, std::uintptr_t stream,
                      bool wait);

// Floats of scratch that the variant for this processor needs, and how it groups the channels.
struct InsertionSizes {
  int block_channels;  // output channels that a block owns
  int blocks;          // blocks that cover all channels
  int group;           // blocks that take a step together, so that they share the pixels' keys while these are in cache
  std::int64_t shared;  // keys and pixels, packed: the same for all blocks
  std::int64_t block;   // base, goal, Lambda, state of one block
  std::int64_t part;    // scratch of one thread
};

PYREWRITE_DECLARE_ISA(InsertionSizes, insertion_sizes, (const InsertionParams& p))
PYREWRITE_DECLARE_ISA(void, insertion_pack, (const InsertionParams& p, float* shared))
// Takes all steps for blocks first ... last - 1 (last - first <= group). block_losses: (last - first) x count sums over
// the channels.
PYREWRITE_DECLARE_ISA(void, insertion_steps,
                      (const InsertionParams& p, const AdamStep* schedule, const float* shared, int first, int last,
                       float* blocks, float* scratch, double* block_losses))

}  // namespace pyrewrite
