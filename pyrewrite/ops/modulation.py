"""The small sums of a modulated layer (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR
2020, section 2.2): its style, and what demodulation multiplies its outputs by.

Both are summed in float64, so that their rounding does not depend on the batch. On a processor each is one call of a
kernel; with gradients, and everywhere else, plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrewrite.ops import _library


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
