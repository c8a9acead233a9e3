// The cluster kernel's block: where its numbers lie, and how they get there before the first step.
#pragma once

#include <cuda_pipeline.h>

#include "insertion/cluster_layout.h"
#include "insertion/mma.h"

namespace pyrewrite {
namespace {

using T = ClusterTraits;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Rows: tiles of 16 channels.
template <int Rows>
struct ClusterBlock {
  static constexpr int kChannels = 16 * Rows;            // of a cluster
  static constexpr int kOwned = kChannels / T::kBlocks;  // channels whose Adam a block does
  static constexpr int kHeld = 2 * Rows;                 // rows of a product that a lane holds
  static_assert(T::kThreads / kOwned % 32 == 0, "whole warps for each owned channel");

  // A tile of pixels in scratch: base and goal of the rows' tiles, lane by lane, noise and weights.
  struct Tile {
    float4 base[Rows][32], goal[Rows][32];
    float2 noise[4], weight[4];
  };

  const InsertionProblem& p;
  const InsertionArrays& edit;
  const ClusterLayout& at;
  const Share& share;
  const Scales& scales;
  char* shared;
  unsigned address;         // of `shared`
  float* cross;             // this block's segments x channels x keys
  Tile* tiles;              // this block's pixels
  const float* gram_scale;  // of each segment
  int first;                // channel of the cluster
  int block;                // of the cluster
  int rank;                 // padded
  int warp, lane;

  __device__ float* floats(std::int64_t offset) const { return reinterpret_cast<float*>(shared + offset); }
  __device__ float& sum(int which, int of_warp, int c) const {
    return floats(at.sums)[(which * T::kWarps + of_warp) * kChannels + c];
  }
  // Channel of row `row` (0 ... kHeld - 1) that this lane holds of a product: tiles of 16, halves of 8.
  __device__ int channel_of(int row) const { return row / 2 * 16 + row % 2 * 8 + lane / 4; }
  // Of a window's tap in the segment's map, in bytes.
  __device__ int tap_offset(const Segment& s, int tap) const {
    return tap / p.kernel_width * map_row(p, s.target) + tap % p.kernel_width * at.position;
  }
  // The largest |x| of the block, in all threads.
  __device__ float largest(float x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    __syncthreads();
    if (lane == 0) sum(0, warp, 0) = x;
    __syncthreads();
    for (int w = 0; w < T::kWarps; ++w) x = fmaxf(x, sum(0, w, 0));
    return x;
  }

  // -- before the first step ------------------------------------------------------------------------------------------

  __device__ void put(std::int64_t row, int d, float scaled) const {
    const Split value = split(scaled);
    __half* to = reinterpret_cast<__half*>(shared + row);
    to[d] = value.hi;
    to[rank + d] = value.lo;
  }

  // First row of the map that the piece of segment s from group `group` on reads.
  __device__ int first_row(const Segment& s, int group) const {
    return (s.begin + group * T::kGroup) / p.widths[s.target];
  }

  // Where each pixel's window begins in shared memory, in bytes.
  __device__ void load_places() const {
    for (int n = 0; n < share.count; ++n) {
      const Segment& s = share.segments[n];
      const int w = p.widths[s.target], start = at.room > 0 ? 0 : static_cast<int>(s.map);
      for (int i = threadIdx.x; i < groups_of(s.end - s.begin) * T::kGroup; i += T::kThreads) {
        const int u = min(s.begin + i, s.end - 1);  // past the end: read anything, count nothing
        const int row = first_row(s, i / T::kGroup / s.piece * s.piece);
        reinterpret_cast<int*>(shared + at.places)[s.pixel + i] =
            start + (u / w - row) * map_row(p, s.target) + u % w * at.position;
      }
    }
  }

  // Starts to copy `bytes` of this block's maps in scratch to shared memory.
  __device__ void copy_maps(std::int64_t from, std::int64_t to, int bytes) const {
    const char* maps = reinterpret_cast<const char*>(edit.scratch + scratch_map(at, block)) + from;
    for (int i = threadIdx.x * 16; i < bytes; i += T::kThreads * 16)
      __pipeline_memcpy_async(shared + at.map + to + i, maps + i, 16);
    __pipeline_commit();
  }

  // The map of the piece of segment n from group `group` on.
  __device__ void copy_piece(int n, int group) const {
    const Segment& s = share.segments[n];
    const int end = min(s.begin + (group + s.piece) * T::kGroup, s.end), row_bytes = map_row(p, s.target);
    const int row = first_row(s, group), rows = (end - 1) / p.widths[s.target] - row + p.kernel_height;
    copy_maps(s.map + std::int64_t(row - s.row) * row_bytes, 0, rows * row_bytes);
  }

