// The insertion of one target with few directions and a 3 x 3 kernel, the published edit. A block keeps all it needs of
// its channels on the multiprocessor: base, goal, and one map a direction (keys are windows of it) in shared memory,
// Lambda and the gradient in registers. A step has two barriers: after the warps' partial sums, and after Adam.
//
// A thread owns one or two channels and tiles of four pixels in one or two rows. A channel's Adam is one warp's.
#include "insertion/kernels.h"

namespace pyrewrite {
namespace {

constexpr int kTaps = 9;
constexpr int kMostRank = 4;
constexpr int kMostPixels = 1 << 16;  // more never fit; the layout's sums stay small
constexpr int kMostChannels = 4;      // of a block: 1, 2 or 4

constexpr int kAdamFloats = sizeof(AdamStep) / sizeof(float);

// R directions, C channels a thread, tiles of Y rows.
template <int R, int C, int Y>
struct Traits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kKeys = R * kTaps;
  static constexpr int kSums = C * (kKeys + 2);    // gradient, dloss / d demod and loss of each channel
  static constexpr int kHeld = (kSums + 31) / 32;  // sums that a lane holds in the end
  static constexpr bool kKeepWindow = R == 1;      // the keys stay in registers from forward to gradient
  static_assert(2 * C * kKeys <= 72, "Lambda and gradient in registers");
  static_assert(kWarps % kMostChannels == 0, "the warps share the channels evenly");
  static_assert(kKeys <= 2 * 32, "Adam's warp takes two keys a lane");
};

// Places in shared memory, in floats. Pixels lie in tiles of four, `tiles_x` a row.
struct Layout {
  int rows;            // of pixels: the target's, in whole tiles
  int tiles_x, tiles;  // fours of pixels: of a row, of all rows
  int pitch;           // of a map's row: the tiles and the two pixels that their windows reach beyond, 16-byte rows
  int map;             // R x (rows + 2) x pitch
  int noise, weight;   // tiles x 4
  int base, goal;      // channels x tiles x 4
  int lambda;          // channels x keys
  int demod;           // channels
  int adam;            // the step's AdamStep
  int sums;            // kWarps x kSums
  int size;
};

// sums: of all warps
__host__ __device__ inline Layout layout_of(int rank, int height, int width, int tile_rows, int channels, int sums) {
  Layout at;
  at.rows = (height + tile_rows - 1) / tile_rows * tile_rows;
  at.tiles_x = (width + 3) / 4;
  at.tiles = at.tiles_x * at.rows;
  at.pitch = 4 * at.tiles_x + 4;
  at.map = 0;
  at.noise = at.map + rank * (at.rows + 2) * at.pitch;
  at.weight = at.noise + 4 * at.tiles;
  at.base = at.weight + 4 * at.tiles;
  at.goal = at.base + 4 * channels * at.tiles;
  at.lambda = at.goal + 4 * channels * at.tiles;
  at.demod = at.lambda + channels * rank * kTaps;
  at.adam = at.demod + channels;
  at.sums = at.adam + kAdamFloats;
  at.size = at.sums + sums;
  return at;
}

// Sums v[0 ... N - 1] over the warp: lane l ends with the sums number place(l), place(l) + 1, ... in v[0], v[1], ...
// Each round halves what a lane holds: it gives one half to its partner and keeps the other, so N sums cost about N
// shuffles, not 5 N.
template <int N, int Step = 16>
__device__ __forceinline__ void warp_sums(float* v) {
  if constexpr (Step > 0) {
    constexpr int kHalf = (N + 1) / 2;
    const bool upper = (threadIdx.x & Step) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float second = i + kHalf < N ? v[i + kHalf] : 0.f;
      const float given = upper ? v[i] : second;
      v[i] = (upper ? second : v[i]) + __shfl_xor_sync(0xffffffffu, given, Step);
    }
    warp_sums<kHalf, Step / 2>(v);
  }
}

// Where the sums of `lane` begin.
template <int N, int Step = 16>
__host__ __device__ inline int sums_place(int lane) {
  if constexpr (Step > 0) {
    constexpr int kHalf = (N + 1) / 2;
    return ((lane & Step) != 0 ? kHalf : 0) + sums_place<kHalf, Step / 2>(lane);
  } else {
    return 0;
  }
}

// How many of v[0], v[1], ... are sums and no padding: what lies at or past N, or past the half that a round kept, is
// another lane's or nothing.
template <int N, int Step = 16>
__host__ __device__ inline int sums_held(int lane, int held) {
  if constexpr (Step > 0) {
    constexpr int kHalf = (N + 1) / 2;
    const int mine = (lane & Step) != 0 ? held - kHalf : (held < kHalf ? held : kHalf);
    return sums_held<kHalf, Step / 2>(lane, mine > 0 ? mine : 0);
  } else {
    return held;
  }
}

