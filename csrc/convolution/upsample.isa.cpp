// The up-sampling convolution: a block of tiles at a time into the map of the transposed convolution, then the blur of
// a row at a time with all that follows it.
#include "convolution/product.isa.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

// In one direction, for inputs d0, d1, d2 around two pixels and taps w0, w1, w2, the four outputs are
//   d0 w2 + d1 w0, d1 w1, d1 w2 + d2 w0, d2 w1
// of which the even ones are m0 + m1 and m1 - m2 with m0 = (d0 - d1) w2, m1 = d1 (w0 + w2), m2 = (d1 - d2) w0.
constexpr int kProducts = 5;
constexpr int kInputOf[kProducts] = {0, 1, 2, 1, 3};   // of d0 - d1, d1, d1 - d2, d2
constexpr int kFilterOf[kProducts] = {0, 1, 2, 3, 3};  // of w2, w0 + w2, w0, w1

struct Tile {
  int image, top, left;  // of its inputs d1
};

inline int across(const UpConv3x3Params& p) { return (p.width + 2) / 2; }  // width + 1 even outputs, two a tile
inline int down(const UpConv3x3Params& p) { return (p.height + 2) / 2; }

inline std::int64_t tiles_of(const UpConv3x3Params& p) {
  return p.height == 0 || p.width == 0 ? 0 : static_cast<std::int64_t>(p.batch) * across(p) * down(p);
}

inline Tile tile_at(const UpConv3x3Params& p, std::int64_t number) {
  const int in_image = static_cast<int>(number % (static_cast<std::int64_t>(across(p)) * down(p)));
  return {static_cast<int>(number / (static_cast<std::int64_t>(across(p)) * down(p))), in_image / across(p) * 2,
          in_image % across(p) * 2};
}

// The inputs of one tile -> v[point][in], the points `stride` apart.
void read_tile(const UpConv3x3Params& p, const Tile& tile, const float* zeros, float* v, std::int64_t stride) {
  const float* image = p.x + static_cast<std::int64_t>(tile.image) * p.height * p.width * p.in;
  const float* pixel[9];
  for (int r = 0; r < 3; ++r)
    for (int c = 0; c < 3; ++c) {
      const int y = tile.top + r - 1, x = tile.left + c - 1;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      pixel[3 * r + c] = inside ? image + (static_cast<std::int64_t>(y) * p.width + x) * p.in : zeros;
    }
  const float* scale = p.in_scale ? p.in_scale + static_cast<std::int64_t>(tile.image) * p.in : nullptr;
  for (int i = 0; i < p.in; i += kLanes) {
    Vec d[9], t[12];
    for (int n = 0; n < 9; ++n) d[n] = load(pixel[n] + i);
    if (scale) {
      const Vec s = load(scale + i);
      for (int n = 0; n < 9; ++n) d[n] *= s;
    }
    for (int c = 0; c < 3; ++c) {
      t[c] = d[c] - d[3 + c];
      t[3 + c] = d[3 + c];
      t[6 + c] = d[3 + c] - d[6 + c];
      t[9 + c] = d[6 + c];
    }
    for (int r = 0; r < 4; ++r) {
      const Vec a = t[3 * r], b = t[3 * r + 1], c = t[3 * r + 2];
      float* to = v + 4 * r * stride + i;
      store(to, a - b);
      store(to + stride, b);
      store(to + 2 * stride, b - c);
      store(to + 3 * stride, c);
    }
  }
}

// m[product][tile][kPanel] of one tile -> its 4 x 4 outputs of one panel, as far as the map reaches
void write_tile(const UpConv3x3Params& p, const Tile& tile, int panel, const float* m, std::int64_t stride) {
  const int height = 2 * p.height + 1, width = 2 * p.width + 1;
  const int rows = height - 2 * tile.top < 4 ? height - 2 * tile.top : 4;
  const int columns = width - 2 * tile.left < 4 ? width - 2 * tile.left : 4;
  float* corner = p.map +
                  ((static_cast<std::int64_t>(tile.image) * height + 2 * tile.top) * width + 2 * tile.left) * p.out +
                  panel * kPanel;
  for (int j = 0; j < kPanel; j += kLanes) {
    Vec t[4][kProducts];
    for (int c = 0; c < kProducts; ++c) {
      Vec in[kProducts];
      for (int r = 0; r < kProducts; ++r) in[r] = load(m + (kProducts * r + c) * stride + j);
      t[0][c] = in[0] + in[1];
      t[1][c] = in[3];
      t[2][c] = in[1] - in[2];
      t[3][c] = in[4];
    }
    for (int r = 0; r < rows; ++r) {
      const Vec out[4] = {t[r][0] + t[r][1], t[r][3], t[r][1] - t[r][2], t[r][4]};
      float* to = corner + static_cast<std::int64_t>(r) * width * p.out + j;
      for (int c = 0; c < columns; ++c) store(to + static_cast<std::int64_t>(c) * p.out, out[c]);
    }
  }
}

}  // namespace

