// Who computes and who copies what in a cluster of the Hopper kernels. Plain arithmetic, the same on both sides.
#pragma once

#include "second_moment/schedule.h"

namespace pyrewrite::sm90 {

// A unit is 64 channels of a slice, 64 rows, as numbers of 16 bits. It lies as its source does, in 64 lines of 128
// bytes: a line is a row of x where channels lie side by side, else a channel. The granules of 16 bytes are turned
// (xor) in groups of eight lines, the one pattern that copies and matrix instructions share.
constexpr int kUnit = 64, kSliceRows = 64, kLine = 128, kUnitBytes = kUnit * kLine;
constexpr int kSlicesOfChunk = kChunkRows / kSliceRows;
constexpr int kSlots = 4;  // units of a stage
constexpr int kGroups = 2, kGroupThreads = 128, kSums = 64;

PYREWRITE_BOTH int turned(int line, int byte) { return line * kLine + (byte ^ (line % 8 * 16)); }

// What a cluster computes: a square of 256 x 256 beside the diagonal (four blocks of 128 x 128), one on the diagonal
// (only the 10 of 16 squares of 64 x 64 that are needed), or, a single block, 128 x 128 on it.
enum class Shape : int { beside, on, single };

PYREWRITE_BOTH int blocks_of(Shape shape) { return shape == Shape::single ? 1 : 4; }
PYREWRITE_BOTH int side_of(Shape shape) { return shape == Shape::single ? 128 : 256; }

// Place 0 ... 7 of a unit's channels: four units of the square's rows, four of its columns. On the diagonal both are
// the same, and only the first four are used.
PYREWRITE_BOTH int unit_in(Shape shape, int block, int slot) {
  if (shape != Shape::beside) return slot;
  return slot < 2 ? block / 2 * 2 + slot : 4 + block % 2 * 2 + slot - 2;
}
// The slots, a bit each, that a block needs.
PYREWRITE_BOTH int slots_of(Shape shape, int block) {
  if (shape == Shape::beside) return 15;
  if (shape == Shape::single || block == 0) return 3;
  return block == 1 ? 12 : block == 2 ? 13 : 14;
}

// Copies are shared out: a block makes up to two, each into the same slot of all blocks that need it.
struct Share {
  int slot, blocks;  // a bit for each block that needs it; 0: nothing
};
PYREWRITE_BOTH Share share_of(Shape shape, int block, int number) {
  if (shape == Shape::single) return {number, 1};
  if (shape == Shape::beside) {
    const int row = block / 2, column = block % 2;
    return number == 0 ? Share{column, 3 << (2 * row)} : Share{2 + row, 5 << column};
  }
  if (number == 1) return {0, 0};
  switch (block) {
    case 0:
      return {0, 1 | 4};
    case 1:
      return {3, 2 | 4 | 8};
    case 2:
      return {2, 2 | 4 | 8};
    default:
      return {1, 1 | 8};
  }
}
// The blocks that get something from this one, and those that it gets something from; itself among both.
PYREWRITE_BOTH int receivers_of(Shape shape, int block) {
  return share_of(shape, block, 0).blocks | share_of(shape, block, 1).blocks;
}
PYREWRITE_BOTH int senders_of(Shape shape, int block) {
  int senders = 0;
  for (int from = 0; from < blocks_of(shape); ++from)
    if (receivers_of(shape, from) >> block & 1) senders |= 1 << from;
  return senders;
}

// The work of a group of four warps: the unit of 64 rows in slot `a` with `columns` columns from slot `b` on.
struct GroupWork {
  int a, b, columns;  // 128, 64 or 0
};
PYREWRITE_BOTH GroupWork whole_work(Shape shape, int block, int group) {
  if (shape == Shape::beside) return {group, 2, 128};
  if (shape == Shape::single || block < 2) {
    const int first = shape == Shape::single ? 0 : 2 * block;
    return group == 0 ? GroupWork{first, first, 128} : GroupWork{first + 1, first + 1, 64};
  }
  return {block - 2, 2 + group, 64};
}

// Where a cluster's square stands: the channels of unit 0 of its rows and of its columns.
struct Square {
  Shape shape;
  int row, column, d;

  PYREWRITE_BOTH int channel(int block, int slot) const {
    const int unit = unit_in(shape, block, slot);
    return unit < 4 ? row + kUnit * unit : column + kUnit * (unit - 4);
  }
  PYREWRITE_BOTH bool there(int block, int slot) const { return channel(block, slot) < d; }
  // Nothing is computed that lies beyond d.
  PYREWRITE_BOTH GroupWork work(int block, int group) const {
    GroupWork work = whole_work(shape, block, group);
    if (work.columns == 128 && !there(block, work.b + 1)) work.columns = 64;
    if (!there(block, work.a) || !there(block, work.b)) work.columns = 0;
    return work;
  }
  // Units that come into a block with every slice.
  PYREWRITE_BOTH int arriving(int block) const {
    int units = 0;
    for (int slot = 0; slot < kSlots; ++slot)
      if ((slots_of(shape, block) >> slot & 1) && there(block, slot)) ++units;
    return units;
  }
};

PYREWRITE_BOTH Square square_of(TriangleTile tile, bool single, int d) {
  const Shape shape = single ? Shape::single : tile.row == tile.column ? Shape::on : Shape::beside;
  return {shape, tile.row * side_of(shape), tile.column * side_of(shape), d};
}

// Sums lie in the workspace as block x group x sum of a thread x thread.
PYREWRITE_BOTH int first_position(int block, int group) { return (block * kGroups + group) * kSums * kGroupThreads; }

// The element of the square at a position; {1, 0}, below the diagonal, where there is none.
PYREWRITE_BOTH TileElement element_at(Shape shape, int position) {
  const int thread = position % kGroupThreads, sum = position / kGroupThreads % kSums;
  const int group = position / (kGroupThreads * kSums) % kGroups, block = position / (kGroupThreads * kSums * kGroups);
  const GroupWork work = whole_work(shape, block, group);
  const int row = thread / 32 * 16 + thread % 32 / 4 + sum / 2 % 2 * 8;
  const int column = sum / 4 * 8 + thread % 4 * 2 + sum % 2;
  if (column >= work.columns) return {1, 0};
  const int a = unit_in(shape, block, work.a), b = unit_in(shape, block, work.b);
  return {kUnit * a + row, kUnit * (b % 4) + column};
}

// Slices do not cross images where they are copied as boxes; rows beyond an image are zero.
struct Slices {
  Divider of_image;
};
inline std::int64_t slices_of_image(const SecondMomentParams& p) { return (p.width + kSliceRows - 1) / kSliceRows; }
inline std::int64_t rows_of_boxes(const SecondMomentParams& p) { return p.images * slices_of_image(p) * kSliceRows; }

// Whether boxes can copy p (joined): two strides, both positive and in whole granules, an address that is a multiple
// of one, and few rows beyond the images.
inline bool boxes_fit(const SecondMomentParams& p) {
  const Access access = access_of(p, 16);
  if (access == Access::elements || p.height != 1 || p.d < 8) return false;
  const std::int64_t stride = access == Access::channels ? p.column_stride : p.channel_stride;
  const std::int64_t least = access == Access::channels ? p.d : p.width, most = std::int64_t{1} << 38;
  if (stride < least || stride > most) return false;
  if (p.images > 1 && (p.image_stride <= 0 || p.image_stride > most)) return false;
  return p.images == 1 || slices_of_image(p) * kSliceRows * 4 <= p.width * 5;
}

}  // namespace pyrewrite::sm90
