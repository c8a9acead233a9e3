// The second moment on the tensor cores of compute capability 8.0 and above (mma.sync, cp.async). A block computes a
// tile of the moment from its chunks of rows. Slices of the rows' two panels are copied to shared memory kStages - 1
// ahead of their use; a slice is 32 rows of float32 or 64 of a 16-bit type.
//
// Tensor cores cut their sums instead of rounding them, which adds up over a long chain. So the accumulators of an mma
// chain (`chain`) are added to other registers (`total`) after few rows, by ordinary additions, and those to pairs of
// floats in the workspace after some thousands.
#pragma once

#include "second_moment/fragments.h"
#include "second_moment/ptx.cuh"
#include "second_moment/reduce.cuh"

namespace pyrewrite {

// How products are made. kChainRows: rows of a chain; kTotalRows: rows between two additions to the workspace.
struct Float32Math {  // each factor as the sum of two of 11 bits; their small product is left out (2^-22)
  using Element = float;
  using Mma = Tf32;
  static constexpr bool kSplit = true;
  static constexpr int kChainRows = 32, kTotalRows = 8192;
};
struct Tf32Math {
  using Element = float;
  using Mma = Tf32;
  static constexpr bool kSplit = false;
  static constexpr int kChainRows = 256, kTotalRows = 8192;
};
template <typename T, typename M>
struct HalfMath {
  using Element = T;
  using Mma = M;
  static constexpr bool kSplit = false;
  static constexpr int kChainRows = 128, kTotalRows = 8192;
};
using Float16Math = HalfMath<__half, Fp16>;
using BFloat16Math = HalfMath<__nv_bfloat16, Bf16>;

template <int kSide, typename M>
struct Sm80Traits : MmaTile<kSide, kSide / 2, 32, sizeof(typename M::Element)> {
  using Math = M;
  static constexpr int kTile = kSide;
  static constexpr int kSize = sizeof(typename M::Element);
  static constexpr int kStages = 3;
  static constexpr int kBlocksPerMultiprocessor = kTile == 64 ? 3 : 1;
  static constexpr int kSharedBytes = kStages * 2 * kTile * kPanelRow;
  static_assert(kSharedBytes <= 99 * 1024, "the least that GPUs of this family give a block");
};

// threadIdx.x. On 10.0 read anew every time: what the compiler would derive from it before the loop and keep does not
// fit into the registers there.
__device__ __forceinline__ unsigned thread_number() {
#if __CUDA_ARCH__ >= 1000
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// Starts the copy of a slice: rows `row` ... and the tile's channels from `channel` on. Zero beyond both.
template <typename Traits, Access kAccess>
struct PanelCopy {
  using T = typename Traits::Math::Element;
  using Layout = PanelLayout<Traits::kTile, Traits::kSize, kAccess == Access::channels>;
  static constexpr int kElements = Layout::kElements;
  static constexpr int kCopies = Layout::kGranules / Traits::kThreads;  // of a thread
#if __CUDA_ARCH__ >= 1000
  static constexpr int kUnrolled = 1;  // for the same reason
#else
  static constexpr int kUnrolled = kCopies;
#endif
  static_assert(Layout::kGranules % Traits::kThreads == 0 && Traits::kThreads % Layout::kLine == 0, "whole lines");

  // The panels of the tile's rows and columns; the second is left out on the diagonal, where they are one.
  static __device__ __forceinline__ void start(const Source& source, std::uint32_t row, TriangleTile tile,
                                               std::uint32_t to) {
    const bool two = tile.row != tile.column;
    const int channels[2] = {tile.row * Traits::kTile, tile.column * Traits::kTile};
    const T* x = static_cast<const T*>(source.x);
    const unsigned thread = thread_number();
    if constexpr (kAccess == Access::elements) {
      for (int panel = 0; panel < (two ? 2 : 1); ++panel)
        elements(source, row, channels[panel], to + panel * Layout::kBytes, thread);
    } else if constexpr (kAccess == Access::pixels) {
      const int granule = thread % Layout::kLine, line = thread / Layout::kLine;
      const std::uint32_t n = row + granule * kElements;
      const T* from = x + source.offset(n);
#pragma unroll
      for (int i = 0; i < 2 * kCopies; ++i) {
        const int panel = i / kCopies, at = line + i % kCopies * (Traits::kThreads / Layout::kLine);
        const int c = channels[panel] + at;
        const bool inside = n < source.rows && c < source.d;
        if (panel == 0 || two)
          copy16(to + panel * Layout::kBytes + Layout::at(at, granule), inside ? from + c * source.channel_stride : x,
                 inside ? kGranule : 0);
      }
    } else {
      const int granule = thread % Layout::kLine, line = thread / Layout::kLine;
#pragma unroll kUnrolled
      for (int i = 0; i < kCopies; ++i) {
        const int at = line + i * (Traits::kThreads / Layout::kLine);
        const std::uint32_t n = row + at;
        const T* from = x + source.offset(n) + granule * kElements;
#pragma unroll
        for (int panel = 0; panel < 2; ++panel) {
          const int left = (source.d - channels[panel]) - granule * kElements;  // channels from here on
          const bool inside = n < source.rows && left > 0;
          if (panel == 0 || two)
            copy16(to + panel * Layout::kBytes + Layout::at(at, granule), inside ? from + channels[panel] : x,
                   inside ? min(left, kElements) * Traits::kSize : 0);
        }
      }
    }
  }

  // Any strides. Squares of 8 words by 4 channels to a warp: neither direction is known to be the near one.
  static __device__ __forceinline__ void elements(const Source& source, std::uint32_t row, int channel,
                                                  std::uint32_t to, unsigned thread) {
    constexpr int kWord = 4 / Traits::kSize, kWords = kPanelRow / 4;  // rows in a word, words of a channel
    const T* x = static_cast<const T*>(source.x);
#pragma unroll 4
    for (int i = thread; i < Traits::kTile * kWords; i += Traits::kThreads) {
      const int word = i % 8 + i / 32 % (kWords / 8) * 8, at = i / 8 % 4 + i / (4 * kWords) * 4;
      const std::uint32_t n = row + word * kWord, place = to + Layout::at(at, word / 4) + word % 4 * 4;
      const std::int64_t across = (channel + at) * source.channel_stride;
      const bool inside = channel + at < source.d;
      if constexpr (kWord == 1) {
        const bool copied = inside && n < source.rows;
        copy4(place, copied ? x + source.offset(n) + across : x, copied ? 4 : 0);
      } else {  // cp.async copies no two bytes
        T pair[2] = {};
        if (inside && n < source.rows) pair[0] = x[source.offset(n) + across];
        if (inside && n + 1 < source.rows) pair[1] = x[source.offset(n + 1) + across];
        store_word(place, *reinterpret_cast<const std::uint32_t*>(pair));
      }
    }
  }
};

// The registers of a group of 32 channels at one step: set x half.
using Fragment = std::uint32_t[4][2];

template <typename Layout, int kSize, bool kByRow>
__device__ __forceinline__ void load_fragment(std::uint32_t panel, int group, int step, Fragment& to) {
#pragma unroll
  for (int load = 0; load < 2; ++load) {
    std::uint32_t words[4];
    const std::uint32_t from = fragment_step<Layout, kSize, kByRow>(
        panel + fragment_at<Layout, kSize, kByRow>(group, load, threadIdx.x % 32), step);
    if constexpr (kByRow && kSize == 4) {
      load_words(from, words);
#pragma unroll
      for (int set = 0; set < 4; ++set) to[set][load] = words[set];
    } else {
      load_matrices<kByRow>(from, words);
#pragma unroll
      for (int m = 0; m < 4; ++m) to[2 * load + m % 2][m / 2] = words[m];
    }
  }
}

// What of a factor goes into an mma: its bits as they are (16 bit), rounded, or the rest that rounding left.
enum class Part { whole, high, low };

template <Part kPart>
__device__ __forceinline__ void take(const Fragment& from, Fragment& to) {
#pragma unroll
  for (int set = 0; set < 4; ++set)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t bits = from[set][half];
      if constexpr (kPart == Part::whole) {
        to[set][half] = bits;
      } else {
        const float value = __uint_as_float(bits);
        const std::uint32_t high = to_tf32(value);
        to[set][half] = kPart == Part::high ? high : to_tf32(value - __uint_as_float(high));
      }
    }
}

template <typename Traits, bool kByRow>
struct WarpProducts {
  using Math = typename Traits::Math;
  using Layout = PanelLayout<Traits::kTile, Traits::kSize, kByRow>;
  static constexpr int kSteps = 4;  // k steps of a slice: of 8 rows of float32, of 16 of a 16-bit type
  static constexpr int kLeft = Traits::kDown / 2, kRight = Traits::kAcross / 4;  // groups

