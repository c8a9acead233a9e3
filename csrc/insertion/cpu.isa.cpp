// The insertion's steps for blocks of output channels. Channels are independent through convolution, demodulation,
// leaky ReLU, L1 and Adam, so a block runs on its own from the first step to the last. Channels lie across the lanes of
// a vector: Lambda's row k is the k-th input of all of them, a pixel's key is one number for all of them, and nothing
// is summed across lanes but the loss.
//
// Both products of a step, Lambda keys (forward) and dloss/dy keys^T (gradient), are one register tile: six rows by two
// vectors.
#include "common/vector.isa.h"
#include "insertion/layout.h"
#include "insertion/params.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

constexpr int kVectors = 2;
constexpr int kBlock = kVectors * kLanes;  // channels of a block
typedef std::int32_t Mask __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec fill(float value) { return value - Vec{}; }

inline Vec root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, v);
#elif defined(__AVX__)
  return _mm256_sqrt_ps(v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(v);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vsqrtq_f32(v);
#else
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}

// What step.h needs of vectors.
struct VectorOps {
  static Vec choose(Vec z, Vec positive, Vec other) {
    const Mask mask = z > 0.f;
    return (Vec)((mask & (Mask)positive) | (~mask & (Mask)other));
  }
  static Vec magnitude(Vec x) { return (Vec)((Mask)x & ~(Mask)fill(-0.f)); }
  static Vec signed_as(Vec x, Vec d) { return (Vec)(((Mask)x ^ ((Mask)d & (Mask)fill(-0.f))) & (Mask)(d != 0.f)); }
  static Vec root(Vec x) { return PYREWRITE_ISA::root(x); }
};

// acc[row][vector] += sum over k of left[k * 6 + row] * right[k * stride + vector]: a tile of packed rows times a
// matrix.
template <int Rows>
inline void multiply(Vec (&acc)[Rows][kVectors], const float* left, const float* right, std::int64_t stride,
                     std::int64_t count) {
  for (std::int64_t k = 0; k < count; ++k) {
    const Vec right0 = load(right), right1 = load(right + kLanes);
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
      const Vec value = fill(left[row]);
      acc[row][0] += value * right0;
      acc[row][1] += value * right1;
    }
    left += kTile;
    right += stride;
  }
}

// gradient rows k .. k + Rows - 1 += sum over the pixels of a chunk of keys * by_y. keys: at row k of the chunk's first
// tile.
template <int Rows>
inline void accumulate(float* gradient, const float* keys, std::int64_t tile_stride, const float* by_y,
                       std::int64_t tiles) {
  Vec acc[Rows][kVectors];
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row) {
    acc[row][0] = load(gradient + row * kBlock);
    acc[row][1] = load(gradient + row * kBlock + kLanes);
  }
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    __builtin_prefetch(keys + tile_stride);
    __builtin_prefetch(keys + tile_stride + 16);
    __builtin_prefetch(keys + tile_stride + 32);
#pragma GCC unroll 6
    for (int pixel = 0; pixel < kTile; ++pixel) {
      const Vec by0 = load(by_y), by1 = load(by_y + kLanes);
#pragma GCC unroll 6
      for (int row = 0; row < Rows; ++row) {
        const Vec value = fill(keys[row * kTile + pixel]);
        acc[row][0] += value * by0;
        acc[row][1] += value * by1;
      }
      by_y += kBlock;
    }
    keys += tile_stride;
  }
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row) {
    store(gradient + row * kBlock, acc[row][0]);
    store(gradient + row * kBlock + kLanes, acc[row][1]);
  }
}

// matrix (r x r, packed) times Lambda (r x taps rows of a block) -> r x taps rows.
void multiply_square(const float* matrix, const float* lambda, int rank, int taps, float* product) {
  for (int tap = 0; tap < taps; ++tap) {
    for (int row = 0; row < rank; row += kTile) {
      Vec acc[kTile][kVectors] = {};
      multiply<kTile>(acc, matrix + std::int64_t(row) * rank, lambda + tap * kBlock, std::int64_t(taps) * kBlock, rank);
      for (int i = 0; i < kTile && row + i < rank; ++i)
        for (int v = 0; v < kVectors; ++v)
          store(product + (std::int64_t(row + i) * taps + tap) * kBlock + v * kLanes, acc[i][v]);
    }
  }
}

// Adds the loss of a block's `channels` real channels to `total`.
inline void add_lanes(const Vec (&loss)[kVectors], int channels, double* total) {
  for (int v = 0; v < kVectors; ++v)
    for (int lane = 0; lane < kLanes && v * kLanes + lane < channels; ++lane) *total += loss[v][lane];
}

