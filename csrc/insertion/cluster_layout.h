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
  static constexpr int kGroup = 16;      // pixels of a group: the inner extent of the gradient's matrix product
  static constexpr int kWarpGroups = 2;  // that a warp takes through the forward product together
  static constexpr int kChunkGroups = kWarps * kWarpGroups;
  static constexpr int kChunk = kChunkGroups * kGroup;  // pixels between two barriers
  static constexpr int kMostSegments = 16;
  static constexpr int kMostRank = 64;
  // Channels of a cluster: two tiles of the matrix instruction, or one where Lambda and its gradient leave too little
  // shared memory for the maps.
  static constexpr int kChannels[] = {32, 16};
};

// Consecutive pixels of one target that one block computes: begin ... end - 1 of target `target`.
struct Segment {
  int target, begin, end;
  int row, rows;  // of the map that they read
  int pixel;      // where they begin among the block's pixels, which each segment pads to whole groups
  int map;        // where its map begins among the block's maps, in positions
  int piece;      // groups whose map is in shared memory at a time
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

// Positions of a row of target b's map.
__host__ __device__ inline int map_width(const InsertionProblem& p, int b) { return p.widths[b] + p.kernel_width - 1; }

// Groups of target b that can be computed from `room` positions of its map, wherever they begin; whole chunks where
// that is more than one. 0: not even one group.
__host__ __device__ inline int groups_in(const InsertionProblem& p, int b, int room) {
  const int w = p.widths[b], rows = room / map_width(p, b) - (p.kernel_height - 1);
  // n pixels touch at most (n + w - 2) / w + 1 rows.
  const int pixels = (rows - 1) * w + 1, groups = rows > 0 ? pixels / ClusterTraits::kGroup : 0;
  return groups > ClusterTraits::kChunkGroups ? groups / ClusterTraits::kChunkGroups * ClusterTraits::kChunkGroups
                                              : groups;
}

struct Share {
  Segment segments[ClusterTraits::kMostSegments];
  int count;      // of segments; -1: too many, or a group needs more room than there is
  int pixels;     // padded
  int positions;  // of maps
};

// What block `block` of a cluster computes: all groups of all targets in a row, cut into even parts. room: positions of
// maps that shared memory holds; 0: all of the block's.
__host__ __device__ inline void share_of(const InsertionProblem& p, int block, int room, Share& share) {
  int total = 0;
  for (int b = 0; b < p.targets; ++b) total += groups_of(p.starts[b + 1] - p.starts[b]);
  const int first = static_cast<int>(std::int64_t(total) * block / ClusterTraits::kBlocks);
  const int last = static_cast<int>(std::int64_t(total) * (block + 1) / ClusterTraits::kBlocks);
  share.count = share.pixels = share.positions = 0;
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
    s.map = share.positions;
    s.piece = room > 0 ? groups_in(p, b, room) : to - from;
    share.pixels += (to - from) * ClusterTraits::kGroup;
    share.positions += s.rows * map_width(p, b);
    if (s.piece == 0) {
      share.count = -1;
      return;
    }
  }
}

// Offsets in bytes. A number that the tensor cores read is two halves, hi + lo. Rows that they read eight of at a time
// are an odd number of 16-byte pieces long, so that eight consecutive ones lie in different banks.
struct ClusterLayout {
  int channels;            // of a cluster
  int position;            // bytes of a map position, or of a row of gram: padded rank halves hi, as many lo, 16 bytes
  int keys;                // K, with the padded rank
  int lambda_row, by_row;  // bytes of a channel's row of Lambda, and of dloss / dz over a chunk
  int gradient_row;        // floats
  int room;                // positions of maps in shared memory where they are read anew each step; 0: they stay there
  int packed;              // positions of maps of a block in scratch, at most
  std::int64_t map, gram, lambda, by, gradient, own, places, inverse, demod, sums, size;
};

// positions: of maps in shared memory.
__host__ __device__ inline ClusterLayout cluster_layout(const InsertionProblem& p, int channels, int positions,
                                                        int segments, int pixels) {
  using T = ClusterTraits;
  const int rank = padded_rank(p.rank);
  ClusterLayout at{};
  at.channels = channels;
  at.position = rank * 4 + 16;
  at.keys = rank * p.taps;
  at.lambda_row = at.keys * 2 + 16;
  at.by_row = T::kChunk * 2 + 16;
  at.gradient_row = at.keys + 8;
  at.map = 0;                                                                              // positions
  at.gram = at.map + std::int64_t(positions) * at.position;                                // segments x rank rows
  at.lambda = at.gram + (p.demodulate ? std::int64_t(segments) * rank * at.position : 0);  // hi, lo: channels rows
  at.by = at.lambda + 2 * std::int64_t(channels) * at.lambda_row;                          // hi, lo: channels rows
  at.gradient = at.by + 2 * std::int64_t(channels) * at.by_row;         // channels x gradient_row floats
  at.own = at.gradient + 4 * std::int64_t(channels) * at.gradient_row;  // Lambda, mean, square: owned x keys floats
  at.places = at.own + 3 * 4 * std::int64_t(channels / T::kBlocks) * at.keys;  // of each pixel in the map, in bytes
  at.inverse = at.places + 4 * std::int64_t(pixels);                           // of Lambda's scale: channels floats
  at.demod = at.inverse + 4 * channels;                                        // channels floats
  at.sums = at.demod + 4 * channels;                                           // 2 x warps x channels floats
  at.size = at.sums + 2 * 4 * T::kWarps * channels;
  return at;
}

// Scratch of an edit: both scales of the maps of each block of a cluster, their maps as they lie in shared memory, and
// cross in the order of a block's keys for each block of the grid. Offsets in floats.
__host__ __device__ inline std::int64_t scratch_map(const ClusterLayout& at, int block) {
  return 2 * ClusterTraits::kBlocks + std::int64_t(block) * at.packed * (at.position / 4);
}
__host__ __device__ inline std::int64_t scratch_cross(const ClusterLayout& at, const InsertionProblem& p, int block) {
  return scratch_map(at, ClusterTraits::kBlocks) + std::int64_t(block) * p.segments * at.channels * at.keys;
}

// The layout with each part at the size of the largest block's, so that all blocks have the same offsets; `size` is 0
// where the problem does not take this form. Maps that do not fit `shared_bytes` are read a piece at a time. piece: the
// fewest groups of a piece that is not a segment's last.
ClusterLayout common_layout(const InsertionProblem& p, int channels, std::int64_t shared_bytes, int* segments,
                            int* piece);

// Computes the maps of all blocks of a cluster, for each edit, into scratch.
cudaError_t launch_cluster_maps(const InsertionProblem& p, const ClusterLayout& at, int edits, cudaStream_t stream);

}  // namespace pyrewrite
