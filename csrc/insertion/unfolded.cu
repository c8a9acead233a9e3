// The insertion of one direction on one larger target, on GPUs with clusters. A cluster of four blocks owns 16 output
// channels; each block computes all of them on a quarter of the pixels, whose base, goal and unfolded keys stay in its
// shared memory. Both products of a step go through the tensor cores: Lambda (16 channels x taps) times the keys, and
// dloss / dz times the keys. Each block sends its part of the gradient to the other three, and each takes Adam's step
// for all 16 channels: one barrier of the cluster a step. Clusters never wait for one another.
//
// dloss / dz needs no rounding: its sign times the activation's slope is one of two whole numbers, after a scale
// (whole_slopes), and its weight is part of the keys it is multiplied with.
#include <cooperative_groups.h>

#include "insertion/kernels.h"
#include "insertion/mma.h"

namespace pyrewrite {
namespace {

namespace cg = cooperative_groups;

// The sizes that the kernel is compiled for.
struct Sizes {
  static constexpr int kBlocks = 4;     // of a cluster
  static constexpr int kChannels = 16;  // of a cluster: the rows of the matrix instruction
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kGroup = 16;            // pixels: the inner extent of the gradient's product
  static constexpr int kMostTaps = 9;          // eight, and one more beside them
  static constexpr int kFewestPixels = 1536;   // below, a block's barriers and sums outweigh its pixels
  static constexpr int kMostPixels = 1 << 16;  // more never fit; the layout's sums stay small
  static constexpr int kLambdaRow = 48;        // bytes of 16 halves, an odd number of 16-byte pieces
  // Sums of a channel over the pixels: the gradient's taps (before demod), dloss / d demod, the loss.
  static constexpr int kByDemod = kMostTaps, kLoss = kMostTaps + 1, kSums = kMostTaps + 2;
  // Place of sum `kind` of channel c: even taps, odd ones, the rest, in rows of 16 that lie so that the lanes of a
  // warp, which hold 8 channels of 4 taps, write to 32 banks.
  static __host__ __device__ constexpr int sum_at(int kind, int c) {
    const int row = kind < 8 ? kind % 2 * 4 + kind / 2 : kind;
    return row * 16 + (c ^ row / 2 % 2 * 8);
  }
  static __host__ __device__ constexpr int kind_at(int place) {
    const int row = place / 16;
    return row < 8 ? row % 4 * 2 + row / 4 : row;
  }
  static constexpr int kLanes = 16;  // that take Adam's step for a channel
  static_assert(kChannels * kSums * 2 <= kThreads && kChannels * kSums % 16 == 0, "two threads a sum, whole warps");
  static_assert(kChannels * kLanes <= kThreads && kMostTaps <= kLanes, "a thread a key");
};
using T = Sizes;

constexpr int kAdamFloats = sizeof(AdamStep) / sizeof(float);

// A group of 16 pixels in shared memory, in bytes: all that a step needs of it. Matrices of 8 x 8 halves are read by
// rows of 16 bytes: eight pixels of a tap. Taps 0-7 of eight pixels lie side by side, first those of both eights' hi,
// then lo; behind them tap 8: hi and lo of the first eight, hi and lo of the second.
struct Group {
  static constexpr int kLo = 256, kLast = 512, kKeyBytes = 576;  // within keys
  static constexpr int kBase = 0;              // 2 x 32 lanes x 4 floats: as the product's result lies in registers
  static constexpr int kGoal = kBase + 1024;   // likewise
  static constexpr int kNoise = kGoal + 1024;  // 16 floats, over `unit`
  static constexpr int kWeight = kNoise + 64;  // 16 floats, of the loss's sum over the channels
  static constexpr int kKeys = kWeight + 64;   // times their scale
  static constexpr int kWeighted = kKeys + kKeyBytes;  // times the pixel's weight and their scale
  static constexpr int kBytes = kWeighted + kKeyBytes;

