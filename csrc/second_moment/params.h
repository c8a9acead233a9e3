// Second moment: total += sum over rows k of k k^T.
#pragma once

#include <cstddef>
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

// Adds to total (d x d, row-major, float64, symmetric). Products and sums over up to kSecondMomentRows rows
// are float32, sums of these are float64. NaN and infinity go where the products put them.
Status second_moment_cpu(const SecondMomentParams& params, double* total, int threads);

// fp32: products and sums as good as float32 arithmetic. tf32: the factors may be rounded to 10 fraction bits.
enum class Precision : int { fp32 = 0, tf32 = 1 };

// Which kernels. By rule: the fastest for the GPU and the input (dispatch.cu); simt and sm80 may be named, for tests
// and measurements, and are refused where the GPU has not what they need.
enum class MomentFamily : int { by_rule = 0, simt = 1, sm80 = 2, sm90 = 3 };

// The name of the family that a GPU takes by rule; sm90: it is one of 9.0, its kernels are built, and they fit the
// input.
const char* second_moment_family(int major, int minor, bool sm90, DType dtype, Precision precision);

// d x d float64 with any strides, in elements.
struct MomentView {
  double* data;
  std::int64_t row_stride, column_stride;
};

// Bytes of scratch on the device that second_moment_cuda needs for params.
Status second_moment_workspace(const SecondMomentParams& params, Precision precision, MomentFamily family, int device,
                               std::size_t* bytes);
// Adds to both triangles of the moment, on the given device and stream, asynchronously; the caller's current device is
// restored. `wait` waits for the end. The same input on the same kind of GPU gives the same bits.
Status second_moment_cuda(const SecondMomentParams& params, Precision precision, MomentFamily family,
                          const MomentView& moment, void* workspace, int device, std::uintptr_t stream, bool wait);

constexpr int kSecondMomentRows = 96;

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
