"""The small low-pass filters of StyleGAN2, on whole feature maps.

A filter is applied as a true convolution, as published: flipped, which matters where it is not symmetric.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def blur_padding(kernel: Tensor, kernel_size: int) -> tuple[int, int]:
    """Padding before and after, in pixels, of the filter that follows a transposed convolution of stride 2.

    The result has twice the size of the input of that convolution.
    """
    p = kernel.shape[0] - 2 - (kernel_size - 1)
    return (p + 1) // 2 + 1, p // 2 + 1


def filtered(x: Tensor, kernel: Tensor, before: int, after: int, bias: Tensor | None = None) -> Tensor:
    """x: B x C x H x W, kernel: fh x fw, bias: C -> each channel filtered after zero padding (negative: cropping)."""
    weight = kernel.flip(0, 1).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    if before != after or before < 0:
        return F.conv2d(F.pad(x, (before, after, before, after)), weight, bias, groups=x.shape[1])
    return F.conv2d(x, weight, bias, padding=before, groups=x.shape[1])


def upsampled_by_two(x: Tensor, kernel: Tensor) -> Tensor:
    """x: B x C x H x W -> B x C x 2H x 2W: zeros between the pixels, then the filter (fh x fw)."""
    length = kernel.shape[0]
    before = (length - 1) // 2 + 1
    crop = length - 1 - before
    weight = kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    if 2 * crop == length - 2:
        return F.conv_transpose2d(x, weight, stride=2, padding=crop, groups=x.shape[1])
    full = F.conv_transpose2d(x, weight, stride=2, groups=x.shape[1])  # 2H - 2 + length
    rest = [2 * n - full.shape[d] + crop for d, n in ((3, x.shape[3]), (2, x.shape[2]))]
    return F.pad(full, (-crop, rest[0], -crop, rest[1]))
