// The Hopper kernels of 16-bit input: one file for each, to compile side by side.
#include "second_moment/sm90.cuh"

namespace pyrewrite {

const MomentKernel& sm90_16bit_kernel(DType dtype) {
  return dtype == DType::float16 ? sm90::kSm90<sm90::Boxes, Fp16> : sm90::kSm90<sm90::Boxes, Bf16>;
}

// What the Hopper kernels are in a build for another architecture than 90a.
__global__ void empty_kernel() {}

bool sm90_is_built() {
  cudaFuncAttributes built{}, empty{};
  if (cudaFuncGetAttributes(&built, sm90::sm90_moment<sm90::Boxes, Bf16, true>) != cudaSuccess ||
      cudaFuncGetAttributes(&empty, empty_kernel) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  // An empty kernel has no shared memory of its own; should a driver count what the system reserves, it does in both.
  return built.sharedSizeBytes > empty.sharedSizeBytes;
}

}  // namespace pyrewrite