__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Six keys in a row: the window of four pixels.
__device__ __forceinline__ void load_window(const float* row, float (&w)[6]) {
  const float4 first = load4(row);
  const float2 last = *reinterpret_cast<const float2*>(row + 4);
  w[0] = first.x, w[1] = first.y, w[2] = first.z, w[3] = first.w, w[4] = last.x, w[5] = last.y;
}

template <int R, int C, int Y>
struct Block {
  using T = Traits<R, C, Y>;
  const InsertionProblem& p;
  const InsertionArrays& edit;
  float* shared;
  const Layout& at;
  int first;     // channel of the block
  int channels;  // of the block, past the last as well

  // Row of keys, and of Lambda, that tap `tap` of a window in the map belongs to.
  __device__ int key_of(int d, int tap) const { return d * kTaps + (p.flipped ? kTaps - 1 - tap : tap); }

  __device__ void load() const {
    const int h = p.heights[0], w = p.widths[0];
    // Map pixel (i, j) is the key of tap (ty, tx) at pixel (i - ty, j - tx), for any tap that lands inside.
    for (int d = 0; d < R; ++d)
      for (int n = threadIdx.x; n < (at.rows + 2) * at.pitch; n += T::kThreads) {
        const int i = n / at.pitch, j = n % at.pitch;
        const int ty = max(0, i - (h - 1)), tx = max(0, j - (w - 1));
        shared[at.map + d * (at.rows + 2) * at.pitch + n] =
            tx < 3 && ty < 3 ? edit.keys[std::int64_t(key_of(d, ty * 3 + tx)) * p.pixels + (i - ty) * w + j - tx] : 0.f;
      }
    for (int n = threadIdx.x; n < 4 * at.tiles; n += T::kThreads) {
      const int x = n % (4 * at.tiles_x), y = n / (4 * at.tiles_x), u = y * w + x;
      const bool inside = x < w && y < h;
      shared[at.noise + n] = inside ? edit.noise[u] : 0.f;
      shared[at.weight + n] = inside ? edit.weight[u] / p.channels : 0.f;
      for (int c = 0; c < channels; ++c) {
        const bool there = inside && first + c < p.channels;
        const std::int64_t from = std::int64_t(first + c) * p.pixels + u;
        shared[at.base + 4 * c * at.tiles + n] = there ? edit.base[from] : 0.f;
        shared[at.goal + 4 * c * at.tiles + n] = there ? edit.goal[from] : 0.f;
      }
    }
    for (int n = threadIdx.x; n < channels * T::kKeys; n += T::kThreads) {
      const int c = n / T::kKeys, j = n % T::kKeys;
      const int k = key_of(j / kTaps, j % kTaps);
      shared[at.lambda + n] = first + c < p.channels ? edit.lambda[(first + c) * T::kKeys + k] : 0.f;
    }
  }

