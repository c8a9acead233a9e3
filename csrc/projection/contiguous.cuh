// Rows without gaps, 3 x 3 or 1 x 1 kernels: every element is read and written once, 128 bits at a time.
//
// A block is one output channel, a row of I x taps. Thread t has two views of it: the vectors t, t + n, t + 2 n, ... of
// n = I / 4, one for each tap, so that neighbours touch neighbouring memory; and the patch of input channels 4 t .. 4 t
// + 3 with all their taps, in which channel and tap of every element are known when this is compiled. Shared memory
// turns one into the other, without bank conflicts as long as the taps are odd in number. The base stays in registers
// from the difference to the sum. The directions come through the first-level cache, which the weights pass by: the
// blocks of a multiprocessor share them there.
#pragma once

#include <type_traits>

#include "projection/launch.h"

namespace pyrewrite {
namespace contiguous {

constexpr int kMostThreads = 256;
constexpr int kMostChannels = 4 * kMostThreads;
constexpr int kMostRank = 128;
constexpr int kGroup = 3;  // directions whose sums a thread keeps at a time
constexpr int kFew = 2;    // directions that a thread keeps from the products to the sums

__host__ __device__ constexpr int pitch_of(int taps) { return (taps + 3) / 4 * 4; }  // of a direction's sums

// In how many parts the warps share the dot products with a group of directions.
__host__ __device__ inline int parts_of(int in, int rank) {
  const int warps = (in / 4 + 31) / 32, groups = (rank + kGroup - 1) / kGroup;
  return groups == 0 || groups > warps ? 1 : warps / groups;
}

// in x taps for the change, parts x rank x pitch for its products.
__host__ __device__ inline int shared_floats(int in, int taps, int rank) {
  return in * taps + parts_of(in, rank) * rank * pitch_of(taps);
}

__device__ inline float4 load_once(const float* at) { return __ldcg(reinterpret_cast<const float4*>(at)); }
__device__ inline void store(float* at, float4 value) { *reinterpret_cast<float4*>(at) = value; }

// Input channels 4 t .. 4 t + 3 of direction r.
__device__ inline float4 direction_of(const ProjectionItem& p, int r, int t) {
  return __ldg(reinterpret_cast<const float4*>(p.direction + r * p.direction_rank_stride) + t);
}

// One exchange of reduce_scatter: the upper lane of a pair goes on with the upper half of the values. `left` counts
// those that this lane still has a part in; where it is less than kLength, the others are zero.
template <int kCount, int kLength, int kBit>
__device__ inline void exchange(float (&values)[kCount], int& index, int& left) {
  constexpr int kHalf = (kLength + 1) / 2;
  const bool upper = (threadIdx.x & kBit) != 0;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float low = values[j], high = j + kHalf < kLength ? values[j + kHalf] : 0.f;
    values[j] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kBit);
  }
  index += upper ? kHalf : 0;
  left = upper ? left - kHalf : min(left, kHalf);
  if constexpr (kBit > 1) exchange<kCount, kHalf, kBit / 2>(values, index, left);
}

// Sums each value over the lanes of a warp: about one shuffle a value instead of five. Every lane ends with one of the
// sums, in values[0]; returns its index, or kCount in a lane left over.
template <int kCount>
__device__ inline int reduce_scatter(float (&values)[kCount]) {
  int index = 0, left = kCount;
  exchange<kCount, kCount, 16>(values, index, left);
  return left > 0 ? index : kCount;
}

template <int kTaps>
__device__ inline float component(const float4 (&v)[kTaps], int e) {
  const float4& q = v[e / 4];
  return e % 4 == 0 ? q.x : e % 4 == 1 ? q.y : e % 4 == 2 ? q.z : q.w;
}

// values[r][k] += the products of kCount directions with a patch of the change
template <int kTaps, int kCount, int kWidth>
__device__ inline void add_dots(const float4 (&direction)[kWidth], const float* row, int patch,
                                float (&values)[kCount * kTaps]) {
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    const float4 change[1] = {reinterpret_cast<const float4*>(row)[kTaps * patch + j]};
#pragma unroll
    for (int e = 4 * j; e < 4 * j + 4; ++e)
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        float& value = values[r * kTaps + e % kTaps];
        value = fmaf(component<kWidth>(direction, 4 * r + e / kTaps), component<1>(change, e % 4), value);
      }
  }
}

