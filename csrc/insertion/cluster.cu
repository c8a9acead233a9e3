// The insertion of several targets or many directions, on GPUs with clusters. A cluster of eight blocks owns 32 output
// channels, or 16; each block computes all of them on an eighth of the pixels, so that the maps of those pixels stay in
// its shared memory from the first step to the last and the matrix instruction's tiles are full. Both products of a
// step go through the tensor cores. Then each block collects the gradient of an eighth of the channels from the others,
// takes Adam's step for them and sends the new Lambda to all. Clusters never wait for one another.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "insertion/cluster_layout.h"
#include "insertion/mma.h"

namespace pyrewrite {
namespace {

namespace cg = cooperative_groups;
using T = ClusterTraits;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Rows: tiles of 16 channels.
template <int Rows>
struct Worker {
  static constexpr int kChannels = 16 * Rows;            // of a cluster
  static constexpr int kOwned = kChannels / T::kBlocks;  // channels whose Adam a block does
  static constexpr int kHeld = 2 * Rows;                 // rows of a product that a lane holds
  static constexpr int kKeyTiles = 10 / Rows;            // eights of keys that a warp holds in the gradient's product
  static_assert(T::kThreads / kOwned % 32 == 0, "whole warps for each owned channel");

  const InsertionProblem& p;
  const InsertionArrays& edit;
  const ClusterLayout& at;
  const Share& share;
  char* shared;
  unsigned address;         // of `shared`
  float* cross;             // this block's segments x channels x keys
  const float* gram_scale;  // of each segment
  int first;                // channel of the cluster
  int block;                // of the cluster
  int rank;                 // padded
  int warp, lane;
  float map_scale, by_scale;

  __device__ float* floats(std::int64_t offset) const { return reinterpret_cast<float*>(shared + offset); }
  __device__ float& sum(int which, int of_warp, int c) const {
    return floats(at.sums)[(which * T::kWarps + of_warp) * kChannels + c];
  }
  // Channel of row `row` (0 ... kHeld - 1) that this lane holds of a product: tiles of 16, halves of 8.
  __device__ int channel_of(int row) const { return row / 2 * 16 + row % 2 * 8 + lane / 4; }
  // Of a window's tap in the segment's map, in bytes.
  __device__ int tap_offset(const Segment& s, int tap) const {
    return (tap / p.kernel_width * map_width(p, s.target) + tap % p.kernel_width) * at.position;
  }
  // The largest |x| of the block, in all threads.
  __device__ float largest(float x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    __syncthreads();
    if (lane == 0) sum(0, warp, 0) = x;
    __syncthreads();
    for (int w = 0; w < T::kWarps; ++w) x = fmaxf(x, sum(0, w, 0));
    return x;
  }

  // -- before the first step ------------------------------------------------------------------------------------------

  __device__ void put(std::int64_t row, int d, float scaled) const {
    const Split value = split(scaled);
    __half* to = reinterpret_cast<__half*>(shared + row);
    to[d] = value.hi;
    to[rank + d] = value.lo;
  }

  // First row of the map that the piece of segment s from group `group` on reads.
  __device__ int first_row(const Segment& s, int group) const {
    return (s.begin + group * T::kGroup) / p.widths[s.target];
  }

  // Where each pixel's window begins in shared memory, in bytes.
  __device__ void load_places() const {
    for (int n = 0; n < share.count; ++n) {
      const Segment& s = share.segments[n];
      const int w = p.widths[s.target], start = at.room > 0 ? 0 : s.map;
      for (int i = threadIdx.x; i < groups_of(s.end - s.begin) * T::kGroup; i += T::kThreads) {
        const int u = min(s.begin + i, s.end - 1);  // past the end: read anything, count nothing
        const int row = first_row(s, i / T::kGroup / s.piece * s.piece);
        reinterpret_cast<int*>(shared + at.places)[s.pixel + i] =
            (start + (u / w - row) * map_width(p, s.target) + u % w) * at.position;
      }
    }
  }

