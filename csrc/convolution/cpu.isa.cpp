// A block of tiles at a time: transform their inputs, multiply for each panel of output channels, transform back. All
// of it stays in the second-level cache; the weights are read once a block.
#include "common/vector.isa.h"
#include "convolution/params.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

constexpr int kVectors = kLanes == 16 ? 1 : 2;
constexpr int kPanel = kVectors * kLanes;  // output channels a product makes at a time
constexpr int kRows = 12 / kVectors;       // tiles a product makes at a time: 12 sums and the weights fit 16 registers
constexpr int kBlock = 24;                 // tiles in a block
constexpr int kPoints = 16;                // of the transformed 4 x 4 tile
static_assert(kConvChannels % kPanel == 0 && kConvChannels % kLanes == 0, "channels come in whole panels");

// B^T d B of a 4 x 4 tile of inputs.
inline void transform_input(const Vec d[16], Vec v[16]) {
  Vec t[16];
  for (int c = 0; c < 4; ++c) {
    t[c] = d[c] - d[8 + c];
    t[4 + c] = d[4 + c] + d[8 + c];
    t[8 + c] = d[8 + c] - d[4 + c];
    t[12 + c] = d[4 + c] - d[12 + c];
  }
  for (int r = 0; r < 16; r += 4) {
    v[r] = t[r] - t[r + 2];
    v[r + 1] = t[r + 1] + t[r + 2];
    v[r + 2] = t[r + 2] - t[r + 1];
    v[r + 3] = t[r + 1] - t[r + 3];
  }
}

// A^T m A: the 2 x 2 outputs.
inline void transform_output(const Vec m[16], Vec y[4]) {
  Vec t[8];
  for (int c = 0; c < 4; ++c) {
    t[c] = m[c] + m[4 + c] + m[8 + c];
    t[4 + c] = m[4 + c] - m[8 + c] - m[12 + c];
  }
  for (int r = 0; r < 2; ++r) {
    y[2 * r] = t[4 * r] + t[4 * r + 1] + t[4 * r + 2];
    y[2 * r + 1] = t[4 * r + 1] - t[4 * r + 2] - t[4 * r + 3];
  }
}

// sums[tile][kPanel] = sum over i of inputs[tile][i] * weights[i][kPanel] for R tiles
template <int R>
void multiply_rows(const float* inputs, const float* weights, int in, float* sums) {
  Vec total[R][kVectors] = {};
  for (int i = 0; i < in; ++i) {
    Vec w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load(weights + i * kPanel + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const float x = inputs[static_cast<std::int64_t>(r) * in + i];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[r][v] += x * w[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sums + r * kPanel + v * kLanes, total[r][v]);
}

// The same for `count` tiles. A tile's sum runs over the input channels in one order, whatever its company.
void multiply(const float* inputs, const float* weights, int in, int count, float* sums) {
  int t = 0;
  for (; t + kRows <= count; t += kRows)
    multiply_rows<kRows>(inputs + static_cast<std::int64_t>(t) * in, weights, in, sums + t * kPanel);
  for (; t + 4 <= count; t += 4)
    multiply_rows<4>(inputs + static_cast<std::int64_t>(t) * in, weights, in, sums + t * kPanel);
  for (; t < count; ++t) multiply_rows<1>(inputs + static_cast<std::int64_t>(t) * in, weights, in, sums + t * kPanel);
}

struct Tile {
  int image, top, left;  // of its outputs
};

inline Tile tile_at(const Conv3x3Params& p, std::int64_t number) {
  const int across = (p.width + 1) / 2, down = (p.height + 1) / 2;
  const int in_image = static_cast<int>(number % (static_cast<std::int64_t>(across) * down));
  return {static_cast<int>(number / (static_cast<std::int64_t>(across) * down)), in_image / across * 2,
          in_image % across * 2};
}

inline std::int64_t tiles_of(const Conv3x3Params& p) {
  return static_cast<std::int64_t>(p.batch) * ((p.width + 1) / 2) * ((p.height + 1) / 2);
}

// The 16 points of one tile's inputs -> v[point][in], the points `stride` apart.
void read_tile(const Conv3x3Params& p, const Tile& tile, const float* zeros, float* v, std::int64_t stride) {
  const int shift = p.upsample ? 1 : 0, width = p.width >> shift, height = p.height >> shift;
  const float* image = p.x + static_cast<std::int64_t>(tile.image) * height * width * p.in;
  const float* pixel[16];
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) {
      const int y = tile.top + r - 1, x = tile.left + c - 1;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      pixel[4 * r + c] = inside ? image + (static_cast<std::int64_t>(y >> shift) * width + (x >> shift)) * p.in : zeros;
    }
  const float* scale = p.in_scale ? p.in_scale + static_cast<std::int64_t>(tile.image) * p.in : nullptr;
  for (int i = 0; i < p.in; i += kLanes) {
    Vec d[16], t[16];
    for (int n = 0; n < 16; ++n) d[n] = load(pixel[n] + i);
    if (scale) {
      const Vec s = load(scale + i);
      for (int n = 0; n < 16; ++n) d[n] *= s;
    }
    transform_input(d, t);
    for (int n = 0; n < 16; ++n) store(v + n * stride + i, t[n]);
  }
}

// m[point][tile][kPanel] of one tile -> its outputs of one panel
void write_tile(const Conv3x3Params& p, const Tile& tile, int panel, const float* m, std::int64_t stride) {
  const int first = panel * kPanel;
  for (int j = 0; j < kPanel; j += kLanes) {
    Vec in[16], y[4];
    for (int n = 0; n < 16; ++n) in[n] = load(m + n * stride + j);
    transform_output(in, y);
    const int o = first + j;
    const Vec scale = p.out_scale ? load(p.out_scale + static_cast<std::int64_t>(tile.image) * p.out + o) : Vec{} + 1.f;
    const Vec bias = p.bias ? load(p.bias + o) : Vec{};
    for (int n = 0; n < 4; ++n) {
      const int row = tile.top + n / 2, column = tile.left + n % 2;
      if (row >= p.height || column >= p.width) continue;
      const std::int64_t at = static_cast<std::int64_t>(row) * p.width + column;
      Vec value = y[n] * scale + bias;
      if (p.noise) value += p.noise[at];
      if (p.negative_slope != 1.f) value = value < 0.f ? value * p.negative_slope : value;
      store(p.y + (static_cast<std::int64_t>(tile.image) * p.height * p.width + at) * p.out + o, value);
    }
  }
}

}  // namespace

