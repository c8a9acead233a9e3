// The matrix products of both convolutions, and what surrounds them. Only for *.isa.cpp.
#pragma once

#include "common/vector.isa.h"
#include "convolution/params.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

constexpr int kVectors = kLanes == 16 ? 1 : 2;
constexpr int kPanel = kVectors * kLanes;  // output channels a product makes at a time
constexpr int kRows = 12 / kVectors;       // tiles a product makes at a time: 12 sums and the weights fit 16 registers
constexpr int kBlock = 24;                 // tiles in a block
constexpr int kPoints = 16;                // of a transformed tile, and of a transformed filter
static_assert(kConvChannels % kPanel == 0 && kConvChannels % kLanes == 0, "channels come in whole panels");

// sums[tile][kPanel] = sum over i of inputs[tile][i] * weights[i][kPanel] for R tiles
template <int R>
void multiply_rows(const float* inputs, const float* weights, int in, float* sums) {
  Vec total[R][kVectors] = {};
  for (int i = 0; i < in; ++i) {
    Vec w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load(weights + i * kPanel + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const float x = inputs[static_cast<std::int64_t>(r) * in + i];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[r][v] += x * w[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sums + r * kPanel + v * kLanes, total[r][v]);
}

// The same for `count` tiles. A tile's sum runs over the input channels in one order, whatever its company.
inline void multiply(const float* inputs, const float* weights, int in, int count, float* sums) {
  int t = 0;
  for (; t + kRows <= count; t += kRows)
    multiply_rows<kRows>(inputs + static_cast<std::int64_t>(t) * in, weights, in, sums + t * kPanel);
  for (; t + 4 <= count; t += 4)
    multiply_rows<4>(inputs + static_cast<std::int64_t>(t) * in, weights, in, sums + t * kPanel);
  for (; t < count; ++t) multiply_rows<1>(inputs + static_cast<std::int64_t>(t) * in, weights, in, sums + t * kPanel);
}

// weight: out x in x 3 x 3 with these strides -> prepared: panel x point x in x kPanel. transform(taps[9], points[16]).
template <typename Transform>
void prepare_filters(const float* weight, const std::int64_t strides[4], int out, int in, float* prepared,
                     Transform transform) {
  const std::int64_t point = static_cast<std::int64_t>(in) * kPanel;
  for (int first = 0; first < out; first += kPanel)
    for (int i = 0; i < in; ++i) {
      float taps[9][kPanel];
      for (int o = 0; o < kPanel; ++o) {
        const float* w = weight + (first + o) * strides[0] + i * strides[1];
        for (int r = 0; r < 3; ++r)
          for (int c = 0; c < 3; ++c) taps[3 * r + c][o] = w[r * strides[2] + c * strides[3]];
      }
      float* to = prepared + first * static_cast<std::int64_t>(kPoints) * in + static_cast<std::int64_t>(i) * kPanel;
      for (int v = 0; v < kPanel; v += kLanes) {
        Vec g[9], u[kPoints];
        for (int n = 0; n < 9; ++n) g[n] = load(taps[n] + v);
        transform(g, u);
        for (int n = 0; n < kPoints; ++n) store(to + n * point + v, u[n]);
      }
    }
}

inline Vec activated(Vec value, float negative_slope) {
  return negative_slope == 1.f ? value : value < 0.f ? value * negative_slope : value;
}

}  // namespace
}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