  // Starts to copy `bytes` of this block's maps in scratch to shared memory.
  __device__ void copy_maps(std::int64_t from, std::int64_t to, int bytes) const {
    const char* maps = reinterpret_cast<const char*>(edit.scratch + scratch_map(at, block)) + from;
    for (int i = threadIdx.x * 16; i < bytes; i += T::kThreads * 16)
      __pipeline_memcpy_async(shared + at.map + to + i, maps + i, 16);
    __pipeline_commit();
  }

  // The map of the piece of segment n from group `group` on.
  __device__ void copy_piece(int n, int group) const {
    const Segment& s = share.segments[n];
    const int end = min(s.begin + (group + s.piece) * T::kGroup, s.end), width = map_width(p, s.target);
    const int row = first_row(s, group), rows = (end - 1) / p.widths[s.target] - row + p.kernel_height;
    copy_maps((std::int64_t(s.map) + (row - s.row) * width) * at.position, 0, rows * width * at.position);
  }

  // All maps, where they stay; else the first piece.
  __device__ void start_maps() const {
    if (at.room == 0)
      copy_maps(0, 0, share.positions * at.position);
    else if (share.count > 0)
      copy_piece(0, 0);
  }

  __device__ void load_demodulation(float* scales) const {
    if (!p.demodulate) return;
    const int k = p.rank * p.taps;
    for (int n = 0; n < share.count; ++n) {
      const int b = share.segments[n].target;
      const float* gram = edit.gram + std::int64_t(b) * p.rank * p.rank;
      float most = 0.f;
      for (int i = threadIdx.x; i < p.rank * p.rank; i += T::kThreads) most = fmaxf(most, fabsf(gram[i]));
      const float scale = half_scale(largest(most));
      if (threadIdx.x == 0) scales[n] = scale;
      for (int i = threadIdx.x; i < rank * rank; i += T::kThreads) {
        const int e = i / rank, d = i % rank;
        put(at.gram + std::int64_t(n * rank + e) * at.position, d,
            e < p.rank && d < p.rank ? gram[e * p.rank + d] * scale : 0.f);
      }
      for (int i = threadIdx.x; i < kChannels * at.keys; i += T::kThreads) {
        const int c = i / at.keys, key = key_of(p, i % at.keys);
        cross[std::int64_t(n) * kChannels * at.keys + i] =
            key >= 0 && first + c < p.channels ? edit.cross[(std::int64_t(b) * p.channels + first + c) * k + key] : 0.f;
      }
    }
  }

  // This block's own channels: Lambda (0), mean (1) or square (2) at padded key kk.
  __device__ float& own(int which, int c, int kk) const { return floats(at.own)[(which * kOwned + c) * at.keys + kk]; }

  // Calls f(place in the problem's state, channel, padded key) for the real entries of the own channels.
  template <class F>
  __device__ void for_state(F f) const {
    for (int i = threadIdx.x; i < kOwned * at.keys; i += T::kThreads) {
      const int c = i / at.keys, kk = i % at.keys, key = key_of(p, kk);
      const int channel = first + block * kOwned + c;
      if (key >= 0 && channel < p.channels) f(std::int64_t(channel) * p.rank * p.taps + key, c, kk);
    }
  }

  __device__ void load_state() const {
    for (int i = threadIdx.x; i < 3 * kOwned * at.keys; i += T::kThreads) floats(at.own)[i] = 0.f;
    if (threadIdx.x < kChannels) floats(at.demod)[threadIdx.x] = 1.f;
    __syncthreads();
    for_state([&](std::int64_t from, int c, int kk) {
      own(0, c, kk) = edit.lambda[from];
      own(1, c, kk) = edit.exp_avg[from];
      own(2, c, kk) = edit.exp_avg_sq[from];
    });
  }