// Prepared: panel x point x in x kPanel, G g G^T of every filter g.
void conv3x3_prepare(const float* weight, const std::int64_t strides[4], int out, int in, float* prepared) {
  const std::int64_t point = static_cast<std::int64_t>(in) * kPanel;
  for (int first = 0; first < out; first += kPanel)
    for (int i = 0; i < in; ++i) {
      float taps[9][kPanel];
      for (int o = 0; o < kPanel; ++o) {
        const float* w = weight + (first + o) * strides[0] + i * strides[1];
        for (int r = 0; r < 3; ++r)
          for (int c = 0; c < 3; ++c) taps[3 * r + c][o] = w[r * strides[2] + c * strides[3]];
      }
      float* to = prepared + first * static_cast<std::int64_t>(kPoints) * in + static_cast<std::int64_t>(i) * kPanel;
      for (int v = 0; v < kPanel; v += kLanes, to += kLanes) {
        Vec t[4][3];
        for (int c = 0; c < 3; ++c) {
          const Vec a = load(taps[c] + v), b = load(taps[3 + c] + v), d = load(taps[6 + c] + v);
          t[0][c] = a;
          t[1][c] = 0.5f * (a + b + d);
          t[2][c] = 0.5f * (a - b + d);
          t[3][c] = d;
        }
        for (int r = 0; r < 4; ++r) {
          const Vec a = t[r][0], b = t[r][1], d = t[r][2];
          store(to + (4 * r) * point, a);
          store(to + (4 * r + 1) * point, 0.5f * (a + b + d));
          store(to + (4 * r + 2) * point, 0.5f * (a - b + d));
          store(to + (4 * r + 3) * point, d);
        }
      }
    }
}

std::int64_t conv3x3_blocks(const Conv3x3Params& p) { return (tiles_of(p) + kBlock - 1) / kBlock; }

std::int64_t conv3x3_scratch(const Conv3x3Params& p) {
  return static_cast<std::int64_t>(kPoints) * kBlock * (p.in + kPanel) + p.in;
}

void conv3x3_block(const Conv3x3Params& p, std::int64_t block, float* scratch) {
  const std::int64_t begin = block * kBlock, all = tiles_of(p);
  const int count = static_cast<int>(all - begin < kBlock ? all - begin : kBlock);
  float* inputs = scratch;                                                     // point x tile x in
  float* sums = inputs + static_cast<std::int64_t>(kPoints) * kBlock * p.in;   // point x tile x kPanel
  float* zeros = sums + static_cast<std::int64_t>(kPoints) * kBlock * kPanel;  // in
  for (int i = 0; i < p.in; ++i) zeros[i] = 0.f;
  const std::int64_t point = static_cast<std::int64_t>(kBlock) * p.in;
  for (int t = 0; t < count; ++t)
    read_tile(p, tile_at(p, begin + t), zeros, inputs + static_cast<std::int64_t>(t) * p.in, point);
  for (int panel = 0; panel < p.out / kPanel; ++panel) {
    for (int n = 0; n < kPoints; ++n) {
      const float* w = p.weight + (static_cast<std::int64_t>(panel) * kPoints + n) * p.in * kPanel;
      float* to = sums + static_cast<std::int64_t>(n) * kBlock * kPanel;
      multiply(inputs + n * point, w, p.in, count, to);
    }
    for (int t = 0; t < count; ++t)
      write_tile(p, tile_at(p, begin + t), panel, sums + static_cast<std::int64_t>(t) * kPanel,
                 static_cast<std::int64_t>(kBlock) * kPanel);
  }
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
