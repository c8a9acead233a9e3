// Chooses the kernel for a device and an input, by rules that depend on nothing that changes from call to call.
#include "common/device.h"
#include "second_moment/launch.h"

namespace pyrewrite {
namespace {

struct Choice {
  const MomentKernel* kernel = nullptr;
  Access access = Access::elements;
  Plan plan{};
};

struct Gpu {
  int major = 0, minor = 0, multiprocessors = 0;
};

Status look_up(int device, Gpu* gpu) {
  cudaError_t error = cudaDeviceGetAttribute(&gpu->major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&gpu->minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return cuda_status(error, "asking for the properties", device);
}

// p: joined, and small enough for one launch.
Choice choose(const SecondMomentParams& p, Precision, const Gpu& gpu) {
  Choice choice;
  choice.kernel = &simt_kernel(tile_for(p.d));
  choice.access = access_of(p, 4, p.dtype == DType::float32 ? 16 : 8);
  const int side = (p.d + choice.kernel->tile - 1) / choice.kernel->tile;
  choice.plan = make_plan(triangle_tiles(side), p.images * p.height * p.width,
                          gpu.multiprocessors * choice.kernel->blocks_per_multiprocessor);
  return choice;
}

// Calls body(part) with parts of p of at most kMostRows rows, joined, until one fails.
template <typename Body>
Status for_parts(SecondMomentParams p, Body&& body) {
  p = joined(p);
  const std::int64_t rows = p.images * p.height * p.width;
  if (rows <= 0 || p.d <= 0) return {};
  if (rows <= kMostRows) return body(p);
  std::int64_t& extent = p.images > 1 ? p.images : p.height > 1 ? p.height : p.width;
  const std::int64_t stride = p.images > 1 ? p.image_stride : p.height > 1 ? p.row_stride : p.column_stride;
  const std::int64_t whole = extent, half = whole / 2;
  extent = half;
  const Status status = for_parts(p, body);
  if (!status.ok()) return status;
  extent = whole - half;
  const std::int64_t size = p.dtype == DType::float32 ? 4 : 2;
  p.x = static_cast<const char*>(p.x) + half * stride * size;
  return for_parts(p, body);
}

}  // namespace

Status second_moment_workspace(const SecondMomentParams& params, Precision precision, int device, std::size_t* bytes) {
  *bytes = 0;
  Gpu gpu;
  const Status status = look_up(device, &gpu);
  if (!status.ok()) return status;
  return for_parts(params, [&](const SecondMomentParams& p) -> Status {
    const Choice choice = choose(p, precision, gpu);
    const std::size_t tile = choice.kernel->tile;
    const std::size_t needed = choice.plan.blocks() * tile * tile * sizeof(Pair);
    if (needed > *bytes) *bytes = needed;
    return {};
  });
}

Status second_moment_cuda(const SecondMomentParams& params, Precision precision, const MomentView& moment,
                          void* workspace, int device, std::uintptr_t stream_handle, bool wait) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda_status(guard.error(), "choosing the device", device);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  Gpu gpu;
  Status status = look_up(device, &gpu);
  if (!status.ok()) return status;
  status = for_parts(params, [&](const SecondMomentParams& p) -> Status {
    const Choice choice = choose(p, precision, gpu);
    const MomentLaunch launch{make_source(p), choice.access, p.dtype, choice.plan, static_cast<Pair*>(workspace),
                              moment,         stream};
    cudaError_t error = choice.kernel->partial(launch);
    if (error == cudaSuccess) error = choice.kernel->reduce(launch);
    return cuda_status(error, "second moment", device);
  });
  if (!status.ok() || !wait) return status;
  return cuda_status(cudaStreamSynchronize(stream), "second moment", device);
}

}  // namespace pyrewrite
