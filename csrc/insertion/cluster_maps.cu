// What the cluster kernel finds when it starts: the layout, and the maps as its blocks keep them in shared memory, a
// position being a row of halves, hi + lo.
#include "insertion/cluster_layout.h"
#include "insertion/mma.h"

namespace pyrewrite {
namespace {

using T = ClusterTraits;

struct Packer {
  const InsertionProblem& p;
  const InsertionArrays& edit;
  const Share& share;
  float* largest_of_warp;  // kWarps

  __device__ float map_value(const Segment& s, int d, int position) const {
    const int w = p.widths[s.target], width = map_width(p, s.target);
    const int i = s.row + position / width, j = position % width;
    // Map pixel (i, j) is the key of tap (ty, tx) at pixel (i - ty, j - tx), for any tap that lands inside.
    const int ty = max(0, i - (p.heights[s.target] - 1)), tx = max(0, j - (w - 1));
    const int key = key_of(p, (ty * p.kernel_width + tx) * padded_rank(p.rank) + d);
    return edit.keys[std::int64_t(key) * p.pixels + p.starts[s.target] + (i - ty) * w + j - tx];
  }

  // The largest |x| of the block, in all threads.
  __device__ float largest(float x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < T::kWarps; ++w) x = fmaxf(x, largest_of_warp[w]);
    return x;
  }

  // The scale of dloss / dz in a segment whose heaviest pixel weighs this much, over the channels. Where the others
  // that count weigh the same, dloss / dz is one of two numbers and their opposites, and all are whole on one scale.
  __device__ void scale_by(int n, float heaviest, bool even, float whole_slope, Scales* scales) const {
    const float whole = whole_slope / (heaviest * p.up);
    scales->whole[n] = even && whole_slope > 0.f && whole < 0x1p100f;
    scales->by[n] = scales->whole[n] ? whole : half_scale(heaviest * fmaxf(p.up, p.down));
  }

  // to: the maps.
  __device__ void run(const ClusterLayout& at, Scales* scales, char* to) const {
    const int rank = padded_rank(p.rank);
    float most = 0.f;
    for (int n = 0; n < share.count; ++n) {
      const Segment& s = share.segments[n];
      const int positions = s.rows * map_width(p, s.target);
      for (int i = threadIdx.x; i < p.rank * positions; i += T::kThreads)
        most = fmaxf(most, fabsf(map_value(s, i / positions, i % positions)));
      const float* weights = edit.weight + p.starts[s.target];
      float heaviest = 0.f;
      for (int u = s.begin + threadIdx.x; u < s.end; u += T::kThreads) heaviest = fmaxf(heaviest, weights[u]);
      heaviest = largest(heaviest);
      bool even = true;
      for (int u = s.begin + threadIdx.x; u < s.end; u += T::kThreads)
        even = even && (weights[u] == heaviest || weights[u] == 0.f);
      even = __syncthreads_and(even);
      if (threadIdx.x == 0) scale_by(n, heaviest / p.channels, even, at.slope, scales);
    }
    const float map_scale = half_scale(largest(most));
    if (threadIdx.x == 0) scales->map = map_scale;
    for (int n = 0; n < share.count; ++n) {
      const Segment& s = share.segments[n];
      const int width = map_width(p, s.target), positions = s.rows * width, row_bytes = map_row(p, s.target);
      for (int i = threadIdx.x; i < rank * positions; i += T::kThreads) {
        const int d = i / positions, position = i % positions;
        const Split value = split(d < p.rank ? map_value(s, d, position) * map_scale : 0.f);
        __half* row = reinterpret_cast<__half*>(to + s.map + std::int64_t(position / width) * row_bytes +
                                                position % width * at.position);
        row[d] = value.hi;
        row[rank + d] = value.lo;
      }
    }
  }
};

__global__ void __launch_bounds__(T::kThreads)
    cluster_maps_kernel(const __grid_constant__ InsertionProblem p, const __grid_constant__ ClusterLayout at) {
  __shared__ Share share;
  __shared__ float largest_of_warp[T::kWarps];
  const int block = blockIdx.x;
  const InsertionArrays& edit = p.edits[blockIdx.y];
  if (threadIdx.x == 0) share_of(p, block, at.room, share);
  __syncthreads();
  const Packer packer = {p, edit, share, largest_of_warp};
  packer.run(at, reinterpret_cast<Scales*>(edit.scratch) + block,
             reinterpret_cast<char*>(edit.scratch + scratch_map(at, block)));
}

// The largest part of a block: what common_layout makes room for.
struct Extent {
  int segments = 0, pixels = 0;
  std::int64_t maps = 0;
  int piece = 1 << 30;  // of the block with the smallest
};

bool measure(const InsertionProblem& p, int room, Extent* most) {
  *most = {};
  for (int block = 0; block < T::kBlocks; ++block) {
    Share share;
    share_of(p, block, room, share);
    if (share.count < 0) return false;
    most->segments = share.count > most->segments ? share.count : most->segments;
    most->maps = share.map_bytes > most->maps ? share.map_bytes : most->maps;
    most->pixels = share.pixels > most->pixels ? share.pixels : most->pixels;
    for (int n = 0; n < share.count; ++n) {
      const Segment& s = share.segments[n];
      if (s.piece < groups_of(s.end - s.begin) && s.piece < most->piece) most->piece = s.piece;
    }
  }
  return true;
}

std::int64_t room_in(const InsertionDevice& device) {
  return device.shared_bytes - static_cast<std::int64_t>(sizeof(Share) + sizeof(Scales) +
                                                         sizeof(float) * T::kMostSegments + 128);  // declared there
}

}  // namespace

