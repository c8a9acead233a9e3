#include <memory>
#include <new>

#include "common/parallel.h"
#include "projection/params.h"

namespace pyrewrite {
namespace {

Status project_one(const ProjectionItem& item, const AdamSettings& settings, int threads) {
  if (item.out <= 0 || item.in <= 0 || item.height <= 0 || item.width <= 0) return {};
  const int parts = threads < item.out ? (threads > 1 ? threads : 1) : item.out;
  const std::int64_t padded = PYREWRITE_DISPATCH(project_padded)(item.in);
  const std::int64_t scratch = PYREWRITE_DISPATCH(project_scratch)(item);
  std::unique_ptr<float[]> direction(new (std::nothrow) float[padded * item.rank + 1]());
  std::unique_ptr<float[]> room(new (std::nothrow) float[scratch * parts]);
  if (!direction || !room) return Status::error(Status::kUnsupported, "projection: no memory for its scratch");
  if (settings.project)
    for (int r = 0; r < item.rank; ++r)
      for (int i = 0; i < item.in; ++i)
        direction[r * padded + i] = item.direction[r * item.direction_rank_stride + i * item.direction_in_stride];
  parallel_parts(parts, [&](int part) {
    const int last = static_cast<int>(part_begin(item.out, parts, part + 1));
    for (int channel = static_cast<int>(part_begin(item.out, parts, part)); channel < last; ++channel)
      PYREWRITE_DISPATCH(project_channel)(item, direction.get(), settings, channel, room.get() + scratch * part);
  });
  return {};
}

}  // namespace

Status project_cpu(const ProjectionItem* items, int count, const AdamSettings& settings, int threads) {
  for (int n = 0; n < count; ++n) {
    const Status status = project_one(items[n], settings, threads);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace pyrewrite
