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

Status no_memory() { return Status::error(Status::kUnsupported, "convolution: no memory for its scratch"); }

}  // namespace

void conv3x3_prepare_cpu(const float* weight, const std::int64_t strides[4], int out, int in, float* prepared) {
  PYREWRITE_DISPATCH(conv3x3_prepare)(weight, strides, out, in, prepared);
}

void upconv3x3_prepare_cpu(const float* weight, const std::int64_t strides[4], int out, int in, float* prepared) {
  PYREWRITE_DISPATCH(upconv3x3_prepare)(weight, strides, out, in, prepared);
}

Status conv3x3_cpu(const Conv3x3Params& params, int threads) {
  const Status status = check_channels(params.in, params.out);
  if (!status.ok()) return status;
  threads = threads > 1 ? threads : 1;
  const std::int64_t scratch = PYREWRITE_DISPATCH(conv3x3_scratch)(params);
  std::unique_ptr<float[]> room(new (std::nothrow) float[scratch * threads]);
  if (!room) return no_memory();
  spread(PYREWRITE_DISPATCH(conv3x3_blocks)(params), threads, room.get(), scratch,
         [&](std::int64_t block, float* own) { PYREWRITE_DISPATCH(conv3x3_block)(params, block, own); });
  return {};
}

Status upconv3x3_cpu(const UpConv3x3Params& params, int threads) {
  const Status status = check_channels(params.in, params.out);
  if (!status.ok()) return status;
  threads = threads > 1 ? threads : 1;
  const std::int64_t scratch = PYREWRITE_DISPATCH(upconv3x3_scratch)(params);
  std::unique_ptr<float[]> room(new (std::nothrow) float[scratch * threads]);
  if (!room) return no_memory();
  spread(PYREWRITE_DISPATCH(upconv3x3_blocks)(params), threads, room.get(), scratch,
         [&](std::int64_t block, float* own) { PYREWRITE_DISPATCH(upconv3x3_block)(params, block, own); });
  const std::int64_t rows = params.width == 0 ? 0 : static_cast<std::int64_t>(params.batch) * 2 * params.height;
  spread(rows, threads, room.get(), scratch,
         [&](std::int64_t row, float* own) { PYREWRITE_DISPATCH(upconv3x3_row)(params, row, own); });
  return {};
}

}  // namespace pyrewrite