  // Partial sums of this thread's tiles: sums[c] is gradient (before demod), dloss / d demod, loss of channel c.
  // member: this thread's number among `members` that share the channels.
  __device__ void run_pixels(int channel, int member, int members, float (&sums)[C][T::kKeys + 2]) const {
    float lambda[C][T::kKeys], demod[C], bias[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int j = 0; j < T::kKeys; ++j) lambda[c][j] = shared[at.lambda + (channel + c) * T::kKeys + j];
#pragma unroll
      for (int j = 0; j < T::kKeys + 2; ++j) sums[c][j] = 0.f;
      demod[c] = shared[at.demod + channel + c];
      bias[c] = first + channel + c < p.channels ? edit.bias[first + channel + c] : 0.f;
    }
    const int map_stride = (at.rows + 2) * at.pitch, row_tiles = at.tiles_x;
    const int skip_y = members / row_tiles, skip_x = members % row_tiles;
    int ty = member / row_tiles, tx = member % row_tiles;
    while (ty < at.rows / Y) {
      // Of the tile's first row; the rest of an address is the same for all threads.
      const float* pixels = shared + 4 * (ty * Y * row_tiles + tx);
      const float* values = pixels + 4 * channel * at.tiles;
      const float* window = shared + at.map + ty * Y * at.pitch + 4 * tx;
      float y[C][Y][4], kept[Y + 2][6];
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int row = 0; row < Y; ++row)
          *reinterpret_cast<float4*>(y[c][row]) = load4(values + (at.base + 4 * (c * at.tiles + row * row_tiles)));
#pragma unroll
      for (int d = 0; d < R; ++d)
        for_window<true>(window + d * map_stride, kept, [&](int c, int row, int i, int key, float value) {
          y[c][row][i] += value * lambda[c][d * kTaps + key];
        });
      float by_z[C][Y][4], difference[C][Y][4], nearest = 1.f;
#pragma unroll
      for (int row = 0; row < Y; ++row) {
        float noise[4], weight[4];
        *reinterpret_cast<float4*>(noise) = load4(pixels + (at.noise + 4 * row * row_tiles));
        *reinterpret_cast<float4*>(weight) = load4(pixels + (at.weight + 4 * row * row_tiles));
#pragma unroll
        for (int c = 0; c < C; ++c) {
          float goal[4];
          *reinterpret_cast<float4*>(goal) = load4(values + (at.goal + 4 * (c * at.tiles + row * row_tiles)));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& d = difference[c][row][i];
            by_z[c][row][i] =
                ScalarOps::turned(pixel_size<ScalarOps>(y[c][row][i], demod[c], noise[i] + bias[c], goal[i], weight[i],
                                                        p.up, p.down, sums[c][T::kKeys + 1], d),
                                  d);
            nearest = fminf(nearest, fabsf(d));
          }
        }
      }
      // A difference of 0 has no sign. It is rare, and looked for in the whole tile at once.
      if (nearest == 0.f) {
#pragma unroll
        for (int n = 0; n < C * Y * 4; ++n)
          if ((&difference[0][0][0])[n] == 0.f) (&by_z[0][0][0])[n] = 0.f;
      }
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int row = 0; row < Y; ++row)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[c][T::kKeys] += by_z[c][row][i] * y[c][row][i];
#pragma unroll
      for (int d = 0; d < R; ++d)
        for_window<!T::kKeepWindow>(window + d * map_stride, kept, [&](int c, int row, int i, int key, float value) {
          sums[c][d * kTaps + key] += by_z[c][row][i] * value;
        });
      ty += skip_y;
      tx += skip_x;
      if (tx >= row_tiles) {
        tx -= row_tiles;
        ++ty;
      }
    }
  }

  // Calls f(channel, row and column in the tile, tap, key) for one direction's map; window: its place in the map.
  template <bool Load, class F>
  __device__ __forceinline__ void for_window(const float* window, float (&kept)[Y + 2][6], F f) const {
#pragma unroll
    for (int at_row = 0; at_row < Y + 2; ++at_row) {
      if (Load) load_window(window + at_row * at.pitch, kept[at_row]);
#pragma unroll
      for (int row = at_row < 2 ? 0 : at_row - 2; row <= at_row && row < Y; ++row)
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
          for (int tap = 0; tap < 3; ++tap)
#pragma unroll
            for (int i = 0; i < 4; ++i) f(c, row, i, (at_row - row) * 3 + tap, kept[at_row][tap + i]);
    }
  }
};

// Adam of one channel, by one warp: lane l owns the keys l and l + 32. Everything constant stays in registers.
template <int R, int C, int Y>
struct Optimizer {
  using T = Traits<R, C, Y>;
  static constexpr int kOwn = (T::kKeys + 31) / 32;
  float lambda[kOwn], mean[kOwn], square[kOwn], cross[kOwn], product[kOwn];
  float energy, scale, demod;
  int channel;  // of the layer
  bool there, demodulate;

  __device__ bool owns(int n) const { return threadIdx.x % 32 + 32 * n < T::kKeys; }

