// The upper triangle of X^T X, a few panels of rows at a time: they are copied into column tiles that fit the cache
// (and widened, if 16 bit), the products of a panel are summed in registers, and the sums added to the float64 total.
#include "common/vector.isa.h"
#include "second_moment/params.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 4;  // of a register block
constexpr int kPanel = kSecondMomentRows;    // rows of X in a panel: the longest float32 sum
constexpr int kPackedFloats = 100 << 10;     // of panels: most of a second-level cache of 512 KiB
constexpr int kMostPanels = 8;

// A register block is kRows x (kVectors * kLanes). Wider blocks do more products a load; narrower ones waste less
// beside the diagonal.
template <int kVectors>
struct Triangle {
  static constexpr int kColumns = kVectors * kLanes;  // of a tile
  static constexpr int kTile = kPanel * kColumns + 16;
  static_assert(kColumns % kRows == 0, "a register block must not straddle two tiles");

  static std::int64_t tiles(int d) { return (d + kColumns - 1) / kColumns; }
  static std::int64_t panel_size(int d) { return tiles(d) * kTile; }
  // Register blocks down to the diagonal's in the column tile `tile`.
  static std::int64_t blocks_in(std::int64_t tile, int d) {
    const std::int64_t end = (tile + 1) * kColumns;
    return ((end < d ? end : d) + kRows - 1) / kRows;
  }
  static std::int64_t partial_size(int d) {
    std::int64_t blocks = 0;
    for (std::int64_t tile = 0; tile < tiles(d); ++tile) blocks += blocks_in(tile, d);
    return blocks * kRows * kColumns;
  }

  // panel: tiles x kTile, a tile kPanel x kColumns and a cache line, without which all tiles' rows would meet in one
  // set of the first-level cache. Copies one run of pixels that lie `step` apart, to rows at, at + 1, ... of the panel.
  template <typename T>
  static void pack(const T* x, std::int64_t step, std::int64_t channel_stride, int d, int at, int run, float* panel) {
    if (channel_stride == 1) {
      for (int k = 0; k < run; ++k) pack_row(x + k * step, d, panel + (at + k) * kColumns);
      return;
    }
    // A cache line of pixels by a tile's channels at a time: both sides stay in the first-level cache.
    for (int c = 0; c < d; c += kColumns, panel += kTile) {
      const int n = d - c < kColumns ? d - c : kColumns;
      for (int k0 = 0; k0 < run; k0 += 16) {
        const int m = run - k0 < 16 ? run - k0 : 16;
        const T* from = x + c * channel_stride + k0 * step;
        float* to = panel + (at + k0) * kColumns;
        int j = 0;
        if (step == 1 && m == 16)
          for (; j + 4 <= n; j += 4)
            for (int k = 0; k < 16; k += 4)
              transpose_4x4(from + j * channel_stride + k, channel_stride, to + k * kColumns + j, kColumns);
        for (; j < n; ++j)
          for (int k = 0; k < m; ++k) to[k * kColumns + j] = widen(from[j * channel_stride + k * step]);
      }
    }
  }

  template <typename T>
  static void pack_row(const T* x, int d, float* to) {
    int c = 0;
    for (; c + kColumns <= d; c += kColumns, to += kTile)
      for (int j = 0; j < kColumns; ++j) to[j] = widen(x[c + j]);
    for (int j = 0; c + j < d; ++j) to[j] = widen(x[c + j]);
  }