  __device__ void store_state() const {
    for_state([&](std::int64_t to, int c, int kk) {
      edit.lambda[to] = own(0, c, kk);
      edit.exp_avg[to] = own(1, c, kk);
      edit.exp_avg_sq[to] = own(2, c, kk);
    });
  }

  // -- products -------------------------------------------------------------------------------------------------------

  // 16 keys from kk of Lambda, all channels: hi and lo of both tiles.
  __device__ void load_lambda(int kk, unsigned (&hi)[Rows][4], unsigned (&lo)[Rows][4]) const {
#pragma unroll
    for (int m = 0; m < Rows; ++m) {
      const unsigned row = address + at.lambda + (m * 16 + lane % 16) * at.lambda_row + (kk + lane / 16 * 8) * 2;
      load_matrices(hi[m], row);
      load_matrices(lo[m], row + kChannels * at.lambda_row);
    }
  }

  // Calls f(row, kk, products, crosses) with gram Lambda and cross of segment n at this lane's keys kk and kk + 1.
  template <class F>
  __device__ void for_products(int n, F f) const {
    const float inverse_gram = 1.f / gram_scale[n];
    // 16 keys at a time: they are of one tap, and share what is read of Lambda.
    for (int pair = warp; pair < at.keys / 16; pair += T::kWarps) {
      const int tap = pair * 16 / rank, e = pair * 16 % rank;
      const unsigned row =
          address + at.gram + (n * rank + e + lane % 8) * at.position + lane / 16 * rank * 2 + lane / 8 % 2 * 16;
      float acc[2][Rows][4] = {};
      for (int d = 0; d < rank; d += 16) {
        unsigned hi[Rows][4], lo[Rows][4];
        load_lambda(tap * rank + d, hi, lo);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          unsigned b[4];
          load_matrices(b, row + tile * 8 * at.position + d * 2);
#pragma unroll
          for (int m = 0; m < Rows; ++m) multiply_split(acc[tile][m], hi[m], lo[m], b);
        }
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int kk = pair * 16 + tile * 8 + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < kHeld; ++r) {
          const int c = channel_of(r);
          const float scale = floats(at.inverse)[c] * inverse_gram;
          const float* product = acc[tile][r / 2] + r % 2 * 2;
          const float2 crosses =
              *reinterpret_cast<const float2*>(cross + (std::int64_t(n) * kChannels + c) * at.keys + kk);
          f(r, kk, make_float2(product[0] * scale, product[1] * scale), crosses);
        }
      }
    }
  }

