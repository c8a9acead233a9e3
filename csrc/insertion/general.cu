// The insertion for any shape: a block owns C output channels from the first step to the last. Lambda and Adam's state
// stay in shared memory; base and goal as well where they fit, else they are read from global memory once a step, as
// the unfolded keys are twice.
#include "insertion/kernels.h"

namespace pyrewrite {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPixelsPerThread = 4;
constexpr int kChunk = kThreads * kPixelsPerThread;  // pixels that go through forward, sign and gradient together
static_assert(kChunk % 32 == 0, "a warp's lanes lie over pixels");

// C channels side by side.
template <int C>
struct alignas(4 * C) Channels {
  float v[C];
};

// Where everything lies in shared memory, in floats. Rows are C channels wide.
struct Layout {
  std::int64_t lambda, gradient, mean, square, product;  // K rows each; product: gram Lambda of the target at hand
  std::int64_t by_y;                                     // chunk rows
  std::int64_t sums;                                     // 3 kWarps rows
  std::int64_t base, goal;                               // N rows each, where resident
  std::int64_t size;
};

__host__ __device__ inline Layout layout_of(int k, int pixels, int c, bool resident) {
  Layout at;
  at.lambda = 0;
  at.gradient = at.lambda + std::int64_t(k) * c;
  at.mean = at.gradient + std::int64_t(k) * c;
  at.square = at.mean + std::int64_t(k) * c;
  at.product = at.square + std::int64_t(k) * c;
  at.by_y = at.product + std::int64_t(k) * c;
  at.sums = at.by_y + std::int64_t(kChunk) * c;
  at.base = at.sums + 3 * kWarps * c;
  at.goal = at.base + (resident ? std::int64_t(pixels) * c : 0);
  at.size = at.goal + (resident ? std::int64_t(pixels) * c : 0);
  return at;
}

template <int C>
struct Block {
  const InsertionProblem& p;
  const InsertionArrays& edit;
  float* shared;
  Layout at;
  int first;  // channel
  bool resident;

  __device__ Channels<C>& row(std::int64_t offset, int i) const {
    return *reinterpret_cast<Channels<C>*>(shared + offset + std::int64_t(i) * C);
  }
  __device__ bool has(int c) const { return first + c < p.channels; }
  // `from` at channel first + c, `stride` apart; `fallback` past the last channel.
  __device__ float channel(const float* from, std::int64_t stride, int c, float fallback) const {
    return has(c) ? from[(first + c) * stride] : fallback;
  }

  // The sum over all threads, the same in all of them, in a fixed order. place: 0, 1 or 2; one is free again after the
  // next __syncthreads.
  __device__ Channels<C> total(Channels<C> x, int place) const {
#pragma unroll
    for (int c = 0; c < C; ++c) x.v[c] = warp_sum(x.v[c]);
    if (threadIdx.x % 32 == 0) row(at.sums, place * kWarps + threadIdx.x / 32) = x;
    __syncthreads();
    x = {};
    for (int warp = 0; warp < kWarps; ++warp)
#pragma unroll
      for (int c = 0; c < C; ++c) x.v[c] += row(at.sums, place * kWarps + warp).v[c];
    return x;
  }

  // Row k of matrix (r x r) times Lambda.
  __device__ Channels<C> multiply_square(const float* matrix, int k) const {
    const int d = k / p.taps, tap = k % p.taps;
    Channels<C> x = {};
    for (int e = 0; e < p.rank; ++e) {
      const float value = matrix[d * p.rank + e];
      const Channels<C> lambda = row(at.lambda, e * p.taps + tap);
#pragma unroll
      for (int c = 0; c < C; ++c) x.v[c] += value * lambda.v[c];
    }
    return x;
  }

  __device__ void load(int k) const {
    for (int i = threadIdx.x; i < k * C; i += kThreads) {
      const int c = i / k, j = i % k;
      row(at.lambda, j).v[c] = channel(edit.lambda + j, k, c, 0.f);
      row(at.mean, j).v[c] = channel(edit.exp_avg + j, k, c, 0.f);
      row(at.square, j).v[c] = channel(edit.exp_avg_sq + j, k, c, 0.f);
    }
    if (!resident) return;
    for (int c = 0; c < C; ++c)
      for (int u = threadIdx.x; u < p.pixels; u += kThreads) {
        row(at.base, u).v[c] = channel(edit.base + u, p.pixels, c, 0.f);
        row(at.goal, u).v[c] = channel(edit.goal + u, p.pixels, c, 0.f);
      }
  }

