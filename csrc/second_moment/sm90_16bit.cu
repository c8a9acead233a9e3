// The Hopper kernels of 16-bit input: one file for each, to compile side by side.
#include "second_moment/sm90.cuh"

namespace pyrewrite {

const MomentKernel& sm90_16bit_kernel(bool single, DType dtype) {
  using sm90::Boxes;
  if (dtype == DType::float16) return single ? sm90::kSm90<Boxes, Fp16, true> : sm90::kSm90<Boxes, Fp16, false>;
  return single ? sm90::kSm90<Boxes, Bf16, true> : sm90::kSm90<Boxes, Bf16, false>;
}

bool sm90_is_built() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, sm90::sm90_moment<sm90::Boxes, Bf16, true>) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  return attributes.sharedSizeBytes > 0;  // of its own; an empty kernel has none
}

}  // namespace pyrewrite
