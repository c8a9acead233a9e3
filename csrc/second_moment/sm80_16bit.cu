// The tensor-core kernels of 16-bit input: one file for each, to compile side by side.
#include "second_moment/sm80.cuh"

namespace pyrewrite {

const MomentKernel& sm80_16bit_kernel(int tile, DType dtype) {
  if (dtype == DType::float16)
    return tile == 64 ? kSm80<Sm80Traits<64, Float16Math>> : kSm80<Sm80Traits<128, Float16Math>>;
  return tile == 64 ? kSm80<Sm80Traits<64, BFloat16Math>> : kSm80<Sm80Traits<128, BFloat16Math>>;
}

}  // namespace pyrewrite
