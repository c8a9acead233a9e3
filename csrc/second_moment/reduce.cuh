// Adds the blocks' partial sums of every element in a fixed order, and the result to both halves of the moment.
#pragma once

#include <type_traits>

#include "second_moment/elements.cuh"
#include "second_moment/launch.h"

namespace pyrewrite {

constexpr int kReduceGroups = 8;  // parts are added by so many warps, each in order, then the warps' sums in order

__device__ __forceinline__ void add_to_pair(Pair& total, float value) {
  // Knuth's sum: sum + rest of it is exact.
  const float sum = __fadd_rn(total.sum, value);
  const float virtual_value = __fsub_rn(sum, total.sum);
  const float lost = __fadd_rn(__fsub_rn(total.sum, __fsub_rn(sum, virtual_value)), __fsub_rn(value, virtual_value));
  total.sum = sum;
  total.rest = __fadd_rn(total.rest, lost);
}

// Element (i, j) again, in float64, by one warp. Stops at the first NaN: nothing after it changes the result.
template <typename T>
__device__ double sum_again(const Source& source, int i, int j, int lane) {
  const T* x = static_cast<const T*>(source.x);
  double total = 0;
  for (std::uint32_t first = 0; first < source.rows; first += 32) {
    const std::uint32_t n = first + lane;
    if (n < source.rows) {
      const T* row = x + source.offset(n);
      total += static_cast<double>(widen(row[i * source.channel_stride])) * widen(row[j * source.channel_stride]);
    }
    if (__any_sync(0xffffffffu, total != total)) break;
  }
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  return total;
}

// A block 32 elements of a tile, as they lie in the workspace. Sums::element says which of the moment; below the
// diagonal or beyond d there is none. A sum that is not finite is computed again in float64: the tensor cores' split of
// a float32 makes NaN of an infinity, and float32 sums may overflow where float64 ones do not.
template <typename Sums, typename Plan, typename T>
__global__ void __launch_bounds__(32 * kReduceGroups)
    reduce_kernel(const __grid_constant__ Source source, const __grid_constant__ Plan plan, const Pair* workspace,
                  const std::uint32_t* peaks, MomentView moment) {
  __shared__ double sums[kReduceGroups][32];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int tile = blockIdx.y, position = blockIdx.x * 32 + lane;
  const TileElement element = Sums::element(plan, tile, position, source.d);
  const int i = element.row, j = element.column;
  const bool mine = i <= j && j < source.d;
  const int parts = plan.parts_of(tile), share = (parts + kReduceGroups - 1) / kReduceGroups;
  const int first = group * share, last = mine ? min(first + share, parts) : 0;
  double total = 0;
#pragma unroll 4
  for (int part = first; part < last; ++part) {
    const Pair pair =
        workspace[static_cast<std::int64_t>(plan.first_of(tile) + part * plan.step_of(tile)) * Sums::kElements +
                  position];
    total += static_cast<double>(pair.sum) + pair.rest;
  }
  sums[group][lane] = total;
  __syncthreads();
  if (group != 0) return;
  for (int other = 1; other < kReduceGroups; ++other) total += sums[other][lane];

  bool redone = false;
  unsigned again = __ballot_sync(0xffffffffu, mine && !isfinite(total));
  while (again != 0) {
    const int which = __ffs(again) - 1;
    again &= again - 1;
    const double sum =
        sum_again<T>(source, __shfl_sync(0xffffffffu, i, which), __shfl_sync(0xffffffffu, j, which), lane);
    if (lane == which) total = sum, redone = true;
  }
  if (!mine) return;
  // What was computed again was not scaled.
  if (peaks != nullptr && !redone) total = scalbn(total, -scale_exponent(peaks[i]) - scale_exponent(peaks[j]));
  moment.data[i * moment.row_stride + j * moment.column_stride] += total;
  if (i != j) moment.data[j * moment.row_stride + i * moment.column_stride] += total;
}

template <typename Sums, typename T>
cudaError_t reduce_typed(const MomentLaunch& launch) {
  const auto& plan = Sums::plan(launch);
  const auto kernel = reduce_kernel<Sums, std::decay_t<decltype(plan)>, T>;
  kernel<<<dim3(Sums::kElements / 32, plan.tiles()), 32 * kReduceGroups, 0, launch.stream>>>(
      launch.source, plan, launch.workspace, launch.peaks, launch.moment);
  return cudaGetLastError();
}
template <typename Sums>
cudaError_t reduce_16bit(const MomentLaunch& launch) {
  return launch.dtype == DType::float16 ? reduce_typed<Sums, __half>(launch)
                                        : reduce_typed<Sums, __nv_bfloat16>(launch);
}

// Sums of square tiles, where Traits::coordinates finds them.
template <typename Traits>
struct TileSums {
  static constexpr int kElements = Traits::kTile * Traits::kTile;
  static const Plan& plan(const MomentLaunch& launch) { return launch.plan; }
  static __device__ __forceinline__ TileElement element(const Plan& plan, int tile, int position, int /* d */) {
    const TriangleTile at = plan.place(tile);
    const TileElement element = Traits::coordinates(position);
    return {at.row * Traits::kTile + element.row, at.column * Traits::kTile + element.column};
  }
};
template <typename Traits>
cudaError_t reduce_partials(const MomentLaunch& launch) {
  return launch.dtype == DType::float32 ? reduce_typed<TileSums<Traits>, float>(launch)
                                        : reduce_16bit<TileSums<Traits>>(launch);
}

}  // namespace pyrewrite