  // Adds the products of a panel's rows to one register block of the float64 partial sums.
  static void block(const float* a, const float* b, int rows, double* to) {
    // The partial sums of all blocks are larger than the second-level cache at many channels; they come while the
    // products are summed.
    for (int at = 0; at < kRows * kColumns; at += 8) __builtin_prefetch(to + at, 1);
    Vec sums[kRows][kVectors] = {};
    for (int k = 0; k < rows; ++k, a += kColumns, b += kColumns) {
      Vec columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] += a[i] * columns[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add(to + i * kColumns + v * kLanes, sums[i][v]);
  }

  // Panels that are filled before their products are summed: as many as fit the second-level cache, so that the partial
  // sums, which do not, come and go less often.
  static int depth(int d) {
    const std::int64_t fit = kPackedFloats / panel_size(d);
    return static_cast<int>(fit < 1 ? 1 : fit > kMostPanels ? kMostPanels : fit);
  }

  // Adds the products of the rows in all panels to the partial sums. A pair of tiles at a time: both, and the sums
  // of their blocks, stay in the first-level cache.
  static void add_products(const float* panels, int rows, int d, double* partial) {
    constexpr int kBlocks = kColumns / kRows;  // of a pair of tiles
    for (std::int64_t tile = 0; tile < tiles(d); ++tile) {
      const std::int64_t blocks = blocks_in(tile, d);
      for (std::int64_t i0 = 0; i0 < blocks; i0 += kBlocks) {
        const std::int64_t last = i0 + kBlocks < blocks ? i0 + kBlocks : blocks;
        const float* panel = panels;
        for (int done = 0; done < rows; done += kPanel, panel += panel_size(d)) {
          const int count = rows - done < kPanel ? rows - done : kPanel;
          for (std::int64_t i = i0; i < last; ++i)
            block(panel + i0 / kBlocks * kTile + (i - i0) * kRows, panel + tile * kTile, count,
                  partial + i * kRows * kColumns);
        }
      }
      partial += blocks * kRows * kColumns;
    }
  }

  template <typename T>
  static void run(const SecondMomentParams& p, std::int64_t first, std::int64_t last, float* panels, double* partial) {
    const int capacity = depth(p.d) * kPanel;
    for (std::int64_t i = 0; i < depth(p.d) * panel_size(p.d); ++i) panels[i] = 0.f;  // columns beyond d are read
    // One run of pixels is as long as a single stride describes it.
    const bool merged = p.height <= 1 || p.row_stride == p.width * p.column_stride;
    const std::int64_t length = merged ? p.height * p.width : p.width;
    while (first < last) {
      int filled = 0;
      while (filled < capacity && first < last) {
        const std::int64_t line = first / length, within = first % length;
        const std::int64_t image = merged ? line : line / p.height, row = merged ? 0 : line % p.height;
        const int at = filled % kPanel;
        std::int64_t count = length - within;
        if (count > last - first) count = last - first;
        if (count > kPanel - at) count = kPanel - at;
        const T* x =
            static_cast<const T*>(p.x) + image * p.image_stride + row * p.row_stride + within * p.column_stride;
        pack(x, p.column_stride, p.channel_stride, p.d, at, static_cast<int>(count),
             panels + filled / kPanel * panel_size(p.d));
        filled += static_cast<int>(count);
        first += count;
      }
      add_products(panels, filled, p.d, partial);
    }
  }

  static void finish(const double* partial, int d, double* total) {
    for (std::int64_t tile = 0; tile < tiles(d); ++tile)
      for (std::int64_t i = 0; i < blocks_in(tile, d) * kRows; ++i, partial += kColumns)
        for (std::int64_t j = 0; j < kColumns; ++j) {
          const std::int64_t column = tile * kColumns + j;
          if (i > column || column >= d) continue;
          total[i * d + column] += partial[j];
          total[column * d + i] = total[i * d + column];
        }
  }
};

// With three vectors a block does 12 products for 7 loads instead of 8 for 6; at few channels the diagonal costs more
// than that.
constexpr int kWideFrom = 20 * kLanes;

}  // namespace

SecondMomentSizes second_moment_sizes(int d) {
  if (d >= kWideFrom) return {Triangle<3>::depth(d) * Triangle<3>::panel_size(d), Triangle<3>::partial_size(d)};
  return {Triangle<2>::depth(d) * Triangle<2>::panel_size(d), Triangle<2>::partial_size(d)};
}

void second_moment_rows(const SecondMomentParams& p, std::int64_t first, std::int64_t last, float* panel,
                        double* partial) {
  const bool wide = p.d >= kWideFrom;
  switch (p.dtype) {
    case DType::float32:
      return (wide ? Triangle<3>::run<float> : Triangle<2>::run<float>)(p, first, last, panel, partial);
    case DType::float16:
      return (wide ? Triangle<3>::run<Half> : Triangle<2>::run<Half>)(p, first, last, panel, partial);
    case DType::bfloat16:
      return (wide ? Triangle<3>::run<BFloat16> : Triangle<2>::run<BFloat16>)(p, first, last, panel, partial);
  }
}

void second_moment_finish(const double* partial, int d, double* total) {
  (d >= kWideFrom ? Triangle<3>::finish : Triangle<2>::finish)(partial, d, total);
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
