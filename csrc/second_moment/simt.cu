// The second moment on the ordinary float32 units, for GPUs whose tensor cores are no faster at this accuracy. A block
// computes a tile of the moment from its chunks of rows: slices of 8 rows are copied to shared memory as slice x tile,
// every thread keeps 8 x 8 sums in registers and adds them to the workspace after each chunk.
#include "second_moment/reduce.cuh"

namespace pyrewrite {
namespace {

template <int kSide>
struct SimtTraits {
  static constexpr int kTile = kSide;
  static constexpr int kAcross = kTile / 8;  // threads along a side of the tile
  static constexpr int kThreads = kAcross * kAcross;
  static constexpr int kSlice = 8;                               // rows copied together
  static constexpr int kGroups = kTile * kSlice / 4 / kThreads;  // of 4 elements, copied by a thread per panel
  static constexpr int kBlocksPerMultiprocessor = kTile == 64 ? 5 : 2;
  static_assert(kTile % 32 == 0 && kChunkRows % kSlice == 0 && kTile * kSlice % (4 * kThreads) == 0, "whole copies");
  static_assert(kTile * kTile == 64 * kThreads, "8 x 8 sums a thread");

  // A thread's sums are four 4 x 4 squares, half a tile apart: the threads of a warp then read 16 bytes side by side.
  static PYREWRITE_BOTH int row(int thread, int i) { return i / 4 * (kTile / 2) + thread / kAcross * 4 + i % 4; }
  static PYREWRITE_BOTH int column(int thread, int j) { return j / 4 * (kTile / 2) + thread % kAcross * 4 + j % 4; }
  static PYREWRITE_BOTH TileElement coordinates(int position) {
    const int thread = position % kThreads, sum = position / kThreads;
    return {row(thread, sum / 8), column(thread, sum % 8)};
  }
};

// Column c of row k of a slice lies at c ^ turn(k): two groups of rows copied at once, from pixels that lie side by
// side, then meet different halves of the banks.
__device__ __forceinline__ int turn(int k) { return k / 4 % 2 * 16; }

template <typename T, Access kAccess, typename Traits>
struct Panel {
  // Elements (k, c) ... of the groups that this thread copies: row k, channel c, along the channels or the pixels.
  static __device__ __forceinline__ int first_k(int group) {
    const int number = group * Traits::kThreads + threadIdx.x;
    return kAccess == Access::channels ? number / (Traits::kTile / 4) : number % (Traits::kSlice / 4) * 4;
  }
  static __device__ __forceinline__ int first_c(int group) {
    const int number = group * Traits::kThreads + threadIdx.x;
    return kAccess == Access::channels ? number % (Traits::kTile / 4) * 4 : number / (Traits::kSlice / 4);
  }

  // Zero beyond the rows and the channels.
  static __device__ void load(const Source& source, std::uint32_t row, std::uint32_t end, int channel,
                              float4 (&values)[Traits::kGroups]) {
    const T* x = static_cast<const T*>(source.x);
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group) {
      const std::uint32_t n = row + first_k(group);
      const int c = channel + first_c(group);
      float value[4] = {};
      if (n < end && c < source.d) {
        const T* from = x + source.offset(n) + c * source.channel_stride;
        if (kAccess == Access::pixels || (kAccess == Access::channels && c + 4 <= source.d)) {
          values[group] = widen4(from);
          continue;
        }
        value[0] = widen(*from);
        for (int e = 1; e < 4; ++e) {
          if (kAccess == Access::channels) {
            if (c + e < source.d) value[e] = widen(from[e]);
          } else if (n + e < end) {
            value[e] = widen(x[source.offset(n + e) + c * source.channel_stride]);
          }
        }
      }
      values[group] = {value[0], value[1], value[2], value[3]};
    }
  }

  static __device__ __forceinline__ void store(float* slice, const float4 (&values)[Traits::kGroups]) {
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group) {
      const int k = first_k(group), c = first_c(group);
      if (kAccess == Access::channels) {
        *reinterpret_cast<float4*>(slice + k * Traits::kTile + (c ^ turn(k))) = values[group];
      } else {
        const float value[4] = {values[group].x, values[group].y, values[group].z, values[group].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) slice[(k + e) * Traits::kTile + (c ^ turn(k))] = value[e];
      }
    }
  }
};

