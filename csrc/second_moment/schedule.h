// Who computes what: the triangle of tiles, the split of the rows, and where a row lies. Plain arithmetic without CUDA
// calls, the same on both sides, so that a test on the processor covers what the GPU runs.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "second_moment/params.h"

#if defined(__CUDACC__)
#define PYREWRITE_BOTH __host__ __device__ __forceinline__
#else
#define PYREWRITE_BOTH inline
#endif

namespace pyrewrite {

// A tile of the moment: channels row * size ... against column * size ..., row <= column.
struct TriangleTile {
  int row, column;
};

struct TileElement {
  int row, column;
};

// The cheaper side of a tile for d channels: smaller tiles waste less beside the triangle, larger ones read less and do
// a third more products a load.
constexpr int tile_for(int d) {
  const std::int64_t small = (d + 63) / 64, large = (d + 127) / 128;
  return small * (small + 1) * 64 * 64 * 4 < large * (large + 1) * 128 * 128 * 3 ? 64 : 128;
}

PYREWRITE_BOTH int triangle_tiles(int side) { return side * (side + 1) / 2; }

// Tiles down the columns of the upper triangle: (0,0) (0,1) (1,1) (0,2) ...
PYREWRITE_BOTH TriangleTile triangle_tile(int number) {
  int column = static_cast<int>((__builtin_sqrtf(8.f * number + 1.f) - 1.f) / 2.f);
  while (triangle_tiles(column) > number) --column;  // the root is rounded
  while (triangle_tiles(column + 1) <= number) ++column;
  return {number - triangle_tiles(column), column};
}

// Rows are handed out in chunks. Chunks first, first + step, ... belong to a block: blocks that run at the same time
// read neighbouring rows, which the L2 cache then holds for all of them.
constexpr int kChunkRows = 256;

struct BlockWork {
  int tile, first, step;
};

// The tiles beside the diagonal come first, then those on it; each kind is split over the rows in its own number of
// parts, since a tile on the diagonal can be less work. A block's number is also that of its partial sums in the
// workspace.
struct Plan {
  int side, chunks;
  int parts_beside, parts_on;

  PYREWRITE_BOTH int beside() const { return triangle_tiles(side - 1); }
  PYREWRITE_BOTH int tiles() const { return triangle_tiles(side); }
  PYREWRITE_BOTH int blocks() const { return beside() * parts_beside + side * parts_on; }
  PYREWRITE_BOTH TriangleTile place(int tile) const {
    if (tile >= beside()) return {tile - beside(), tile - beside()};
    const TriangleTile of_smaller = triangle_tile(tile);
    return {of_smaller.row, of_smaller.column + 1};
  }
  // Blocks first_of(tile) + i * step_of(tile), i < parts_of(tile), share a tile.
  PYREWRITE_BOTH int first_of(int tile) const {
    return tile < beside() ? tile : beside() * parts_beside + tile - beside();
  }
  PYREWRITE_BOTH int step_of(int tile) const { return tile < beside() ? beside() : side; }
  PYREWRITE_BOTH int parts_of(int tile) const { return tile < beside() ? parts_beside : parts_on; }
  PYREWRITE_BOTH BlockWork work(int block) const {
    const int number = block - beside() * parts_beside;
    if (number < 0) return {block % beside(), block / beside(), parts_beside};
    return {beside() + number % side, number / side, parts_on};
  }
};

// When `second` blocks of length b, begun after `first` of length a, are all done, on `resident` places that each take
// the next block when they are free.
inline std::int64_t finish_time(std::int64_t first, std::int64_t a, std::int64_t second, std::int64_t b,
                                std::int64_t resident) {
  const std::int64_t full = first / resident, late = first % resident;
  const std::int64_t early_free = full * a, late_free = early_free + (late > 0 ? a : 0);
  if (second == 0) return late_free;
  // Blocks done by a time, from both kinds of places; the end is a multiple of b after one of the two.
  const auto done = [&](std::int64_t time) {
    return (time < early_free ? 0 : (resident - late) * ((time - early_free) / b)) +
           (time < late_free ? 0 : late * ((time - late_free) / b));
  };
  std::int64_t end = -1;
  for (const std::int64_t start : {early_free, late_free}) {
    std::int64_t low = 0, high = (second + resident - 1) / resident + a / b + 2;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (done(start + middle * b) >= second)
        high = middle;
      else
        low = middle + 1;
    }
    if (end < 0 || start + low * b < end) end = start + low * b;
  }
  return end > late_free ? end : late_free;
}

// `resident`: how many blocks the GPU holds at once; `on`: thirds of the work of a tile beside the diagonal that one on
// it takes. The split depends on nothing else, so the sums are the same bits every time. A part costs about one chunk
// more than its rows (its partial sums are written and read again).
inline Plan make_plan(int side, std::int64_t rows, int resident, int on) {
  Plan plan{side, static_cast<int>((rows + kChunkRows - 1) / kChunkRows), 1, 1};
  const int beside = plan.beside(), most = resident < plan.chunks ? resident : plan.chunks;
  const auto length = [&](int parts) { return std::int64_t{(plan.chunks + parts - 1) / parts + 1}; };
  std::int64_t least = -1;
  const auto consider = [&](int parts_beside, int parts_on) {
    if (parts_on < 1 || parts_on > most) return;
    const std::int64_t time = finish_time(std::int64_t{beside} * parts_beside, 3 * length(parts_beside),
                                          std::int64_t{side} * parts_on, on * length(parts_on), resident);
    if (least >= 0 && time > least - least / 50) return;  // not for less than a fiftieth: more parts take more memory
    least = time;
    plan.parts_beside = parts_beside;
    plan.parts_on = parts_on;
  };
  // At most eight waves of parts: the workspace stays small beside the input.
  for (int parts = 1; parts <= most && (parts == 1 || parts * beside <= 8 * resident); ++parts) {
    if (beside == 0 || parts == 1) {
      consider(1, parts);
      if (parts == 1)
        for (int parts_on = 2; parts_on <= most && parts_on * side <= 8 * resident; ++parts_on) consider(1, parts_on);
      continue;
    }
    for (int shift = -1; shift <= 1; ++shift) consider(parts, parts * on / 3 + shift);
  }
  return plan;
}