  // demod of segment n's target, all channels. Two barriers.
  __device__ void demodulate(int n) const {
    float norm2[kHeld] = {};
    for_products(n, [&](int r, int kk, float2 product, float2 crosses) {
      const int c = channel_of(r);
      const char* row = shared + at.lambda + c * at.lambda_row + kk * 2;
      const float2 hi = __half22float2(*reinterpret_cast<const __half2*>(row));
      const float2 lo = __half22float2(*reinterpret_cast<const __half2*>(row + kChannels * at.lambda_row));
      const float inverse = floats(at.inverse)[c];
      norm2[r] += (2.f * crosses.x + product.x) * ((hi.x + lo.x) * inverse) +
                  (2.f * crosses.y + product.y) * ((hi.y + lo.y) * inverse);
    });
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      norm2[r] = quad_sum(norm2[r]);
      if (lane % 4 == 0) sum(0, warp, channel_of(r)) = norm2[r];
    }
    __syncthreads();
    if (threadIdx.x < kChannels) {
      const int c = threadIdx.x;
      float total = 0.f;
      for (int w = 0; w < T::kWarps; ++w) total += sum(0, w, c);
      const float energy =
          first + c < p.channels ? edit.energy[std::int64_t(share.segments[n].target) * p.channels + first + c] : 1.f;
      floats(at.demod)[c] = 1.f / sqrtf(energy + total);
    }
    __syncthreads();
  }

  // Value, sign and dloss / dz of `Groups` groups of pixels: group `group` of the chunk that begins at pixel `chunk` of
  // the segment, and those a whole round of warps further.
  template <int Groups>
  __device__ void forward(const Segment& s, int chunk, int group, float (&by_demod)[kHeld],
                          float (&loss)[kHeld]) const {
    constexpr int kTiles = 2 * Groups;
    float acc[kTiles][Rows][4] = {}, base[kTiles][Rows][4], goal[kTiles][Rows][4];
    unsigned keys[kTiles];
    const int* places = reinterpret_cast<const int*>(shared + at.places) + s.pixel;
    const int start = p.starts[s.target];
    int pixel[kTiles];  // of the chunk: the first of the tile
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      pixel[tile] = (group + tile / 2 * T::kWarps) * T::kGroup + tile % 2 * 8;
      keys[tile] = address + at.map + places[chunk + pixel[tile] + lane % 8] + lane / 16 * rank * 2 + lane / 8 % 2 * 16;
#pragma unroll
      for (int i = 0; i < 4 * Rows; ++i) {
        // Read now, used after the product: the memory has all its time to answer.
        const int c = first + i / 4 * 16 + i % 4 / 2 * 8 + lane / 4;
        const int u = min(s.begin + chunk + pixel[tile] + lane % 4 * 2 + i % 2, s.end - 1);
        const std::int64_t from = std::int64_t(c) * p.pixels + start + u;
        base[tile][i / 4][i % 4] = c < p.channels ? edit.base[from] : 0.f;
        goal[tile][i / 4][i % 4] = c < p.channels ? edit.goal[from] : 0.f;
      }
    }
    for (int tap = 0; tap < p.taps; ++tap) {
      const int offset = tap_offset(s, tap);
      for (int d = 0; d < rank; d += 16) {
        unsigned hi[Rows][4], lo[Rows][4];
        load_lambda(tap * rank + d, hi, lo);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          unsigned b[4];
          load_matrices(b, keys[tile] + offset + d * 2);
#pragma unroll
          for (int m = 0; m < Rows; ++m) multiply_split(acc[tile][m], hi[m], lo[m], b);
        }
      }
    }
    float demod[kHeld], bias[kHeld], scale[kHeld];
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const int c = channel_of(r);
      demod[r] = floats(at.demod)[c];
      bias[r] = first + c < p.channels ? edit.bias[first + c] : 0.f;
      scale[r] = floats(at.inverse)[c] / map_scale;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int local = pixel[tile] + lane % 4 * 2, u = s.begin + chunk + local;
      float noise[2], weight[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        noise[i] = edit.noise[start + min(u + i, s.end - 1)];
        weight[i] = u + i < s.end ? edit.weight[start + u + i] / p.channels : 0.f;
      }
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        Split by[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at_value = r % 2 * 2 + i;
          const float y = base[tile][r / 2][at_value] + acc[tile][r / 2][at_value] * scale[r];
          const float by_z = pixel_step<ScalarOps>(y, demod[r], noise[i] + bias[r], goal[tile][r / 2][at_value],
                                                   weight[i], p.up, p.down, loss[r]);
          by_demod[r] += by_z * y;
          by[i] = split(by_z * by_scale);
        }
        char* to = shared + at.by + channel_of(r) * at.by_row + local * 2;
        *reinterpret_cast<unsigned*>(to) = pack(by[0].hi, by[1].hi);
        *reinterpret_cast<unsigned*>(to + kChannels * at.by_row) = pack(by[0].lo, by[1].lo);
      }
    }
  }

  // gradient += demod dloss/dz keys^T over `groups` groups of pixels from `chunk` on; `fresh`: = instead. A key tile is
  // one warp's, and every warp has as many as another, or one less.
  __device__ void accumulate(const Segment& s, int chunk, int groups, bool fresh) const {
    const int tiles = at.keys / 8, rounds = (tiles + T::kWarps * kKeyTiles - 1) / (T::kWarps * kKeyTiles);
    const int* places = reinterpret_cast<const int*>(shared + at.places) + s.pixel + chunk + lane % 16;
    const float unscale = 1.f / (by_scale * map_scale);
    for (int round = 0; round < rounds; ++round) {
      const int begin = tiles * round / rounds, here = tiles * (round + 1) / rounds - begin;
      const int count = here / T::kWarps + (warp < here % T::kWarps);
      const int tile = begin + here / T::kWarps * warp + min(warp, here % T::kWarps);
      float acc[kKeyTiles][Rows][4] = {};
      int offset[kKeyTiles];
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        const int kk = (tile + j) * 8;
        offset[j] = j < count ? tap_offset(s, kk / rank) + kk % rank * 2 : 0;
      }
      for (int group = 0; group < groups; ++group) {
        unsigned hi[Rows][4], lo[Rows][4];
#pragma unroll
        for (int m = 0; m < Rows; ++m) {
          const unsigned row = address + at.by + (m * 16 + lane % 16) * at.by_row + (group * 16 + lane / 16 * 8) * 2;
          load_matrices(hi[m], row);
          load_matrices(lo[m], row + kChannels * at.by_row);
        }
        const unsigned keys = address + at.map + places[group * T::kGroup] + lane / 16 * rank * 2;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) {
          if (j >= count) break;
          unsigned b[4];
          load_matrices_transposed(b, keys + offset[j]);
#pragma unroll
          for (int m = 0; m < Rows; ++m) multiply_split(acc[j][m], hi[m], lo[m], b);
        }
      }
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        if (j >= count) break;
#pragma unroll
        for (int r = 0; r < kHeld; ++r) {
          const int c = channel_of(r);
          const float scale = floats(at.demod)[c] * unscale;
          float2* to = gradient_at(c, (tile + j) * 8 + lane % 4 * 2);
          const float2 before = fresh ? make_float2(0.f, 0.f) : *to;
          *to =
              make_float2(before.x + scale * acc[j][r / 2][r % 2 * 2], before.y + scale * acc[j][r / 2][r % 2 * 2 + 1]);
        }
      }
    }
  }

  __device__ float2* gradient_at(int c, int kk) const {
    return reinterpret_cast<float2*>(floats(at.gradient) + c * at.gradient_row + kk);
  }

  // d demod / d Lambda = -demod^3 (cross + gram Lambda). One barrier.
  __device__ void finish_segment(int n, const float (&by_demod)[kHeld]) const {
    float by_norm[kHeld];
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      by_norm[r] = quad_sum(by_demod[r]);
      if (lane % 4 == 0) sum(1, warp, channel_of(r)) = by_norm[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const float demod = floats(at.demod)[channel_of(r)];
      by_norm[r] = 0.f;
      for (int w = 0; w < T::kWarps; ++w) by_norm[r] += sum(1, w, channel_of(r));
      by_norm[r] *= demod * demod * demod;
    }
    for_products(n, [&](int r, int kk, float2 product, float2 crosses) {
      float2* to = gradient_at(channel_of(r), kk);
      *to = make_float2(to->x - by_norm[r] * (crosses.x + product.x), to->y - by_norm[r] * (crosses.y + product.y));
    });
  }

  // This block's part of the gradient of all channels, and of the loss. Ends without a barrier.
  __device__ void run_pixels() const {
    if (share.count == 0) {
      float4* zero = reinterpret_cast<float4*>(shared + at.gradient);
      for (int i = threadIdx.x; i < kChannels * at.gradient_row / 4; i += T::kThreads)
        zero[i] = make_float4(0, 0, 0, 0);
    }
    float loss[kHeld] = {};
    for (int n = 0; n < share.count; ++n) {
      const Segment& s = share.segments[n];
      const int all = groups_of(s.end - s.begin);
      float by_demod[kHeld] = {};
      if (p.demodulate) demodulate(n);
      for (int piece = 0; piece < all; piece += s.piece) {
        const int end = min(piece + s.piece, all);
        if (at.room > 0) {
          __pipeline_wait_prior(0);
          __syncthreads();  // the piece's map is whole
        }
        for (int group = piece; group < end; group += T::kChunkGroups) {
          const int groups = min(T::kChunkGroups, end - group), chunk = group * T::kGroup;
          if (warp + T::kWarps < groups)
            forward<2>(s, chunk, warp, by_demod, loss);
          else if (warp < groups)
            forward<1>(s, chunk, warp, by_demod, loss);
          __syncthreads();  // dloss / dz is whole
          accumulate(s, chunk, groups, n == 0 && group == 0);
          __syncthreads();  // dloss / dz and the map are used up, the gradient whole
        }
        // The next one comes while the segment ends, the next begins or Adam runs.
        if (at.room > 0) {
          if (end < all)
            copy_piece(n, end);
          else
            copy_piece((n + 1) % share.count, 0);
        }
      }
      if (p.demodulate) finish_segment(n, by_demod);
    }
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      loss[r] = quad_sum(loss[r]);
      if (lane % 4 == 0) sum(0, warp, channel_of(r)) = loss[r];
    }
  }

  __device__ void store_loss(double* to) const {
    if (warp != 0) return;
    float part = 0.f;
    if (lane < kChannels && first + lane < p.channels)
      for (int w = 0; w < T::kWarps; ++w) part += sum(0, w, lane);
    double total = part;
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    if (lane == 0) *to = total;
  }

  // -- Adam -----------------------------------------------------------------------------------------------------------

  static constexpr int kShare = T::kThreads / kOwned;  // threads of an own channel

  // The whole gradient of the own channels, in their rows of this block's gradient: no other block reads those.
  __device__ void collect(const cg::cluster_group& cluster) const {
    const int c = threadIdx.x / kShare, row = block * kOwned + c, channel = first + row;
    const float scale =
        edit.penalty_scale != nullptr && channel < p.channels ? edit.penalty_scale[channel] * (2.f / p.channels) : 0.f;
    for (int kk = threadIdx.x % kShare * 4; kk < at.keys; kk += kShare * 4) {
      float4* mine = reinterpret_cast<float4*>(floats(at.gradient) + row * at.gradient_row + kk);
      float total[4] = {};
      if (scale != 0.f) {
        const int tap = kk / rank, d = kk % rank;
        for (int e = 0; e < p.rank; ++e)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (d + i < p.rank) total[i] += edit.penalty_matrix[(d + i) * p.rank + e] * own(0, c, tap * rank + e);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] *= scale;
      }
#pragma unroll
      for (int from = 0; from < T::kBlocks; ++from) {
        const float4 part = *cluster.map_shared_rank(mine, from);
        total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
      }
      *mine = make_float4(total[0], total[1], total[2], total[3]);
    }
  }

  __device__ void update(const AdamStep& adam) const {
    const int c = threadIdx.x / kShare;
    const float* gradient = floats(at.gradient) + (block * kOwned + c) * at.gradient_row;
    for (int kk = threadIdx.x % kShare; kk < at.keys; kk += kShare)
      if (kk % rank < p.rank)
        own(0, c, kk) = adam_step<ScalarOps>(own(0, c, kk), gradient[kk], own(1, c, kk), own(2, c, kk), adam);
  }

  // Sends Lambda of the own channels to all blocks. One barrier.
  __device__ void publish(const cg::cluster_group& cluster) const {
    const int c = threadIdx.x / kShare, row = block * kOwned + c;
    float most = 0.f;
    for (int kk = threadIdx.x % kShare; kk < at.keys; kk += kShare) most = fmaxf(most, fabsf(own(0, c, kk)));
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (lane == 0) sum(1, warp, 0) = most;
    __syncthreads();
    for (int w = 0; w < kShare / 32; ++w) most = fmaxf(most, sum(1, c * (kShare / 32) + w, 0));
    const float scale = half_scale(most);
    for (int kk = threadIdx.x % kShare * 4; kk < at.keys; kk += kShare * 4) {
      Split value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = split(own(0, c, kk + i) * scale);
      const uint2 hi = make_uint2(pack(value[0].hi, value[1].hi), pack(value[2].hi, value[3].hi));
      const uint2 lo = make_uint2(pack(value[0].lo, value[1].lo), pack(value[2].lo, value[3].lo));
      char* to = shared + at.lambda + row * at.lambda_row + kk * 2;
#pragma unroll
      for (int other = 0; other < T::kBlocks; ++other) {
        char* there = cluster.map_shared_rank(to, other);
        *reinterpret_cast<uint2*>(there) = hi;
        *reinterpret_cast<uint2*>(there + kChannels * at.lambda_row) = lo;
      }
    }
    if (threadIdx.x % kShare < T::kBlocks)
      *cluster.map_shared_rank(floats(at.inverse) + row, threadIdx.x % kShare) = 1.f / scale;
  }
};

