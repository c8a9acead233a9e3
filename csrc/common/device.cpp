#include "common/device.h"

#ifdef PYREWRITE_HAS_CUDA

#include <map>
#include <mutex>
#include <tuple>

namespace pyrewrite {

CudaReport cuda_report() {
  CudaReport report;
  if (cudaDriverGetVersion(&report.driver) != cudaSuccess) report.driver = 0;
  if (cudaRuntimeGetVersion(&report.runtime) != cudaSuccess) report.runtime = 0;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    report.error = static_cast<int>(error);
    report.message = cudaGetErrorString(error);
    (void)cudaGetLastError();  // told here; it must not turn up in another library's check
    return report;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp found;
    if (cudaGetDeviceProperties(&found, device) != cudaSuccess) {
      (void)cudaGetLastError();
      continue;
    }
    DeviceProperties properties;
    properties.name = found.name;
    properties.major = found.major;
    properties.minor = found.minor;
    properties.multiprocessors = found.multiProcessorCount;
    properties.memory = found.totalGlobalMem;
    properties.shared_memory = static_cast<int>(found.sharedMemPerBlockOptin);
    int pageable = 0;
    if (cudaDeviceGetAttribute(&pageable, cudaDevAttrPageableMemoryAccess, device) != cudaSuccess)
      (void)cudaGetLastError();
    properties.reads_host_memory = pageable != 0;
    report.devices.push_back(properties);
  }
  return report;
}

Status cuda_status(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaDeviceProp found{};
    if (cudaGetDeviceProperties(&found, device) != cudaSuccess) (void)cudaGetLastError();
    return Status::error(Status::kDevice,
                         "%s: this build has no code for GPU %d (%s, compute capability %d.%d); it was built for %s. "
                         "Rebuild with PYREWRITE_CUDA_ARCHITECTURES=native",
                         what, device, found.name, found.major, found.minor, PYREWRITE_CUDA_ARCHITECTURES);
  }
  return Status::error(Status::kDevice, "%s on GPU %d: CUDA error %d, %s", what, device, static_cast<int>(error),
                       cudaGetErrorString(error));
}

cudaError_t allow_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  int reserve = 0;
  if (error == cudaSuccess) error = reserve_counted(&reserve);
  if (error != cudaSuccess) return error;
  most -= static_cast<int>(attributes.sharedSizeBytes) - reserve;
  if (attributes.maxDynamicSharedSizeBytes >= most) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

ClusterLaunch::ClusterLaunch(int size, dim3 blocks, int threads, int shared_bytes, cudaStream_t stream) {
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = size;
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &shape;
  config.numAttrs = 1;
}

int clusters_at_once(const void* kernel, int size, int threads, int shared_bytes) {
  constexpr int kMany = 1 << 20;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    (void)cudaGetLastError();
    return kMany;
  }
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto asked = std::make_tuple(device, kernel, size, threads, shared_bytes);
  const auto found = known.find(asked);
  if (found != known.end()) return found->second;
  const ClusterLaunch launch(size, dim3(size), threads, shared_bytes, nullptr);
  int count = 0;
  cudaError_t error = allow_shared_memory(kernel);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    return kMany;
  }
  known[asked] = count;
  return count;
}

Status waited_for(const Status& launched, cudaStream_t stream, const char* what, int device) {
  const cudaError_t error = cudaStreamSynchronize(stream);
  if (launched.ok()) return cuda_status(error, what, device);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return launched;
}

DeviceGuard::DeviceGuard(int device) {
  error_ = cudaGetDevice(&previous_);
  if (error_ == cudaSuccess && previous_ != device) {
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
}

DeviceGuard::~DeviceGuard() {
  if (changed_) (void)cudaSetDevice(previous_);
}

}  // namespace pyrewrite

#endif  // PYREWRITE_HAS_CUDA