ClusterLayout common_layout(const InsertionProblem& p, int channels, std::int64_t shared_bytes, int* piece) {
  Extent most;
  if (!measure(p, 0, &most)) return {};
  *piece = most.piece;
  ClusterLayout at = cluster_layout(p, channels, most.maps, most.segments, most.pixels);
  if (at.size > shared_bytes) {
    const std::int64_t left = shared_bytes - cluster_layout(p, channels, 0, most.segments, most.pixels).size;
    const int room = left > 0 ? static_cast<int>(left / 16 * 16) : 0;
    if (room == 0 || !measure(p, room, &most)) return {};
    at = cluster_layout(p, channels, room, most.segments, most.pixels);
    at.room = room;
    *piece = most.piece;
  }
  at.packed = most.maps;
  float other;
  if (!whole_slopes(p, &at.slope, &other)) at.slope = 0.f;
  return at;
}

// A GPU with clusters and room for one, a rank up to 64, and a map of at least one group of pixels that fits a block's
// shared memory. As many channels a cluster as leave each warp a group of every piece; else as few as there are.
InsertionPlan plan_cluster(const InsertionProblem& p, const InsertionDevice& device) {
  InsertionPlan plan{};
  if (!device.clusters || p.rank > T::kMostRank) return plan;
  for (const int channels : T::kChannels) {
    int piece = 0;
    const ClusterLayout at = common_layout(p, channels, room_in(device), &piece);
    if (at.size == 0 || !cluster_has_room(channels, static_cast<int>(at.size))) continue;
    plan.blocks = plan.loss_rows = (p.channels + channels - 1) / channels * T::kBlocks;
    plan.channels_per_block = channels;
    plan.shared_bytes = static_cast<int>(at.size);
    plan.scratch_floats = scratch_cross(at, p, plan.blocks);
    if (piece >= T::kWarps) break;
  }
  return plan;
}

cudaError_t launch_cluster_maps(const InsertionProblem& p, const ClusterLayout& at, int edits, cudaStream_t stream) {
  cluster_maps_kernel<<<dim3(T::kBlocks, edits), T::kThreads, 0, stream>>>(p, at);
  return cudaGetLastError();
}

}  // namespace pyrewrite