// Prepared: panel x point x in x kPanel; the points are the taps w2, w0 + w2, w0, w1 in each direction.
void upconv3x3_prepare(const float* weight, int out, int in, int panel, float* prepared) {
  prepare_filters(weight, out, in, panel, prepared, [](const Vec g[9], Vec u[16]) {
    Vec t[12];
    for (int c = 0; c < 3; ++c) {
      t[c] = g[6 + c];
      t[3 + c] = g[c] + g[6 + c];
      t[6 + c] = g[c];
      t[9 + c] = g[3 + c];
    }
    for (int r = 0; r < 4; ++r) {
      u[4 * r] = t[3 * r + 2];
      u[4 * r + 1] = t[3 * r] + t[3 * r + 2];
      u[4 * r + 2] = t[3 * r];
      u[4 * r + 3] = t[3 * r + 1];
    }
  });
}

std::int64_t upconv3x3_tiles(const UpConv3x3Params& p) { return tiles_of(p); }

std::int64_t upconv3x3_scratch(const UpConv3x3Params& p) {
  const Order order = order_of(p.in, p.out);
  const std::int64_t sums = static_cast<std::int64_t>(kProducts) * kProducts * kPanel * order.panels;
  const std::int64_t product = order.tiles * (static_cast<std::int64_t>(kPoints) * p.in + sums) + p.in;
  const std::int64_t row = (2 * static_cast<std::int64_t>(p.width) + 3) * p.out;
  return product > row ? product : row;
}

void upconv3x3_part(const UpConv3x3Params& p, const ConvPart& part, float* scratch) {
  const Order order = order_of(p.in, p.out);
  const std::int64_t point = static_cast<std::int64_t>(order.tiles) * p.in, plane = order.tiles * kPanel;
  const std::int64_t filter = static_cast<std::int64_t>(p.in) * kPanel;
  float* zeros = scratch;                  // in
  float* inputs = zeros + p.in;            // point x tile x in
  float* sums = inputs + kPoints * point;  // panel x product x tile x kPanel
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
      for (int r = 0; r < kProducts; ++r)
        for (int c = 0; c < kProducts; ++c)
          for (int panel = first; panel < last; ++panel)
            multiply(inputs + (4 * kInputOf[r] + kInputOf[c]) * point,
                     p.weight + (static_cast<std::int64_t>(panel) * kPoints + 4 * kFilterOf[r] + kFilterOf[c]) * filter,
                     p.in, count, sums + (panel - first) * kProducts * kProducts * plane + (kProducts * r + c) * plane);
      for (int panel = first; panel < last; ++panel)
        for (int t = 0; t < count; ++t)
          write_tile(p, tiles[t], panel, sums + (panel - first) * kProducts * kProducts * plane + t * kPanel, plane);
    }
  }
}

void upconv3x3_row(const UpConv3x3Params& p, std::int64_t number, float* scratch) {
  const int height = 2 * p.height, width = 2 * p.width, out = p.out;
  const int image = static_cast<int>(number / height), row = static_cast<int>(number % height);
  const std::int64_t length = (static_cast<std::int64_t>(width) + 1) * out;
  const float* map = p.map + static_cast<std::int64_t>(image) * (height + 1) * length;
  // A pixel of zeros, the row of the map after the vertical filter, another pixel of zeros. Row `height` of the map is
  // the last; the filter of row 0 begins above the first.
  float* line = scratch + out;
  for (int i = 0; i < out; ++i) scratch[i] = line[length + i] = 0.f;
  const int first = row == 0 ? 1 : 0, last = row == height - 1 ? 2 : 3;
  for (std::int64_t i = 0; i < length; i += kLanes) {
    Vec total = {};
    for (int k = first; k <= last; ++k) total += p.vertical[k] * load(map + (row + k - 1) * length + i);
    store(line + i, total);
  }
  const float* scale = p.out_scale ? p.out_scale + static_cast<std::int64_t>(image) * out : nullptr;
  const float* noise = p.noise ? p.noise + static_cast<std::int64_t>(row) * width : nullptr;
  float* y = p.y + number * width * out;
  for (int x = 0; x < width; ++x) {
    const float more = noise ? noise[x] : 0.f;
    for (int o = 0; o < out; o += kLanes) {
      const float* from = line + (static_cast<std::int64_t>(x) - 1) * out + o;
      Vec value = p.horizontal[0] * load(from) + p.horizontal[1] * load(from + out) +
                  p.horizontal[2] * load(from + 2 * out) + p.horizontal[3] * load(from + 3 * out);
      if (scale) value *= load(scale + o);
      value += (p.bias ? load(p.bias + o) : Vec{}) + more;
      store(y + static_cast<std::int64_t>(x) * out + o, activated(value, p.negative_slope));
    }
  }
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
