#include "common/device.h"

namespace pyrewrite {
namespace {

// Neither kernel is ever launched. How much more shared memory the one has than the other says what it was compiled
// for: in units, twice the architecture, and one more for 90a. Both have some, since what the system reserves on 9.0
// and later is reserved for kernels that have; and units are large, should a driver round.
constexpr int kUnit = 128;  // bytes

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kOwn = 1;
#else
constexpr int kOwn = 0;
#endif

__global__ void telling_kernel() {
#if defined(__CUDA_ARCH__)
  __shared__ volatile char bytes[kUnit * (1 + 2 * (__CUDA_ARCH__ / 10) + kOwn)];
  bytes[threadIdx.x] = 0;
#endif
}

__global__ void unit_kernel() {
  __shared__ volatile char bytes[kUnit];
  bytes[threadIdx.x] = 0;
}

}  // namespace

cudaError_t code_here(Code* code) {
  cudaFuncAttributes telling{}, unit{};
  cudaError_t error = cudaFuncGetAttributes(&telling, reinterpret_cast<const void*>(telling_kernel));
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&unit, reinterpret_cast<const void*>(unit_kernel));
  if (error != cudaSuccess) return error;
  const int units = static_cast<int>(telling.sharedSizeBytes - unit.sharedSizeBytes) / kUnit;
  *code = {units / 2, units % 2 != 0};
  return cudaSuccess;
}

cudaError_t reserve_counted(int* bytes) {
  cudaFuncAttributes unit{};
  const cudaError_t error = cudaFuncGetAttributes(&unit, reinterpret_cast<const void*>(unit_kernel));
  *bytes = static_cast<int>(unit.sharedSizeBytes) - kUnit;
  return error;
}

}  // namespace pyrewrite