#endif

template <int Rows>
__global__ void __launch_bounds__(T::kThreads, 1)
    cluster_kernel(const __grid_constant__ InsertionProblem p, const __grid_constant__ ClusterLayout at) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  __shared__ Share share;
  __shared__ float gram_scale[T::kMostSegments];
  const cg::cluster_group cluster = cg::this_cluster();
  const int block = cluster.block_rank(), rank = padded_rank(p.rank);
  if (threadIdx.x == 0) share_of(p, block, at.room, share);
  __syncthreads();
  const InsertionArrays& edit = p.edits[blockIdx.y];
  using Work = Worker<Rows>;
  Work worker = {p,
                 edit,
                 at,
                 share,
                 shared,
                 static_cast<unsigned>(__cvta_generic_to_shared(shared)),
                 edit.scratch + scratch_cross(at, p, blockIdx.x),
                 gram_scale,
                 static_cast<int>(blockIdx.x) / T::kBlocks * Work::kChannels,
                 block,
                 rank,
                 static_cast<int>(threadIdx.x) / 32,
                 static_cast<int>(threadIdx.x) % 32,
                 edit.scratch[2 * block],
                 edit.scratch[2 * block + 1]};
  worker.start_maps();
  worker.load_places();
  worker.load_demodulation(gram_scale);
  worker.load_state();
  if (at.room == 0) __pipeline_wait_prior(0);
  __syncthreads();
  cluster.sync();  // all blocks have started: their shared memory may be written
  worker.publish(cluster);
  cluster.sync();  // Lambda is whole
  for (int step = 0; step < p.count; ++step) {
    worker.run_pixels();
    cluster.sync();  // every block's gradient is whole, Lambda is used up
    worker.store_loss(edit.block_losses + std::int64_t(blockIdx.x) * p.count + step);
    worker.collect(cluster);
    __syncthreads();  // the own channels' Lambda has been read for the penalty
    worker.update(p.schedule[step]);
    __syncthreads();
    worker.publish(cluster);
    cluster.sync();  // Lambda is whole, the gradients are used up
  }
  if (at.room > 0) __pipeline_wait_prior(0);  // no copy outlives the block
  worker.store_state();
#endif
}

}  // namespace

cudaError_t launch_cluster(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream) {
  const auto kernel = plan.channels_per_block == 32 ? cluster_kernel<2> : cluster_kernel<1>;
  int segments = 0, piece = 0;
  const ClusterLayout at = common_layout(p, plan.channels_per_block, plan.shared_bytes, &segments, &piece);
  const cudaError_t packed = launch_cluster_maps(p, at, edits, stream);
  if (packed != cudaSuccess) return packed;
  return launch_in_clusters(kernel, T::kBlocks, T::kThreads, p, plan, at, edits, stream);
}

}  // namespace pyrewrite
