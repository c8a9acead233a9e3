#include "common/device.h"

namespace pyrewrite {
namespace {

__global__ void empty_kernel() {}

}  // namespace

bool has_code(const void* kernel) {
  cudaFuncAttributes built{}, empty{};
  if (cudaFuncGetAttributes(&built, kernel) != cudaSuccess ||
      cudaFuncGetAttributes(&empty, reinterpret_cast<const void*>(empty_kernel)) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  // An empty kernel has no shared memory of its own; should a driver count what the system reserves, it does in both.
  return built.sharedSizeBytes > empty.sharedSizeBytes;
}

}  // namespace pyrewrite
