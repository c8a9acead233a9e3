// Who computes and who copies what in the Hopper kernels. Plain arithmetic, the same on both sides.
#pragma once

#include "second_moment/schedule.h"

namespace pyrewrite::sm90 {

// Everything is made of units of 64 channels. A slice of one is 8 KiB: 64 rows of 16-bit numbers or 32 of float32. It
// lies in shared memory as its source does, in lines of 128 bytes whose granules of 16 bytes are turned (xor) in groups
// of eight lines, the one pattern that copies and matrix instructions share.
constexpr int kUnit = 64, kLine = 128, kUnitBytes = 8192, kTile = 128;
constexpr int kSlots = 6;  // units of a stage, at most
constexpr int kColumnUnits = 4;
constexpr int kGroups = 2, kGroupThreads = 128, kSums = kColumnUnits * kUnit / 2;
constexpr int kElements = kGroups * kSums * kGroupThreads;  // of a block's part of the workspace

PYREWRITE_BOTH constexpr int slice_rows(DType dtype) { return dtype == DType::float32 ? 32 : 64; }

PYREWRITE_BOTH int turned(int line, int byte) { return line * kLine + (byte ^ (line % 8 * 16)); }

// What is computed together. Two blocks that share what they read: a square of 256 x 256 beside the diagonal (a block
// 128 x 256), or one on it (the 10 of 16 squares of 64 x 64 that are needed, 5 a block). One block: a tile of 128 x 128
// beside the diagonal, or one on it (3 squares of 64 x 64).
enum class Shape : int { square, diagonal, beside, on };
constexpr int kShapes = 4;

PYREWRITE_BOTH bool is_shared(Shape shape) { return shape == Shape::square || shape == Shape::diagonal; }
PYREWRITE_BOTH int blocks_of(Shape shape) { return is_shared(shape) ? 2 : 1; }
// The slots of a stage.
PYREWRITE_BOTH int slots_in(Shape shape) { return shape == Shape::square ? 6 : shape == Shape::on ? 2 : 4; }

// The slots, a bit each, that a block needs.
PYREWRITE_BOTH int slots_of(Shape shape, int block) {
  const int all = (1 << slots_in(shape)) - 1;
  return shape == Shape::diagonal && block == 1 ? all - 1 : all;
}

// Copies are shared out: a block makes up to four, each into the same slot of all blocks that need it.
struct Share {
  int slot, blocks;  // a bit for each block that needs it; 0: nothing
};
PYREWRITE_BOTH Share share_of(Shape shape, int block, int number) {
  if (!is_shared(shape)) return {number, slots_of(shape, 0) >> number & 1};
  if (shape == Shape::square) {  // its rows, and half of the columns
    if (number > 3) return {0, 0};
    return number < 2 ? Share{number, 1 << block} : Share{number + 2 * block, 3};
  }
  if (number > 1) return {0, 0};
  if (block == 0) return number == 0 ? Share{0, 1} : Share{3, 3};
  return {1 + number, 3};
}
// The blocks that get something from this one, and those that it gets something from; itself among both.
PYREWRITE_BOTH int receivers_of(Shape shape, int block) {
  int receivers = 0;
  for (int number = 0; number < kSlots; ++number) receivers |= share_of(shape, block, number).blocks;
  return receivers;
}
PYREWRITE_BOTH int senders_of(Shape shape, int block) {
  int senders = 0;
  for (int from = 0; from < blocks_of(shape); ++from)
    if (receivers_of(shape, from) >> block & 1) senders |= 1 << from;
  return senders;
}

// The slots of a block's columns: what float32 input is made half numbers of in shared memory. (That of the rows
// becomes so in registers.)
struct Columns {
  int first, count;
};
PYREWRITE_BOTH Columns columns_of(Shape shape, int block) {
  if (shape == Shape::diagonal) return {block, 4 - block};
  if (shape == Shape::on) return {0, 2};
  return {2, shape == Shape::square ? 4 : 2};
}

// The work of a group of four warps: the unit of 64 rows in slot `a` with `units` units of columns from slot `b` on.
struct GroupWork {
  int a, b, units;  // 0 to 4
};
PYREWRITE_BOTH GroupWork whole_work(Shape shape, int block, int group) {
  if (shape == Shape::square || shape == Shape::beside) return {group, 2, columns_of(shape, block).count};
  if (shape == Shape::on) return {group, group, 2 - group};
  const int a = block == 1 ? 1 + group : 3 * group;
  return {a, a, 4 - a};
}

// A block's part of the moment: where its shape stands (the first channels), and which block of the shape it is.
struct Place {
  Shape shape;
  int block, row, column, d;

