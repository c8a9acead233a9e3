#include <memory>
#include <new>

#include "common/parallel.h"
#include "convolution/params.h"

namespace pyrewrite {

void conv3x3_prepare_cpu(const float* weight, const std::int64_t strides[4], int out, int in, float* prepared) {
  PYREWRITE_DISPATCH(conv3x3_prepare)(weight, strides, out, in, prepared);
}

Status conv3x3_cpu(const Conv3x3Params& params, int threads) {
  if (params.in % kConvChannels || params.out % kConvChannels)
    return Status::error(Status::kUnsupported, "convolution: %d and %d channels, expected multiples of %d", params.in,
                         params.out, kConvChannels);
  const std::int64_t blocks = PYREWRITE_DISPATCH(conv3x3_blocks)(params);
  const int parts = static_cast<int>(threads < blocks ? (threads > 1 ? threads : 1) : blocks);
  if (parts == 0) return {};
  const std::int64_t scratch = PYREWRITE_DISPATCH(conv3x3_scratch)(params);
  std::unique_ptr<float[]> room(new (std::nothrow) float[scratch * parts]);
  if (!room) return Status::error(Status::kUnsupported, "convolution: no memory for its scratch");
  parallel_parts(parts, [&](int part) {
    const std::int64_t last = part_begin(blocks, parts, part + 1);
    for (std::int64_t block = part_begin(blocks, parts, part); block < last; ++block)
      PYREWRITE_DISPATCH(conv3x3_block)(params, block, room.get() + scratch * part);
  });
  return {};
}

}  // namespace pyrewrite
