// The insertion of several targets or many directions, on GPUs with clusters. A cluster of eight blocks owns 32 output
// channels, or 16; each block computes all of them on an eighth of the pixels, so that the maps of those pixels stay in
// its shared memory from the first step to the last and the matrix instruction's tiles are full. Both products of a
// step go through the tensor cores. Then each block collects the gradient of an eighth of the channels from the others,
// takes Adam's step for them and sends the new Lambda to all. Clusters never wait for one another.
//
// Where all pixels of a segment weigh the same, dloss / dz needs no rounding: its sign times the activation's slope is
// one of two whole numbers, after a scale (whole_slopes).
#include <cooperative_groups.h>

#include "insertion/cluster_block.h"

namespace pyrewrite {
namespace {

namespace cg = cooperative_groups;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

template <int Rows>
struct Worker : ClusterBlock<Rows> {
  using Block = ClusterBlock<Rows>;
  using Block::cross, Block::tiles, Block::gram_scale, Block::first, Block::block, Block::rank, Block::warp;
  using Block::kChannels, Block::kOwned, Block::kHeld;
  using Block::lane, Block::floats, Block::sum, Block::channel_of, Block::tap_offset, Block::own;
  using Block::p, Block::edit, Block::at, Block::share, Block::scales, Block::shared, Block::address;
  using typename Block::Tile;
  static constexpr int kFifth = 2 / Rows;  // key tiles of a fifth of what a warp holds in the gradient's product
  static constexpr int kKeyTiles = 5 * kFifth;

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
      const int tap = pair * 16 / rank, e = pair * 16 % rank, kk = pair * 16 + lane % 4 * 2;
      // Read now, used after the product: the memory has that time to answer.
      float2 crosses[2][kHeld];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int r = 0; r < kHeld; ++r)
          crosses[tile][r] = *reinterpret_cast<const float2*>(
              cross + (std::int64_t(n) * kChannels + channel_of(r)) * at.keys + kk + tile * 8);
      const unsigned row =
          address + at.gram + (n * rank + e + lane % 8) * at.position + lane / 16 * rank * 2 + lane / 8 % 2 * 16;
      float acc[2][Rows][4] = {};
      for (int d = 0; d < rank; d += 16) {
        unsigned hi[Rows][4], lo[Rows][4], b[2][4];
        load_lambda(tap * rank + d, hi, lo);
        load_matrices(b[0], row + d * 2);
        load_matrices(b[1], row + 8 * at.position + d * 2);
        multiply_tiles<false>(acc, hi, lo, b);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int r = 0; r < kHeld; ++r) {
          const float scale = floats(at.inverse)[channel_of(r)] * inverse_gram;
          const float* product = acc[tile][r / 2] + r % 2 * 2;
          f(r, kk + tile * 8, make_float2(product[0] * scale, product[1] * scale), crosses[tile][r]);
        }
    }
  }

  // demod of segment n's target, all channels. `keep`: cross + gram Lambda goes to the gradient's place. Two barriers.
  __device__ void demodulate(int n, bool keep) const {
    float norm2[kHeld] = {};
    for_products(n, [&](int r, int kk, float2 product, float2 crosses) {
      const int c = channel_of(r);
      const char* row = shared + at.lambda + c * at.lambda_row + kk * 2;
      const float2 hi = __half22float2(*reinterpret_cast<const __half2*>(row));
      const float2 lo = __half22float2(*reinterpret_cast<const __half2*>(row + kChannels * at.lambda_row));
      const float inverse = floats(at.inverse)[c];
      norm2[r] += (2.f * crosses.x + product.x) * ((hi.x + lo.x) * inverse) +
                  (2.f * crosses.y + product.y) * ((hi.y + lo.y) * inverse);
      if (keep) *gradient_at(c, kk) = make_float2(crosses.x + product.x, crosses.y + product.y);
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

  // What of a tile's pixels is read from global memory.
  struct Pixels {
    float4 base[Rows], goal[Rows];
    float2 noise, weight;
  };

  __device__ void load_pixels(Pixels& pixels, const Tile& tile) const {
#pragma unroll
    for (int m = 0; m < Rows; ++m) pixels.base[m] = tile.base[m][lane], pixels.goal[m] = tile.goal[m][lane];
    pixels.noise = tile.noise[lane % 4], pixels.weight = tile.weight[lane % 4];
  }

  // Value, sign and dloss / dz of `Groups` groups of pixels: that of this warp in the chunk that begins at group
  // `chunk` of segment n, and those a whole round of warps further.
  template <int Groups>
  __device__ void forward(int n, int chunk, float (&by_demod)[kHeld], float (&loss)[kHeld]) const {
    constexpr int kTiles = 2 * Groups;
    const Segment& s = share.segments[n];
    const int* places = reinterpret_cast<const int*>(shared + at.places) + s.pixel + chunk * T::kGroup;
    const Tile* from = tiles + s.pixel / T::kTile + chunk * 2;
    float acc[kTiles][Rows][4] = {};
    unsigned keys[kTiles];
    int number[kTiles];  // of the tile in the chunk
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      number[tile] = (warp + tile / 2 * T::kWarps) * 2 + tile % 2;
      keys[tile] = address + at.map + places[number[tile] * 8 + lane % 8] + lane / 16 * rank * 2 + lane / 8 % 2 * 16;
    }
    // Read now, used after the product: the memory has all its time to answer.
    Pixels pixels[2];
    load_pixels(pixels[0], from[number[0]]);
    load_pixels(pixels[1], from[number[1]]);
    int kk = 0;
    for (int tap = 0; tap < p.taps; ++tap) {
      const int offset = tap_offset(s, tap);
#pragma unroll 1
      for (int d = 0; d < rank; d += 16, kk += 16) {
        unsigned hi[Rows][4], lo[Rows][4], b[2][2][4];
        load_lambda(kk, hi, lo);
        load_keys(b[0], keys, 0, offset + d * 2);
#pragma unroll
        for (int group = 0; group < Groups; ++group) {
          if (group + 1 < Groups) load_keys(b[(group + 1) % 2], keys, group + 1, offset + d * 2);
          multiply_tiles<false>(acc + 2 * group, hi, lo, b[group % 2]);
        }
      }
    }
    const bool whole = scales.whole[n];
    const float by_scale = scales.by[n];
    const int by_row = T::by_row(whole);
    float demod[kHeld], bias[kHeld], scale[kHeld];
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const int c = channel_of(r);
      demod[r] = floats(at.demod)[c];
      bias[r] = first + c < p.channels ? edit.bias[first + c] : 0.f;
      scale[r] = floats(at.inverse)[c] / scales.map;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Pixels now = pixels[tile % 2];
      if (tile + 2 < kTiles) load_pixels(pixels[tile % 2], from[number[tile + 2]]);
      const float noise[2] = {now.noise.x, now.noise.y}, weight[2] = {now.weight.x, now.weight.y};
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        const float* base = &now.base[r / 2].x + r % 2 * 2;
        const float* goal = &now.goal[r / 2].x + r % 2 * 2;
        float by[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float y = base[i] + acc[tile][r / 2][r % 2 * 2 + i] * scale[r];
          const float by_z =
              pixel_step<ScalarOps>(y, demod[r], noise[i] + bias[r], goal[i], weight[i], p.up, p.down, loss[r]);
          by_demod[r] += by_z * y;
          by[i] = by_z * by_scale;
        }
        char* to = shared + at.by + channel_of(r) * by_row + (number[tile] * 8 + lane % 4 * 2) * 2;
        const Split first_by = split(by[0]), second_by = split(by[1]);
        *reinterpret_cast<unsigned*>(to) = pack(first_by.hi, second_by.hi);
        if (!whole) *reinterpret_cast<unsigned*>(to + kChannels * by_row) = pack(first_by.lo, second_by.lo);
      }
    }
  }

  __device__ static void load_keys(unsigned (&b)[2][4], const unsigned* keys, int group, int offset) {
    load_matrices(b[0], keys[2 * group] + offset);
    load_matrices(b[1], keys[2 * group + 1] + offset);
  }

  // What the gradient's product reads of a group of pixels.
  template <int Tiles, bool Whole>
  struct Factors {
    unsigned hi[Rows][4], lo[Rows][4], keys[Tiles][4];

    __device__ void load(const Worker& w, const int* places, const int (&offset)[Tiles], int group) {
      constexpr int kRow = T::by_row(Whole);
#pragma unroll
      for (int m = 0; m < Rows; ++m) {
        const unsigned row = w.address + w.at.by + (m * 16 + w.lane % 16) * kRow + (group * 16 + w.lane / 16 * 8) * 2;
        load_matrices(hi[m], row);
        if (!Whole) load_matrices(lo[m], row + kChannels * kRow);
      }
      const unsigned from = w.address + w.at.map + places[group * T::kGroup] + w.lane / 16 * w.rank * 2;
#pragma unroll
      for (int j = 0; j < Tiles; ++j) load_matrices_transposed(keys[j], from + offset[j]);
    }
  };

  // gradient = keep gradient + demod dloss/dz keys^T over `groups` groups of pixels from group `chunk` of segment n on,
  // for `count` key tiles from `tile` on; `fresh`: there is no gradient before. Tiles: count, or one more.
  template <int Tiles, bool Whole>
  __device__ void accumulate_tiles(int n, int chunk, int groups, int tile, int count, bool fresh,
                                   const float (&keep)[kHeld]) const {
    const Segment& s = share.segments[n];
    const int* places = reinterpret_cast<const int*>(shared + at.places) + s.pixel + chunk * T::kGroup + lane % 16;
    float acc[Tiles][Rows][4] = {};
    int offset[Tiles];
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      const int kk = (tile + (j < count ? j : 0)) * 8;
      offset[j] = tap_offset(s, kk / rank) + kk % rank * 2;
    }
    // A group's factors are read while the one before is multiplied.
    Factors<Tiles, Whole> now, next;
    now.load(*this, places, offset, 0);
