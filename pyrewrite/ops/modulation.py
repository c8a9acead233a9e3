"""The small parts of a modulated layer (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR
2020, section 2.2): its style and what demodulation multiplies its outputs by, both summed in float64, and its colours.

An image's bits do not depend on its batch. On a processor each is one call of a kernel; with gradients, and everywhere
else, plain torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrewrite.ops import _library
from pyrewrite.ops.convolution import CHANNELS


def _native(*tensors: Tensor) -> bool:
    """Whether the processor's kernels are for these."""
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not grad and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: float, rate: float = 1.0) -> Tensor:
    """scale * x W^T + rate * bias, summed in float64. x: B x I, weight: O x I, bias: O -> B x O, x's dtype.

    Raises ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(f"wide_linear takes x B x I, a weight O x I and a bias O, got {shapes}")
    if not _native(x, weight, bias):
        return F.linear(x.double() * scale, weight.double(), bias.double() * rate).to(x.dtype)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = x.new_empty(len(x), len(weight))
    arrays = [t.data_ptr() for t in (x, weight, bias, y)]
    _library.native("wide_linear").linear_cpu(arrays, (*x.shape, len(weight)), scale, rate)
    return y


def demodulated_scale(
    weight: Tensor, style: Tensor, scale: float, epsilon: float, gain: float = 1.0, prepared: Tensor | None = None
) -> Tensor:
    """gain * scale over the norm of each modulated filter, scale * style * weight: what its output is multiplied by.

    weight: O x I x k x k; style: B x I -> B x O, style's dtype. prepared: what `prepare_conv3x3` or `prepare_upconv3x3`
    gave for this weight, whose sums are used then. Raises ValueError for shapes that do not fit.
    """
    if weight.ndim != 4 or style.ndim != 2 or style.shape[1] != weight.shape[1]:
        raise ValueError(
            f"demodulated_scale takes a weight O x I x k x k and styles B x I, got {tuple(weight.shape)} and "
            f"{tuple(style.shape)}"
        )
    o, i = weight.shape[:2]
    if prepared is None or not _native(weight, style, prepared):
        energy = weight.square().sum((2, 3)).double()  # O x I
        norm = style.double().square() @ energy.t() * scale**2  # B x O
        return (torch.rsqrt(norm + epsilon) * (scale * gain)).to(style.dtype)
    if prepared.numel() != 17 * o * i:
        raise ValueError(f"demodulated_scale: prepared holds {prepared.numel()} numbers, expected {17 * o * i}")
    style, y = style.contiguous(), style.new_empty(len(style), o)
    arrays = [prepared.data_ptr(), style.data_ptr(), y.data_ptr()]
    _library.native("demodulated_scale").demodulation_cpu(arrays, (len(style), i, o), scale, epsilon, gain)
    return y


def colours_kernel_takes(x: Tensor, matrix: Tensor, bias: Tensor, skip: Tensor | None, kernel: Tensor | None) -> bool:
    """Whether `colours` is for these: float32 on a processor without gradients, channels in multiples of 16, and a
    filter of 4 x 4.
    """
    tensors = (x, matrix, bias) if skip is None or kernel is None else (x, matrix, bias, skip, kernel)
    even = skip is None or (kernel is not None and tuple(kernel.shape) == (4, 4))
    return even and x.shape[1] > 0 and x.shape[1] % CHANNELS == 0 and _native(*tensors)


def colours(
    x: Tensor, matrix: Tensor, bias: Tensor, clamp: float | None, skip: Tensor | None, kernel: Tensor | None
) -> Tensor:
    """clamped(matrix x + bias) + skip with zeros between its pixels and the filter, B x C x H x W: ToRGB of StyleGAN2.

    x: B x I x H x W; matrix: B x C x I; bias: C; clamp: bound of the first part, None for none; skip: B x C x H/2 x W/2
    with its kernel, 4 x 4, or None. For what `colours_kernel_takes`. Raises ValueError for shapes that do not fit.
    """
    b, i, h, w = x.shape
    c = matrix.shape[1]
    fits = tuple(matrix.shape) == (b, c, i) and tuple(bias.shape) == (c,)
    if not fits or (skip is not None and (tuple(skip.shape) != (b, c, h // 2, w // 2) or h % 2 or w % 2)):
        shapes = ", ".join("None" if t is None else str(tuple(t.shape)) for t in (x, matrix, bias, skip))
        raise ValueError(f"colours takes B x I x H x W, B x C x I, C and B x C x H/2 x W/2, got {shapes}")
    x, y = x.contiguous(memory_format=torch.channels_last), x.new_empty(b, c, h, w)
    given = [None if t is None else t.contiguous() for t in (matrix, bias, skip, kernel)]
    arrays = [0 if t is None else t.data_ptr() for t in (x, *given, y)]
    bound = math.inf if clamp is None else clamp
    _library.native("colours").colours_cpu(arrays, (b, h, w, i, c), bound, torch.get_num_threads())
    return y
