// Where the tensor-core kernels keep things: panels in shared memory, and the elements of a tile in the registers of a
// warp. Plain arithmetic, the same on both sides.
#pragma once

#include "second_moment/schedule.h"

namespace pyrewrite {

constexpr int kGranule = 16;    // bytes copied together
constexpr int kPanelRow = 128;  // bytes of a channel in a slice: 32 rows of float32, 64 of a 16-bit type

// A slice of a panel: `kTile` channels at kPanelRow / kSize rows of x, kSize bytes an element. It lies as the memory it
// comes from: where channels lie side by side, row by row (kByRow), else channel by channel. Granules are turned (xor)
// within groups of eight, so that those which a warp touches together lie in different banks.
template <int kTile, int kSize, bool kByRow>
struct PanelLayout {
  static constexpr int kRows = kPanelRow / kSize;     // rows of x in a slice
  static constexpr int kElements = kGranule / kSize;  // of a granule
  static constexpr int kBytes = kTile * kPanelRow;
  static constexpr int kLine = kByRow ? kTile * kSize / kGranule : kPanelRow / kGranule;  // granules in a line
  static constexpr int kGranules = kBytes / kGranule;
  static_assert(kLine % 8 == 0, "granules are turned in groups of eight");

  // Lines are rows of x (kByRow) or channels.
  static PYREWRITE_BOTH int turn(int line) {
    if (kByRow) return kSize == 4 ? line % 4 * 2 : line % 8;
    return kSize == 4 ? line / 4 % 8 : line % 8;
  }
  static PYREWRITE_BOTH int at(int line, int granule) { return (line * kLine + (granule ^ turn(line))) * kGranule; }
};

// The unit of a warp's work is a group of 32 channels at one k step of an mma instruction: 4 sets of 8 channels, at two
// halves of the step. A lane holds, of set e and half h, one register: channel kGroup * group + channel_in(lane / 4,
// e), and k = kStep * step + h * kStep / 2 + lane % 4 (float32), or the two rows from 2 * (lane % 4) on (16 bit). Sets
// 2i and 2i + 1 are the rows of an m16 operand, one set the columns of an n8 operand.
constexpr int kGroup = 32;

template <int kSize>
PYREWRITE_BOTH int channel_in(int number, int set) {
  // float32 channels side by side come in one 16-byte load; 16-bit ones in the 8 x 8 matrices of ldmatrix.
  return kSize == 4 ? 4 * number + set : 8 * set + number;
}

// Bytes from the panel's begin to what a lane passes to its load of (group, step 0). By row and float32: two loads of
// 16 bytes, half `load`. Else two ldmatrix.x4: matrices m = lane / 8 of load p are set 2p + m % 2, half m / 2.
template <typename Layout, int kSize, bool kByRow>
PYREWRITE_BOTH int fragment_at(int group, int load, int lane) {
  if (kByRow && kSize == 4) return Layout::at(4 * load + lane % 4, 8 * group + lane / 4);
  const int set = 2 * load + lane / 8 % 2, half = lane / 16;
  if (kByRow) return Layout::at(8 * half + lane % 8, 4 * group + set);
  return Layout::at(kGroup * group + channel_in<kSize>(lane % 8, set), half);
}

// The same at another step: rows further, or two granules further in all lines. `at` may be an address, where panels
// begin at multiples of kPanelRow. One operation on what does not depend on the step keeps registers free.
template <typename Layout, int kSize, bool kByRow>
PYREWRITE_BOTH std::uint32_t fragment_step(std::uint32_t at, int step) {
  constexpr int kRows = Layout::kRows / 4;  // of a step
  static_assert(kRows % 8 == 0, "rows of all steps are turned alike");
  return kByRow ? at + step * kRows * Layout::kLine * kGranule : at ^ (step * 2 * kGranule);
}

// A tile of sums over warps of kWarpRows x kWarpColumns; kSize bytes an element of x.
template <int kTile, int kWarpRows, int kWarpColumns, int kSize>
struct MmaTile {
  static constexpr int kWarpsAcross = kTile / kWarpColumns, kWarpsDown = kTile / kWarpRows;
  static constexpr int kThreads = 32 * kWarpsAcross * kWarpsDown;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // mma instructions of a warp at a step
  static constexpr int kSums = kDown * kAcross * 4;                         // of a thread
  static_assert(kTile % kWarpRows == 0 && kTile % kWarpColumns == 0, "whole warps");
  static_assert(kWarpRows % kGroup == 0 && kWarpColumns % kGroup == 0, "whole groups");

  // Element of a thread's sum (down, across, which of the four of an m16n8 accumulator).
  static PYREWRITE_BOTH TileElement element(int thread, int down, int across, int which) {
    const int warp = thread / 32, number = thread % 32 / 4, pair = thread % 4 * 2;
    return {warp / kWarpsAcross * kWarpRows + down / 2 * kGroup + channel_in<kSize>(number, down % 2 * 2 + which / 2),
            warp % kWarpsAcross * kWarpColumns + across / 4 * kGroup + channel_in<kSize>(pair + which % 2, across % 4)};
  }
  // Sums lie in the workspace one after the other, each of all threads.
  static PYREWRITE_BOTH TileElement coordinates(int position) {
    const int thread = position % kThreads, sum = position / kThreads;
    return element(thread, sum / (4 * kAcross), sum / 4 % kAcross, sum % 4);
  }
  // Its inverse.
  static PYREWRITE_BOTH int position(int row, int column) {
    const int warp = row / kWarpRows * kWarpsAcross + column / kWarpColumns;
    const int r = row % kGroup, c = column % kGroup;
    const int number = kSize == 4 ? r / 4 : r % 8, set = kSize == 4 ? r % 4 : r / 8;
    const int pair = kSize == 4 ? c / 4 : c % 8, across_set = kSize == 4 ? c % 4 : c / 8;
    const int down = row % kWarpRows / kGroup * 2 + set / 2;
    const int across = column % kWarpColumns / kGroup * 4 + across_set;
    const int sum = (down * kAcross + across) * 4 + set % 2 * 2 + pair % 2;
    return sum * kThreads + warp * 32 + number * 4 + pair / 2;
  }
};

}  // namespace pyrewrite