  __device__ void store(int k) const {
    for (int i = threadIdx.x; i < k * C; i += kThreads) {
      const int c = i / k, j = i % k;
      if (!has(c)) continue;
      const std::int64_t to = std::int64_t(first + c) * k + j;
      edit.lambda[to] = row(at.lambda, j).v[c];
      edit.exp_avg[to] = row(at.mean, j).v[c];
      edit.exp_avg_sq[to] = row(at.square, j).v[c];
    }
  }

  // The gradient before any pixel: that of the penalty, 2 q_o / O * P Lambda_o, or zero.
  __device__ void start_gradient(int k) const {
    for (int j = threadIdx.x; j < k; j += kThreads) {
      Channels<C> x = {};
      if (edit.penalty_matrix != nullptr) {
        x = multiply_square(edit.penalty_matrix, j);
#pragma unroll
        for (int c = 0; c < C; ++c) x.v[c] *= channel(edit.penalty_scale, 1, c, 0.f) * (2.f / p.channels);
      }
      row(at.gradient, j) = x;
    }
  }

  // demod of target b for the Lambda at hand, and gram Lambda, which the gradient needs too.
  __device__ Channels<C> demodulation(int b, int k) const {
    const float* gram = edit.gram + std::int64_t(b) * p.rank * p.rank;
    Channels<C> norm2 = {};
    for (int j = threadIdx.x; j < k; j += kThreads) {
      const Channels<C> product = multiply_square(gram, j), lambda = row(at.lambda, j);
      row(at.product, j) = product;
#pragma unroll
      for (int c = 0; c < C; ++c)
        norm2.v[c] +=
            (2.f * channel(edit.cross + std::int64_t(b) * p.channels * k + j, k, c, 0.f) + product.v[c]) * lambda.v[c];
    }
    norm2 = total(norm2, 0);
#pragma unroll
    for (int c = 0; c < C; ++c)
      norm2.v[c] = 1.f / sqrtf(channel(edit.energy + std::int64_t(b) * p.channels, 1, c, 1.f) + norm2.v[c]);
    return norm2;
  }

  // Value, sign and dloss / dy of the pixels begin ... end - 1, at most a chunk; by_y past the end is 0.
  __device__ void forward(int k, int begin, int end, const Channels<C>& demod, Channels<C>& by_demod,
                          Channels<C>& loss) const {
    Channels<C> y[kPixelsPerThread];
    int at_pixel[kPixelsPerThread];
#pragma unroll
    for (int i = 0; i < kPixelsPerThread; ++i) {
      // Past the end the last pixel is computed again, and thrown away.
      at_pixel[i] = min(begin + i * kThreads + static_cast<int>(threadIdx.x), end - 1);
      if (resident)
        y[i] = row(at.base, at_pixel[i]);
      else
#pragma unroll
        for (int c = 0; c < C; ++c) y[i].v[c] = channel(edit.base + at_pixel[i], p.pixels, c, 0.f);
    }
    const float* keys = edit.keys;
    for (int j = 0; j < k; ++j, keys += p.pixels) {
      const Channels<C> lambda = row(at.lambda, j);
#pragma unroll
      for (int i = 0; i < kPixelsPerThread; ++i) {
        const float key = keys[at_pixel[i]];
#pragma unroll
        for (int c = 0; c < C; ++c) y[i].v[c] += key * lambda.v[c];
      }
    }
#pragma unroll
    for (int i = 0; i < kPixelsPerThread; ++i) {
      const int local = i * kThreads + threadIdx.x, u = at_pixel[i];
      const bool counts = begin + local < end;
      const float noise = edit.noise[u], weight = counts ? edit.weight[u] / p.channels : 0.f;
      Channels<C> by;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const float goal = resident ? row(at.goal, u).v[c] : channel(edit.goal + u, p.pixels, c, 0.f);
        // A channel past the last has base, goal and Lambda 0: give it no bias, and it adds nothing.
        const float shift = has(c) ? noise + edit.bias[first + c] : 0.f;
        const float by_z = pixel_step<ScalarOps>(y[i].v[c], demod.v[c], shift, goal, weight, p.up, p.down, loss.v[c]);
        by_demod.v[c] += by_z * y[i].v[c];
        by.v[c] = by_z * demod.v[c];
      }
      row(at.by_y, local) = by;
    }
  }

  // gradient += keys by_y over the pixels begin ... end - 1. A warp a row, its lanes over the pixels; no other warp
  // touches the row.
  __device__ void accumulate(int k, int begin, int end) const {
    const int lane = threadIdx.x % 32;
    for (int j = threadIdx.x / 32; j < k; j += kWarps) {
      const float* keys = edit.keys + std::int64_t(j) * p.pixels;
      Channels<C> x = {};
      for (int u = begin + lane; u < end; u += 32) {
        const float key = keys[u];
        const Channels<C> by = row(at.by_y, u - begin);
#pragma unroll
        for (int c = 0; c < C; ++c) x.v[c] += key * by.v[c];
      }
#pragma unroll
      for (int c = 0; c < C; ++c) x.v[c] = warp_sum(x.v[c]);
      if (lane == 0)
#pragma unroll
        for (int c = 0; c < C; ++c) row(at.gradient, j).v[c] += x.v[c];
    }
  }