  PYREWRITE_BOTH int channel(int slot) const {
    if (shape == Shape::square && slot < 2) return row + kUnit * (2 * block + slot);
    const bool of_columns = slot > 1 && (shape == Shape::square || shape == Shape::beside);
    return of_columns ? column + kUnit * (slot - 2) : row + kUnit * slot;
  }
  PYREWRITE_BOTH bool there(int slot) const { return channel(slot) < d; }
  // Nothing is computed that lies beyond d.
  PYREWRITE_BOTH GroupWork work(int group) const {
    GroupWork work = whole_work(shape, block, group);
    if (!there(work.a)) work.units = 0;
    while (work.units > 0 && !there(work.b + work.units - 1)) --work.units;
    return work;
  }
  // Units that come into the block with every slice.
  PYREWRITE_BOTH int arriving() const {
    int units = 0;
    for (int slot = 0; slot < kSlots; ++slot)
      if ((slots_of(shape, block) >> slot & 1) && there(slot)) ++units;
    return units;
  }
  // The element of the moment whose sum lies at a position of the block's part of the workspace; {1, 0}, below the
  // diagonal, where there is none. Which channels a lane has in lines lane / 4 and eight below of a product: these, or,
  // `paired`, two neighbours (as they are loaded together).
  PYREWRITE_BOTH TileElement element(int position, bool paired) const {
    const int thread = position % kGroupThreads, sum = position / kGroupThreads % kSums;
    const GroupWork work = whole_work(shape, block, position / (kGroupThreads * kSums));
    const int lower = sum / 2 % 2, line = thread % 32 / 4;
    const int i = thread / 32 * 16 + (paired ? 2 * line + lower : line + 8 * lower);
    const int j = sum / 4 * 8 + thread % 4 * 2 + sum % 2;
    if (j >= work.units * kUnit) return {1, 0};
    return {channel(work.a) + i, channel(work.b + j / kUnit) + j % kUnit};
  }
};

// Sums lie in a block's part of the workspace as group x sum of a thread x thread.
PYREWRITE_BOTH int first_position(int group) { return group * kSums * kGroupThreads; }

// What a block takes for 16 rows, in clocks (docs/kernels.md). diagonal 0: what lies in squares on the diagonal is
// cheaper tile by tile.
struct Costs {
  int square, diagonal, beside, on;
};

// Which shapes cover the triangle, and in how many parts the chunks of rows are handed out for each kind. Blocks are
// numbered kind by kind; in a kind part by part; a block's number is that of its partial sums in the workspace, too. A
// `tile`, for the reduction, is what the blocks compute that differ in nothing but their chunks.
struct ClusterPlan {
  int side, chunks;  // tiles of 128 along the moment; chunks of rows
  int cluster;       // blocks of a cluster: 1 where nothing is shared
  int count[kShapes], parts[kShapes];

  PYREWRITE_BOTH int tiles_of(int shape) const { return count[shape] * blocks_of(static_cast<Shape>(shape)); }
  PYREWRITE_BOTH int tiles() const { return tiles_of(0) + tiles_of(1) + tiles_of(2) + tiles_of(3); }
  PYREWRITE_BOTH int blocks() const {  // whole clusters: the last blocks may have nothing to do
    int blocks = 0;
    for (int shape = 0; shape < kShapes; ++shape) blocks += tiles_of(shape) * parts[shape];
    return (blocks + cluster - 1) / cluster * cluster;
  }
  PYREWRITE_BOTH BlockWork work(int block) const {
    int first_tile = 0;
    for (int shape = 0; shape < kShapes; ++shape) {
      const int tiles = tiles_of(shape);
      if (block < tiles * parts[shape]) return {first_tile + block % tiles, block / tiles, parts[shape]};
      block -= tiles * parts[shape];
      first_tile += tiles;
    }
    return {0, chunks, 1};
  }

  struct Part {
    int shape, number;  // the tile's number in its kind
    int before;         // blocks of kinds before
  };
  PYREWRITE_BOTH Part part(int tile) const {
    Part part{0, tile, 0};
    for (; part.shape < kShapes - 1 && part.number >= tiles_of(part.shape); ++part.shape) {
      part.number -= tiles_of(part.shape);
      part.before += tiles_of(part.shape) * parts[part.shape];
    }
    return part;
  }
  // Blocks first_of(tile) + i * step_of(tile), i < parts_of(tile), share a tile.
  PYREWRITE_BOTH int first_of(int tile) const {
    const Part at = part(tile);
    return at.before + at.number;
  }
  PYREWRITE_BOTH int step_of(int tile) const { return tiles_of(part(tile).shape); }
  PYREWRITE_BOTH int parts_of(int tile) const { return parts[part(tile).shape]; }