// Division of numbers below 2^31 by a divisor that the compiler does not know: a multiplication and a shift.
struct Divider {
  std::uint32_t divisor, factor, shift;

  PYREWRITE_BOTH std::uint32_t operator()(std::uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, factor) + n) >> shift;
#else
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * factor >> 32) + n) >> shift;
#endif
  }
};

inline Divider make_divider(std::uint32_t divisor) {
  std::uint32_t shift = 0;
  while (shift < 32 && (std::uint64_t{1} << shift) < divisor) ++shift;
  const std::uint64_t factor = (std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - divisor) / divisor + 1;
  return {divisor, static_cast<std::uint32_t>(factor), shift};
}

// The rows as images x height x width; one call of a kernel takes fewer than 2^31 of them.
constexpr std::int64_t kMostRows = std::int64_t{1} << 30;

struct Source {
  const void* x;
  std::int64_t image_stride, line_stride, pixel_stride, channel_stride;
  Divider width, height;
  std::uint32_t rows;
  int d;

  // Elements from x to channel 0 of row n.
  PYREWRITE_BOTH std::int64_t offset(std::uint32_t n) const {
    const std::uint32_t line = width(n);
    std::int64_t at = static_cast<std::int64_t>(n - line * width.divisor) * pixel_stride;
    if (height.divisor == 1) return at + line * image_stride;
    const std::uint32_t image = height(line);
    return at + image * image_stride + static_cast<std::int64_t>(line - image * height.divisor) * line_stride;
  }
};

// How the elements of a panel lie in memory, which decides how they are copied.
enum class Access : int {
  channels,  // several channels at a time: rows, channels_last
  pixels,    // several pixels at a time: NCHW
  elements   // one by one
};

// Joins dimensions that one stride describes, so that a run of pixels is as long as it can be.
inline SecondMomentParams joined(SecondMomentParams p) {
  if (p.width == 1) {
    p.width = p.height;
    p.column_stride = p.row_stride;
    p.height = 1;
  } else if (p.height == 1 || p.row_stride == p.width * p.column_stride) {
    p.width *= p.height;
    p.height = 1;
  }
  if (p.height == 1) {
    p.row_stride = 0;
    if (p.width == 1) {
      p.width = p.images;
      p.column_stride = p.image_stride;
      p.images = 1;
    } else if (p.images == 1 || p.image_stride == p.width * p.column_stride) {
      p.width *= p.images;
      p.images = 1;
    }
  }
  if (p.images == 1) p.image_stride = 0;
  return p;
}

// Calls body(part) with parts of p of at most `most` rows, joined, until one fails.
template <typename Body>
Status for_parts(SecondMomentParams p, Body&& body, std::int64_t most = kMostRows) {
  p = joined(p);
  const std::int64_t rows = p.images * p.height * p.width;
  if (rows <= 0 || p.d <= 0) return {};
  if (rows <= most) return body(p);
  std::int64_t& extent = p.images > 1 ? p.images : p.height > 1 ? p.height : p.width;
  const std::int64_t stride = p.images > 1 ? p.image_stride : p.height > 1 ? p.row_stride : p.column_stride;
  const std::int64_t whole = extent, half = whole / 2;
  extent = half;
  const Status status = for_parts(p, body, most);
  if (!status.ok()) return status;
  extent = whole - half;
  const std::int64_t size = p.dtype == DType::float32 ? 4 : 2;
  p.x = static_cast<const char*>(p.x) + half * stride * size;
  return for_parts(p, body, most);
}

inline Source make_source(const SecondMomentParams& p) {
  Source source{};
  source.x = p.x;
  source.image_stride = p.image_stride;
  source.line_stride = p.row_stride;
  source.pixel_stride = p.column_stride;
  source.channel_stride = p.channel_stride;
  source.width = make_divider(static_cast<std::uint32_t>(p.width));
  source.height = make_divider(static_cast<std::uint32_t>(p.height));
  source.rows = static_cast<std::uint32_t>(p.images * p.height * p.width);
  source.d = p.d;
  return source;
}

// `bytes`: of a copy. p is joined.
inline Access access_of(const SecondMomentParams& p, int bytes) {
  const int group = bytes / (p.dtype == DType::float32 ? 4 : 2);  // elements
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(p.x) % bytes == 0 && p.image_stride % group == 0 && p.row_stride % group == 0;
  if (aligned && (p.channel_stride == 1 || p.d == 1) && p.column_stride % group == 0) return Access::channels;
  if (aligned && p.column_stride == 1 && p.width % group == 0 && (p.d == 1 || p.channel_stride % group == 0))
    return Access::pixels;
  return Access::elements;
}

// A power of two that brings a channel of this largest magnitude (of a sample of its rows) to 128 ... 256: far below
// the largest half number, 65504, and as far above the smallest. 1 where the sample does not tell.
PYREWRITE_BOTH int scale_exponent(std::uint32_t peak) {  // peak: the bits of a float that is not negative
  const int exponent = static_cast<int>(peak >> 23);
  if (peak == 0 || exponent == 255) return 0;
  const int scale = 7 - ((exponent == 0 ? 1 : exponent) - 127);
  return scale > 126 ? 126 : scale;
}

}  // namespace pyrewrite
