// The small parts of a modulated layer: its style and its demodulation, in double, and its colours.
#include "convolution/product.isa.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {

void linear_rows(const LinearParams& p) {
  const int whole = p.in / kConvChannels * kConvChannels;
  for (int b = 0; b < p.batch; ++b)
    for (int o = 0; o < p.out; ++o) {
      const float *x = p.x + static_cast<std::int64_t>(b) * p.in, *w = p.weight + static_cast<std::int64_t>(o) * p.in;
      double sums[kConvChannels] = {};  // loops of this length are what compilers make vectors of
      for (int i = 0; i < whole; i += kConvChannels)
        for (int n = 0; n < kConvChannels; ++n)
          sums[n] += static_cast<double>(x[i + n]) * static_cast<double>(w[i + n]);
      double total = 0;
      for (int n = 0; n < kConvChannels; ++n) total += sums[n];
      for (int i = whole; i < p.in; ++i) total += static_cast<double>(x[i]) * static_cast<double>(w[i]);
      p.y[static_cast<std::int64_t>(b) * p.out + o] =
          static_cast<float>(p.scale * total + p.rate * static_cast<double>(p.bias[o]));
    }
}

void demodulate(const DemodulationParams& p) {
  const float* energy = p.prepared + static_cast<std::int64_t>(kPoints) * p.out * p.in;
  for (int b = 0; b < p.batch; ++b)
    for (int first = 0; first < p.out; first += kPanel) {
      const float* style = p.style + static_cast<std::int64_t>(b) * p.in;
      const float* e = energy + static_cast<std::int64_t>(first) * p.in;
      double sums[kPanel] = {};
      for (int i = 0; i < p.in; ++i) {
        const double square = static_cast<double>(style[i]) * static_cast<double>(style[i]);
        for (int o = 0; o < kPanel; ++o) sums[o] += square * static_cast<double>(e[i * kPanel + o]);
      }
      float* y = p.y + static_cast<std::int64_t>(b) * p.out + first;
      for (int o = 0; o < kPanel; ++o)
        y[o] = static_cast<float>(p.gain * p.scale / __builtin_sqrt(p.scale * p.scale * sums[o] + p.epsilon));
    }
}

void colours_row(const ColoursParams& p, std::int64_t number) {
  const int image = static_cast<int>(number / p.height), row = static_cast<int>(number % p.height);
  const std::int64_t plane = static_cast<std::int64_t>(p.height) * p.width;
  const float* x = p.x + number * p.width * p.in;
  const int half = p.width / 2, above = (row + 1) / 2, tap = (row + 1) % 2;
  for (int c = 0; c < p.channels; ++c) {
    const float* matrix = p.matrix + (static_cast<std::int64_t>(image) * p.channels + c) * p.in;
    float* y =
        p.y + (static_cast<std::int64_t>(image) * p.channels + c) * plane + static_cast<std::int64_t>(row) * p.width;
    for (int n = 0; n < p.width; ++n) {
      const float* pixel = x + static_cast<std::int64_t>(n) * p.in;
      Vec a = {}, b = {};
      for (int i = 0; i < p.in; i += kConvChannels)
        for (int j = 0; j < kConvChannels; j += 2 * kLanes) {
          a += load(pixel + i + j) * load(matrix + i + j);
          if (j + kLanes < kConvChannels) b += load(pixel + i + j + kLanes) * load(matrix + i + j + kLanes);
        }
      float lanes[kLanes];
      store(lanes, a + b);
      for (int width = kLanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
      const float value = lanes[0] + p.bias[c];
      y[n] = value > p.clamp ? p.clamp : value < -p.clamp ? -p.clamp : value;
    }
    if (!p.skip) continue;
    // Output n is filter[k] * skip[m] + filter[k + 2] * skip[m - 1] with m = (n + 1) / 2 and k = (n + 1) % 2, zeros
    // around.
    const float* small = p.skip + (static_cast<std::int64_t>(image) * p.channels + c) * (plane / 4);
    for (int r = 0; r < 2; ++r) {
      if (above - r < 0 || above - r >= p.height / 2) continue;
      const float* line = small + static_cast<std::int64_t>(above - r) * half;
      const float* f = p.filter + 4 * (tap + 2 * r);
      for (int m = 0; m < half; ++m) {
        y[2 * m] += f[1] * line[m] + (m > 0 ? f[3] * line[m - 1] : 0.f);
        y[2 * m + 1] += (m + 1 < half ? f[0] * line[m + 1] : 0.f) + f[2] * line[m];
      }
    }
  }
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
