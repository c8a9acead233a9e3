// float32 input of the Hopper kernels. It comes as it is. A group of four warps that multiplies takes its 64 rows of
// the moment to registers and makes half numbers of them there; another group makes half numbers of the columns, for
// both, and puts them back into shared memory, into a ring of its own.
#pragma once

#include "second_moment/sm90_ring.cuh"

namespace pyrewrite::sm90 {

__device__ __forceinline__ float scale_of(const std::uint32_t* peaks, int channel, int d) {
  return channel < d ? __int_as_float((scale_exponent(peaks[channel]) + 127) << 23) : 0.f;
}

// Two numbers, scaled, as one half number each, and what that leaves as another.
struct Split {
  std::uint32_t high, low;

  __device__ __forceinline__ Split(float x, float y) {
    const __half2 rounded = __floats2half2_rn(x, y);
    const float2 near = __half22float2(rounded);
    const __half2 rest = __floats2half2_rn(x - near.x, y - near.y);
    high = *reinterpret_cast<const std::uint32_t*>(&rounded);
    low = *reinterpret_cast<const std::uint32_t*>(&rest);
  }
};

// A thread's numbers of a unit, as products take them from registers: two neighbouring channels (see Place::element),
// of every 16 rows 2 * (lane % 4), the next, and both 8 further. Eight bytes at a time, and a half warp's are in
// different banks.
template <bool kByRow>
struct Lines {
  static constexpr int kSteps = 2;
  std::uint32_t first, second;  // by row: the two rows; else the two channels; bytes from the unit's begin
  float scale[2];
  float2 values[kSteps][4];

  __device__ __forceinline__ Lines(const std::uint32_t* peaks, int unit_channel, int d) {
    const int warp = threadIdx.x % kGroupThreads / 32, lane = threadIdx.x % 32;
    const int channel = 16 * warp + lane / 4 * 2, row = lane % 4 * 2;
    if (kByRow) {  // two boxes of 32 channels
      const int box = channel / 32 * (kUnitBytes / 2), byte = channel % 32 * 4;
      first = box + turned(row, byte), second = box + turned(row + 1, byte);
    } else {
      first = turned(channel, row * 4), second = turned(channel + 1, row * 4);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = scale_of(peaks, unit_channel + channel + i, d);
  }

  __device__ __forceinline__ void load(std::uint32_t unit) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t from = i % 2 == 0 ? first : second;
        // Rows 8 and 16 further: lines that are turned alike, or other granules of the line.
        values[step][i] = load_two(kByRow ? unit + from + (16 * step + 8 * (i / 2)) * kLine
                                          : unit + (from ^ (64 * step + 32 * (i / 2))));
      }
  }

  __device__ __forceinline__ void split(std::uint32_t (&high)[kSteps][4], std::uint32_t (&low)[kSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 a = values[step][i], b = values[step][i + 1];
        const Split upper(scale[0] * a.x, scale[0] * (kByRow ? b.x : a.y));
        const Split lower(scale[1] * (kByRow ? a.y : b.x), scale[1] * b.y);
        high[step][i] = upper.high, high[step][i + 1] = lower.high;
        low[step][i] = upper.low, low[step][i + 1] = lower.low;
      }
  }
};

// The sums of a group of four warps. `first`: the first slot of the block's columns.
template <typename Input, bool kByRow, int kColumns>
__device__ __forceinline__ void compute_halves(Ring<Input::kStages> ring, Ring<Input::kHalfStages> halves,
                                               const GroupWork& work, int first, int count, const Release& release,
                                               Lines<kByRow> lines, Pair* partial) {
  constexpr int kStep = kByRow ? 16 * kLine : 32, kSteps = Lines<kByRow>::kSteps;
  constexpr int kHalfLine = kByRow ? kLine : 2 * Input::kSliceRows;
  static_assert(Input::kSliceRows == 16 * kSteps, "rows of a slice");
  static_assert(kChunkRows / Input::kSliceRows % Input::kChainSlices == 0, "chains end with chunks");
  float chain[kColumns / 2];
  Total<kColumns / 2, kTotalRows / (Input::kChainSlices * Input::kSliceRows)> total(partial);
  std::uint32_t high[kSteps][4], low[kSteps][4];
  const auto load = [&] {
    ring.wait_full();
    lines.load(ring.stages + ring.stage * kStageBytes + work.a * kUnitBytes);
  };
  load();
  for (int slice = 0; slice < count; ++slice) {
    lines.split(high, low);
    __syncwarp();  // all lanes have what they need
    release(ring.stage);
    ring.next();
    halves.wait_full();
    const std::uint32_t columns =
        halves.stages + halves.stage * Input::kNumbers * Input::kPlaneBytes + (work.b - first) * Input::kHalfUnit;
    int add = slice % Input::kChainSlices != 0;
    const auto multiply_all = [&](const std::uint32_t (&a)[kSteps][4], int plane) {
      const std::uint64_t b = operand<kHalfLine>(columns + plane * Input::kPlaneBytes, Input::kHalfUnit);
#pragma unroll
      for (int step = 0; step < kSteps; ++step, add = 1) multiply<kByRow>(chain, a[step], b + step * (kStep / 16), add);
    };
    products_begin();
    if constexpr (Input::kNumbers == 2) {  // small products first: cut sums of small numbers lose little
      multiply_all(high, 1);
      multiply_all(low, 0);
    }
    multiply_all(high, 0);
    products_end_group();
    if (slice + 1 < count) load();  // meanwhile
    products_wait<0>();
    settle(chain);
    if (threadIdx.x % 32 == 0) barrier_arrive(halves.empty_barrier());
    halves.next();
    if ((slice + 1) % Input::kChainSlices == 0) total.add(chain, slice + 1 == count);
  }
}

