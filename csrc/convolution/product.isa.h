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
constexpr int kMostTiles = 48;             // in a block
constexpr int kPoints = 16;                // of a transformed tile, and of a transformed filter
static_assert(kConvChannels % kPanel == 0 && kConvChannels % kLanes == 0, "channels come in whole panels");

// How a part is done. With few channels the transformed inputs of a block stay in the second-level cache for all
// panels, one after the other. With many, those of one point stay there, for all panels before the next point; a larger
// block then reads the weights less often.
struct Order {
  int tiles;   // in a block
  int panels;  // whose sums are made before any output is
};

inline Order order_of(int in, int out) { return in > 320 ? Order{kMostTiles, out / kPanel} : Order{24, 1}; }

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

// weight: out x in x 3 x 3 -> of this panel of outputs, prepared: panel x point x in x kPanel, and after all panels
// panel x in x kPanel, the sums of the squares of each filter's taps. transform(taps[9], points[16]).
template <typename Transform>
void prepare_filters(const float* weight, int out, int in, int panel, float* prepared, Transform transform) {
  constexpr int kInputs = 4;  // at a time: a whole number of 4 x 4 transpositions
  const std::int64_t point = static_cast<std::int64_t>(in) * kPanel, filters = 9 * static_cast<std::int64_t>(in);
  weight += panel * kPanel * filters;
  float* energy = prepared + kPoints * static_cast<std::int64_t>(out) * in + panel * point;
  prepared += panel * kPoints * point;
  for (int i = 0; i < in; i += kInputs) {
    float taps[9 * kInputs][kPanel];
    for (int o = 0; o < kPanel; o += 4)
      for (int n = 0; n < 9 * kInputs; n += 4)
        transpose_4x4(weight + o * filters + 9 * static_cast<std::int64_t>(i) + n, filters, taps[n] + o, kPanel);
    float points[kPoints][kInputs * kPanel];  // whole cache lines for each of the distant places that they go to
    for (int j = 0; j < kInputs; ++j)
      for (int v = 0; v < kPanel; v += kLanes) {
        Vec g[9], u[kPoints], total = {};
        for (int n = 0; n < 9; ++n) g[n] = load(taps[9 * j + n] + v);
        for (int n = 0; n < 9; ++n) total += g[n] * g[n];
        transform(g, u);
        store(energy + (i + j) * kPanel + v, total);
        for (int n = 0; n < kPoints; ++n) store(points[n] + j * kPanel + v, u[n]);
      }
    for (int n = 0; n < kPoints; ++n)
      for (int k = 0; k < kInputs * kPanel; k += kLanes)
        store(prepared + n * point + i * kPanel + k, load(points[n] + k));
  }
}

inline Vec activated(Vec value, float negative_slope) {
  return negative_slope == 1.f ? value : value < 0.f ? value * negative_slope : value;
}

}  // namespace
}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