// kCount x kTaps values of every lane, summed over the warp, to kCount x pitch.
template <int kTaps, int kCount>
__device__ inline void sum_over_warp(float (&values)[kCount * kTaps], float* sums) {
  const int index = reduce_scatter(values);
  if (index < kCount * kTaps) sums[index / kTaps * pitch_of(kTaps) + index % kTaps] = values[0];
}

// The products of kCount directions from r0 on with the patches first, first + step, ..., one of them for each lane.
template <int kTaps, int kCount>
__device__ inline void dots(const ProjectionItem& p, const float* row, int r0, int first, int step, float* sums) {
  float values[kCount * kTaps] = {};
#pragma unroll 1
  for (int patch = first + threadIdx.x % 32; patch < p.in / 4; patch += step) {
    float4 direction[kCount];
#pragma unroll
    for (int r = 0; r < kCount; ++r) direction[r] = direction_of(p, r0 + r, patch);
    add_dots<kTaps, kCount>(direction, row, patch, values);
  }
  sum_over_warp<kTaps, kCount>(values, sums);
}

// The products of all kCount directions with this thread's patch, a part a warp.
template <int kTaps, int kCount>
__device__ inline void own_dots(const ProjectionItem& p, const float4 (&direction)[kFew], const float* row,
                                float* sums) {
  float values[kCount * kTaps] = {};
  if (threadIdx.x < p.in / 4) add_dots<kTaps, kCount>(direction, row, threadIdx.x, values);
  sum_over_warp<kTaps, kCount>(values, sums + threadIdx.x / 32 * kCount * pitch_of(kTaps));
}

// Calls body with min(count, kGroup) as a constant.
template <class Body>
__device__ inline void with_count(int count, const Body& body) {
  switch (count) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    default:
      return body(std::integral_constant<int, kGroup>{});
  }
}

// patch += a direction times its sums
template <int kTaps>
__device__ inline void add_direction(float4 direction, const float* sums, float (&patch)[4 * kTaps]) {
  constexpr int kVectors = pitch_of(kTaps) / 4;
  float4 s[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) s[k] = reinterpret_cast<const float4*>(sums)[k];
  const float d[4] = {direction.x, direction.y, direction.z, direction.w};
#pragma unroll
  for (int e = 0; e < 4 * kTaps; ++e) patch[e] = fmaf(component<kVectors>(s, e % kTaps), d[e / kTaps], patch[e]);
}

// Adds the parts up, into the first.
template <int kTaps>
__device__ inline void add_parts(float* sums, int parts, int rank) {
  if (parts == 1) return;
  const int size = rank * pitch_of(kTaps);
  for (int at = threadIdx.x; at < size; at += blockDim.x)
    for (int part = 1; part < parts; ++part) sums[at] += sums[part * size + at];
  __syncthreads();
}

// The projected change of a thread's patch. With at most kFew directions its part in the dot products is the same
// patch, and it reads their elements once. The warps beyond the channels only keep the barriers.
template <int kTaps>
__device__ void project_patch(const ProjectionItem& p, const float* row, float* sums, float (&patch)[4 * kTaps]) {
  constexpr int kPitch = pitch_of(kTaps);
  const int n = p.in / 4, t = threadIdx.x, warp = t / 32, warps = (n + 31) / 32, parts = parts_of(p.in, p.rank);
  if (p.rank <= kFew) {
    float4 direction[kFew] = {};
    if (t < n) {
#pragma unroll
      for (int r = 0; r < kFew; ++r)
        if (r < p.rank) direction[r] = direction_of(p, r, t);
    }
    __syncthreads();  // the change is in `row`
    if (warp < warps && p.rank == 1) own_dots<kTaps, 1>(p, direction, row, sums);
    if (warp < warps && p.rank == 2) own_dots<kTaps, 2>(p, direction, row, sums);
    __syncthreads();
    add_parts<kTaps>(sums, parts, p.rank);
#pragma unroll
    for (int r = 0; r < kFew; ++r)
      if (r < p.rank) add_direction<kTaps>(direction[r], sums + r * kPitch, patch);
    return;
  }
  __syncthreads();
  const int units = (p.rank + kGroup - 1) / kGroup * parts;
  for (int unit = warp < warps ? warp : units; unit < units; unit += warps) {
    const int r0 = unit / parts * kGroup, part = unit % parts;
    with_count(p.rank - r0, [&](auto count) {
      dots<kTaps, decltype(count)::value>(p, row, r0, 32 * part, 32 * parts, sums + (part * p.rank + r0) * kPitch);
    });
  }
  __syncthreads();
  add_parts<kTaps>(sums, parts, p.rank);
  if (t < n)
#pragma unroll 1
    for (int r = 0; r < p.rank; ++r) add_direction<kTaps>(direction_of(p, r, t), sums + r * kPitch, patch);
}

