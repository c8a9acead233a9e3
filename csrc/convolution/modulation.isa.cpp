// The small sums of a modulated layer, in double: its style and its demodulation.
#include "common/vector.isa.h"
#include "convolution/params.h"
#include "convolution/product.isa.h"

namespace pyrewrite {
namespace PYREWRITE_ISA {
namespace {

typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));

// A vector of so many doubles is never returned: how, depends on the instruction set.
#define PYREWRITE_WIDENED(p) __builtin_convertvector(load(p), Wide)

}  // namespace

void linear_rows(const LinearParams& p) {
  const int whole = p.in / kLanes * kLanes;
  for (int b = 0; b < p.batch; ++b)
    for (int o = 0; o < p.out; ++o) {
      const float *x = p.x + static_cast<std::int64_t>(b) * p.in, *w = p.weight + static_cast<std::int64_t>(o) * p.in;
      Wide sums = {};
      for (int i = 0; i < whole; i += kLanes) sums += PYREWRITE_WIDENED(x + i) * PYREWRITE_WIDENED(w + i);
      double total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
      for (int i = whole; i < p.in; ++i) total += static_cast<double>(x[i]) * w[i];
      p.y[static_cast<std::int64_t>(b) * p.out + o] = static_cast<float>(p.scale * total + p.rate * p.bias[o]);
    }
}

void demodulate(const DemodulationParams& p) {
  const float* energy = p.prepared + static_cast<std::int64_t>(kPoints) * p.out * p.in;
  for (int b = 0; b < p.batch; ++b)
    for (int o = 0; o < p.out; o += kPanel) {
      const float *style = p.style + static_cast<std::int64_t>(b) * p.in, *e = energy + static_cast<std::int64_t>(o) * p.in;
      Wide sums[kVectors] = {};
      for (int i = 0; i < p.in; ++i) {
        const double square = static_cast<double>(style[i]) * style[i];
        for (int v = 0; v < kVectors; ++v) sums[v] += square * PYREWRITE_WIDENED(e + i * kPanel + v * kLanes);
      }
      for (int j = 0; j < kPanel; ++j) {
        const double norm = __builtin_sqrt(p.scale * p.scale * sums[j / kLanes][j % kLanes] + p.epsilon);
        p.y[static_cast<std::int64_t>(b) * p.out + o + j] = static_cast<float>(p.gain * p.scale / norm);
      }
    }
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