// A group without work still lets the stages of both rings go.
template <int kStages, int kHalfStages>
__device__ __forceinline__ void watch_halves(Ring<kStages> ring, Ring<kHalfStages> halves, int count,
                                             const Release& release) {
  for (int slice = 0; slice < count; ++slice, ring.next(), halves.next()) {
    ring.wait_full();
    release(ring.stage);
    halves.wait_full();
    if (threadIdx.x % 32 == 0) barrier_arrive(halves.empty_barrier());
  }
}

// The columns of a block, by one group: a thread takes four numbers at a time of four lines of a unit.
template <typename Input, bool kByRow>
__device__ __forceinline__ void convert(Ring<Input::kStages> ring, Ring<Input::kHalfStages> halves, const Place& place,
                                        int count, const Release& release, const std::uint32_t* peaks) {
  constexpr int kLines = 4;
  // Threads of a line, by row of both its boxes; bytes from one line of a thread to its next, here and there.
  constexpr int kOfLine = kByRow ? 16 : 8, kApart = kGroupThreads / kOfLine;
  constexpr int kHalfLine = kByRow ? kLine : 2 * Input::kSliceRows;
  static_assert(kApart % 8 == 0, "lines of a thread are turned alike");
  const Columns columns = columns_of(place.shape, place.block);
  const int thread = threadIdx.x % kGroupThreads, line = thread / kOfLine, along = thread % kOfLine * 4;
  const std::uint32_t from = along / 32 * (kUnitBytes / 2) + turned(line, along % 32 * 4);
  // Lines of 64 bytes lie two in 128, and are turned by the number of these.
  const std::uint32_t to = kByRow ? turned(line, along * 2) : line * kHalfLine + ((along * 2) ^ (line / 2 % 4 * 16));
  float scale[2][4];  // unit x number (channels side by side) or line
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scale[u][i] =
          u < columns.count
              ? scale_of(peaks, place.channel(columns.first + u) + (kByRow ? along + i : line + kApart * i), place.d)
              : 0.f;
  const int units = columns.count == 2 && place.there(columns.first + 1) ? 2 : place.there(columns.first) ? 1 : 0;

  for (int slice = 0; slice < count; ++slice, ring.next(), halves.next()) {
    const std::uint32_t stage = ring.stages + ring.stage * kStageBytes + columns.first * kUnitBytes + from;
    const std::uint32_t half = halves.stages + halves.stage * Input::kNumbers * Input::kPlaneBytes + to;
    float4 values[2][kLines];
    ring.wait_full();
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (u < units)
#pragma unroll
        for (int i = 0; i < kLines; ++i) values[u][i] = load_four(stage + u * kUnitBytes + i * kApart * kLine);
    halves.wait_empty();
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (u < units)
#pragma unroll
        for (int i = 0; i < kLines; ++i) {
          const float4 value = values[u][i];
          const Split first(value.x * scale[u][kByRow ? 0 : i], value.y * scale[u][kByRow ? 1 : i]);
          const Split second(value.z * scale[u][kByRow ? 2 : i], value.w * scale[u][kByRow ? 3 : i]);
          const std::uint32_t at = half + u * Input::kHalfUnit + i * kApart * kHalfLine;
          store_pair(at, first.high, second.high);
          if constexpr (Input::kNumbers == 2) store_pair(at + Input::kPlaneBytes, first.low, second.low);
        }
    fence_for_products();
    __syncwarp();
    release(ring.stage);
    if (threadIdx.x % 32 == 0) barrier_arrive(halves.full_barrier());
  }
}

}  // namespace pyrewrite::sm90
