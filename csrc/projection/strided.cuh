// Any strides, any size of kernel, any number of channels. The change W - W0 of a tile of input channels is staged in
// shared memory, tap by tap, and its products with the directions are summed there; then every element is written
// once. The base is read twice; the second time it comes from the second-level cache.
#pragma once

#include "projection/launch.h"

namespace pyrewrite {
namespace strided {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPlainSharedFloats = 48 * 1024 / 4;  // what a block may use without asking
constexpr int kLeastTile = 32;                     // input channels

// Taps of the tile lie `pitch` apart: 4 beyond a multiple of the 32 banks, so that the taps of neighbouring channels,
// which neighbouring threads write, meet in few of them.
__host__ __device__ constexpr int pitch_of(int tile) { return (tile + 31) / 32 * 32 + 4; }

__device__ std::int64_t offset(const WeightView& v, const ProjectionItem& p, int channel, int i, int k) {
  return channel * v.out_stride + i * v.in_stride + (k / p.width) * v.height_stride + (k % p.width) * v.width_stride;
}

__global__ void __launch_bounds__(kThreads) project_kernel(const __grid_constant__ ProjectionLaunch launch) {
  extern __shared__ float shared[];
  const int n = item_of_block(launch);
  const ProjectionItem& p = launch.items[n];
  const AdamSettings& adam = launch.adam;
  const int channel = static_cast<int>(blockIdx.x) - launch.first_block[n];
  const int taps = p.height * p.width, pairs = p.rank * taps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = shared;            // rank x taps
  float* change = shared + pairs;  // taps x pitch
  const int pitch = pitch_of(launch.tile[n]);

  for (int pair = threadIdx.x; pair < pairs; pair += kThreads) sums[pair] = 0.f;
  for (int i0 = 0; i0 < p.in; i0 += launch.tile[n]) {
    const int tile = min(launch.tile[n], p.in - i0);
    __syncthreads();  // the sums are zero, or the tile before is used up
    for (int j = threadIdx.x; j < tile * taps; j += kThreads) {
      const int i = j / taps, k = j % taps;
      float* at = p.weight.data + offset(p.weight, p, channel, i0 + i, k);
      float weight = *at;
      if (adam.enabled) {
        float* exp_avg = p.exp_avg.data + offset(p.exp_avg, p, channel, i0 + i, k);
        float* exp_avg_sq = p.exp_avg_sq.data + offset(p.exp_avg_sq, p, channel, i0 + i, k);
        const float grad = p.grad.data[offset(p.grad, p, channel, i0 + i, k)];
        float m = *exp_avg, v = *exp_avg_sq;
        weight = adam_element(weight, grad, m, v, adam);
        *exp_avg = m;
        *exp_avg_sq = v;
      }
      if (adam.project)
        change[k * pitch + i] = weight - p.base.data[offset(p.base, p, channel, i0 + i, k)];
      else
        *at = weight;
    }
    if (!adam.project) continue;
    __syncthreads();
    // A warp an entry, its lanes over the input channels. Only this warp ever touches the entry.
    for (int pair = warp; pair < pairs; pair += kWarps) {
      const int r = pair / taps, k = pair % taps;
      const float* direction = p.direction + r * p.direction_rank_stride + i0 * p.direction_in_stride;
      float total = 0.f;
      for (int i = lane; i < tile; i += 32) total += direction[i * p.direction_in_stride] * change[k * pitch + i];
      for (int step = 16; step > 0; step /= 2) total += __shfl_down_sync(0xffffffffu, total, step);
      if (lane == 0) sums[pair] += total;
    }
  }
  if (!adam.project) return;
  __syncthreads();
  for (int j = threadIdx.x; j < p.in * taps; j += kThreads) {
    const int i = j / taps, k = j % taps;
    float total = 0.f;
    for (int r = 0; r < p.rank; ++r)
      total += sums[r * taps + k] * p.direction[r * p.direction_rank_stride + i * p.direction_in_stride];
    p.weight.data[offset(p.weight, p, channel, i, k)] = p.base.data[offset(p.base, p, channel, i, k)] + total;
  }
}

}  // namespace strided
}  // namespace pyrewrite
