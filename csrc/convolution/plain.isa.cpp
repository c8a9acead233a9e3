// A block of tiles at a time: transform their inputs, multiply for each panel of output channels, transform back. All
// of it stays in the second-level cache; the weights are read once a block.
#include "convolution/product.isa.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

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
      const Vec value = y[n] * scale + bias + (p.noise ? p.noise[at] : 0.f);
      store(p.y + (static_cast<std::int64_t>(tile.image) * p.height * p.width + at) * p.out + o,
            activated(value, p.negative_slope));
    }
  }
}

}  // namespace

int conv_panel() { return kPanel; }

// Prepared: panel x point x in x kPanel, G g G^T of every filter g.
void conv3x3_prepare(const float* weight, int out, int in, int panel, float* prepared) {
  prepare_filters(weight, out, in, panel, prepared, [](const Vec g[9], Vec u[16]) {
    Vec t[12];
    for (int c = 0; c < 3; ++c) {
      t[c] = g[c];
      t[3 + c] = 0.5f * (g[c] + g[3 + c] + g[6 + c]);
      t[6 + c] = 0.5f * (g[c] - g[3 + c] + g[6 + c]);
      t[9 + c] = g[6 + c];
    }
    for (int r = 0; r < 4; ++r) {
      const Vec a = t[3 * r], b = t[3 * r + 1], d = t[3 * r + 2];
      u[4 * r] = a;
      u[4 * r + 1] = 0.5f * (a + b + d);
      u[4 * r + 2] = 0.5f * (a - b + d);
      u[4 * r + 3] = d;
    }
  });
}

std::int64_t conv3x3_tiles(const Conv3x3Params& p) { return tiles_of(p); }

std::int64_t conv3x3_scratch(const Conv3x3Params& p) {
  const Order order = order_of(p.in, p.out);
  return order.tiles * (static_cast<std::int64_t>(kPoints) * p.in + kPoints * kPanel * order.panels) + p.in;
}

void conv3x3_part(const Conv3x3Params& p, const ConvPart& part, float* scratch) {
  const Order order = order_of(p.in, p.out);
  const std::int64_t point = static_cast<std::int64_t>(order.tiles) * p.in, plane = order.tiles * kPanel;
  const std::int64_t filter = static_cast<std::int64_t>(p.in) * kPanel;
  float* zeros = scratch;                  // in
  float* inputs = zeros + p.in;            // point x tile x in
  float* sums = inputs + kPoints * point;  // panel x point x tile x kPanel
  for (int i = 0; i < p.in; ++i) zeros[i] = 0.f;
  for (std::int64_t begin = part.first_tile; begin < part.last_tile; begin += order.tiles) {
    const int count = static_cast<int>(part.last_tile - begin < order.tiles ? part.last_tile - begin : order.tiles);
    Tile tiles[kMostTiles];
    for (int t = 0; t < count; ++t) {
      tiles[t] = tile_at(p, begin + t);
      read_tile(p, tiles[t], zeros, inputs + static_cast<std::int64_t>(t) * p.in, point);
    }
    for (int first = part.first_panel, last; first < part.last_panel; first = last) {
      last = first + order.panels < part.last_panel ? first + order.panels : part.last_panel;
      for (int n = 0; n < kPoints; ++n)
        for (int panel = first; panel < last; ++panel)
          multiply(inputs + n * point, p.weight + (static_cast<std::int64_t>(panel) * kPoints + n) * filter, p.in,
                   count, sums + ((panel - first) * kPoints + n) * plane);
      for (int panel = first; panel < last; ++panel)
        for (int t = 0; t < count; ++t)
          write_tile(p, tiles[t], panel, sums + (panel - first) * kPoints * plane + t * kPanel, plane);
    }
  }
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