  // Loss and gradient of target b.
  __device__ void run_target(int b, int k, Channels<C>& loss) const {
    Channels<C> demod, by_demod = {};
#pragma unroll
    for (int c = 0; c < C; ++c) demod.v[c] = 1.f;
    if (p.demodulate) demod = demodulation(b, k);
    for (int begin = p.starts[b]; begin < p.starts[b + 1]; begin += kChunk) {
      const int end = min(begin + kChunk, p.starts[b + 1]);
      forward(k, begin, end, demod, by_demod, loss);
      __syncthreads();  // by_y is whole
      accumulate(k, begin, end);
      __syncthreads();  // by_y is used up, the gradient whole
    }
    if (!p.demodulate) return;
    // d demod / d Lambda = -demod^3 (cross + gram Lambda)
    by_demod = total(by_demod, 1);
    for (int j = threadIdx.x; j < k; j += kThreads)
#pragma unroll
      for (int c = 0; c < C; ++c)
        row(at.gradient, j).v[c] -=
            by_demod.v[c] * (demod.v[c] * demod.v[c] * demod.v[c]) *
            (channel(edit.cross + std::int64_t(b) * p.channels * k + j, k, c, 0.f) + row(at.product, j).v[c]);
    __syncthreads();
  }

  __device__ void update(int k, const AdamStep& adam) const {
    for (int j = threadIdx.x; j < k; j += kThreads) {
      Channels<C> lambda = row(at.lambda, j), mean = row(at.mean, j), square = row(at.square, j);
      const Channels<C> gradient = row(at.gradient, j);
#pragma unroll
      for (int c = 0; c < C; ++c)
        lambda.v[c] = adam_step<ScalarOps>(lambda.v[c], gradient.v[c], mean.v[c], square.v[c], adam);
      row(at.lambda, j) = lambda;
      row(at.mean, j) = mean;
      row(at.square, j) = square;
    }
  }
};

template <int C>
__global__ void __launch_bounds__(kThreads, 1)
    general_kernel(const __grid_constant__ InsertionProblem p, bool resident) {
  extern __shared__ __align__(16) float shared[];
  const int k = p.rank * p.taps;
  const Block<C> block = {
      p, p.edits[blockIdx.y], shared, layout_of(k, p.pixels, C, resident), static_cast<int>(blockIdx.x) * C, resident};
  block.load(k);
  __syncthreads();
  for (int step = 0; step < p.count; ++step) {
    Channels<C> loss = {};
    block.start_gradient(k);
    __syncthreads();  // the gradient has begun
    for (int b = 0; b < p.targets; ++b) block.run_target(b, k, loss);
    loss = block.total(loss, 2);
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int c = 0; c < C; ++c) sum += loss.v[c];
      block.edit.block_losses[std::int64_t(blockIdx.x) * p.count + step] = sum;
    }
    block.update(k, p.schedule[step]);
    __syncthreads();  // Lambda is whole
  }
  block.store(k);
}

template <int C>
cudaError_t launch(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream) {
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(general_kernel<C>));
  if (error != cudaSuccess) return error;
  general_kernel<C><<<dim3(plan.blocks, edits), kThreads, plan.shared_bytes, stream>>>(p, plan.resident);
  return cudaGetLastError();
}

}  // namespace

// As many channels a block as fill the multiprocessors once (each reads all keys), fewer where they do not fit.
InsertionPlan plan_general(const InsertionProblem& p, const InsertionDevice& device) {
  int c = 4;
  while (c > 1 && (p.channels + c / 2 - 1) / (c / 2) <= device.multiprocessors) c /= 2;
  for (; c >= 1; c /= 2)
    for (const bool resident : {true, false}) {
      const std::int64_t bytes = 4 * layout_of(p.rank * p.taps, p.pixels, c, resident).size;
      if (bytes <= device.shared_bytes)
        return {(p.channels + c - 1) / c, c, static_cast<int>(bytes), resident, (p.channels + c - 1) / c, 0};
    }
  return {};
}

cudaError_t launch_general(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream) {
  if (plan.channels_per_block == 4) return launch<4>(p, plan, edits, stream);
  if (plan.channels_per_block == 2) return launch<2>(p, plan, edits, stream);
  return launch<1>(p, plan, edits, stream);
}

}  // namespace pyrewrite