template <typename T, Access kAccess, typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
    simt_moment(const __grid_constant__ Source source, const Plan plan, Pair* workspace) {
  using Copy = Panel<T, kAccess, Traits>;
  constexpr int kTile = Traits::kTile, kSlice = Traits::kSlice;
  __shared__ alignas(16) float panels[2][2][kSlice * kTile];  // buffer x (rows, columns of the tile) x slice
  const BlockWork work = plan.work(blockIdx.x);
  const TriangleTile tile = plan.place(work.tile);
  const bool diagonal = tile.row == tile.column;
  const int across = threadIdx.x % Traits::kAcross * 4, down = threadIdx.x / Traits::kAcross * 4;

  float sums[8][8] = {};
  float4 values[Traits::kGroups];
  const auto load = [&](std::uint32_t row, int side) { Copy::load(source, row, source.rows, side * kTile, values); };
  const auto multiply = [&](int buffer, int first) {
    const float* a = panels[buffer][0];
    const float* b = panels[buffer][diagonal ? 0 : 1];
#pragma unroll
    for (int k = first; k < first + kSlice / 2; ++k) {
      float left[8], right[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float4*>(left + 4 * half) =
            *reinterpret_cast<const float4*>(a + k * kTile + ((half * (kTile / 2) + down) ^ turn(k)));
        *reinterpret_cast<float4*>(right + 4 * half) =
            *reinterpret_cast<const float4*>(b + k * kTile + ((half * (kTile / 2) + across) ^ turn(k)));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
    }
  };

  int chunk = work.first, buffer = 0;
  std::uint32_t row = static_cast<std::uint32_t>(chunk) * kChunkRows;
  load(row, tile.row);
  Copy::store(panels[0][0], values);
  if (!diagonal) {
    load(row, tile.column);
    Copy::store(panels[0][1], values);
  }
  __syncthreads();
  for (int step = 1;; ++step) {
    // The next slice: within the chunk, then the first of the next chunk. Its two panels are on their way one after the
    // other, each during half of the products, which halves the registers that hold them.
    const bool chunk_ends = step % (kChunkRows / kSlice) == 0;
    row += kSlice;
    if (chunk_ends) {
      chunk += work.step;
      row = static_cast<std::uint32_t>(chunk) * kChunkRows;
    }
    const bool more = chunk < plan.chunks;
    if (more) load(row, tile.row);
    multiply(buffer, 0);
    if (more) {
      Copy::store(panels[buffer ^ 1][0], values);
      if (!diagonal) load(row, tile.column);
    }
    multiply(buffer, kSlice / 2);
    if (more && !diagonal) Copy::store(panels[buffer ^ 1][1], values);
    if (chunk_ends) {
      Pair* partial = workspace + static_cast<std::int64_t>(blockIdx.x) * kTile * kTile + threadIdx.x;
      const bool first = step == kChunkRows / kSlice;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          Pair* to = partial + (i * 8 + j) * Traits::kThreads;
          Pair total = first ? Pair{0.f, 0.f} : *to;
          add_to_pair(total, sums[i][j]);
          *to = total;
          sums[i][j] = 0.f;
        }
        __syncwarp();  // no more loads under way than there are registers for
      }
    }
    if (!more) break;
    buffer ^= 1;
    __syncthreads();
  }
}

template <typename T, typename Traits>
cudaError_t launch_typed(const MomentLaunch& launch) {
  const auto run = [&](auto kernel) {
    kernel<<<launch.plan.blocks(), Traits::kThreads, 0, launch.stream>>>(launch.source, launch.plan, launch.workspace);
    return cudaGetLastError();
  };
  switch (launch.access) {
    case Access::channels:
      return run(simt_moment<T, Access::channels, Traits>);
    case Access::pixels:
      return run(simt_moment<T, Access::pixels, Traits>);
    case Access::elements:
      return run(simt_moment<T, Access::elements, Traits>);
  }
  return cudaErrorInvalidValue;
}

template <typename Traits>
cudaError_t launch_simt(const MomentLaunch& launch) {
  switch (launch.dtype) {
    case DType::float32:
      return launch_typed<float, Traits>(launch);
    case DType::float16:
      return launch_typed<__half, Traits>(launch);
    case DType::bfloat16:
      return launch_typed<__nv_bfloat16, Traits>(launch);
  }
  return cudaErrorInvalidValue;
}

template <int kTile, int kCopyBytes>
constexpr MomentKernel kSimt{
    kTile,
    kCopyBytes,
    SimtTraits<kTile>::kBlocksPerMultiprocessor,
    3,
    4 * kTile * SimtTraits<kTile>::kSlice * static_cast<int>(sizeof(float)),
    launch_simt<SimtTraits<kTile>>,
    reduce_partials<SimtTraits<kTile>>,
};

}  // namespace

const MomentKernel& simt_kernel(int tile, DType dtype) {
  if (dtype == DType::float32) return tile == 64 ? kSimt<64, 16> : kSimt<128, 16>;
  return tile == 64 ? kSimt<64, 8> : kSimt<128, 8>;
}

}  // namespace pyrewrite