  // All maps, where they stay; else the first piece.
  __device__ void start_maps() const {
    if (at.room == 0)
      copy_maps(0, 0, static_cast<int>(share.map_bytes));
    else if (share.count > 0)
      copy_piece(0, 0);
  }

  // base, goal, noise and weights of this block's pixels, as the lanes of a warp will read them; zeros past the last
  // channel and past a segment's end.
  __device__ void load_tiles() const {
    for (int n = 0; n < share.count; ++n) {
      const Segment& s = share.segments[n];
      Tile* to = tiles + s.pixel / T::kTile;
      const int padded = groups_of(s.end - s.begin) * T::kGroup;
      const std::int64_t start = p.starts[s.target] + s.begin;
      for (int i = threadIdx.x; i < kChannels * padded; i += T::kThreads) {
        const int c = i / padded, u = i % padded, m = c / 16, of_lane = c % 8 * 4 + u % 8 / 2;
        const int value = c / 8 % 2 * 2 + u % 2;
        const bool there = s.begin + u < s.end && first + c < p.channels;
        const std::int64_t from = std::int64_t(first + c) * p.pixels + start + u;
        Tile& tile = to[u / T::kTile];
        reinterpret_cast<float*>(&tile.base[m][of_lane])[value] = there ? edit.base[from] : 0.f;
        reinterpret_cast<float*>(&tile.goal[m][of_lane])[value] = there ? edit.goal[from] : 0.f;
      }
      for (int u = threadIdx.x; u < padded; u += T::kThreads) {
        const bool there = s.begin + u < s.end;
        Tile& tile = to[u / T::kTile];
        reinterpret_cast<float*>(tile.noise)[u % T::kTile] = there ? edit.noise[start + u] : 0.f;
        reinterpret_cast<float*>(tile.weight)[u % T::kTile] = there ? edit.weight[start + u] / p.channels : 0.f;
      }
    }
  }

  __device__ void load_demodulation(float* gram_scales) const {
    if (!p.demodulate) return;
    const int k = p.rank * p.taps;
    for (int n = 0; n < share.count; ++n) {
      const int b = share.segments[n].target;
      const float* gram = edit.gram + std::int64_t(b) * p.rank * p.rank;
      float most = 0.f;
      for (int i = threadIdx.x; i < p.rank * p.rank; i += T::kThreads) most = fmaxf(most, fabsf(gram[i]));
      const float scale = half_scale(largest(most));
      if (threadIdx.x == 0) gram_scales[n] = scale;
      for (int i = threadIdx.x; i < rank * rank; i += T::kThreads) {
        const int e = i / rank, d = i % rank;
        put(at.gram + std::int64_t(n * rank + e) * at.position, d,
            e < p.rank && d < p.rank ? gram[e * p.rank + d] * scale : 0.f);
      }
      for (int i = threadIdx.x; i < kChannels * at.keys; i += T::kThreads) {
        const int c = i / at.keys, key = key_of(p, i % at.keys);
        cross[std::int64_t(n) * kChannels * at.keys + i] =
            key >= 0 && first + c < p.channels ? edit.cross[(std::int64_t(b) * p.channels + first + c) * k + key] : 0.f;
      }
    }
  }

  // This block's own channels: Lambda (0), mean (1) or square (2) at padded key kk.
  __device__ float& own(int which, int c, int kk) const { return floats(at.own)[(which * kOwned + c) * at.keys + kk]; }

  // Calls f(place in the problem's state, channel, padded key) for the real entries of the own channels.
  template <class F>
  __device__ void for_state(F f) const {
    for (int i = threadIdx.x; i < kOwned * at.keys; i += T::kThreads) {
      const int c = i / at.keys, kk = i % at.keys, key = key_of(p, kk);
      const int channel = first + block * kOwned + c;
      if (key >= 0 && channel < p.channels) f(std::int64_t(channel) * p.rank * p.taps + key, c, kk);
    }
  }

  __device__ void load_state() const {
    for (int i = threadIdx.x; i < 3 * kOwned * at.keys; i += T::kThreads) floats(at.own)[i] = 0.f;
    if (threadIdx.x < kChannels) floats(at.demod)[threadIdx.x] = 1.f;
    __syncthreads();
    for_state([&](std::int64_t from, int c, int kk) {
      own(0, c, kk) = edit.lambda[from];
      own(1, c, kk) = edit.exp_avg[from];
      own(2, c, kk) = edit.exp_avg_sq[from];
    });
  }

  __device__ void store_state() const {
    for_state([&](std::int64_t to, int c, int kk) {
      edit.lambda[to] = own(0, c, kk);
      edit.exp_avg[to] = own(1, c, kk);
      edit.exp_avg_sq[to] = own(2, c, kk);
    });
  }
};

#endif

}  // namespace
}  // namespace pyrewrite