  __device__ void load(const Block<R, C, Y>& block, int c) {
    const InsertionProblem& p = block.p;
    const InsertionArrays& edit = block.edit;
    channel = block.first + c;
    there = channel < p.channels;
    demodulate = p.demodulate;
    energy = demodulate && there ? edit.energy[channel] : 1.f;
    scale = edit.penalty_scale != nullptr && there ? edit.penalty_scale[channel] * (2.f / p.channels) : 0.f;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int j = threadIdx.x % 32 + 32 * n;
      const bool own = there && owns(n);
      const std::int64_t at = std::int64_t(channel) * T::kKeys + (own ? block.key_of(j / kTaps, j % kTaps) : 0);
      lambda[n] = own ? edit.lambda[at] : 0.f;
      mean[n] = own ? edit.exp_avg[at] : 0.f;
      square[n] = own ? edit.exp_avg_sq[at] : 0.f;
      cross[n] = own && demodulate ? edit.cross[at] : 0.f;
    }
  }

  // matrix (r x r, global) times Lambda, at this lane's keys.
  __device__ void multiply_square(const float* matrix, const float* all, float (&result)[kOwn]) const {
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int j = threadIdx.x % 32 + 32 * n;
      result[n] = 0.f;
      if (!owns(n)) continue;
#pragma unroll
      for (int e = 0; e < R; ++e) result[n] += matrix[j / kTaps * R + e] * all[e * kTaps + j % kTaps];
    }
  }

  // gram Lambda and demod for the Lambda at hand. all: the channel's Lambda in shared memory, which this warp wrote.
  __device__ void demodulation(const InsertionArrays& edit, const float* all, float* place) {
    demod = 1.f;
    if (demodulate) {
      multiply_square(edit.gram, all, product);
      float norm2 = 0.f;
#pragma unroll
      for (int n = 0; n < kOwn; ++n) norm2 += (2.f * cross[n] + product[n]) * lambda[n];
      demod = 1.f / sqrtf(energy + warp_sum(norm2));
    }
    if (threadIdx.x % 32 == 0) *place = demod;
  }

  // partial: the first of `count` warps' sums of this channel, `stride` apart.
  __device__ void step(const InsertionArrays& edit, const AdamStep& adam, const float* partial, int count, int stride,
                       float* all, double* loss) {
    float by_demod = 0.f, sum = 0.f;
    for (int i = 0; i < count; ++i) {
      by_demod += partial[i * stride + T::kKeys];
      sum += partial[i * stride + T::kKeys + 1];
    }
    if (threadIdx.x % 32 == 0) *loss = there ? sum : 0.f;  // past the last channel the noise alone is left
    float gradient[kOwn];
    if (edit.penalty_matrix != nullptr) multiply_square(edit.penalty_matrix, all, gradient);
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int j = threadIdx.x % 32 + 32 * n;
      gradient[n] = edit.penalty_matrix != nullptr ? gradient[n] * scale : 0.f;
      if (!owns(n)) continue;
      float data = 0.f;
      for (int i = 0; i < count; ++i) data += partial[i * stride + j];
      gradient[n] += data * demod;
      // d demod / d Lambda = -demod^3 (cross + gram Lambda)
      if (demodulate) gradient[n] -= by_demod * (demod * demod * demod) * (cross[n] + product[n]);
    }
    __syncwarp();  // Lambda has been read by the whole warp
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      lambda[n] = adam_step<ScalarOps>(lambda[n], gradient[n], mean[n], square[n], adam);
      if (owns(n)) all[threadIdx.x % 32 + 32 * n] = lambda[n];
    }
    __syncwarp();
  }

  __device__ void store(const Block<R, C, Y>& block) const {
    const InsertionArrays& edit = block.edit;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int j = threadIdx.x % 32 + 32 * n;
      if (!there || !owns(n)) continue;
      const std::int64_t at = std::int64_t(channel) * T::kKeys + block.key_of(j / kTaps, j % kTaps);
      edit.lambda[at] = lambda[n];
      edit.exp_avg[at] = mean[n];
      edit.exp_avg_sq[at] = square[n];
    }
  }
};

template <int R, int C, int Y>
__global__ void __launch_bounds__(Traits<R, C, Y>::kThreads, 1)
    resident_kernel(const __grid_constant__ InsertionProblem p, const __grid_constant__ Layout at, int channels) {
  using T = Traits<R, C, Y>;
  const InsertionArrays& edit = p.edits[blockIdx.y];
  extern __shared__ __align__(16) float shared[];
  const Block<R, C, Y> block = {p, p.edits[blockIdx.y], shared, at, static_cast<int>(blockIdx.x) * channels, channels};
  const int warp = threadIdx.x / 32, groups = channels / C, group_warps = T::kWarps / groups,
            group = warp / group_warps;
  // Warp c optimises channel c; warps are spread over the schedulers, so the four of them do not share one.
  const bool optimises = warp < channels;
  Optimizer<R, C, Y> optimizer;
  block.load();
  if (optimises) optimizer.load(block, warp);
  __syncthreads();  // Lambda is whole
  float* lambda = shared + at.lambda + warp * T::kKeys;
  if (optimises) optimizer.demodulation(edit, lambda, shared + at.demod + warp);
  __syncthreads();
  const int place = sums_place<T::kSums>(threadIdx.x % 32), held = sums_held<T::kSums>(threadIdx.x % 32, T::kSums);
  for (int step = 0; step < p.count; ++step) {
    float sums[C][T::kKeys + 2], adam = 0.f;
    // Read now, used after the pixels: Adam does not wait for the memory.
    if (threadIdx.x < kAdamFloats) adam = reinterpret_cast<const float*>(p.schedule + step)[threadIdx.x];
    block.run_pixels(group * C, threadIdx.x - group * group_warps * 32, group_warps * 32, sums);
    warp_sums<T::kSums>(&sums[0][0]);
#pragma unroll
    for (int i = 0; i < T::kHeld; ++i)
      if (i < held) shared[at.sums + warp * T::kSums + place + i] = (&sums[0][0])[i];
    if (threadIdx.x < kAdamFloats) shared[at.adam + threadIdx.x] = adam;
    __syncthreads();  // the partial sums are whole, Lambda is used up
    if (optimises) {
      const float* partial = shared + at.sums + warp / C * group_warps * T::kSums + warp % C * (T::kKeys + 2);
      optimizer.step(edit, *reinterpret_cast<const AdamStep*>(shared + at.adam), partial, group_warps, T::kSums, lambda,
                     edit.block_losses + (std::int64_t(blockIdx.x) * channels + warp) * p.count + step);
      optimizer.demodulation(edit, lambda, shared + at.demod + warp);
    }
    __syncthreads();  // Lambda and demod are whole, the partial sums used up
  }
  if (optimises) optimizer.store(block);
}

