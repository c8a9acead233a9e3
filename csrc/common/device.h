// The CUDA side's common ground: errors as values, the caller's device kept, what the machine has.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "common/status.h"

#ifdef PYREWRITE_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pyrewrite {

struct DeviceProperties {
  std::string name;
  int major = 0, minor = 0, multiprocessors = 0, shared_memory = 0;  // the most shared memory of a block, bytes
  std::size_t memory = 0;                                            // bytes
  bool reads_host_memory = false;                                    // kernels may follow pointers from malloc
};

struct CudaReport {
  int driver = 0, runtime = 0;  // 13000 is CUDA 13.0; 0: unknown
  int error = 0;                // cudaError_t of the search for GPUs
  std::string message;
  std::vector<DeviceProperties> devices;
};

#ifdef PYREWRITE_HAS_CUDA

// Searches anew at every call.
CudaReport cuda_report();

// What failed and why; where this binary holds no code for the GPU, names both.
Status cuda_status(cudaError_t error, const char* what, int device);

// Lets a kernel have all the dynamic shared memory that a block of the current device can have beside its own. The most
// it may ask for belongs to the kernel, not to a launch: a launch that set no more than it needs would take from one
// that another thread is about to make.
cudaError_t allow_shared_memory(const void* kernel);

// Which of this build's code the current device runs: 80 was compiled for 8.0. A newer device runs code for an older
// one where the build has nothing better, and kernels that need more are empty there. own: 90a, with what only 9.0 has.
struct Code {
  int architecture = 0;
  bool own = false;
};
cudaError_t code_here(Code* code);

// How much of the shared memory that the runtime says a kernel has is the system's own: the machine code of 9.0 and
// later names its 1 KiB among the kernel's, but the limit of a block is without it.
cudaError_t reserve_counted(int* bytes);

// A launch in clusters of `size` blocks.
struct ClusterLaunch {
  cudaLaunchAttribute shape{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int size, dim3 blocks, int threads, int shared_bytes, cudaStream_t stream);
  ClusterLaunch(const ClusterLaunch&) = delete;  // config points to shape
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};

// How many clusters of a kernel the current device can hold at once, nothing else running: 0 where not even one finds
// blocks enough in one part of the chip. Asked once for a device, so that every call finds the same answer. Many where
// the question fails, since the launch then fails as well, and tells why.
int clusters_at_once(const void* kernel, int size, int threads, int shared_bytes);

// Waits for the stream, whatever became of the launches before: when it returns, nothing of them runs any more, so that
// memory may be freed. The status of the launches, or, where they were fine, that of waiting.
Status waited_for(const Status& launched, cudaStream_t stream, const char* what, int device);

// Makes `device` current for its lifetime, then the caller's again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = -1;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

#endif  // PYREWRITE_HAS_CUDA

}  // namespace pyrewrite