struct Pixels {
  const float *keys, *noise, *weight;  // of the chunk's first tile
  std::int64_t row;                    // its first row in base and goal
  std::int64_t tiles;
};

// Forward, the loss's sign and the gradient for one chunk of pixels and one block.
void run_chunk(const InsertionParams& p, const Pixels& x, float* block, const BlockLayout& at, float* by_y,
               int channels, double* total) {
  const std::int64_t k = std::int64_t(p.rank) * p.taps;
  const float *base = block + at.base + x.row * kBlock, *goal = block + at.goal + x.row * kBlock;
  const float* lambda = block + at.lambda;
  const bool demodulate = p.energy != nullptr;
  Vec demod[kVectors], by_demod[kVectors], loss[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    demod[v] = demodulate ? load(block + at.demod + v * kLanes) : fill(1.f);
    by_demod[v] = loss[v] = Vec{};
    bias[v] = load(block + at.bias + v * kLanes);
  }
  const Vec up = fill(p.gain), down = fill(p.gain * p.negative_slope);
  for (std::int64_t tile = 0; tile < x.tiles; ++tile) {
    Vec y[kTile][kVectors];
#pragma GCC unroll 6
    for (int pixel = 0; pixel < kTile; ++pixel) {
      y[pixel][0] = load(base + (tile * kTile + pixel) * kBlock);
      y[pixel][1] = load(base + (tile * kTile + pixel) * kBlock + kLanes);
    }
    multiply<kTile>(y, x.keys + tile * k * kTile, lambda, kBlock, k);
#pragma GCC unroll 6
    for (int pixel = 0; pixel < kTile; ++pixel) {
      const std::int64_t i = tile * kTile + pixel;
      const Vec noise = fill(x.noise[i]), weight = fill(x.weight[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vec by_z = pixel_step<VectorOps>(y[pixel][v], demod[v], noise + bias[v],
                                               load(goal + i * kBlock + v * kLanes), weight, up, down, loss[v]);
        by_demod[v] += by_z * y[pixel][v];
        store(by_y + i * kBlock + v * kLanes, by_z * demod[v]);
      }
    }
  }
  if (demodulate)
    for (int v = 0; v < kVectors; ++v) {
      float* sum = block + at.by_demod + v * kLanes;
      store(sum, load(sum) + by_demod[v]);
    }
  add_lanes(loss, channels, total);
  float* gradient = block + at.gradient;
  std::int64_t row = 0;
  for (; row + kTile <= k; row += kTile)
    accumulate<kTile>(gradient + row * kBlock, x.keys + row * kTile, k * kTile, by_y, x.tiles);
  gradient += row * kBlock;
  const float* keys = x.keys + row * kTile;
  switch (k - row) {
    case 1:
      accumulate<1>(gradient, keys, k * kTile, by_y, x.tiles);
      break;
    case 2:
      accumulate<2>(gradient, keys, k * kTile, by_y, x.tiles);
      break;
    case 3:
      accumulate<3>(gradient, keys, k * kTile, by_y, x.tiles);
      break;
    case 4:
      accumulate<4>(gradient, keys, k * kTile, by_y, x.tiles);
      break;
    case 5:
      accumulate<5>(gradient, keys, k * kTile, by_y, x.tiles);
      break;
    default:
      break;
  }
}

// The gradient before any pixel: that of the penalty, 2 q_o / O * P Lambda_o, or zero.
void start_gradient(const InsertionParams& p, const float* shared, const SharedLayout& s, float* block,
                    const BlockLayout& at) {
  const std::int64_t k = std::int64_t(p.rank) * p.taps;
  float* gradient = block + at.gradient;
  if (p.penalty_matrix == nullptr) {
    for (std::int64_t i = 0; i < k * kBlock; i += kLanes) store(gradient + i, Vec{});
    return;
  }
  multiply_square(shared + s.penalty, block + at.lambda, p.rank, p.taps, gradient);
  for (std::int64_t i = 0; i < k; ++i)
    for (int v = 0; v < kBlock; v += kLanes)
      store(gradient + i * kBlock + v, load(gradient + i * kBlock + v) * load(block + at.scale + v));
}

// demod of target b for the Lambda at hand, and gram Lambda, which the gradient needs too.
void start_target(const InsertionParams& p, int b, const float* shared, const SharedLayout& s, float* block,
                  const BlockLayout& at) {
  const std::int64_t k = std::int64_t(p.rank) * p.taps, square = tiles_of(p.rank) * p.rank * kTile;
  const float *lambda = block + at.lambda, *cross = block + at.cross + b * k * kBlock;
  float* product = block + at.product;
  multiply_square(shared + s.gram + b * square, lambda, p.rank, p.taps, product);
  for (int v = 0; v < kBlock; v += kLanes) {
    Vec norm2 = load(block + at.energy + b * kBlock + v);
    for (std::int64_t i = v; i < k * kBlock; i += kBlock)
      norm2 += (2.f * load(cross + i) + load(product + i)) * load(lambda + i);
    store(block + at.demod + v, 1.f / root(norm2));
    store(block + at.by_demod + v, Vec{});
  }
}

// d demod / d Lambda = -demod^3 (cross + gram Lambda).
void finish_target(const InsertionParams& p, int b, float* block, const BlockLayout& at) {
  const std::int64_t k = std::int64_t(p.rank) * p.taps;
  const float *cross = block + at.cross + b * k * kBlock, *product = block + at.product;
  float* gradient = block + at.gradient;
  for (int v = 0; v < kBlock; v += kLanes) {
    const Vec demod = load(block + at.demod + v);
    const Vec by_norm = load(block + at.by_demod + v) * (demod * demod * demod);
    for (std::int64_t i = v; i < k * kBlock; i += kBlock)
      store(gradient + i, load(gradient + i) - by_norm * (load(cross + i) + load(product + i)));
  }
}

void update(const InsertionParams& p, const AdamStep& a, float* block, const BlockLayout& at) {
  const std::int64_t size = std::int64_t(p.rank) * p.taps * kBlock;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    Vec mean = load(block + at.exp_avg + i), square = load(block + at.exp_avg_sq + i);
    store(block + at.lambda + i,
          adam_step<VectorOps>(load(block + at.lambda + i), load(block + at.gradient + i), mean, square, a));
    store(block + at.exp_avg + i, mean);
    store(block + at.exp_avg_sq + i, square);
  }
}

