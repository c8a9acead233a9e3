#include <memory>
#include <new>

#include "common/parallel.h"
#include "convolution/params.h"

namespace pyrewrite {
namespace {

Status check_channels(int in, int out) {
  if (in % kConvChannels || out % kConvChannels)
    return Status::error(Status::kUnsupported, "convolution: %d and %d channels, expected multiples of %d", in, out,
                         kConvChannels);
  return {};
}

// work(item, scratch) for every item, spread over threads that have `scratch` floats each.
template <typename Work>
void spread(std::int64_t items, int threads, float* room, std::int64_t scratch, const Work& work) {
  const int parts = static_cast<int>(threads < items ? threads : items);
  parallel_parts(parts, [&](int part) {
    const std::int64_t last = part_begin(items, parts, part + 1);
    for (std::int64_t item = part_begin(items, parts, part); item < last; ++item) work(item, room + scratch * part);
  });
}

// work(part) for all tiles and panels, a part for each thread. Few tiles are not split, for there would be too few for
// the product; their inputs are transformed by every thread then.
template <typename Work>
void spread_product(std::int64_t tiles, int panels, int threads, float* room, std::int64_t scratch, const Work& work) {
  constexpr std::int64_t kGroup = 12;  // tiles, a multiple of what a product makes at a time
  constexpr std::int64_t kFew = 48;    // tiles a thread
  const int panel_parts = tiles >= kFew * threads ? 1 : threads < panels ? threads : panels;
  const std::int64_t groups = (tiles + kGroup - 1) / kGroup, wanted = (threads + panel_parts - 1) / panel_parts;
  const int tile_parts = static_cast<int>(wanted < groups ? wanted : groups);
  parallel_parts(tile_parts * panel_parts, [&](int part) {
    const int across = part % panel_parts, down = part / panel_parts;
    const std::int64_t last = kGroup * part_begin(groups, tile_parts, down + 1);
    work(ConvPart{kGroup * part_begin(groups, tile_parts, down), last < tiles ? last : tiles,
                  static_cast<int>(part_begin(panels, panel_parts, across)),
                  static_cast<int>(part_begin(panels, panel_parts, across + 1))},
         room + scratch * part);
  });
}

template <typename Prepare>
Status prepare_panels(const Prepare& prepare, int out, int in, int threads) {
  const Status status = check_channels(in, out);
  if (!status.ok()) return status;
  const int small = 1 << 14;  // filters; it takes longer to share the work than to do it
  spread(out / PYREWRITE_DISPATCH(conv_panel)(), out * static_cast<std::int64_t>(in) < small ? 1 : threads, nullptr, 0,
         [&](std::int64_t panel, float*) { prepare(static_cast<int>(panel)); });
  return {};
}

// Scratch of all parts: there are fewer than twice as many as threads.
std::unique_ptr<float[]> room_for(std::int64_t scratch, int threads) {
  return std::unique_ptr<float[]>(new (std::nothrow) float[2 * scratch * threads]);
}

Status no_memory() { return Status::error(Status::kUnsupported, "convolution: no memory for its scratch"); }

}  // namespace

Status conv3x3_prepare_cpu(const float* weight, int out, int in, float* prepared, int threads) {
  return prepare_panels([&](int panel) { PYREWRITE_DISPATCH(conv3x3_prepare)(weight, out, in, panel, prepared); }, out,
                        in, threads);
}

Status upconv3x3_prepare_cpu(const float* weight, int out, int in, float* prepared, int threads) {
  return prepare_panels([&](int panel) { PYREWRITE_DISPATCH(upconv3x3_prepare)(weight, out, in, panel, prepared); },
                        out, in, threads);
}

Status conv3x3_cpu(const Conv3x3Params& params, int threads) {
  const Status status = check_channels(params.in, params.out);
  if (!status.ok()) return status;
  threads = threads > 1 ? threads : 1;
  const std::int64_t scratch = PYREWRITE_DISPATCH(conv3x3_scratch)(params);
  const auto room = room_for(scratch, threads);
  if (!room) return no_memory();
  spread_product(PYREWRITE_DISPATCH(conv3x3_tiles)(params), params.out / PYREWRITE_DISPATCH(conv_panel)(), threads,
                 room.get(), scratch,
                 [&](const ConvPart& part, float* own) { PYREWRITE_DISPATCH(conv3x3_part)(params, part, own); });
  return {};
}

Status upconv3x3_cpu(const UpConv3x3Params& params, int threads) {
  const Status status = check_channels(params.in, params.out);
  if (!status.ok()) return status;
  threads = threads > 1 ? threads : 1;
  const std::int64_t scratch = PYREWRITE_DISPATCH(upconv3x3_scratch)(params);
  const auto room = room_for(scratch, threads);
  if (!room) return no_memory();
  spread_product(PYREWRITE_DISPATCH(upconv3x3_tiles)(params), params.out / PYREWRITE_DISPATCH(conv_panel)(), threads,
                 room.get(), scratch,
                 [&](const ConvPart& part, float* own) { PYREWRITE_DISPATCH(upconv3x3_part)(params, part, own); });
  const std::int64_t rows = params.width == 0 ? 0 : static_cast<std::int64_t>(params.batch) * 2 * params.height;
  spread(rows, threads, room.get(), scratch,
         [&](std::int64_t row, float* own) { PYREWRITE_DISPATCH(upconv3x3_row)(params, row, own); });
  return {};
}

void linear_cpu(const LinearParams& params) { PYREWRITE_DISPATCH(linear_rows)(params); }

Status colours_cpu(const ColoursParams& params, int threads) {
  const Status status = check_channels(params.in, kConvChannels);
  if (!status.ok()) return status;
  const std::int64_t rows = params.width == 0 ? 0 : static_cast<std::int64_t>(params.batch) * params.height;
  const bool small = rows * params.width * params.in < 1 << 14;
  spread(rows, small ? 1 : threads, nullptr, 0,
         [&](std::int64_t row, float*) { PYREWRITE_DISPATCH(colours_row)(params, row); });
  return {};
}

Status demodulation_cpu(const DemodulationParams& params) {
  const Status status = check_channels(params.in, params.out);
  if (status.ok()) PYREWRITE_DISPATCH(demodulate)(params);
  return status;
}

}  // namespace pyrewrite
