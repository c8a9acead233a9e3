#include <cmath>
#include <memory>
#include <new>

#include "common/parallel.h"
#include "insertion/params.h"

namespace pyrewrite {
namespace {

constexpr std::int64_t kAlign = 16;  // floats: a cache line, and the widest vector

// Floats on a cache line, freed with the object. Null where there is no memory.
struct Scratch {
  explicit Scratch(std::int64_t size) : memory(new (std::nothrow) float[size + kAlign]) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
    floats = memory ? memory.get() + (kAlign - address / sizeof(float) % kAlign) % kAlign : nullptr;
  }
  std::unique_ptr<float[]> memory;
  float* floats;
};

std::int64_t aligned(std::int64_t size) { return (size + kAlign - 1) / kAlign * kAlign; }

AdamStep adam_settings(const InsertionParams& p, int step) {
  AdamStep a;
  a.rise1 = static_cast<float>(1 - p.beta1);
  a.keep2 = static_cast<float>(p.beta2);
  a.rise2 = static_cast<float>(1 - p.beta2);
  a.root_correction2 = static_cast<float>(std::sqrt(1 - std::pow(p.beta2, step)));
  a.eps = static_cast<float>(p.eps);
  a.rate = static_cast<float>(-p.lr / (1 - std::pow(p.beta1, step)));
  return a;
}

}  // namespace

Status insertion_cpu(const InsertionParams& p, int threads) {
  if (p.channels <= 0 || p.rank <= 0 || p.taps <= 0 || p.targets <= 0 || p.pixels <= 0)
    return Status::error(Status::kInvalid,
                         "insertion: %d channels, rank %d, %d taps, %d targets, %lld pixels: none may be 0", p.channels,
                         p.rank, p.taps, p.targets, static_cast<long long>(p.pixels));
  if (p.starts[0] != 0 || p.starts[p.targets] != p.pixels)
    return Status::error(Status::kInvalid, "insertion: the targets do not cover the pixels 0 ... %lld",
                         static_cast<long long>(p.pixels));
  for (int b = 0; b < p.targets; ++b)
    if (p.starts[b] >= p.starts[b + 1]) return Status::error(Status::kInvalid, "insertion: target %d is empty", b);
  if (p.count <= 0) return {};

  const InsertionSizes sizes = PYREWRITE_DISPATCH(insertion_sizes)(p);
  const int parts = threads < 1 ? 1 : threads < sizes.blocks ? threads : sizes.blocks;
  const int widest = (sizes.blocks + parts - 1) / parts;
  const int group = sizes.group < widest ? sizes.group : widest;
  const std::int64_t part_floats = aligned(sizes.part + group * sizes.block);
  const Scratch shared(sizes.shared), scratch(part_floats * parts);
  std::unique_ptr<double[]> losses(new (std::nothrow) double[std::int64_t(sizes.blocks) * p.count]);
  std::unique_ptr<AdamStep[]> schedule(new (std::nothrow) AdamStep[p.count]);
  if (shared.floats == nullptr || scratch.floats == nullptr || !losses || !schedule)
    return Status::error(Status::kUnsupported, "insertion: no memory for %lld floats of scratch",
                         static_cast<long long>(sizes.shared + part_floats * parts));
  for (int step = 0; step < p.count; ++step) schedule[step] = adam_settings(p, p.first + step + 1);
  PYREWRITE_DISPATCH(insertion_pack)(p, shared.floats);
  // No thread waits for another before the last step: the channels are independent.
  parallel_parts(parts, [&](int part) {
    const int last = static_cast<int>(part_begin(sizes.blocks, parts, part + 1));
    float* own = scratch.floats + part_floats * part;
    for (int first = static_cast<int>(part_begin(sizes.blocks, parts, part)); first < last; first += group)
      PYREWRITE_DISPATCH(insertion_steps)
    (p, schedule.get(), shared.floats, first, first + group < last ? first + group : last, own + sizes.part, own,
     losses.get() + std::int64_t(first) * p.count);
  });
  // Blocks in their order, whatever the threads: results do not depend on their number.
  for (int step = 0; step < p.count; ++step) {
    p.losses[step] = 0;
    for (int block = 0; block < sizes.blocks; ++block) p.losses[step] += losses[std::int64_t(block) * p.count + step];
  }
  return {};
}

}  // namespace pyrewrite
