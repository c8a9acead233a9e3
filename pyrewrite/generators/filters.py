"""The small low-pass filters of StyleGAN2 and StyleGAN3, on whole feature maps.

A filter is applied as a true convolution, as published: flipped, which matters where it is not symmetric.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a map at StyleGAN3's higher rate that are alive at once on a CPU: they stay in the caches.
_CHUNK = 1 << 20


def blur_padding(kernel: Tensor, kernel_size: int) -> tuple[int, int]:
    """Padding before and after, in pixels, of the filter that follows a transposed convolution of stride 2.

    The result has twice the size of the input of that convolution.
    """
    p = kernel.shape[0] - 2 - (kernel_size - 1)
    return (p + 1) // 2 + 1, p // 2 + 1


def separated(kernel: Tensor) -> tuple[list[float], list[float]] | None:
    """kernel: fh x fw -> flipped, as factors: a vertical filter of fh numbers and a horizontal one of fw, whose outer
    product it is; None where there are none, as with a sum of zero.
    """
    return _factors(tuple(map(tuple, kernel.tolist())))


@functools.lru_cache(64)
def _factors(kernel: tuple[tuple[float, ...], ...]) -> tuple[list[float], list[float]] | None:
    rows = [row[::-1] for row in kernel[::-1]]
    vertical = [sum(row) for row in rows]
    columns = [sum(column) for column in zip(*rows, strict=True)]
    total = sum(vertical)
    if total == 0:
        return None
    horizontal = [column / total for column in columns]
    largest = max(abs(tap) for row in rows for tap in row)
    error = max(
        abs(tap - v * h) for row, v in zip(rows, vertical, strict=True) for tap, h in zip(row, horizontal, strict=True)
    )
    return (vertical, horizontal) if error <= 1e-6 * largest else None


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


def filtered_lrelu(
    x: Tensor,
    up_filter: Tensor | None,
    down_filter: Tensor | None,
    *,
    up: int,
    down: int,
    padding: tuple[int, int],
    slope: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """The leaky ReLU of StyleGAN3 at a higher sampling rate. x: B x C x h x w -> B x C x H x W.

    Zeros between the pixels (up - 1 of them after each), zero padding (before, after; negative: cropping), the up
    filter times up^2, leaky ReLU times gain, clamped to [-clamp, clamp], the down filter, every down-th pixel. A filter
    is taps, one dimension of a product, or taps x taps; None: 1.
    """
    up_kernel, down_kernel = _flipped_square(up_filter, x), _flipped_square(down_filter, x)
    before, length = padding[0], len(up_kernel)
    sizes = [n * up + sum(padding) - length + 1 for n in x.shape[2:]]  # at the higher rate
    up_kernel = F.pad(up_kernel, (0, -length % up) * 2) * (up * up * gain)  # gain * lrelu(x) = lrelu(gain * x)
    taps = len(up_kernel) // up
    # Zeros are never multiplied: pixel up * q + p reads x at q + start, q + start + 1, ... with kernel[first::up].
    firsts = [(before - p) % up for p in range(up)]
    starts = [(p + first - before) // up for p, first in enumerate(firsts)]
    low = max(0, -min(starts))
    ends = [max(s + -((p - size) // up) for p, s in enumerate(starts)) + taps - 1 for size in sizes]
    high = [max(0, end - n) for end, n in zip(ends, x.shape[2:], strict=True)]
    parts = []
    chunk = _CHUNK if x.device.type == "cpu" else 64 * _CHUNK
    for part in x.split(max(1, chunk // max(1, len(x) * sizes[0] * sizes[1])), 1):
        part = F.pad(part, (low, high[1], low, high[0]))
        dense = part.new_empty(*part.shape[:2], *sizes)
        for row, (first, top) in enumerate(zip(firsts, starts, strict=True)):
            for column, (start, left) in enumerate(zip(firsts, starts, strict=True)):
                place = dense[:, :, row::up, column::up]
                window = part[:, :, low + top :, low + left :]
                window = window[:, :, : place.shape[2] + taps - 1, : place.shape[3] + taps - 1]
                place.copy_(_each_channel(window, up_kernel[first::up, start::up]))
        dense = F.leaky_relu_(dense, slope)
        if clamp is not None:
            dense = dense.clamp_(-clamp, clamp)
        parts.append(_each_channel(dense, down_kernel, down))
    return torch.cat(parts, 1)


def _flipped_square(kernel: Tensor | None, x: Tensor) -> Tensor:
    """taps, taps x taps or None -> taps x taps, as a correlation takes it."""
    if kernel is None:
        return x.new_ones(1, 1)
    kernel = kernel.to(x.dtype)
    return (torch.outer(kernel, kernel) if kernel.ndim == 1 else kernel).flip(0, 1)


def _each_channel(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """x: B x C x h x w, kernel: fh x fw -> the correlation of each channel, without padding."""
    return F.conv2d(x, kernel.expand(x.shape[1], 1, -1, -1), stride=stride, groups=x.shape[1])
