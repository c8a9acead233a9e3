"""A generator's 3 x 3 convolutions with all that follows them, and their peers in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core import Case, Way, compiled, relative_error
from pyrewrite.ops import conv3x3, conv3x3_ref, prepare_conv3x3, prepare_upconv3x3, upconv3x3, upconv3x3_ref

BLUR = [0.25, 0.75, 0.75, 0.25]
BOUND = 1e-6


@torch.no_grad()
def case(device: str, size: dict) -> Case:
    """`size`: channels in and out, the map's height and width, kind ("plain", "nearest" or "transposed" up-sampling).

    As in a generator that renders one image after the other: the weight is prepared once, and the peers' is modulated,
    which is cheaper than modulating the map.
    """
    torch.manual_seed(0)
    i, o, side, kind = size["in"], size["out"], size["side"], size["kind"]
    out = side if kind == "plain" else 2 * side
    x = torch.randn(1, i, side, side, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, i, 3, 3, device=device) / (3 * i**0.5)
    style, scale = torch.rand(1, i, device=device) + 0.5, torch.rand(1, o, device=device) + 0.5
    noise, bias = torch.randn(out, out, device=device), torch.randn(o, device=device)
    extras = {"in_scale": style, "out_scale": scale, "noise": noise, "bias": bias, "negative_slope": 0.2}
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in extras.items()}
    blur = x.new_tensor(BLUR)
    kernel = torch.outer(blur, blur).expand(o, 1, 4, 4)

    if kind == "transposed":
        truth = upconv3x3_ref(x.double(), weight.double(), BLUR, BLUR, **wide)
        prepared = prepare_upconv3x3(weight)

        def ours() -> Tensor:
            return upconv3x3(x, weight, BLUR, BLUR, **extras, prepared=prepared)

        def bare(x: Tensor, modulated: Tensor) -> Tensor:
            y = F.conv_transpose2d(x, modulated.transpose(0, 1), stride=2)
            return F.conv2d(y, kernel, bias, padding=1, groups=o)
    else:
        up = kind == "nearest"
        truth = conv3x3_ref(x.double(), weight.double(), **wide, upsample=up)
        prepared = prepare_conv3x3(weight)

        def ours() -> Tensor:
            return conv3x3(x, weight, **extras, upsample=up, prepared=prepared)

        def bare(x: Tensor, modulated: Tensor) -> Tensor:
            if up:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            return F.conv2d(x.contiguous(memory_format=torch.channels_last), modulated, bias, padding=1)

    def stock() -> Tensor:
        return F.leaky_relu_(bare(x, weight * (scale.t() * style)[:, :, None, None]).add_(noise), 0.2)

    traced = compiled(stock)

    def error(result: Tensor) -> float:
        return relative_error(result, truth)

    # The least: the plain sum's products of the transposed or plain convolution, and every map and weight once.
    side_of_products = out if kind != "transposed" else side
    flop = 2 * 9 * i * o * side_of_products**2
    moved = 4 * (x.numel() + o * out**2 + weight.numel() + noise.numel())
    ways = [Way(name, run, error) for name, run in (("pyrewrite", ours), ("torch", stock), ("torch.compile", traced))]
    label = f"{i} to {o} channels at {out} x {out}, {kind}"
    return Case("convolution", label, device, moved, flop, "fp32", BOUND, ways)