template <int R, int C, int Y>
cudaError_t launch(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream) {
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(resident_kernel<R, C, Y>));
  if (error != cudaSuccess) return error;
  const int channels = plan.channels_per_block;
  const Layout at =
      layout_of(R, p.heights[0], p.widths[0], Y, channels, Traits<R, C, Y>::kWarps * Traits<R, C, Y>::kSums);
  resident_kernel<R, C, Y>
      <<<dim3(plan.blocks, edits), Traits<R, C, Y>::kThreads, plan.shared_bytes, stream>>>(p, at, channels);
  return cudaGetLastError();
}

template <int R, int C, int Y>
InsertionPlan plan(const InsertionProblem& p, const InsertionDevice& device, int channels) {
  const Layout at =
      layout_of(R, p.heights[0], p.widths[0], Y, channels, Traits<R, C, Y>::kWarps * Traits<R, C, Y>::kSums);
  if (4 * at.size > device.shared_bytes) return {};
  const int blocks = (p.channels + channels - 1) / channels;
  return {blocks, channels, 4 * at.size, true, blocks * channels, 0};
}

// One direction leaves the registers for two channels a thread, which share the loads of keys, noise and weights, and
// for two rows of pixels, which share those of keys. It pays where it leaves at least half the threads of `channels` a
// tile.
bool takes_large_tiles(const InsertionProblem& p, int channels) {
  const int tiles = (p.heights[0] + 1) / 2 * ((p.widths[0] + 3) / 4);
  return p.rank == 1 && channels >= 2 && tiles * (channels / 2) * 2 >= Traits<1, 2, 2>::kThreads;
}

}  // namespace

// One target, 3 x 3, at most four directions. As many channels a block as fill the multiprocessors once, fewer where
// they do not fit.
InsertionPlan plan_resident(const InsertionProblem& p, const InsertionDevice& device) {
  if (p.targets != 1 || p.rank > kMostRank || p.kernel_height != 3 || p.kernel_width != 3) return {};
  if (p.pixels > kMostPixels || p.heights[0] > kMostPixels / 4) return {};
  int c = kMostChannels;
  while (c > 1 && (p.channels + c / 2 - 1) / (c / 2) <= device.multiprocessors) c /= 2;
  for (; c >= 1; c /= 2) {
    const InsertionPlan found = takes_large_tiles(p, c) ? plan<1, 2, 2>(p, device, c)
                                : p.rank == 1           ? plan<1, 1, 1>(p, device, c)
                                : p.rank == 2           ? plan<2, 1, 1>(p, device, c)
                                : p.rank == 3           ? plan<3, 1, 1>(p, device, c)
                                                        : plan<4, 1, 1>(p, device, c);
    if (found.blocks > 0) return found;
  }
  return {};
}

cudaError_t launch_resident(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream) {
  if (takes_large_tiles(p, plan.channels_per_block)) return launch<1, 2, 2>(p, plan, edits, stream);
  if (p.rank == 1) return launch<1, 1, 1>(p, plan, edits, stream);
  if (p.rank == 2) return launch<2, 1, 1>(p, plan, edits, stream);
  if (p.rank == 3) return launch<3, 1, 1>(p, plan, edits, stream);
  return launch<4, 1, 1>(p, plan, edits, stream);
}

}  // namespace pyrewrite