  // Of a tap's hi at pixel n; lo lies lo(tap) behind.
  static __host__ __device__ constexpr int key(int tap, int n) {
    return (tap < 8 ? n / 8 * 128 + tap * 16 : kLast + n / 8 * 32) + n % 8 * 2;
  }
  static __host__ __device__ constexpr int lo(int tap) { return tap < 8 ? kLo : 16; }
};

// Places in shared memory, in bytes.
struct Layout {
  int groups;          // of a block, at most
  int lambda;          // 2 x 16 rows of halves: taps 0-7 hi, lo; taps 0-7 hi, tap 8 hi, lo, hi
  int partial;         // kWarps x 16 x kSums floats
  int gathered;        // 2 x kBlocks x 16 x kSums floats: the blocks' sums of this step and of the one before
  int demod, inverse;  // 16 floats; inverse: of Lambda's scale
  int adam;            // the step's AdamStep
  int arrived;         // 2 barriers in hardware, for the two halves of `gathered`
  int size;
  float positive, other;  // the activation's slopes as whole numbers
  float unit;             // positive x unit is the slope
};

__host__ __device__ inline Layout layout_of(int pixels) {
  const int groups = (pixels + T::kGroup - 1) / T::kGroup, sums = 4 * T::kChannels * T::kSums;
  Layout at{};
  at.groups = (groups + T::kBlocks - 1) / T::kBlocks;
  at.lambda = at.groups * Group::kBytes;
  at.partial = at.lambda + 2 * T::kChannels * T::kLambdaRow;
  at.gathered = at.partial + T::kWarps * sums;
  at.demod = at.gathered + 2 * T::kBlocks * sums;
  at.inverse = at.demod + T::kChannels * 4;
  at.arrived = at.inverse + T::kChannels * 4;
  at.adam = at.arrived + 2 * 8;
  at.size = at.adam + kAdamFloats * 4;
  return at;
}

bool whole_slopes(const InsertionProblem& p, Layout* at) {
  if (!whole_slopes(p, &at->positive, &at->other)) return false;
  at->unit = p.up / at->positive;
  return true;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The same place in another block of the cluster.
__device__ __forceinline__ unsigned in_block(unsigned place, int other) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place), "r"(other));
  return there;
}

// Writes to another block, and counts the bytes at a barrier of that block: who waits there sees them, without a fence.
__device__ __forceinline__ void tell(unsigned to, float value, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
               "r"(__float_as_int(value)), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void barrier_init(unsigned barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(barrier)
               : "memory");
}

// The one arrival of a phase, and how many bytes come with it.
__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// Of a power of two, as half_scale makes them.
__device__ __forceinline__ float reciprocal(float power) { return __int_as_float((254 << 23) - __float_as_int(power)); }

