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

// weight: out x in x 3 x 3 -> prepared, 17 * out * in floats. Their order is private; the last out * in are the sums of
// the squares of each filter's taps, for `demodulation_cpu`.
Status conv3x3_prepare_cpu(const float* weight, int out, int in, float* prepared, int threads);
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

Status upconv3x3_prepare_cpu(const float* weight, int out, int in, float* prepared, int threads);
Status upconv3x3_cpu(const UpConv3x3Params& params, int threads);

// The product of a part: some tiles of 2 x 2 outputs, those of all images one after the other, for some panels of
// output channels. An output's rounding does not depend on the part, the batch or the threads.
struct ConvPart {
  std::int64_t first_tile, last_tile;
  int first_panel, last_panel;
};

PYREWRITE_DECLARE_ISA(int, conv_panel, ())  // output channels in a panel
PYREWRITE_DECLARE_ISA(void, conv3x3_prepare, (const float* weight, int out, int in, int panel, float* prepared))
PYREWRITE_DECLARE_ISA(std::int64_t, conv3x3_tiles, (const Conv3x3Params& params))
PYREWRITE_DECLARE_ISA(std::int64_t, conv3x3_scratch, (const Conv3x3Params& params))
PYREWRITE_DECLARE_ISA(void, conv3x3_part, (const Conv3x3Params& params, const ConvPart& part, float* scratch))

PYREWRITE_DECLARE_ISA(void, upconv3x3_prepare, (const float* weight, int out, int in, int panel, float* prepared))
PYREWRITE_DECLARE_ISA(std::int64_t, upconv3x3_tiles, (const UpConv3x3Params& params))
PYREWRITE_DECLARE_ISA(std::int64_t, upconv3x3_scratch, (const UpConv3x3Params& params))
PYREWRITE_DECLARE_ISA(void, upconv3x3_part, (const UpConv3x3Params& params, const ConvPart& part, float* scratch))
// One row of the outputs: number row of batch x 2 height.
PYREWRITE_DECLARE_ISA(void, upconv3x3_row, (const UpConv3x3Params& params, std::int64_t row, float* scratch))

// y[b][o] = scale * (x[b] . weight[o]) + rate * bias[o], summed in double. x: batch x in, weight: out x in, bias: out,
// y: batch x out.
struct LinearParams {
  const float *x, *weight, *bias;
  float* y;
  int batch, in, out;
  double scale, rate;
};

// y[b][o] = gain * scale / sqrt(scale^2 * sum over i of style[b][i]^2 |filter of o and i|^2 + epsilon), summed in
// double: what StyleGAN2 multiplies output o by. prepared: as made of the weight; style: batch x in, y: batch x out.
struct DemodulationParams {
  const float *prepared, *style;
  float* y;
  int batch, in, out;
  double scale, epsilon, gain;
};

// y = clamped(matrix x + bias) + skip, each of its pixels four, by this filter. Rows of pixels x, planes of y and skip.
struct ColoursParams {
  const float* x;       // batch x height x width x in
  const float* matrix;  // batch x channels x in
  const float* bias;    // channels
  const float* skip;    // batch x channels x height / 2 x width / 2, or null
  const float* filter;  // 4 x 4: output 2 n + k - 1 takes filter[k] * skip[n] in each direction; null without skip
  float* y;             // batch x channels x height x width
  int batch, height, width, in, channels;
  float clamp;  // infinity: none
};

void linear_cpu(const LinearParams& params);
Status colours_cpu(const ColoursParams& params, int threads);
Status demodulation_cpu(const DemodulationParams& params);

PYREWRITE_DECLARE_ISA(void, linear_rows, (const LinearParams& params))
PYREWRITE_DECLARE_ISA(void, demodulate, (const DemodulationParams& params))
// One row of pixels: number row of batch x height.
PYREWRITE_DECLARE_ISA(void, colours_row, (const ColoursParams& params, std::int64_t row))

}  // namespace pyrewrite