  PYREWRITE_BOTH Place place(int tile, int d) const {
    const Part at = part(tile);
    const Shape shape = static_cast<Shape>(at.shape);
    const int number = at.number / blocks_of(shape), block = at.number % blocks_of(shape);
    int row = number, column = number;  // in tiles
    if (shape == Shape::square) {
      const TriangleTile of_smaller = triangle_tile(number);
      row = 2 * of_smaller.row, column = 2 * of_smaller.column + 2;
    } else if (shape == Shape::diagonal) {
      row = column = 2 * number;
    } else if (shape == Shape::beside) {
      // Those in the squares on the diagonal, where these are not shared; then those of a last odd column.
      const int inner = count[1] > 0 ? 0 : side / 2;
      row = number < inner ? 2 * number : number - inner;
      column = number < inner ? row + 1 : side - 1;
    } else if (count[1] > 0) {
      row = column = side - 1;
    }
    return {shape, block, row * kTile, column * kTile, d};
  }
};

// The plan that ends first on a GPU that runs so many blocks at once, one a multiprocessor. It depends on nothing else,
// so the sums are the same bits every time. A part costs about one chunk more than its rows (its partial sums are
// written and read).
inline ClusterPlan make_cluster_plan(int d, std::int64_t rows, int at_once, const Costs& costs) {
  ClusterPlan plan{};
  plan.side = (d + kTile - 1) / kTile;
  plan.chunks = static_cast<int>((rows + kChunkRows - 1) / kChunkRows);
  const int squares = plan.side / 2, odd = plan.side % 2;
  const bool diagonal = costs.diagonal > 0;
  plan.count[0] = triangle_tiles(squares - 1);
  plan.count[1] = diagonal ? squares : 0;
  plan.count[2] = (diagonal ? 0 : squares) + odd * 2 * squares;
  plan.count[3] = diagonal ? odd : plan.side;
  plan.cluster = plan.count[0] + plan.count[1] > 0 ? 2 : 1;
  int places = at_once / plan.cluster * plan.cluster;
  if (places < plan.cluster) places = plan.cluster;

  const int cost[kShapes] = {costs.square, costs.diagonal, costs.beside, costs.on};
  // Parts such that no block takes longer than `time`; the number of blocks.
  const auto split = [&](std::int64_t time) {
    for (int shape = 0; shape < kShapes; ++shape) {
      if (plan.count[shape] == 0) continue;
      std::int64_t chunks = time / cost[shape] - 1;
      if (chunks > plan.chunks) chunks = plan.chunks;
      plan.parts[shape] = static_cast<int>((plan.chunks + chunks - 1) / chunks);
    }
    return plan.blocks();
  };
  std::int64_t dearest = 0;
  for (int shape = 0; shape < kShapes; ++shape)
    if (plan.count[shape] > 0 && cost[shape] > dearest) dearest = cost[shape];
  const std::int64_t longest = dearest * (plan.chunks + 1);
  const int fewest = (split(longest) + places - 1) / places;
  std::int64_t best = -1, best_time = longest;
  for (int waves = fewest; waves < fewest + 8; ++waves) {  // more waves are more even, and more partial sums
    std::int64_t low = 2 * dearest, high = longest;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (split(middle) <= waves * places)
        high = middle;
      else
        low = middle + 1;
    }
    const std::int64_t end = waves * low;
    if (best >= 0 && end > best - best / 50) continue;
    best = end, best_time = low;
  }
  split(best_time);
  return plan;
}

// Slices do not cross images where they are copied as boxes; rows beyond an image are zero.
struct Slices {
  Divider of_image;
};
inline std::int64_t slices_of_image(const SecondMomentParams& p) {
  return (p.width + slice_rows(p.dtype) - 1) / slice_rows(p.dtype);
}
inline std::int64_t rows_of_boxes(const SecondMomentParams& p) {
  return p.images * slices_of_image(p) * slice_rows(p.dtype);
}

// Whether boxes can copy p (joined): two strides, both positive and in whole granules, an address that is a multiple
// of one, and few rows beyond the images.
inline bool boxes_fit(const SecondMomentParams& p) {
  const Access access = access_of(p, 16);
  if (access == Access::elements || p.height != 1 || p.d < 8) return false;
  const std::int64_t stride = access == Access::channels ? p.column_stride : p.channel_stride;
  const std::int64_t least = access == Access::channels ? p.d : p.width, most = std::int64_t{1} << 37;
  if (stride < least || stride > most) return false;
  if (p.images > 1 && (p.image_stride <= 0 || p.image_stride > most)) return false;
  return p.images == 1 || slices_of_image(p) * slice_rows(p.dtype) * 4 <= p.width * 5;
}

}  // namespace pyrewrite::sm90
