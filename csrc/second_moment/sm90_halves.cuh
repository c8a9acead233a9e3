// float32 input of the Hopper kernels. It comes as it is. A group of four warps that multiplies takes its 64 rows of
// the moment to registers and makes half numbers of them there; another group makes half numbers of the columns, for
// both, and puts them back into shared memory, into a ring of its own.
#pragma once

#include "second_moment/sm90_ring.cuh"

namespace pyrewrite::sm90 {

// The exponent of a channel's scale as a float has it; 0, which stands for 0, beyond d.
__device__ __forceinline__ std::uint32_t scale_bits(const std::uint32_t* peaks, int channel, int d) {
  return channel < d ? scale_exponent(peaks[channel]) + 127 : 0;
}
__device__ __forceinline__ float scale_from(std::uint32_t bits) { return __uint_as_float(bits << 23); }

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
    for (int i = 0; i < 2; ++i) scale[i] = scale_from(scale_bits(peaks, unit_channel + channel + i, d));
  }

  __device__ __forceinline__ void load(std::uint32_t unit, int step) {
    asm volatile("" : "+r"(first), "+r"(second));  // addresses are made anew for every slice, not kept in registers
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t from = i % 2 == 0 ? first : second;
      // Rows 8 and 16 further: lines that are turned alike, or other granules of the line.
      values[step][i] = load_two(kByRow ? unit + from + (16 * step + 8 * (i / 2)) * kLine
                                        : unit + (from ^ (64 * step + 32 * (i / 2))));
    }
  }

  __device__ __forceinline__ void split(std::uint32_t (&high)[4], std::uint32_t (&low)[4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float2 a = values[step][i], b = values[step][i + 1];
      const Split upper(scale[0] * a.x, scale[0] * (kByRow ? b.x : a.y));
      const Split lower(scale[1] * (kByRow ? a.y : b.x), scale[1] * b.y);
      high[i] = upper.high, high[i + 1] = lower.high;
      low[i] = upper.low, low[i + 1] = lower.low;
    }
  }
};

// The sums of a group of four warps. A chain's rows are in registers, and all its columns in shared memory, so these
// are taken a unit at a time.
template <typename Input, bool kByRow>
__device__ __forceinline__ void compute_halves(BoxRing<Input> ring, HalfRing<Input> halves, const GroupWork& work,
                                               const Columns& of_block, int count, const Release& release,
                                               Lines<kByRow> lines, Pair* partial) {
  constexpr int kStep = kByRow ? 16 * kLine : 32, kSteps = Lines<kByRow>::kSteps, kSlices = Input::kChainSlices;
  constexpr int kHalfLine = kByRow ? kLine : 2 * Input::kSliceRows;
  static_assert(Input::kSliceRows == 16 * kSteps, "rows of a slice");
  static_assert(kChunkRows / Input::kSliceRows % kSlices == 0, "chains end with chunks");
  const std::uint32_t plane = of_block.count * Input::kHalfUnit;
  const std::uint32_t first = (work.b - of_block.first) * Input::kHalfUnit;
  float chain[kUnit / 2];
  Total<kTotalRows / (kSlices * Input::kSliceRows)> total(partial);
  std::uint32_t high[kSlices][kSteps][4], low[kSlices][kSteps][4], columns[kSlices] = {};
  const std::uint32_t rows = work.a * kUnitBytes;
  const auto load = [&] {  // of a slice the first step; registers for all of it there are not before its turn
    ring.wait_full();
    lines.load(ring.here() + rows, 0);
  };
  // Products of a slice with a unit of columns.
  const auto multiply_slice = [&](int i, int unit) {
    int add = i > 0;
    const auto multiply_all = [&](const std::uint32_t (&a)[kSteps][4], std::uint32_t from) {
      const std::uint64_t b = operand<kHalfLine>(from + unit * Input::kHalfUnit, Input::kHalfUnit);
#pragma unroll
      for (int step = 0; step < kSteps; ++step, add = 1) multiply<kByRow>(chain, a[step], b + step * (kStep / 16), add);
    };
    if constexpr (Input::kNumbers == 2) {  // small products first: cut sums of small numbers lose little
      multiply_all(high[i], columns[i] + plane);
      multiply_all(low[i], columns[i]);
    }
    multiply_all(high[i], columns[i]);
  };
  load();
  for (int slice = 0; slice < count; slice += kSlices) {
    const int begin = halves.stage;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step > 0) lines.load(ring.here() + rows, step);
        lines.split(high[i][step], low[i][step], step);
      }
      __syncwarp();  // all lanes have what they need
      release(ring.stage);
      ring.next();
      halves.wait_full();
      columns[i] = halves.here() + first;
      halves.next();
      products_begin();
      multiply_slice(i, 0);
      products_end_group();
      if (slice + i + 1 < count) load();  // meanwhile
    }
    products_wait<0>();
    settle(chain);
    const auto let_go = [&] {
      if (threadIdx.x % 32 != 0) return;
      int stage = begin;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        barrier_arrive(halves.empty(stage));
        if (++stage == halves.count) stage = 0;
      }
    };
    if (work.units == 1) let_go();
    total.template add<0>(chain);
    const auto take = [&](auto number) {
      constexpr int kUnitNumber = decltype(number)::value;
      if (kUnitNumber >= work.units) return;
      products_begin();
#pragma unroll
      for (int i = 0; i < kSlices; ++i) multiply_slice(i, kUnitNumber);
      products_end_group();
      products_wait<0>();
      settle(chain);
      if (kUnitNumber + 1 == work.units) let_go();
      total.template add<kUnitNumber * kUnit / 2>(chain);
    };
    take(Number<1>{});
    take(Number<2>{});
    take(Number<3>{});
    total.end_chain(work.units, slice + kSlices >= count);
  }
}