// rows x columns matrix with the given strides -> [row tile][column][6]
void pack_rows(const float* from, std::int64_t rows, std::int64_t row_stride, std::int64_t columns,
               std::int64_t column_stride, float* to) {
  for (std::int64_t tile = 0; tile < tiles_of(rows); ++tile)
    for (std::int64_t column = 0; column < columns; ++column)
      for (int i = 0; i < kTile; ++i) {
        const std::int64_t row = tile * kTile + i;
        to[(tile * columns + column) * kTile + i] = row < rows ? from[row * row_stride + column * column_stride] : 0.f;
      }
}

// Copies `columns` of the rows first .. first + kBlock - 1 of an O x (stride) matrix to rows of kBlock channels;
// `fallback` past O.
void pack_channels(const float* from, std::int64_t stride, std::int64_t columns, int first, int channels,
                   float fallback, float* to) {
  for (std::int64_t column = 0; column < columns; ++column)
    for (int c = 0; c < kBlock; ++c)
      to[column * kBlock + c] = first + c < channels ? from[(first + c) * stride + column] : fallback;
}

void pack_block(const InsertionParams& p, int first, float* block, const BlockLayout& at) {
  const std::int64_t k = std::int64_t(p.rank) * p.taps;
  pack_channels(p.lambda, k, k, first, p.channels, 0.f, block + at.lambda);
  pack_channels(p.exp_avg, k, k, first, p.channels, 0.f, block + at.exp_avg);
  pack_channels(p.exp_avg_sq, k, k, first, p.channels, 0.f, block + at.exp_avg_sq);
  std::int64_t row = 0;
  for (int b = 0; b < p.targets; ++b) {
    const std::int64_t start = p.starts[b], count = p.starts[b + 1] - start, rows = tiles_of(count) * kTile;
    pack_channels(p.base + start, p.pixels, count, first, p.channels, 0.f, block + at.base + row * kBlock);
    pack_channels(p.goal + start, p.pixels, count, first, p.channels, 0.f, block + at.goal + row * kBlock);
    for (std::int64_t i = (row + count) * kBlock; i < (row + rows) * kBlock; ++i)
      block[at.base + i] = block[at.goal + i] = 0.f;
    row += rows;
  }
  pack_channels(p.bias, 1, 1, first, p.channels, 0.f, block + at.bias);
  if (p.penalty_scale != nullptr) {
    pack_channels(p.penalty_scale, 1, 1, first, p.channels, 0.f, block + at.scale);
    for (int c = 0; c < kBlock; ++c) block[at.scale + c] *= 2.f / static_cast<float>(p.channels);
  }
  if (p.energy == nullptr) return;
  for (int b = 0; b < p.targets; ++b) {
    pack_channels(p.energy + std::int64_t(b) * p.channels, 1, 1, first, p.channels, 1.f,
                  block + at.energy + b * kBlock);
    pack_channels(p.cross + std::int64_t(b) * p.channels * k, k, k, first, p.channels, 0.f,
                  block + at.cross + b * k * kBlock);
  }
}

