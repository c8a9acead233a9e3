// How a cluster of blocks shares a problem, and where everything lies in a block's shared memory. Pure arithmetic.
#pragma once

#include <cstdint>

#include "insertion/kernels.h"

namespace pyrewrite {

// The sizes that the cluster kernel is compiled for.
struct ClusterTraits {
  static constexpr int kBlocks = 8;  // of a cluster: the most that every GPU with clusters allows
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kGroup = 16;  // pixels of a group: the inner extent of the gradient's matrix product
  static constexpr int kTile = 8;    // pixels of a tile: the columns of the forward product
  // Groups between two barriers: as many as a warp holds the sums of, where dloss / dz takes one half; else half of it.
  static constexpr int kWarpGroups = 4;
  static __host__ __device__ constexpr int chunk_groups(bool whole) {
    return kWarps * (whole ? kWarpGroups : kWarpGroups / 2);
  }
  // Bytes of a channel's row of dloss / dz over a chunk, hi or lo.
  static __host__ __device__ constexpr int by_row(bool whole) { return chunk_groups(whole) * kGroup * 2 + 16; }
  static constexpr int kMostSegments = 16;
  static constexpr int kMostRank = 64;
  // Channels of a cluster: two tiles of the matrix instruction, or one where Lambda and its gradient leave too little
  // shared memory for the maps.
  static constexpr int kChannels[] = {32, 16};
};

// Consecutive pixels of one target that one block computes: begin ... end - 1 of target `target`.
struct Segment {
  int target, begin, end;
  int row, rows;     // of the map that they read
  int pixel;         // where they begin among the block's pixels, which each segment pads to whole groups
  int piece;         // groups whose map is in shared memory at a time
  std::int64_t map;  // where its map begins among the block's maps, in bytes
};

// What the numbers of a block are multiplied with to be halves.
struct Scales {
  float map;                                // of all its maps
  float by[ClusterTraits::kMostSegments];   // of dloss / dz of each segment
  int whole[ClusterTraits::kMostSegments];  // whether that makes them whole numbers, which one half holds
};

__host__ __device__ inline int groups_of(int pixels) {
  return (pixels + ClusterTraits::kGroup - 1) / ClusterTraits::kGroup;
}

// Directions, padded to what the matrix instruction takes.
__host__ __device__ inline int padded_rank(int rank) { return (rank + 15) / 16 * 16; }

// Number of padded key kk in a row of the problem's Lambda; -1: padding. Keys are ordered by tap, then direction.
__host__ __device__ inline int key_of(const InsertionProblem& p, int kk) {
  const int rank = padded_rank(p.rank), tap = kk / rank, d = kk % rank;
  return d < p.rank ? d * p.taps + (p.flipped ? p.taps - 1 - tap : tap) : -1;
}

// Bytes of a map position, or of a row of gram: padded rank halves hi, as many lo, 16 more.
__host__ __device__ inline int position_bytes(const InsertionProblem& p) { return padded_rank(p.rank) * 4 + 16; }

// Positions of a row of target b's map.
__host__ __device__ inline int map_width(const InsertionProblem& p, int b) { return p.widths[b] + p.kernel_width - 1; }

// Bytes of a row of target b's map. Up to seven pieces of 16 bytes behind the positions bring each pixel's place to
// its number times a position, modulo the banks: eight consecutive ones then lie in different banks across the end of
// a row as well.
__host__ __device__ inline int map_row(const InsertionProblem& p, int b) {
  const int position = position_bytes(p), extra = (p.kernel_width - 1) * (position / 16) % 8;
  return map_width(p, b) * position + (8 - extra) % 8 * 16;
}

// Groups of target b that can be computed from `room` bytes of its map, wherever they begin; whole chunks where that
// is more than one. 0: not even one group.
__host__ __device__ inline int groups_in(const InsertionProblem& p, int b, int room) {
  constexpr int kChunk = ClusterTraits::chunk_groups(false);
  const int w = p.widths[b], rows = room / map_row(p, b) - (p.kernel_height - 1);
  // n pixels touch at most (n + w - 2) / w + 1 rows.
  const int pixels = (rows - 1) * w + 1, groups = rows > 0 ? pixels / ClusterTraits::kGroup : 0;
  return groups > kChunk ? groups / kChunk * kChunk : groups;
}

struct Share {
  Segment segments[ClusterTraits::kMostSegments];
  int count;   // of segments; -1: too many, or a group needs more room than there is
  int pixels;  // padded
  std::int64_t map_bytes;
};

// What block `block` of a cluster computes: all groups of all targets in a row, cut into even parts. room: bytes of
// maps that shared memory holds; 0: all of the block's.
__host__ __device__ inline void share_of(const InsertionProblem& p, int block, int room, Share& share) {
  int total = 0;
  for (int b = 0; b < p.targets; ++b) total += groups_of(p.starts[b + 1] - p.starts[b]);
  const int first = static_cast<int>(std::int64_t(total) * block / ClusterTraits::kBlocks);
  const int last = static_cast<int>(std::int64_t(total) * (block + 1) / ClusterTraits::kBlocks);
  share.count = share.pixels = 0;
  share.map_bytes = 0;
  int group = 0;
  for (int b = 0; b < p.targets; ++b) {
    const int pixels = p.starts[b + 1] - p.starts[b], groups = groups_of(pixels);
    const int from = first > group ? first - group : 0, to = last - group < groups ? last - group : groups;
    group += groups;
    if (from >= to) continue;
    if (share.count == ClusterTraits::kMostSegments) {
      share.count = -1;
      return;
    }
    Segment& s = share.segments[share.count++];
    s.target = b;
    s.begin = from * ClusterTraits::kGroup;
    s.end = to * ClusterTraits::kGroup < pixels ? to * ClusterTraits::kGroup : pixels;
    s.row = s.begin / p.widths[b];
    s.rows = (s.end - 1) / p.widths[b] - s.row + p.kernel_height;
    s.pixel = share.pixels;
    s.map = share.map_bytes;
    s.piece = room > 0 ? groups_in(p, b, room) : to - from;
    share.pixels += (to - from) * ClusterTraits::kGroup;
    share.map_bytes += std::int64_t(s.rows) * map_row(p, b);
    if (s.piece == 0) {
      share.count = -1;
      return;
    }
  }
}

// Offsets in bytes. A number that the tensor cores read is two halves, hi + lo. Rows that they read eight of at a time
// are an odd number of 16-byte pieces long, so that eight consecutive ones lie in different banks.
struct ClusterLayout {
  int channels;         // of a cluster
  int segments;         // of a block, at most
  int pixels;           // of a block, padded, at most
  int position;         // bytes of a map position
  int keys;             // K, with the padded rank
  int lambda_row;       // bytes of a channel's row of Lambda
  int gradient_row;     // floats
  int room;             // bytes of maps in shared memory where they are read anew each step; 0: they stay there
  std::int64_t packed;  // bytes of maps of a block in scratch, at most
  float slope;          // the activation's for positive values, as the whole number of whole_slopes; 0: there is none
  std::int64_t map, gram, lambda, by, gradient, own, places, inverse, demod, sums, size;
};

// maps: bytes of maps in shared memory.
__host__ __device__ inline ClusterLayout cluster_layout(const InsertionProblem& p, int channels, std::int64_t maps,
                                                        int segments, int pixels) {
  using T = ClusterTraits;
  static_assert(T::by_row(true) <= 2 * T::by_row(false), "one half each for twice the pixels");
  const int rank = padded_rank(p.rank);
  ClusterLayout at{};
  at.channels = channels;
  at.segments = segments;
  at.pixels = pixels;
  at.position = position_bytes(p);
  at.keys = rank * p.taps;
  at.lambda_row = at.keys * 2 + 16;
  at.gradient_row = at.keys + 8;
  at.map = 0;
  at.gram = at.map + maps;                                                                 // segments x rank rows
  at.lambda = at.gram + (p.demodulate ? std::int64_t(segments) * rank * at.position : 0);  // hi, lo: channels rows
  at.by = at.lambda + 2 * std::int64_t(channels) * at.lambda_row;                          // hi, lo: channels rows
  at.gradient = at.by + 2 * std::int64_t(channels) * T::by_row(false);  // channels x gradient_row floats
  at.own = at.gradient + 4 * std::int64_t(channels) * at.gradient_row;  // Lambda, mean, square: owned x keys floats
  at.places = at.own + 3 * 4 * std::int64_t(channels / T::kBlocks) * at.keys;  // of each pixel in the map, in bytes
  at.inverse = at.places + 4 * std::int64_t(pixels);                           // of Lambda's scale: channels floats
  at.demod = at.inverse + 4 * channels;                                        // channels floats
  at.sums = at.demod + 4 * channels;                                           // 2 x warps x channels floats
  at.size = at.sums + 2 * 4 * T::kWarps * channels;
  return at;
}

// Scratch of an edit: the scales of each block of a cluster, their maps as they lie in shared memory, and for each
// block of the grid cross in the order of its keys, and its pixels' tiles. Offsets in floats.
__host__ __device__ inline std::int64_t scratch_map(const ClusterLayout& at, int block) {
  return ClusterTraits::kBlocks * std::int64_t(sizeof(Scales) / 4) + std::int64_t(block) * (at.packed / 4);
}
// Of a tile of pixels: base and goal, in the order in which the lanes of a warp hold a product's result, noise, and
// weights of the loss's sum.
__host__ __device__ inline int tile_floats(const ClusterLayout& at) {
  return 2 * ClusterTraits::kTile * (at.channels + 1);
}
__host__ __device__ inline std::int64_t cross_floats(const ClusterLayout& at, const InsertionProblem& p) {
  return p.demodulate ? std::int64_t(at.segments) * at.channels * at.keys : 0;
}
__host__ __device__ inline std::int64_t scratch_cross(const ClusterLayout& at, const InsertionProblem& p, int block) {
  const std::int64_t tiles = std::int64_t(at.pixels / ClusterTraits::kTile) * tile_floats(at);
  return scratch_map(at, ClusterTraits::kBlocks) + block * (cross_floats(at, p) + tiles);
}

// The layout with each part at the size of the largest block's, so that all blocks have the same offsets; `size` is 0
// where the problem does not take this form. Maps that do not fit `shared_bytes` are read a piece at a time. piece: the
// fewest groups of a piece that is not a segment's last.
ClusterLayout common_layout(const InsertionProblem& p, int channels, std::int64_t shared_bytes, int* piece);

// Computes the maps of all blocks of a cluster, for each edit, into scratch.
cudaError_t launch_cluster_maps(const InsertionProblem& p, const ClusterLayout& at, int edits, cudaStream_t stream);

}  // namespace pyrewrite
