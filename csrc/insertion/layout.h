// Where everything lies in the packed arrays of the insertion. Pure arithmetic, without standard templates: each
// instruction set and the tests compile it.
#pragma once

#include <cstdint>

#include "insertion/params.h"

namespace pyrewrite {
namespace {

constexpr int kTile = 6;                        // pixels (or rows of the gradient) that the product holds in registers
constexpr int kChunkTiles = 16;                 // tiles that go through forward, sign and gradient together: 96 pixels
constexpr std::int64_t kSmallKeys = 32 * 1024;  // floats of packed keys that stay in cache beside one block (128 KiB)
constexpr std::int64_t kGroupFloats = 64 * 1024;  // floats of Lambda and gradient that a group may hold (256 KiB)

inline std::int64_t tiles_of(std::int64_t pixels) { return (pixels + kTile - 1) / kTile; }

inline std::int64_t insertion_tiles(const InsertionParams& p) {
  std::int64_t tiles = 0;
  for (int b = 0; b < p.targets; ++b) tiles += tiles_of(p.starts[b + 1] - p.starts[b]);
  return tiles;
}

// Tiles per chunk of a target with `tiles` tiles: as even as can be, so that no chunk is a remainder of one.
inline std::int64_t chunk_tiles(std::int64_t tiles) {
  const std::int64_t chunks = (tiles + kChunkTiles - 1) / kChunkTiles;
  return chunks > 0 ? (tiles + chunks - 1) / chunks : 0;
}

// Shared by all blocks. A matrix of rows x columns is packed in tiles of six rows: [row tile][column][6], zeros past
// the last row.
struct SharedLayout {
  std::int64_t keys;     // [tile][K][6]: pixels are the rows; each target starts a new tile
  std::int64_t noise;    // [tile][6]
  std::int64_t weight;   // [tile][6], 0 past a target's end, divided by O
  std::int64_t gram;     // [target][row tile][r][6]
  std::int64_t penalty;  // [row tile][r][6]
  std::int64_t size;
};

inline SharedLayout shared_layout(const InsertionParams& p) {
  const std::int64_t tiles = insertion_tiles(p), k = std::int64_t(p.rank) * p.taps;
  const std::int64_t square = tiles_of(p.rank) * p.rank * kTile;
  SharedLayout at;
  at.keys = 0;
  at.noise = at.keys + tiles * k * kTile;
  at.weight = at.noise + tiles * kTile;
  at.gram = at.weight + tiles * kTile;
  at.penalty = at.gram + (p.gram != nullptr ? p.targets * square : 0);
  at.size = at.penalty + (p.penalty_matrix != nullptr ? square : 0);
  return at;
}

// One block of `c` channels; every row holds the c channels side by side. Sizes are multiples of c.
struct BlockLayout {
  std::int64_t lambda;  // K rows, and likewise
  std::int64_t gradient, exp_avg, exp_avg_sq;
  std::int64_t base;  // 6 tiles rows
  std::int64_t goal;
  std::int64_t bias;             // 1 row
  std::int64_t scale;            // 1 row: 2 q / O of the penalty
  std::int64_t energy;           // B rows
  std::int64_t cross;            // B K rows
  std::int64_t product;          // K rows: gram Lambda of the target at hand
  std::int64_t demod, by_demod;  // 1 row each
  std::int64_t size;
};

inline BlockLayout block_layout(const InsertionParams& p, int c) {
  const std::int64_t rows = insertion_tiles(p) * kTile, k = std::int64_t(p.rank) * p.taps;
  const bool demodulate = p.energy != nullptr;
  BlockLayout at;
  at.lambda = 0;
  at.gradient = at.lambda + k * c;
  at.exp_avg = at.gradient + k * c;
  at.exp_avg_sq = at.exp_avg + k * c;
  at.base = at.exp_avg_sq + k * c;
  at.goal = at.base + rows * c;
  at.bias = at.goal + rows * c;
  at.scale = at.bias + c;
  at.energy = at.scale + c;
  at.cross = at.energy + (demodulate ? p.targets * c : 0);
  at.product = at.cross + (demodulate ? p.targets * k * c : 0);
  at.demod = at.product + k * c;
  at.by_demod = at.demod + c;
  at.size = at.by_demod + c;
  return at;
}

}  // namespace
}  // namespace pyrewrite