void unpack_channels(const float* from, std::int64_t columns, int first, int channels, float* to) {
  for (int c = 0; c < kBlock && first + c < channels; ++c)
    for (std::int64_t column = 0; column < columns; ++column)
      to[(first + c) * columns + column] = from[column * kBlock + c];
}

}  // namespace

InsertionSizes insertion_sizes(const InsertionParams& p) {
  const std::int64_t k = std::int64_t(p.rank) * p.taps;
  InsertionSizes sizes;
  sizes.block_channels = kBlock;
  sizes.blocks = (p.channels + kBlock - 1) / kBlock;
  const std::int64_t group = kGroupFloats / (2 * k * kBlock);
  sizes.group = insertion_tiles(p) * kTile * k <= kSmallKeys || group < 1 ? 1 : static_cast<int>(group);
  sizes.shared = shared_layout(p).size;
  sizes.block = block_layout(p, kBlock).size;
  sizes.part = std::int64_t(kChunkTiles) * kTile * kBlock;
  return sizes;
}

void insertion_pack(const InsertionParams& p, float* shared) {
  const SharedLayout s = shared_layout(p);
  const std::int64_t k = std::int64_t(p.rank) * p.taps;
  std::int64_t tile = 0;
  for (int b = 0; b < p.targets; ++b) {
    const std::int64_t start = p.starts[b], count = p.starts[b + 1] - start;
    pack_rows(p.keys + start, count, 1, k, p.pixels, shared + s.keys + tile * k * kTile);
    for (std::int64_t i = 0; i < tiles_of(count) * kTile; ++i) {
      shared[s.noise + tile * kTile + i] = i < count ? p.noise[start + i] : 0.f;
      shared[s.weight + tile * kTile + i] = i < count ? p.weight[start + i] / static_cast<float>(p.channels) : 0.f;
    }
    tile += tiles_of(count);
  }
  const std::int64_t square = tiles_of(p.rank) * p.rank * kTile;
  if (p.gram != nullptr)
    for (int b = 0; b < p.targets; ++b)
      pack_rows(p.gram + std::int64_t(b) * p.rank * p.rank, p.rank, p.rank, p.rank, 1, shared + s.gram + b * square);
  if (p.penalty_matrix != nullptr) pack_rows(p.penalty_matrix, p.rank, p.rank, p.rank, 1, shared + s.penalty);
}

void insertion_steps(const InsertionParams& p, const AdamStep* schedule, const float* shared, int first, int last,
                     float* blocks, float* scratch, double* block_losses) {
  const SharedLayout s = shared_layout(p);
  const BlockLayout at = block_layout(p, kBlock);
  const std::int64_t k = std::int64_t(p.rank) * p.taps;
  const int count = last - first;
  for (int i = 0; i < count; ++i) pack_block(p, (first + i) * kBlock, blocks + i * at.size, at);
  for (int step = 0; step < p.count; ++step) {
    for (int i = 0; i < count; ++i) {
      start_gradient(p, shared, s, blocks + i * at.size, at);
      block_losses[std::int64_t(i) * p.count + step] = 0;
    }
    std::int64_t tile = 0;
    for (int b = 0; b < p.targets; ++b) {
      const std::int64_t end = tile + tiles_of(p.starts[b + 1] - p.starts[b]), chunk = chunk_tiles(end - tile);
      if (p.energy != nullptr)
        for (int i = 0; i < count; ++i) start_target(p, b, shared, s, blocks + i * at.size, at);
      for (; tile < end; tile += chunk) {
        const std::int64_t tiles = end - tile < chunk ? end - tile : chunk;
        const Pixels x = {shared + s.keys + tile * k * kTile, shared + s.noise + tile * kTile,
                          shared + s.weight + tile * kTile, tile * kTile, tiles};
        for (int i = 0; i < count; ++i)
          run_chunk(p, x, blocks + i * at.size, at, scratch, p.channels - (first + i) * kBlock,
                    block_losses + std::int64_t(i) * p.count + step);
      }
      tile = end;
      if (p.energy != nullptr)
        for (int i = 0; i < count; ++i) finish_target(p, b, blocks + i * at.size, at);
    }
    for (int i = 0; i < count; ++i) update(p, schedule[step], blocks + i * at.size, at);
  }
  for (int i = 0; i < count; ++i) {
    const float* block = blocks + i * at.size;
    unpack_channels(block + at.lambda, k, (first + i) * kBlock, p.channels, p.lambda);
    unpack_channels(block + at.exp_avg, k, (first + i) * kBlock, p.channels, p.exp_avg);
    unpack_channels(block + at.exp_avg_sq, k, (first + i) * kBlock, p.channels, p.exp_avg_sq);
  }
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
