// The tensor-core kernels of float32 input: one file for each, to compile side by side.
#include "second_moment/sm80.cuh"

namespace pyrewrite {

const MomentKernel& sm80_float32_kernel(int tile, Precision precision) {
  if (precision == Precision::tf32)
    return tile == 64 ? kSm80<Sm80Traits<64, Tf32Math>> : kSm80<Sm80Traits<128, Tf32Math>>;
  return tile == 64 ? kSm80<Sm80Traits<64, Float32Math>> : kSm80<Sm80Traits<128, Float32Math>>;
}

}  // namespace pyrewrite