  float sums[Traits::kDown][Traits::kAcross][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Traits::kDown; ++i)
#pragma unroll
      for (int j = 0; j < Traits::kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.f;
  }

  // The products of one group of rows with all columns of the warp.
  __device__ __forceinline__ void multiply(int group, const Fragment& left, const Fragment (&right)[kRight]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t a[4] = {left[2 * i][0], left[2 * i + 1][0], left[2 * i][1], left[2 * i + 1][1]};
#pragma unroll
      for (int j = 0; j < Traits::kAcross; ++j)
        mma(typename Math::Mma{}, sums[2 * group + i][j], a, right[j / 4][j % 4]);
    }
  }

  // Adds the products of a slice. `rows` and `columns`: the warp's first group in the panels a and b. On the diagonal a
  // split takes two products instead of three, high^T (high / 2 + low): added to its transpose it is the sum.
  __device__ __forceinline__ void slice(std::uint32_t a, std::uint32_t b, int rows, int columns, bool diagonal) {
    if constexpr (Math::kSplit) {
      // The small products of the whole slice come first: cut sums of small numbers lose little.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Fragment right[kRight], high[kRight], low[kRight];
        load(b, columns, step, right);
        parts<Part::high>(right, high);
        parts<Part::low>(right, low);
#pragma unroll
        for (int group = 0; group < kLeft; ++group) {
          Fragment left[1];
          load(a, rows + group, step, left);
          parts<Part::high>(left, left);
          multiply(group, left[0], low);
        }
        if (diagonal) continue;
        __syncwarp();
#pragma unroll
        for (int group = 0; group < kLeft; ++group) {
          Fragment left[1];
          load(a, rows + group, step, left);
          parts<Part::low>(left, left);
          multiply(group, left[0], high);
        }
        __syncwarp();  // or the compiler would keep all that was loaded, in more registers than there are
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Fragment left[kLeft], right[kRight];
      load(a, rows, step, left);
      load(b, columns, step, right);
      constexpr Part kPart = Traits::kSize == 4 ? Part::high : Part::whole;
      parts<kPart>(left, left);
      parts<kPart>(right, right);
      if constexpr (Math::kSplit) halve(right, diagonal ? 0.5f : 1.f);
#pragma unroll
      for (int group = 0; group < kLeft; ++group) multiply(group, left[group], right);
    }
  }

