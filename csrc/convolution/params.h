// 3 x 3 convolution with what follows it in a generator's layer, by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): 16 products instead of 36 for 2 x 2
// outputs.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/status.h"

namespace pyrewrite {

// y = lrelu(out_scale * conv(in_scale * x) + bias + noise), zeros around x, channels last throughout.
struct Conv3x3Params {
  const float* x;          // batch x height x width x in; half the height and width where `upsample`
  const float* weight;     // as conv3x3_prepare made it
  const float* in_scale;   // batch x in, or null
  const float* out_scale;  // batch x out, or null
  const float* noise;      // height x width, or null
  const float* bias;       // out, or null
  float* y;                // batch x height x width x out
  int batch, height, width, in, out;
  bool upsample;         // each pixel of x stands for 2 x 2, nearest neighbour
  float negative_slope;  // 1: no activation
};

// Channels come in multiples of this, on every instruction set.
constexpr int kConvChannels = 16;

// weight: out x in x 3 x 3 with these strides, in elements -> prepared, 16 * out * in floats. Its order is private.
void conv3x3_prepare_cpu(const float* weight, const std::int64_t strides[4], int out, int in, float* prepared);
Status conv3x3_cpu(const Conv3x3Params& params, int threads);

// y = lrelu(out_scale * blur(conv_transpose(in_scale * x)) + bias + noise), channels last throughout. The transposed
// convolution has stride 2 and no padding; its 2 height + 1 rows are `map`. Its even outputs have two taps in a
// direction and go by F(2, 2), its odd ones have one: 25 products instead of 36 for 2 x 2 inputs.
struct UpConv3x3Params {
  const float* x;                    // batch x height x width x in
  const float* weight;               // as upconv3x3_prepare made it
  const float* in_scale;             // batch x in, or null
  const float* out_scale;            // batch x out, or null
  const float* noise;                // 2 height x 2 width, or null
  const float* bias;                 // out, or null
  float* map;                        // batch x (2 height + 1) x (2 width + 1) x out, written
  float* y;                          // batch x 2 height x 2 width x out
  float vertical[4], horizontal[4];  // blur: output n is the sum over k of filter[k] * map[n + k - 1]
  int batch, height, width, in, out;
  float negative_slope;  // 1: no activation
};

void upconv3x3_prepare_cpu(const float* weight, const std::int64_t strides[4], int out, int in, float* prepared);
Status upconv3x3_cpu(const UpConv3x3Params& params, int threads);

// The tiles of 2 x 2 outputs come in blocks: those of all images one after the other. An output's rounding does not
// depend on the block, the batch or the threads.
PYREWRITE_DECLARE_ISA(void, conv3x3_prepare,
                      (const float* weight, const std::int64_t strides[4], int out, int in, float* prepared))
PYREWRITE_DECLARE_ISA(std::int64_t, conv3x3_blocks, (const Conv3x3Params& params))
PYREWRITE_DECLARE_ISA(std::int64_t, conv3x3_scratch, (const Conv3x3Params& params))
PYREWRITE_DECLARE_ISA(void, conv3x3_block, (const Conv3x3Params& params, std::int64_t block, float* scratch))

PYREWRITE_DECLARE_ISA(void, upconv3x3_prepare,
                      (const float* weight, const std::int64_t strides[4], int out, int in, float* prepared))
PYREWRITE_DECLARE_ISA(std::int64_t, upconv3x3_blocks, (const UpConv3x3Params& params))
PYREWRITE_DECLARE_ISA(std::int64_t, upconv3x3_scratch, (const UpConv3x3Params& params))
PYREWRITE_DECLARE_ISA(void, upconv3x3_block, (const UpConv3x3Params& params, std::int64_t block, float* scratch))
// One row of the outputs: number row of batch x 2 height.
PYREWRITE_DECLARE_ISA(void, upconv3x3_row, (const UpConv3x3Params& params, std::int64_t row, float* scratch))

}  // namespace pyrewrite