#pragma unroll 2
    for (int group = 0; group < groups; ++group) {
      next.load(*this, places, offset, min(group + 1, groups - 1));
      multiply_tiles<Whole>(acc, now.hi, now.lo, now.keys);
      now = next;
    }
    const float unscale = 1.f / (scales.by[n] * scales.map);
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const int c = channel_of(r);
      const float scale = floats(at.demod)[c] * unscale;
#pragma unroll
      for (int j = 0; j < Tiles; ++j) {
        if (j >= count) break;
        float2* to = gradient_at(c, (tile + j) * 8 + lane % 4 * 2);
        const float2 before = fresh ? make_float2(0.f, 0.f) : *to;
        const float* product = acc[j][r / 2] + r % 2 * 2;
        *to = make_float2(keep[r] * before.x + scale * product[0], keep[r] * before.y + scale * product[1]);
      }
    }
  }

  // The same for all key tiles. One is one warp's, and every warp has as many as another, or one less.
  template <bool Whole>
  __device__ void accumulate(int n, int chunk, int groups, bool fresh, const float (&keep)[kHeld]) const {
    const int tiles = at.keys / 8, rounds = (tiles + T::kWarps * kKeyTiles - 1) / (T::kWarps * kKeyTiles);
    for (int round = 0; round < rounds; ++round) {
      const int begin = tiles * round / rounds, here = tiles * (round + 1) / rounds - begin;
      const int count = here / T::kWarps + (warp < here % T::kWarps);
      const int tile = begin + here / T::kWarps * warp + min(warp, here % T::kWarps);
      if (count > 4 * kFifth)
        accumulate_tiles<5 * kFifth, Whole>(n, chunk, groups, tile, count, fresh, keep);
      else if (count > 3 * kFifth)
        accumulate_tiles<4 * kFifth, Whole>(n, chunk, groups, tile, count, fresh, keep);
      else if (count > 2 * kFifth)
        accumulate_tiles<3 * kFifth, Whole>(n, chunk, groups, tile, count, fresh, keep);
      else if (count > 0)
        accumulate_tiles<2 * kFifth, Whole>(n, chunk, groups, tile, count, fresh, keep);
    }
  }

  __device__ float2* gradient_at(int c, int kk) const {
    return reinterpret_cast<float2*>(floats(at.gradient) + c * at.gradient_row + kk);
  }

  // demod^3 times the sum over this block's pixels, in all warps. One barrier in between.
  __device__ void put_by_demod(const float (&by_demod)[kHeld]) const {
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const float all = quad_sum(by_demod[r]);
      if (lane % 4 == 0) sum(1, warp, channel_of(r)) = all;
    }
  }
  __device__ void get_by_norm(float (&by_norm)[kHeld]) const {
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const float demod = floats(at.demod)[channel_of(r)];
      by_norm[r] = 0.f;
      for (int w = 0; w < T::kWarps; ++w) by_norm[r] += sum(1, w, channel_of(r));
      by_norm[r] *= demod * demod * demod;
    }
  }

  // d demod / d Lambda = -demod^3 (cross + gram Lambda). One barrier.
  __device__ void finish_segment(int n, const float (&by_demod)[kHeld]) const {
    float by_norm[kHeld];
    put_by_demod(by_demod);
    __syncthreads();
    get_by_norm(by_norm);
    for_products(n, [&](int r, int kk, float2 product, float2 crosses) {
      float2* to = gradient_at(channel_of(r), kk);
      *to = make_float2(to->x - by_norm[r] * (crosses.x + product.x), to->y - by_norm[r] * (crosses.y + product.y));
    });
  }

  // `groups` groups of pixels from group `chunk` of segment n on. `kept`: cross + gram Lambda is in the gradient's
  // place, and these are all pixels of the segment. `fresh`: nothing is.
  __device__ void run_chunk(int n, int chunk, int groups, bool kept, bool fresh, float (&by_demod)[kHeld],
                            float (&loss)[kHeld]) const {
    // Groups of this warp: whole numbers, up to four; else up to two.
    const int mine = (groups - warp + T::kWarps - 1) / T::kWarps;
    if (mine > 3)
      forward<4>(n, chunk, by_demod, loss);
    else if (mine > 2)
      forward<3>(n, chunk, by_demod, loss);
    else if (mine > 1)
      forward<2>(n, chunk, by_demod, loss);
    else if (mine > 0)
      forward<1>(n, chunk, by_demod, loss);
    if (kept) put_by_demod(by_demod);
    __syncthreads();  // dloss / dz is whole
    float keep[kHeld];
    if (kept) get_by_norm(keep);
#pragma unroll
    for (int r = 0; r < kHeld; ++r) keep[r] = kept ? -keep[r] : 1.f;
    if (scales.whole[n])
      accumulate<true>(n, chunk, groups, fresh, keep);
    else
      accumulate<false>(n, chunk, groups, fresh, keep);
    __syncthreads();  // dloss / dz and the map are used up, the gradient whole
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
      const int all = groups_of(s.end - s.begin), most = T::chunk_groups(scales.whole[n]);
      const bool kept = p.demodulate && n == 0 && all <= min(most, s.piece);
      float by_demod[kHeld] = {};
      if (p.demodulate) demodulate(n, kept);
      for (int piece = 0; piece < all; piece += s.piece) {
        const int end = min(piece + s.piece, all);
        if (at.room > 0) {
          __pipeline_wait_prior(0);
          __syncthreads();  // the piece's map is whole
        }
        for (int group = piece; group < end; group += most)
          run_chunk(n, group, min(most, end - group), kept, n == 0 && group == 0 && !kept, by_demod, loss);
        // The next one comes while the segment ends, the next begins or Adam runs.
        if (at.room > 0) {
          if (end < all)
            this->copy_piece(n, end);
          else
            this->copy_piece((n + 1) % share.count, 0);
        }
      }
      if (p.demodulate && !kept) finish_segment(n, by_demod);
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
  __shared__ Scales scales;
  __shared__ float gram_scale[T::kMostSegments];
  const cg::cluster_group cluster = cg::this_cluster();
  const int block = cluster.block_rank(), rank = padded_rank(p.rank);
  const InsertionArrays& edit = p.edits[blockIdx.y];
  if (threadIdx.x == 0) {
    share_of(p, block, at.room, share);
    scales = reinterpret_cast<const Scales*>(edit.scratch)[block];
  }
  __syncthreads();
  using Work = Worker<Rows>;
  float* cross = edit.scratch + scratch_cross(at, p, blockIdx.x);
  const Work worker = {{p, edit, at, share, scales, shared, static_cast<unsigned>(__cvta_generic_to_shared(shared)),
                        cross, reinterpret_cast<typename Work::Tile*>(cross + cross_floats(at, p)), gram_scale,
                        static_cast<int>(blockIdx.x) / T::kBlocks * Work::kChannels, block, rank,
                        static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32}};
  worker.start_maps();
  worker.load_places();
  worker.load_tiles();
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

auto kernel_for(int channels) { return channels == 32 ? cluster_kernel<2> : cluster_kernel<1>; }

}  // namespace

bool cluster_has_room(int channels, int shared_bytes) {
  const void* kernel = reinterpret_cast<const void*>(kernel_for(channels));
  return clusters_at_once(kernel, T::kBlocks, T::kThreads, shared_bytes) > 0;
}

cudaError_t launch_cluster(const InsertionProblem& p, const InsertionPlan& plan, int edits, cudaStream_t stream) {
  int piece = 0;
  const ClusterLayout at = common_layout(p, plan.channels_per_block, plan.shared_bytes, &piece);
  const cudaError_t packed = launch_cluster_maps(p, at, edits, stream);
  if (packed != cudaSuccess) return packed;
  return launch_in_clusters(kernel_for(plan.channels_per_block), T::kBlocks, T::kThreads, p, plan, at, edits, stream);
}

}  // namespace pyrewrite
