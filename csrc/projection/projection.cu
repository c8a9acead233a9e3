// The host side: which kernel takes an item, and as many items a launch as fit its parameters.
#include <vector>

#include "common/device.h"
#include "projection/contiguous.cuh"
#include "projection/launch.h"
#include "projection/strided.cuh"

namespace pyrewrite {
namespace {

bool empty(const ProjectionItem& p) { return p.out <= 0 || p.in <= 0 || p.height <= 0 || p.width <= 0; }

// Whether every row lies without gaps and can be read 128 bits at a time.
bool rows_of_vectors(const WeightView& v, const ProjectionItem& p) {
  const std::int64_t taps = static_cast<std::int64_t>(p.height) * p.width;
  return (p.width == 1 || v.width_stride == 1) && (p.height == 1 || v.height_stride == p.width) &&
         (p.in == 1 || v.in_stride == taps) && (p.out == 1 || v.out_stride % 4 == 0) &&
         reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
}

bool direction_of_vectors(const ProjectionItem& p) {
  return p.direction_in_stride == 1 && p.direction_rank_stride % 4 == 0 &&
         reinterpret_cast<std::uintptr_t>(p.direction) % 16 == 0;
}

bool is_contiguous(const ProjectionItem& p, const AdamSettings& settings) {
  const int taps = p.height * p.width;
  if ((taps != 1 && taps != 9) || p.in % 4 != 0 || p.in > contiguous::kMostChannels) return false;
  if (!rows_of_vectors(p.weight, p)) return false;
  if (settings.project && (p.rank > contiguous::kMostRank || !rows_of_vectors(p.base, p) || !direction_of_vectors(p)))
    return false;
  return !settings.enabled ||
         (rows_of_vectors(p.grad, p) && rows_of_vectors(p.exp_avg, p) && rows_of_vectors(p.exp_avg_sq, p));
}

// The largest tile of input channels that fits; the padding of a pitch is at most 35 floats a tap.
int strided_tile(const ProjectionItem& p) {
  const int taps = p.height * p.width;
  const int tile = ((strided::kPlainSharedFloats - p.rank * taps) / taps - 4) / 32 * 32;
  return tile > p.in ? p.in : tile < strided::kLeastTile ? strided::kLeastTile : tile;
}

// Adds an item to the launch and returns the floats of shared memory it needs.
int add(ProjectionLaunch& launch, const ProjectionItem& p, bool contiguous_rows, bool project) {
  const int n = launch.count++, taps = p.height * p.width;
  launch.items[n] = p;
  launch.first_block[n + 1] = launch.first_block[n] + p.out;
  if (contiguous_rows) return project ? contiguous::shared_floats(p.in, taps, p.rank) : 0;
  launch.tile[n] = strided_tile(p);
  return p.rank * taps + taps * strided::pitch_of(launch.tile[n]);
}

using Kernel = void (*)(ProjectionLaunch);

Kernel kernel_of(bool contiguous_rows, const AdamSettings& settings) {
  if (!contiguous_rows) return strided::project_kernel;
  if (!settings.enabled) return contiguous::project_kernel<false, true>;
  return settings.project ? contiguous::project_kernel<true, true> : contiguous::project_kernel<true, false>;
}

}  // namespace

Status project_cuda(const ProjectionItem* items, int count, const AdamSettings& settings, int device,
                    std::uintptr_t stream_handle, bool wait) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda_status(guard.error(), "choosing the device", device);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  int most = 0;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return cuda_status(error, "asking for the shared memory", device);

  // Everything is checked before the first launch, so that a refusal leaves all weights as they were.
  std::vector<const ProjectionItem*> kinds[2];  // strided, contiguous
  for (int n = 0; n < count; ++n) {
    const ProjectionItem& p = items[n];
    if (empty(p)) continue;
    kinds[is_contiguous(p, settings)].push_back(&p);
    const std::int64_t taps = static_cast<std::int64_t>(p.height) * p.width;
    if ((p.rank * taps + taps * strided::pitch_of(strided::kLeastTile)) * 4 > most)
      return Status::error(
          Status::kUnsupported,
          "projection: rank %d with a %d x %d kernel needs more shared memory than the %d bytes of GPU "
          "%d; impl='torch' takes it",
          p.rank, p.height, p.width, most, device);
  }
  const auto launch_all = [&]() -> Status {
    for (const bool contiguous_rows : {true, false}) {
      const Kernel kernel = kernel_of(contiguous_rows, settings);
      const std::vector<const ProjectionItem*>& chosen = kinds[contiguous_rows];
      for (std::size_t next = 0; next < chosen.size();) {
        ProjectionLaunch launch{};
        launch.adam = settings;
        int shared_floats = 0, threads = contiguous_rows ? 32 : strided::kThreads;
        for (; next < chosen.size() && launch.count < kItemsPerLaunch; ++next) {
          const ProjectionItem& p = *chosen[next];
          const int floats = add(launch, p, contiguous_rows, settings.project != 0);
          if (floats > shared_floats) shared_floats = floats;
          if (contiguous_rows && p.in / 4 > threads) threads = (p.in / 4 + 31) / 32 * 32;
        }
        if (shared_floats > strided::kPlainSharedFloats) {
          error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
          if (error != cudaSuccess) return cuda_status(error, "asking for more shared memory", device);
        }
        kernel<<<launch.first_block[launch.count], threads, shared_floats * 4, stream>>>(launch);
        error = cudaGetLastError();
        if (error != cudaSuccess) return cuda_status(error, "projection", device);
      }
    }
    return {};
  };
  const Status status = launch_all();
  return wait ? waited_for(status, stream, "projection", device) : status;
}

}  // namespace pyrewrite
