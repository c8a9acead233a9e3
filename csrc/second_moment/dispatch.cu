// Chooses the kernel for a device and an input, by rules that depend on nothing that changes from call to call.
#include <algorithm>

#include "common/device.h"
#include "second_moment/launch.h"
#include "second_moment/sm90_layout.h"

namespace pyrewrite {
namespace {

struct Choice {
  const MomentKernel* kernel = nullptr;
  Access access = Access::elements;
  Plan plan{};
  sm90::ClusterPlan clusters{};

  // Pairs of the workspace.
  std::int64_t sums() const {
    return kernel->costs != nullptr ? clusters.blocks() * std::int64_t{sm90::kElements}
                                    : plan.blocks() * std::int64_t{kernel->tile} * kernel->tile;
  }
};

struct Gpu {
  int major = 0, minor = 0, multiprocessors = 0, shared_bytes = 0;  // of a multiprocessor
  bool sm80 = false, sm90 = false;                                  // it runs code for these
};

Status look_up(int device, MomentFamily family, Gpu* gpu) {
  cudaError_t error = cudaDeviceGetAttribute(&gpu->major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&gpu->minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu->shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  Code code;
  if (error == cudaSuccess) error = code_here(&code);
  if (error != cudaSuccess) return cuda_status(error, "asking for the properties", device);
  gpu->sm80 = code.architecture >= 80;
  gpu->sm90 = code.own;  // no other GPU runs it
  if (family == MomentFamily::sm90)
    return Status::error(Status::kUnsupported, "second moment: the kernels for 9.0 are taken by rule, not by name");
  if (family == MomentFamily::sm80 && !gpu->sm80)
    return Status::error(Status::kUnsupported,
                         "second moment: the kernels for compute capability 8.0 were asked for, "
                         "GPU %d has %d.%d and runs code for %d.%d",
                         device, gpu->major, gpu->minor, code.architecture / 10, code.architecture % 10);
  return {};
}

const MomentKernel& sm90_kernel(DType dtype, Precision precision) {
  return dtype == DType::float32 ? sm90_float32_kernel(precision) : sm90_16bit_kernel(dtype);
}

// Whether the Hopper kernels take p: all that boxes can copy, where there is room for two blocks that share them.
bool sm90_takes(const SecondMomentParams& p, Precision precision, const Gpu& gpu) {
  return gpu.sm90 && sm90::boxes_fit(p) && sm90_kernel(p.dtype, precision).pairs_at_once() > 0;
}

// float32 from three tensor-core products each pays where a multiprocessor makes 1024 TF32 products a cycle or more: on
// 8.0, 9.0 and 10.x. The others (8.6, 8.7, 8.9, 12.x) make as many TF32 as float32 products, so there float32 takes the
// ordinary units. Before 8.0 everything does.
MomentFamily by_rule(int major, int minor, bool sm90, DType dtype, Precision precision) {
  if (sm90) return MomentFamily::sm90;
  const bool fast_tf32 = (major == 8 && minor == 0) || major == 9 || major == 10;
  const bool plain_float32 = dtype == DType::float32 && precision == Precision::fp32;
  return major < 8 || (plain_float32 && !fast_tf32) ? MomentFamily::simt : MomentFamily::sm80;
}

const MomentKernel& kernel_for(const SecondMomentParams& p, Precision precision, MomentFamily family, const Gpu& gpu) {
  if (family == MomentFamily::by_rule)
    family = !gpu.sm80 ? MomentFamily::simt
                       : by_rule(gpu.major, gpu.minor, sm90_takes(p, precision, gpu), p.dtype, precision);
  if (family == MomentFamily::sm90) return sm90_kernel(p.dtype, precision);
  const int tile = tile_for(p.d);
  if (family == MomentFamily::simt) return simt_kernel(tile, p.dtype);
  if (p.dtype == DType::float32) return sm80_float32_kernel(tile, precision);
  return sm80_16bit_kernel(tile, p.dtype);
}

// p: joined, and small enough for one launch.
Choice choose(const SecondMomentParams& p, Precision precision, MomentFamily family, const Gpu& gpu) {
  Choice choice;
  choice.kernel = &kernel_for(p, precision, family, gpu);
  choice.access = access_of(p, choice.kernel->copy_bytes);
  if (choice.kernel->costs != nullptr) {
    const int blocks = std::min(gpu.multiprocessors, 2 * choice.kernel->pairs_at_once());
    choice.clusters = sm90::make_cluster_plan(p.d, sm90::rows_of_boxes(p), blocks, *choice.kernel->costs);
    return choice;
  }
  const int tile = choice.kernel->tile, side = (p.d + tile - 1) / tile;
  const int room = gpu.shared_bytes / (choice.kernel->shared_bytes + 1024);  // 1 KB of a block is the system's
  const int resident =
      room < choice.kernel->blocks_per_multiprocessor ? room : choice.kernel->blocks_per_multiprocessor;
  choice.plan = make_plan(side, p.images * p.height * p.width, gpu.multiprocessors * (resident > 0 ? resident : 1),
                          choice.kernel->work_on_diagonal);
  return choice;
}

}  // namespace

const char* second_moment_family(int major, int minor, bool sm90, DType dtype, Precision precision) {
  const MomentFamily family = by_rule(major, minor, sm90, dtype, precision);
  return family == MomentFamily::sm90 ? "sm90" : family == MomentFamily::sm80 ? "sm80" : "simt";
}

Status second_moment_workspace(const SecondMomentParams& params, Precision precision, MomentFamily family, int device,
                               std::size_t* bytes) {
  *bytes = 0;
  const DeviceGuard guard(device);  // what kernels a build has is asked of the current device
  if (guard.error() != cudaSuccess) return cuda_status(guard.error(), "choosing the device", device);
  Gpu gpu;
  const Status status = look_up(device, family, &gpu);
  if (!status.ok()) return status;
  return for_parts(params, [&](const SecondMomentParams& p) -> Status {
    const Choice choice = choose(p, precision, family, gpu);
    const std::size_t needed = choice.sums() * sizeof(Pair) + (choice.kernel->scaled ? p.d * sizeof(std::uint32_t) : 0);
    if (needed > *bytes) *bytes = needed;
    return {};
  });
}

Status second_moment_cuda(const SecondMomentParams& params, Precision precision, MomentFamily family,
                          const MomentView& moment, void* workspace, int device, std::uintptr_t stream_handle,
                          bool wait) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda_status(guard.error(), "choosing the device", device);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  Gpu gpu;
  Status status = look_up(device, family, &gpu);
  if (!status.ok()) return status;
  status = for_parts(params, [&](const SecondMomentParams& p) -> Status {
    const Choice choice = choose(p, precision, family, gpu);
    Pair* const pairs = static_cast<Pair*>(workspace);
    const MomentLaunch launch{
        make_source(p),
        choice.access,
        p.dtype,
        choice.plan,
        choice.clusters,
        pairs,
        moment,
        stream,
        choice.kernel->scaled ? reinterpret_cast<std::uint32_t*>(pairs + choice.sums()) : nullptr};
    cudaError_t error = choice.kernel->partial(launch);
    if (error == cudaSuccess) error = choice.kernel->reduce(launch);
    return cuda_status(error, "second moment", device);
  });
  return wait ? waited_for(status, stream, "second moment", device) : status;
}

}  // namespace pyrewrite