struct Worker {
  const InsertionProblem& p;
  const InsertionArrays& edit;
  const Layout& at;
  char* shared;
  unsigned address;  // of `shared`
  int first;         // channel of the cluster
  int block;         // of the cluster
  int begin, end;    // pixels of this block
  int warp, lane;

  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(shared + offset); }
  __device__ int groups() const { return (end - begin + T::kGroup - 1) / T::kGroup; }
  __device__ bool has(int c) const { return first + c < p.channels; }

  // Over `unit`, as all that is added to the convolution.
  __device__ float bias(int c) const { return has(c) ? edit.bias[first + c] * at.unit : 0.f; }

  // -- before the first step ------------------------------------------------------------------------------------------

  // The largest |x| of the block, in all threads.
  __device__ float largest(float x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    __syncthreads();
    if (lane == 0) floats(at.partial)[warp] = x;
    __syncthreads();
    for (int w = 0; w < T::kWarps; ++w) x = fmaxf(x, floats(at.partial)[w]);
    return x;
  }

  // Zeros past the last channel. Past the block's last pixel: what adds nothing, to float32's precision, even where no
  // weight of 0 says so.
  __device__ void load_pixels() const {
    const int padded = at.groups * T::kGroup;
    for (int i = threadIdx.x; i < T::kChannels * padded; i += T::kThreads) {
      const int c = i / padded, n = i % padded, u = begin + n;
      const bool there = u < end && has(c);
      const std::int64_t from = std::int64_t(first + c) * p.pixels + u;
      // Half, lane and register of the product's result.
      const int place = (n % 16 / 8 * 32 + c % 8 * 4 + n % 8 / 2) * 4 + c / 8 * 2 + n % 2;
      floats(group_at(n) + Group::kBase)[place] = there ? edit.base[from] : 0.f;
      const float nothing = bias(c) * (bias(c) > 0.f ? at.positive : at.other);  // the value there
      floats(group_at(n) + Group::kGoal)[place] = there ? edit.goal[from] : nothing;
    }
    for (int n = threadIdx.x; n < padded; n += T::kThreads) {
      const bool there = begin + n < end;
      floats(group_at(n) + Group::kNoise)[n % 16] = there ? edit.noise[begin + n] * at.unit : 0.f;
      weight(n) = there ? edit.weight[begin + n] / p.channels : 0.f;
    }
  }

  __device__ static int group_at(int n) { return n / T::kGroup * Group::kBytes; }
  __device__ float& weight(int n) const { return floats(group_at(n) + Group::kWeight)[n % 16]; }

  // Whether all pixels of the block weigh as much as the first.
  __device__ bool weighs_evenly() const {
    bool even = true;
    for (int u = begin + threadIdx.x; u < end; u += T::kThreads) even = even && edit.weight[u] == edit.weight[begin];
    return __syncthreads_and(even);
  }

  // Keys as halves, and their scales. Zeros past the block's last pixel and the last tap.
  __device__ void load_keys(float& key_scale, float& weighted_scale) const {
    const int padded = at.groups * T::kGroup;
    float most = 0.f, heaviest = 0.f;
    for (int i = threadIdx.x; i < p.taps * (end - begin); i += T::kThreads) {
      const int tap = i / (end - begin), n = i % (end - begin);
      const float key = edit.keys[std::int64_t(tap) * p.pixels + begin + n];
      most = fmaxf(most, fabsf(key));
      heaviest = fmaxf(heaviest, fabsf(key * weight(n)));
    }
    key_scale = half_scale(largest(most));
    weighted_scale = half_scale(largest(heaviest));
    for (int i = threadIdx.x; i < T::kMostTaps * padded; i += T::kThreads) {
      const int tap = i / padded, n = i % padded, to = group_at(n) + Group::key(tap, n % 16);
      const float key = tap < p.taps && begin + n < end ? edit.keys[std::int64_t(tap) * p.pixels + begin + n] : 0.f;
      put(to + Group::kKeys, Group::lo(tap), split(key * key_scale));
      put(to + Group::kWeighted, Group::lo(tap), split(key * weight(n) * weighted_scale));
    }
  }

  // hi at `to`, lo `apart` bytes behind it.
  __device__ void put(int to, int apart, Split value) const {
    *reinterpret_cast<__half*>(shared + to) = value.hi;
    *reinterpret_cast<__half*>(shared + to + apart) = value.lo;
  }

  // -- the pixels -----------------------------------------------------------------------------------------------------

  // Each warp's sums over its pixels. shift: bias of this lane's channels. Even: all pixels weigh the same, and that is
  // left to send().
  template <bool Even>
  __device__ void run_pixels(float key_unscale, const float (&shift)[2]) const {
    unsigned taps[4], rest[4];  // Lambda as it meets the keys' hi, and their lo and the last tap
    const unsigned lambda = address + at.lambda + lane % 16 * T::kLambdaRow + lane / 16 * 16;
    load_matrices(taps, lambda);
    load_matrices(rest, lambda + T::kChannels * T::kLambdaRow);
    float scale[2], demod[2];  // of rows lane / 4 and 8 more
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int c = r * 8 + lane / 4;
      scale[r] = floats(at.inverse)[c] * key_unscale;
      demod[r] = floats(at.demod)[c] * at.unit;
    }
    // Where this lane's row of each matrix begins. Of tap 8: hi, hi, lo; the rows behind, which lie in other banks,
    // meet zeros of Lambda, and what becomes of them in the gradient is not used.
    const int half = lane / 16, row = lane % 8;
    const int of_last = row < 2 ? Group::kLast : row == 2 ? Group::kLast + 16 : max(row, 4) * 16;
    const int step_of_last = row < 3 ? 32 : 128;  // to the second eight of pixels
    const unsigned start = address + warp * Group::kBytes;
    unsigned lane_at = start + lane * 16;
    unsigned hi_at = start + Group::kKeys + lane / 8 % 2 * 128 + row * 16;
    unsigned lo_at =
        start + Group::kKeys + (lane / 8 % 2 ? of_last + half * step_of_last : Group::kLo + half * 128 + row * 16);
    unsigned last_at = start + Group::kWeighted + of_last + lane / 8 % 2 * step_of_last;
    const char* pixels = shared + warp * Group::kBytes;
    float gradient[4] = {}, last_gradient[4] = {}, by_demod[2] = {}, loss[2] = {};
    for (int group = warp; group < groups(); group += T::kWarps) {
      float base[2][4], goal[2][4];
      float2 noise[2], weight[2] = {{1.f, 1.f}, {1.f, 1.f}};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        *reinterpret_cast<float4*>(base[j]) =
            *reinterpret_cast<const float4*>(pixels + lane * 16 + Group::kBase + j * 512);
        *reinterpret_cast<float4*>(goal[j]) =
            *reinterpret_cast<const float4*>(pixels + lane * 16 + Group::kGoal + j * 512);
        noise[j] = *reinterpret_cast<const float2*>(pixels + lane % 4 * 8 + Group::kNoise + j * 32);
        if (!Even) weight[j] = *reinterpret_cast<const float2*>(pixels + lane % 4 * 8 + Group::kWeight + j * 32);
      }
      unsigned hi[2], lo[4];  // of both eights of pixels; lo beside tap 8
      load_matrices_transposed(lo, lo_at);
      load_two_matrices_transposed(hi, hi_at);
      float y[2][4], by[2][4], difference[2][4], nearest = 1.f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float acc[4] = {};
        multiply(acc, rest, lo[2 * j], lo[2 * j + 1]);
        multiply_eight(acc, taps[2], taps[3], hi[j]);
        multiply_eight(acc, taps[0], taps[1], hi[j]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = i / 2;
          y[j][i] = base[j][i] + acc[i] * scale[r];
          float& d = difference[j][i];
          d = pixel_difference<ScalarOps>(y[j][i], demod[r], (i % 2 ? noise[j].y : noise[j].x) + shift[r], goal[j][i],
                                          at.positive, at.other, by[j][i]);
          by[j][i] = ScalarOps::turned(by[j][i], d);
          loss[r] += (i % 2 ? weight[j].y : weight[j].x) * fabsf(d);
          nearest = fminf(nearest, fabsf(d));
        }
      }
      // A difference of 0 has no sign. It is rare, and looked for in all eight at once.
      if (nearest == 0.f) {
#pragma unroll
        for (int n = 0; n < 8; ++n)
          if ((&difference[0][0])[n] == 0.f) (&by[0][0])[n] = 0.f;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) by_demod[i / 2] += by[j][i] * (i % 2 ? weight[j].y : weight[j].x) * y[j][i];
      // The result's registers are the next product's factor: 16 channels x 16 pixels.
      unsigned factor[4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          factor[2 * j + r] = pack(__float2half_rn(by[j][2 * r]), __float2half_rn(by[j][2 * r + 1]));
      unsigned keys[4], last[2];
      load_matrices(keys, lane_at + Group::kWeighted);
      load_two_matrices(last, last_at);
      multiply(gradient, factor, keys[2], keys[3]);
      multiply(gradient, factor, keys[0], keys[1]);
      multiply(last_gradient, factor, last[0], last[1]);
      pixels += T::kWarps * Group::kBytes;
      lane_at += T::kWarps * Group::kBytes, hi_at += T::kWarps * Group::kBytes;
      lo_at += T::kWarps * Group::kBytes, last_at += T::kWarps * Group::kBytes;
    }
    // Sums over the lanes that share a channel.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* to = floats(at.partial) + warp * T::kChannels * T::kSums;
      const int c = r * 8 + lane / 4, quarter = lane % 4;
      // Tap 8 stands in columns 0 (hi) and 2 (lo): in the first two lanes of four.
      const float last = last_gradient[2 * r] + __shfl_xor_sync(0xffffffffu, last_gradient[2 * r], 1);
      by_demod[r] = quad_sum(by_demod[r]);
      loss[r] = quad_sum(loss[r]);
      to[T::sum_at(quarter * 2, c)] = gradient[2 * r];
      to[T::sum_at(quarter * 2 + 1, c)] = gradient[2 * r + 1];
      if (quarter < 3) to[T::sum_at(8 + quarter, c)] = quarter == 0 ? last : quarter == 1 ? by_demod[r] : loss[r];
    }
  }

  // Sums over the warps, in the problem's units, to all blocks. unscale: of the gradient. weight: what the others lack.
  __device__ void send(int buffer, float unscale, float weight) const {
    constexpr int kAll = T::kChannels * T::kSums;
    if (threadIdx.x >= 2 * kAll) return;
    // Two threads a sum, half a warp apart: every second warp each, and half of the blocks to tell.
    const int n = warp * 16 + lane % 16, half = lane / 16, kind = T::kind_at(n);
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < T::kWarps / 2; ++w) sum += floats(at.partial)[(2 * w + half) * kAll + n];
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    sum *= kind < T::kByDemod ? unscale : kind == T::kByDemod ? at.unit * weight : weight;
    const unsigned to = address + at.gathered + 4 * ((buffer * T::kBlocks + block) * kAll + n);
