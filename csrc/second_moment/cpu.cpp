#include <memory>
#include <new>

#include "common/parallel.h"
#include "second_moment/params.h"

namespace pyrewrite {
namespace {

constexpr std::align_val_t kCacheLine{64};  // vectors of a panel must not straddle two

struct FreeAligned {
  template <typename T>
  void operator()(T* pointer) const {
    ::operator delete[](pointer, kCacheLine);
  }
};
template <typename T>
using Scratch = std::unique_ptr<T[], FreeAligned>;

}  // namespace

Status second_moment_cpu(const SecondMomentParams& p, double* total, int threads) {
  const std::int64_t rows = p.images * p.height * p.width;
  if (rows <= 0 || p.d <= 0) return {};
  // Whole panels to each thread: fewer threads for little work.
  const std::int64_t panels = (rows + kSecondMomentRows - 1) / kSecondMomentRows;
  const int parts = static_cast<int>(threads < panels ? (threads > 1 ? threads : 1) : panels);
  const SecondMomentSizes sizes = PYREWRITE_DISPATCH(second_moment_sizes)(p.d);
  Scratch<float> panel(new (kCacheLine, std::nothrow) float[sizes.panel * parts]);
  Scratch<double> partial(new (kCacheLine, std::nothrow) double[sizes.partial * parts]());
  if (!panel || !partial)
    return Status::error(Status::kUnsupported, "second moment: no memory for the scratch of %d threads at d = %d",
                         parts, p.d);
  parallel_parts(parts, [&](int part) {
    const std::int64_t first = part_begin(panels, parts, part) * kSecondMomentRows;
    const std::int64_t last = part_begin(panels, parts, part + 1) * kSecondMomentRows;
    PYREWRITE_DISPATCH(second_moment_rows)
    (p, first, last < rows ? last : rows, panel.get() + sizes.panel * part, partial.get() + sizes.partial * part);
  });
  for (int part = 0; part < parts; ++part)
    PYREWRITE_DISPATCH(second_moment_finish)(partial.get() + sizes.partial * part, p.d, total);
  return {};
}

}  // namespace pyrewrite
