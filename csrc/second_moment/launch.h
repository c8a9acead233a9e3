// What the kernels of the second moment share on the host's side, and the reduction of their partial sums.
#pragma once

#include <cuda_runtime_api.h>

#include "second_moment/schedule.h"

namespace pyrewrite {

// A sum of many parts as an unevaluated pair of floats, about 48 bits: as good as float64 here, and fast also where the
// GPU computes float64 at 1/64 of the float32 rate.
struct alignas(8) Pair {
  float sum, rest;
};

struct MomentLaunch {
  Source source;
  Access access;
  DType dtype;
  Plan plan;
  Pair* workspace;  // plan.blocks() x tile * tile, in the order of the kernel's threads
  MomentView moment;
  cudaStream_t stream;
};

// One way to compute: the side of its tiles, the bytes of a copy (see access_of), what a multiprocessor holds, its
// kernels.
struct MomentKernel {
  int tile, copy_bytes;
  int blocks_per_multiprocessor;                // as its registers allow
  int work_on_diagonal;                         // thirds of a tile beside it
  int shared_bytes;                             // of a block
  cudaError_t (*partial)(const MomentLaunch&);  // the blocks' partial sums
  cudaError_t (*reduce)(const MomentLaunch&);   // their sums, added to the moment
};

// float32 arithmetic of the ordinary units; any GPU. tile: 64 or 128.
const MomentKernel& simt_kernel(int tile, DType dtype);
// Tensor cores from compute capability 8.0 on.
const MomentKernel& sm80_float32_kernel(int tile, Precision precision);
const MomentKernel& sm80_16bit_kernel(int tile, DType dtype);

}  // namespace pyrewrite
