// What the kernels of the second moment share on the host's side, and the reduction of their partial sums.
#pragma once

#include <cuda_runtime_api.h>

#include "second_moment/sm90_layout.h"

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
  sm90::ClusterPlan clusters;  // instead, for the kernels of 9.0
  Pair* workspace;             // blocks x tile * tile, in the order of the kernel's threads
  MomentView moment;
  cudaStream_t stream;
  // float32 input as scaled half numbers: of every channel the largest magnitude in some rows, the bits of a float. The
  // kernels fill it before they use it. nullptr: not scaled.
  std::uint32_t* peaks;
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
  bool scaled = false;                          // needs peaks
  const sm90::Costs* costs = nullptr;           // copies boxes, which do not cross images, and has a ClusterPlan
  int (*pairs_at_once)() = nullptr;             // clusters of two that the current device holds; likewise
};

// float32 arithmetic of the ordinary units; any GPU. tile: 64 or 128.
const MomentKernel& simt_kernel(int tile, DType dtype);
// Tensor cores from compute capability 8.0 on.
const MomentKernel& sm80_float32_kernel(int tile, Precision precision);
const MomentKernel& sm80_16bit_kernel(int tile, DType dtype);
// Tensor cores of 9.0a.
const MomentKernel& sm90_float32_kernel(Precision precision);
const MomentKernel& sm90_16bit_kernel(DType dtype);

}  // namespace pyrewrite
