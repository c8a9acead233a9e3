// Second moment: total += sum over rows k of k k^T.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/status.h"

namespace pyrewrite {

// The rows lie as images x height x width, each a vector of d channels, with any strides (in elements). A matrix of
// rows is one image of height 1.
struct SecondMomentParams {
  const void* x;
  DType dtype;
  std::int64_t images, height, width;
  int d;
  std::int64_t image_stride, row_stride, column_stride, channel_stride;
};

// Adds to the upper triangle of total (d x d, row-major, float64). Products and sums over up to kSecondMomentRows rows
// are float32, sums of these are float64. NaN and infinity go where the products put them.
Status second_moment_cpu(const SecondMomentParams& params, double* total, int threads);

constexpr int kSecondMomentRows = 128;

// What one thread needs: floats for its panel of rows, float64 partial sums (zero at first).
struct SecondMomentSizes {
  std::int64_t panel, partial;
};
PYREWRITE_DECLARE_ISA(SecondMomentSizes, second_moment_sizes, (int d))
// Rows first .. last - 1 of params, added to `partial`.
PYREWRITE_DECLARE_ISA(void, second_moment_rows,
                      (const SecondMomentParams& params, std::int64_t first, std::int64_t last, float* panel,
                       double* partial))
// Adds a thread's partial sums to the total.
PYREWRITE_DECLARE_ISA(void, second_moment_finish, (const double* partial, int d, double* total))

}  // namespace pyrewrite