// `row` holds the change, in x taps; behind it is room for its products.
template <int kTaps>
__device__ void project_row(const ProjectionItem& p, float4 (&base)[kTaps], int channel, float* row) {
  const int n = p.in / 4, t = threadIdx.x;
  float* sums = row + p.in * kTaps;  // parts x rank x pitch
  for (int at = t; at < parts_of(p.in, p.rank) * p.rank * pitch_of(kTaps); at += blockDim.x)
    sums[at] = 0.f;  // the padding is read
  float patch[4 * kTaps] = {};
  project_patch<kTaps>(p, row, sums, patch);
  if (t < n) {
#pragma unroll
    for (int j = 0; j < kTaps; ++j)
      store(row + 4 * (kTaps * t + j), {patch[4 * j], patch[4 * j + 1], patch[4 * j + 2], patch[4 * j + 3]});
  }
  __syncthreads();
  if (t >= n) return;
  float* weight = p.weight.data + channel * p.weight.out_stride;
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    const float4 b = base[j], change = reinterpret_cast<const float4*>(row)[t + j * n];
    store(weight + 4 * (t + j * n), {b.x + change.x, b.y + change.y, b.z + change.z, b.w + change.w});
  }
}

template <int kTaps, bool kAdam, bool kProject>
__device__ void update_row(const ProjectionItem& p, const AdamSettings& adam, int channel, float* shared) {
  const int n = p.in / 4, t = threadIdx.x;
  float* weight = p.weight.data + channel * p.weight.out_stride;
  float4 base[kTaps];
  if (t < n) {
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const int at = 4 * (t + j * n);
      float4 w = load_once(weight + at);
      if (kProject) base[j] = load_once(p.base.data + channel * p.base.out_stride + at);
      if (kAdam) {
        float* exp_avg = p.exp_avg.data + channel * p.exp_avg.out_stride + at;
        float* exp_avg_sq = p.exp_avg_sq.data + channel * p.exp_avg_sq.out_stride + at;
        const float4 g = load_once(p.grad.data + channel * p.grad.out_stride + at);
        float4 m = load_once(exp_avg), v = load_once(exp_avg_sq);
        w.x = adam_element(w.x, g.x, m.x, v.x, adam);
        w.y = adam_element(w.y, g.y, m.y, v.y, adam);
        w.z = adam_element(w.z, g.z, m.z, v.z, adam);
        w.w = adam_element(w.w, g.w, m.w, v.w, adam);
        store(exp_avg, m);
        store(exp_avg_sq, v);
      }
      if (kProject)
        store(shared + at, {w.x - base[j].x, w.y - base[j].y, w.z - base[j].z, w.w - base[j].w});
      else
        store(weight + at, w);
    }
  }
  if (kProject) project_row<kTaps>(p, base, channel, shared);
}

// Two blocks of kMostThreads on a multiprocessor, or four of 512 channels.
template <bool kAdam, bool kProject>
__global__ void __launch_bounds__(kMostThreads, 2) project_kernel(const __grid_constant__ ProjectionLaunch launch) {
  extern __shared__ __align__(16) float row[];
  const int n = item_of_block(launch);
  const ProjectionItem& p = launch.items[n];
  const int channel = static_cast<int>(blockIdx.x) - launch.first_block[n];
  if (p.height * p.width == 1)
    update_row<1, kAdam, kProject>(p, launch.adam, channel, row);
  else
    update_row<9, kAdam, kProject>(p, launch.adam, channel, row);
}

}  // namespace contiguous
}  // namespace pyrewrite