#pragma unroll
    for (int i = 0; i < T::kBlocks / 2; ++i) {
      const int other = half * (T::kBlocks / 2) + i;
      tell(in_block(to, other), sum, in_block(address + at.arrived + 8 * buffer, other));
    }
  }
};

// Adam of one channel, by half a warp: lane j owns key j. All blocks of a cluster do the same.
struct Optimizer {
  float lambda, mean, square, cross, product;
  float gram, penalty, energy, demod;
  int c, key;  // channel of the cluster
  bool there;  // its channel and its key

  __device__ static float lanes_sum(float x) {
#pragma unroll
    for (int step = T::kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  __device__ void load(const Worker& worker) {
    const InsertionProblem& p = worker.p;
    const InsertionArrays& edit = worker.edit;
    c = threadIdx.x / T::kLanes, key = threadIdx.x % T::kLanes;
    there = worker.has(c) && key < p.taps;
    const int channel = worker.first + c;
    const std::int64_t from = std::int64_t(channel) * p.taps + key;
    lambda = there ? edit.lambda[from] : 0.f;
    mean = there ? edit.exp_avg[from] : 0.f;
    square = there ? edit.exp_avg_sq[from] : 0.f;
    cross = there && p.demodulate ? edit.cross[from] : 0.f;
    gram = p.demodulate ? edit.gram[0] : 0.f;
    energy = worker.has(c) && p.demodulate ? edit.energy[channel] : 1.f;
    // Of the penalty's gradient, 2 q / O P Lambda.
    penalty = edit.penalty_scale != nullptr && worker.has(c)
                  ? edit.penalty_scale[channel] * (2.f / p.channels) * edit.penalty_matrix[0]
                  : 0.f;
  }

  // Lambda as halves, its scale and demod into shared memory. Ends without a barrier.
  __device__ void publish(const Worker& worker) {
    product = gram * lambda;
    demod = 1.f;
    if (worker.p.demodulate) demod = 1.f / sqrtf(energy + lanes_sum((2.f * cross + product) * lambda));
    float most = fabsf(lambda);
#pragma unroll
    for (int step = T::kLanes / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    const float scale = half_scale(most);
    const Split value = split(lambda * scale);
    __half* taps = reinterpret_cast<__half*>(worker.shared + worker.at.lambda + c * T::kLambdaRow);
    __half* rest = reinterpret_cast<__half*>(reinterpret_cast<char*>(taps) + T::kChannels * T::kLambdaRow);
    if (key < 8) {
      taps[key] = rest[key] = value.hi;
      taps[8 + key] = value.lo;
    } else if (key == 8) {
      // Against tap 8's hi, hi and lo; zeros behind.
      rest[8] = rest[10] = value.hi;
      rest[9] = value.lo;
    } else if (key > 10) {
      rest[key] = __float2half_rn(0.f);
    }
    if (key == 0) {
      worker.floats(worker.at.demod)[c] = demod;
      worker.floats(worker.at.inverse)[c] = reciprocal(scale);
    }
  }

  // parts: the blocks' sums of all channels.
  __device__ void step(const float* parts, const AdamStep& adam, bool channel_there, double* loss) {
    float total = 0.f, by_demod = 0.f;
#pragma unroll
    for (int from = 0; from < T::kBlocks; ++from) {
      const float* part = parts + from * T::kChannels * T::kSums;
      if (key <= T::kLoss) total += part[T::sum_at(key, c)];
      by_demod += part[T::sum_at(T::kByDemod, c)];
    }
    // Past the last channel the noise alone is left.
    if (key == T::kLoss && loss != nullptr) *loss = channel_there ? total : 0.f;
    if (!there) return;
    // d demod / d Lambda = -demod^3 (cross + gram Lambda); product and cross are 0 where nothing is demodulated.
    const float gradient = penalty * lambda + total * demod - by_demod * (demod * demod * demod) * (cross + product);
    lambda = adam_step<ScalarOps>(lambda, gradient, mean, square, adam);
  }

  __device__ void store(const Worker& worker) const {
    if (!there) return;
    const std::int64_t to = std::int64_t(worker.first + c) * worker.p.taps + key;
    worker.edit.lambda[to] = lambda;
    worker.edit.exp_avg[to] = mean;
    worker.edit.exp_avg_sq[to] = square;
  }
};

#endif

__global__ void __launch_bounds__(T::kThreads, 1)
    unfolded_kernel(const __grid_constant__ InsertionProblem p, const __grid_constant__ Layout at) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  const cg::cluster_group cluster = cg::this_cluster();
  const InsertionArrays& edit = p.edits[blockIdx.y];
  const int block = cluster.block_rank(), number = blockIdx.x / T::kBlocks;
  const int groups = (p.pixels + T::kGroup - 1) / T::kGroup;
  const Worker worker = {p,
                         edit,
                         at,
                         shared,
                         static_cast<unsigned>(__cvta_generic_to_shared(shared)),
                         number * T::kChannels,
                         block,
                         groups * block / T::kBlocks * T::kGroup,
                         min(groups * (block + 1) / T::kBlocks * T::kGroup, p.pixels),
                         static_cast<int>(threadIdx.x) / 32,
                         static_cast<int>(threadIdx.x) % 32};
  const bool optimises = threadIdx.x < T::kChannels * T::kLanes;
  float key_scale, weighted_scale;
  Optimizer optimizer;
  if (threadIdx.x < 2) barrier_init(worker.address + at.arrived + 8 * threadIdx.x);
  worker.load_pixels();
  __syncthreads();  // the weights are there
  worker.load_keys(key_scale, weighted_scale);
  if (optimises) {
    optimizer.load(worker);
    optimizer.publish(worker);
  }
  __syncthreads();  // all is there
  const float shift[2] = {worker.bias(worker.lane / 4), worker.bias(8 + worker.lane / 4)};
  const bool even = worker.weighs_evenly();
  const float weight = even ? worker.weight(0) : 1.f;
  const float key_unscale = reciprocal(key_scale), unscale = at.unit * reciprocal(weighted_scale);
  cluster.sync();  // all blocks have started, with barriers: their shared memory may be written
  for (int step = 0; step < p.count; ++step) {
    // Read now, used after the pixels: Adam does not wait for the memory.
    float adam = 0.f;
    if (threadIdx.x < kAdamFloats) adam = reinterpret_cast<const float*>(p.schedule + step)[threadIdx.x];
    const unsigned arrived = worker.address + at.arrived + step % 2 * 8;
    if (threadIdx.x == 0) barrier_expect(arrived, T::kBlocks * T::kChannels * T::kSums * 4);
    if (even)
      worker.run_pixels<true>(key_unscale, shift);
    else
      worker.run_pixels<false>(key_unscale, shift);
    if (threadIdx.x < kAdamFloats) worker.floats(at.adam)[threadIdx.x] = adam;
    __syncthreads();  // the warps' sums are whole
    worker.send(step % 2, unscale, weight);
    if (optimises) {
      barrier_wait(arrived, step / 2 % 2);  // every block's sums are here
      const int channel = number * T::kChannels + optimizer.c;
      double* loss = block == 0 ? edit.block_losses + std::int64_t(channel) * p.count + step : nullptr;
      optimizer.step(worker.floats(at.gathered) + step % 2 * T::kBlocks * T::kChannels * T::kSums,
                     *reinterpret_cast<const AdamStep*>(shared + at.adam), worker.has(optimizer.c), loss);
      optimizer.publish(worker);
    }
    __syncthreads();  // Lambda and demod are whole, the sums used up
  }
  cluster.sync();  // no block is written to any more
  if (optimises && block == 0) optimizer.store(worker);
#endif
}

}  // namespace

// A GPU with clusters and room for one, one target, one direction, at most nine taps, enough pixels to be worth four
// blocks, enough channels to fill the multiprocessors, and an activation whose slopes are as whole numbers.
InsertionPlan plan_unfolded(const InsertionProblem& p, const InsertionDevice& device) {
  if (!device.clusters || p.targets != 1 || p.rank != 1 || p.taps > T::kMostTaps) return {};
  if (p.pixels < T::kFewestPixels || p.pixels > T::kMostPixels) return {};
  Layout at = layout_of(p.pixels);
  if (at.size > device.shared_bytes || !whole_slopes(p, &at)) return {};
  // With fewer channels, smaller shares of them for each block leave less to do a step.
  if ((p.channels + 1) / 2 <= device.multiprocessors) return {};
  if (clusters_at_once(reinterpret_cast<const void*>(unfolded_kernel), T::kBlocks, T::kThreads, at.size) == 0)
    return {};
  const int clusters = (p.channels + T::kChannels - 1) / T::kChannels;
  return {clusters * T::kBlocks, T::kChannels, at.size, true, clusters * T::kChannels, 0};
}

cudaError_t launch_unfolded(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream) {
  Layout at = layout_of(p.pixels);
  whole_slopes(p, &at);
  return launch_in_clusters(unfolded_kernel, T::kBlocks, T::kThreads, p, plan, at, edits, stream);
}

}  // namespace pyrewrite