 private:
  template <int kGroups>
  static __device__ __forceinline__ void load(std::uint32_t panel, int group, int step, Fragment (&to)[kGroups]) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) load_fragment<Layout, Traits::kSize, kByRow>(panel, group + i, step, to[i]);
  }
  static __device__ __forceinline__ void halve(Fragment (&values)[kRight], float factor) {
#pragma unroll
    for (int i = 0; i < kRight; ++i)
#pragma unroll
      for (int set = 0; set < 4; ++set)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          values[i][set][half] = __float_as_uint(__uint_as_float(values[i][set][half]) * factor);
  }
  template <Part kPart, int kGroups>
  static __device__ __forceinline__ void parts(const Fragment (&from)[kGroups], Fragment (&to)[kGroups]) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) take<kPart>(from[i], to[i]);
  }
};

template <typename Traits, Access kAccess>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
    sm80_moment(const __grid_constant__ Source source, const Plan plan, Pair* workspace) {
#if __CUDA_ARCH__ >= 800
  using Math = typename Traits::Math;
  constexpr bool kByRow = kAccess == Access::channels;
  using Copy = PanelCopy<Traits, kAccess>;
  using Layout = PanelLayout<Traits::kTile, Traits::kSize, kByRow>;
  constexpr int kSlices = kChunkRows / Layout::kRows;  // of a chunk
  constexpr int kStageBytes = 2 * Layout::kBytes;
  static_assert(
      Math::kChainRows % Layout::kRows == 0 && Math::kTotalRows % kChunkRows == 0 && kChunkRows % Math::kChainRows == 0,
      "chains end with slices, totals with chunks");
  extern __shared__ __align__(128) unsigned char stages[];
  const std::uint32_t shared = shared_address(stages);
  const BlockWork work = plan.work(blockIdx.x);
  const TriangleTile tile = plan.place(work.tile);
  const bool diagonal = tile.row == tile.column;
  // The warps of a block take turns at the places in the tile: on the diagonal the lower ones have nothing to do, and
  // the four schedulers of a multiprocessor would otherwise not share what remains.
  const int thread = (threadIdx.x + blockIdx.x % (Traits::kThreads / 32) * 32) % Traits::kThreads, warp = thread / 32;
  const int down = warp / Traits::kWarpsAcross * (Traits::kTile / Traits::kWarpsDown);
  const int across = warp % Traits::kWarpsAcross * (Traits::kTile / Traits::kWarpsAcross);
  const bool needed = Math::kSplit || !diagonal || down < across + Traits::kTile / Traits::kWarpsAcross;

  const int count = (plan.chunks - work.first + work.step - 1) / work.step * kSlices;
  const auto copy = [&](int slice) {
    if (slice < count) {
      const int chunk = work.first + slice / kSlices * work.step;
      const std::uint32_t row = static_cast<std::uint32_t>(chunk) * kChunkRows + slice % kSlices * Layout::kRows;
      Copy::start(source, row, tile, shared + slice % Traits::kStages * kStageBytes);
    }
    copies_end_group();
  };

  WarpProducts<Traits, kByRow> chain;
  chain.clear();
  float total[Traits::kDown][Traits::kAcross][4] = {};
#pragma unroll 1
  for (int slice = 0; slice < Traits::kStages - 1; ++slice) copy(slice);
  Pair* const partial = workspace + static_cast<std::int64_t>(blockIdx.x) * Traits::kTile * Traits::kTile;
  const auto for_sums = [](auto&& body) {
#pragma unroll
    for (int i = 0; i < Traits::kDown; ++i)
#pragma unroll
      for (int j = 0; j < Traits::kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) body(i, j, e);
  };
  bool written = false;
  for (int slice = 0; slice < count; ++slice) {
    copies_wait<Traits::kStages - 2>();
    __syncthreads();  // the slice is there for all, and all are done with the one before
    copy(slice + Traits::kStages - 1);
    if (!needed) continue;
    const std::uint32_t a = shared + slice % Traits::kStages * kStageBytes;
    chain.slice(a, diagonal ? a : a + Layout::kBytes, down / kGroup, across / kGroup, diagonal);
    if ((slice + 1) % (Math::kChainRows / Layout::kRows) != 0) continue;
    for_sums([&](int i, int j, int e) { total[i][j][e] = __fadd_rn(total[i][j][e], chain.sums[i][j][e]); });
    chain.clear();
    if ((slice + 1) % (Math::kTotalRows / Layout::kRows) != 0 && slice + 1 != count) continue;
    Pair* to = partial + thread;
    if (written) {
      for_sums([&](int i, int j, int e) {
        Pair sum = *to;
        add_to_pair(sum, total[i][j][e]);
        *to = sum;
        to += Traits::kThreads;
        if (j + 1 == Traits::kAcross && e == 3) __syncwarp();  // no more loads under way than there are registers for
      });
    } else {
      for_sums([&](int i, int j, int e) {
        *to = {total[i][j][e], 0.f};
        to += Traits::kThreads;
      });
    }
    for_sums([&](int i, int j, int e) { total[i][j][e] = 0.f; });
    written = true;
  }
  if (Math::kSplit && diagonal) {
    __syncthreads();
    for (int position = threadIdx.x; position < Traits::kTile * Traits::kTile; position += Traits::kThreads) {
      const TileElement element = Traits::coordinates(position);
      if (element.row > element.column) continue;
      const Pair mirrored = partial[Traits::position(element.column, element.row)];
      Pair sum = partial[position];
      add_to_pair(sum, mirrored.sum);
      add_to_pair(sum, mirrored.rest);
      partial[position] = sum;
    }
  }
#endif
}

template <typename Traits>
cudaError_t launch_sm80(const MomentLaunch& launch) {
  const auto run = [&](auto kernel) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<launch.plan.blocks(), Traits::kThreads, Traits::kSharedBytes, launch.stream>>>(launch.source, launch.plan,
                                                                                            launch.workspace);
    return cudaGetLastError();
  };
  switch (launch.access) {
    case Access::channels:
      return run(sm80_moment<Traits, Access::channels>);
    case Access::pixels:
      return run(sm80_moment<Traits, Access::pixels>);
    case Access::elements:
      return run(sm80_moment<Traits, Access::elements>);
  }
  return cudaErrorInvalidValue;
}

template <typename Traits>
constexpr MomentKernel kSm80{Traits::kTile,
                             kGranule,
                             Traits::kBlocksPerMultiprocessor,
                             Traits::Math::kSplit ? 2 : 3,
                             Traits::kSharedBytes,
                             launch_sm80<Traits>,
                             reduce_partials<Traits>};

}  // namespace pyrewrite
