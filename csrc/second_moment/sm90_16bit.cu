// The Hopper kernels of 16-bit input: one file for each, to compile side by side.
#include "second_moment/sm90.cuh"

namespace pyrewrite {

const MomentKernel& sm90_16bit_kernel(DType dtype) {
  return dtype == DType::float16 ? sm90::kSm90<sm90::Boxes, Fp16> : sm90::kSm90<sm90::Boxes, Bf16>;
}

}  // namespace pyrewrite