// A group without work still lets the stages of both rings go.
template <typename Input>
__device__ __forceinline__ void watch_halves(BoxRing<Input> ring, HalfRing<Input> halves, int count,
                                             const Release& release) {
  for (int slice = 0; slice < count; ++slice, ring.next(), halves.next()) {
    ring.wait_full();
    __syncwarp();  // as in watch
    release(ring.stage);
    halves.wait_full();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(halves.empty_barrier());
  }
}

// The columns of a block, by one group: a thread takes four numbers at a time of four lines of a unit.
template <typename Input, bool kByRow>
__device__ __forceinline__ void convert(BoxRing<Input> ring, HalfRing<Input> halves, const Place& place,
                                        const Columns& columns, int count, const Release& release,
                                        const std::uint32_t* peaks) {
  constexpr int kLines = 4, kTogether = 2;  // units
  // Threads of a line, by row of both its boxes; bytes from one line of a thread to its next, here and there.
  constexpr int kOfLine = kByRow ? 16 : 8, kApart = kGroupThreads / kOfLine;
  constexpr int kHalfLine = kByRow ? kLine : 2 * Input::kSliceRows;
  static_assert(kApart % 8 == 0, "lines of a thread are turned alike");
  const int thread = threadIdx.x % kGroupThreads, line = thread / kOfLine, along = thread % kOfLine * 4;
  const std::uint32_t from = along / 32 * (kUnitBytes / 2) + turned(line, along % 32 * 4);
  // Lines of 64 bytes lie two in 128, and are turned by the number of these.
  const std::uint32_t to = kByRow ? turned(line, along * 2) : line * kHalfLine + ((along * 2) ^ (line / 2 % 4 * 16));
  std::uint32_t scales[kColumnUnits] = {};  // of a unit four, a byte each, by number (channels side by side) or line
#pragma unroll
  for (int u = 0; u < kColumnUnits; ++u)
    if (u < columns.count)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = place.channel(columns.first + u) + (kByRow ? along + i : line + kApart * i);
        scales[u] |= scale_bits(peaks, channel, place.d) << (8 * i);
      }
  const std::uint32_t plane = columns.count * Input::kHalfUnit;
  int units = columns.count;
  while (units > 0 && !place.there(columns.first + units - 1)) --units;

  for (int slice = 0; slice < count; ++slice, ring.next(), halves.next()) {
    const std::uint32_t stage = ring.here() + columns.first * kUnitBytes + from;
    std::uint32_t high = halves.here() + to, low = high + plane;
    asm volatile("" : "+r"(high), "+r"(low));  // two addresses, and what is added is known: else 16 of them
    ring.wait_full();
#pragma unroll
    for (int first = 0; first < kColumnUnits; first += kTogether) {
      if (first >= units) continue;
      float4 values[kTogether][kLines];
#pragma unroll
      for (int u = 0; u < kTogether; ++u)
        if (first + u < units)
#pragma unroll
          for (int i = 0; i < kLines; ++i)
            values[u][i] = load_four(stage + (first + u) * kUnitBytes + i * kApart * kLine);
      if (first == 0) halves.wait_empty();
#pragma unroll
      for (int u = 0; u < kTogether; ++u)
        if (first + u < units) {
          asm volatile("" : "+r"(scales[first + u]));  // taken apart for every slice, or there are 16 registers of them
          float by[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) by[i] = scale_from(scales[first + u] >> (8 * i) & 255);
#pragma unroll
          for (int i = 0; i < kLines; ++i) {
            const float4 value = values[u][i];
            const Split one(value.x * by[kByRow ? 0 : i], value.y * by[kByRow ? 1 : i]);
            const Split two(value.z * by[kByRow ? 2 : i], value.w * by[kByRow ? 3 : i]);
            const int at = (first + u) * Input::kHalfUnit + i * kApart * kHalfLine;
            store_pair(high + at, one.high, two.high);
            if constexpr (Input::kNumbers == 2) store_pair(low + at, one.low, two.low);
          }
        }
    }
    fence_for_products();
    __syncwarp();
    release(ring.stage);
    if (threadIdx.x % 32 == 0) barrier_arrive(halves.full_barrier());
  }
}

}  // namespace pyrewrite::sm90
