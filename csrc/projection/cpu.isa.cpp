// One output channel at a time: its row of the weight stays in the cache from the first read to the write.
#include "common/vector.isa.h"
#include "projection/params.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

constexpr int kRanks = 4;  // directions by taps in a block of sums: 12 products for 7 loads
constexpr int kTaps = 3;

bool flat(const WeightView& v, const ProjectionItem& p) {
  return (p.width == 1 || v.width_stride == 1) && (p.height == 1 || v.height_stride == p.width) &&
         (p.in == 1 || v.in_stride == static_cast<std::int64_t>(p.height) * p.width);
}

template <typename Visit>
void each_element(const WeightView& v, const ProjectionItem& p, int channel, Visit visit) {
  float* row = v.data + channel * v.out_stride;
  std::int64_t at = 0;
  for (int i = 0; i < p.in; ++i)
    for (int y = 0; y < p.height; ++y)
      for (int x = 0; x < p.width; ++x, ++at)
        visit(row[i * v.in_stride + y * v.height_stride + x * v.width_stride], at);
}

// A channel as in x height x width without gaps: in place where it lies so, else copied to `room`.
float* gather(const WeightView& v, const ProjectionItem& p, int channel, float* room) {
  if (flat(v, p)) return v.data + channel * v.out_stride;
  each_element(v, p, channel, [room](float& element, std::int64_t at) { room[at] = element; });
  return room;
}

void scatter(const WeightView& v, const ProjectionItem& p, int channel, const float* row) {
  if (row == v.data + channel * v.out_stride) return;
  each_element(v, p, channel, [row](float& element, std::int64_t at) { element = row[at]; });
}

// sums[r][k] = <direction r, tap k> for a block of both.
template <int R, int K>
void dots(const float* direction, const float* taps, std::int64_t padded, int stride, float* sums) {
  Vec total[R][K] = {};
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    Vec tap[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) tap[k] = load(taps + k * padded + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec d = load(direction + r * padded + i);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) total[r][k] += d * tap[k];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) sums[r * stride + k] = sum(total[r][k]);
}

template <int K>
void dots_of_rank(int ranks, const float* direction, const float* taps, std::int64_t padded, int stride, float* sums) {
  switch (ranks) {
    case 1:
      return dots<1, K>(direction, taps, padded, stride, sums);
    case 2:
      return dots<2, K>(direction, taps, padded, stride, sums);
    case 3:
      return dots<3, K>(direction, taps, padded, stride, sums);
    default:
      return dots<4, K>(direction, taps, padded, stride, sums);
  }
}

// taps[k] = sum over r of sums[r][k] * direction r
template <int K>
void expand(int rank, const float* direction, const float* sums, std::int64_t padded, int stride, float* taps) {
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    Vec total[K] = {};
    for (int r = 0; r < rank; ++r) {
      const Vec d = load(direction + r * padded + i);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) total[k] += sums[r * stride + k] * d;
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) store(taps + k * padded + i, total[k]);
  }
}

}  // namespace

std::int64_t project_padded(int in) { return (in + kLanes - 1) / kLanes * static_cast<std::int64_t>(kLanes); }

std::int64_t project_scratch(const ProjectionItem& p) {
  const std::int64_t taps = static_cast<std::int64_t>(p.height) * p.width;
  return 5 * taps * p.in + taps * project_padded(p.in) + taps * p.rank;
}

void project_channel(const ProjectionItem& p, const float* direction, const AdamSettings& adam, int channel,
                     float* scratch) {
  const int taps = p.height * p.width;
  const std::int64_t size = static_cast<std::int64_t>(taps) * p.in, padded = project_padded(p.in);
  float* weight = gather(p.weight, p, channel, scratch);
  if (adam.enabled) {
    const float* grad = gather(p.grad, p, channel, scratch + 2 * size);
    float* exp_avg = gather(p.exp_avg, p, channel, scratch + 3 * size);
    float* exp_avg_sq = gather(p.exp_avg_sq, p, channel, scratch + 4 * size);
    const AdamSettings settings = adam;  // a copy that the stores below cannot change
#pragma GCC ivdep
    for (std::int64_t j = 0; j < size; ++j)
      weight[j] = adam_element(weight[j], grad[j], exp_avg[j], exp_avg_sq[j], settings);
    scatter(p.exp_avg, p, channel, exp_avg);
    scatter(p.exp_avg_sq, p, channel, exp_avg_sq);
  }
  if (adam.project) {
    const float* base = gather(p.base, p, channel, scratch + size);
    float* change = scratch + 5 * size;    // taps x padded
    float* sums = change + taps * padded;  // rank x taps
    for (int k = 0; k < taps; ++k) {
      float* to = change + k * padded;
      for (int i = 0; i < p.in; ++i)
        to[i] = weight[static_cast<std::int64_t>(i) * taps + k] - base[static_cast<std::int64_t>(i) * taps + k];
      for (std::int64_t i = p.in; i < padded; ++i) to[i] = 0.f;
    }
    for (int k = 0; k < taps; k += kTaps)
      for (int r = 0; r < p.rank; r += kRanks) {
        const float* d = direction + r * padded;
        const float* c = change + k * padded;
        float* s = sums + static_cast<std::int64_t>(r) * taps + k;
        switch (taps - k) {
          case 1:
            dots_of_rank<1>(p.rank - r, d, c, padded, taps, s);
            break;
          case 2:
            dots_of_rank<2>(p.rank - r, d, c, padded, taps, s);
            break;
          default:
            dots_of_rank<3>(p.rank - r, d, c, padded, taps, s);
        }
      }
    for (int k = 0; k < taps; k += kTaps) switch (taps - k) {
        case 1:
          expand<1>(p.rank, direction, sums + k, padded, taps, change + k * padded);
          break;
        case 2:
          expand<2>(p.rank, direction, sums + k, padded, taps, change + k * padded);
          break;
        default:
          expand<3>(p.rank, direction, sums + k, padded, taps, change + k * padded);
      }
    for (int i = 0; i < p.in; ++i)
      for (int k = 0; k < taps; ++k)
        weight[static_cast<std::int64_t>(i) * taps + k] =
            base[static_cast<std::int64_t>(i) * taps + k] + change[k * padded + i];
  }
  scatter(p.weight, p, channel, weight);
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
