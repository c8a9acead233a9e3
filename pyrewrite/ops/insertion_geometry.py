"""What a convolution layer computes on a crop, and the surroundings that the crop of its keys needs.

Notation as in Bau et al., "Rewriting a Deep Generative Model" (ECCV 2020), section 3: a key is the channel vector at
one pixel of the convolution's input, a value what the layer puts out there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError

DEMODULATION_EPSILON = 1e-8


@dataclass(frozen=True)
class ConvLayer:
    """A convolution layer as the insertion sees it.

    The value is ``v = gain * leaky_relu(demod * scale * conv(key, weight) + noise + bias, negative_slope)``, where
    ``demod`` is one number for each target and output channel, ``rsqrt(scale^2 sum_iyx style_i^2 weight_oiyx^2 +
    1e-8)``, or 1.

    weight          O x I x kh x kw, float32 (float64 for the torch implementation)
    scale           factor on the weight; StyleGAN2: 1 / sqrt(I kh kw)
    demodulate      whether the output is divided by the norm of the modulated filter; targets then need a style
    blur            f x f filter, or None. With one, the convolution is a transposed one of stride 2 without padding,
                    followed by this filter: a key map of h x w gives values of 2h x 2w
    bias            O, or None
    negative_slope  of the leaky ReLU; 1 means none
    gain            factor after the leaky ReLU; StyleGAN2: sqrt(2)
    padding         of the convolution on the whole map, on every side; None: kernel // 2. Not used with a blur
    """

    weight: Tensor
    scale: float = 1.0
    demodulate: bool = False
    blur: Tensor | None = None
    bias: Tensor | None = None
    negative_slope: float = 1.0
    gain: float = 1.0
    padding: int | None = None


@dataclass(frozen=True)
class InsertionTarget:
    """What the layer should put out in one place of one image.

    key     I x hk x wk: the crop of the key map with its surroundings (see `crop_key`), already modulated
    goal    O x h x w: the values wanted there
    style   I: the modulation, for demodulation only; None for layers without
    noise   h x w: what the layer adds before the bias, already times its strength; None: nothing
    weight  h x w, not negative: the weight of each pixel in the loss; None: 1 everywhere
    """

    key: Tensor
    goal: Tensor
    style: Tensor | None = None
    noise: Tensor | None = None
    weight: Tensor | None = None


# -- margins -----------------------------------------------------------------------------------------------------------


def blur_padding(taps: int, kernel_size: int) -> tuple[int, int]:
    """Padding before and after the blur of a transposed convolution of stride 2: the output is twice as large."""
    p = taps - 2 - (kernel_size - 1)
    return (p + 1) // 2 + 1, p // 2 + 1


def upsample_margins(taps: int, kernel_size: int) -> tuple[int, int]:
    """Key pixels that values 2a ... 2b - 1 of an up-sampling layer reach before a and after b - 1, along one axis.

    taps: length of the blur filter. kernel_size: of the transposed convolution. (1, 1) for 4 taps and a 3 x 3 kernel.
    """
    before, _ = blur_padding(taps, kernel_size)
    # Value u reads n = u - before ... u - before + taps - 1 of the transposed convolution, and n reads the keys x with
    # 0 <= n - 2x < kernel_size.
    return (before + kernel_size - 1) // 2, (taps - before) // 2


def margins(layer: ConvLayer) -> tuple[int, int, int, int]:
    """Key pixels needed above, below, left and right of a crop of values (see `crop_key` for where the crop lies)."""
    kh, kw = layer.weight.shape[2:]
    if layer.blur is None:
        rows, columns = paddings(layer)
        return rows, kh - 1 - rows, columns, kw - 1 - columns
    taps = blur_taps(layer)
    return (*upsample_margins(taps, kh), *upsample_margins(taps, kw))


def paddings(layer: ConvLayer) -> tuple[int, int]:
    """Padding of the convolution on the whole map: rows above and below, columns left and right."""
    kh, kw = layer.weight.shape[2:]
    return (kh // 2, kw // 2) if layer.padding is None else (layer.padding, layer.padding)


def blur_taps(layer: ConvLayer) -> int:
    """Length of the square blur filter."""
    height, width = layer.blur.shape
    if height != width:
        raise ValueError(f"layer.blur: expected a square filter, got {height} x {width}")
    return height


def key_size(layer: ConvLayer, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the key crop that belongs to height x width values."""
    if layer.blur is None:
        kh, kw = layer.weight.shape[2:]
        return height + kh - 1, width + kw - 1
    if height % 2 or width % 2:
        raise ValueError(f"an up-sampling layer's crop has an even number of rows and columns, got {height} x {width}")
    above, below, left, right = margins(layer)
    return height // 2 + above + below, width // 2 + left + right


def crop_key(layer: ConvLayer, key: Tensor, box: Sequence[int], *, surroundings: bool = True) -> Tensor:
    """Cut out of a key map what the values in a box are computed from.

    key: I x h x w, the whole map. box: (top, left, bottom, right), half open, on the value map; even coordinates for an
    up-sampling layer. Returns I x hk x wk, a copy, with zeros where the map ends.
    surroundings=False: zeros around the box as well, as the official tool's `tight_paste` has them (the crop convolved
    alone). It applies where key and value maps lie on each other (a "same" convolution); others keep their
    surroundings.
    """
    top, left, bottom, right = box[0], box[1], box[2], box[3]
    if not (top < bottom and left < right):
        raise ValueError(f"box {tuple(box)} is empty: expected top < bottom and left < right")
    if key.ndim != 3 or key.shape[0] != layer.weight.shape[1]:
        raise ValueError(f"key: expected {layer.weight.shape[1]} x h x w, got {' x '.join(map(str, key.shape))}")
    stride = 1 if layer.blur is None else 2
    if any(edge % stride for edge in (top, left, bottom, right)):
        raise ValueError(f"box {tuple(box)}: an up-sampling layer's box has even coordinates")
    h, w = key.shape[1:]
    if layer.blur is None:
        kh, kw = layer.weight.shape[2:]
        pad = paddings(layer)
        size = (h + 2 * pad[0] - kh + 1, w + 2 * pad[1] - kw + 1)
    else:
        size = (2 * h, 2 * w)
    if top < 0 or left < 0 or bottom > size[0] or right > size[1]:
        raise ValueError(f"box {tuple(box)} leaves the value map of {size[0]} x {size[1]}")
    above, below, before, after = margins(layer)
    top, left, bottom, right = top // stride, left // stride, bottom // stride, right // stride
    rows, columns = (top - above, bottom + below), (left - before, right + after)
    if not surroundings and (stride == 2 or (above == below and before == after)):
        inside, outside = key[:, top:bottom, left:right], (before, after, above, below)
        return F.pad(inside, outside)
    inside = key[:, max(rows[0], 0) : max(min(rows[1], h), 0), max(columns[0], 0) : max(min(columns[1], w), 0)]
    outside = (max(-columns[0], 0), max(columns[1] - w, 0), max(-rows[0], 0), max(rows[1] - h, 0))
    return F.pad(inside, outside) if any(outside) else inside.clone()


# -- the layer on a crop -----------------------------------------------------------------------------------------------


def blurred_crop(layer: ConvLayer, x: Tensor, height: int, width: int) -> Tensor:
    """x: B x C x n x m, a transposed convolution of a key crop -> the filter's B x C x height x width values."""
    taps = blur_taps(layer)
    above, _, left, _ = margins(layer)
    kh, kw = layer.weight.shape[2:]
    top = 2 * above - blur_padding(taps, kh)[0]
    start = 2 * left - blur_padding(taps, kw)[0]
    right, bottom = start + width + taps - 1 - x.shape[3], top + height + taps - 1 - x.shape[2]
    x = F.pad(x, (-start, right, -top, bottom))  # cut to what the filter reads; zeros beyond the reach of the kernel
    b, c = x.shape[:2]
    kernel = layer.blur.to(x).flip(0, 1)[None, None]  # a true convolution, as in the published network
    return F.conv2d(x.reshape(b * c, 1, *x.shape[2:]), kernel).reshape(b, c, height, width)


def conv_crop(layer: ConvLayer, key: Tensor, weight: Tensor) -> Tensor:
    """scale * conv(key, weight), with the blur: key B x I x hk x wk, weight O x I x kh x kw -> B x O x h x w."""
    if layer.blur is None:
        return F.conv2d(key, weight) * layer.scale
    above, below, left, right = margins(layer)
    height, width = 2 * (key.shape[2] - above - below), 2 * (key.shape[3] - left - right)
    return blurred_crop(layer, F.conv_transpose2d(key, weight.transpose(0, 1), stride=2), height, width) * layer.scale


def unfold_keys(layer: ConvLayer, key: Tensor) -> Tensor:
    """The matrix U with scale * conv(key, weight) = weight.flatten(1) @ U: key B x C x hk x wk -> B x (C kh kw) x (h
    w).

    For an up-sampling layer it goes through the transposed convolution and the blur, which are linear too.
    """
    kh, kw = layer.weight.shape[2:]
    if layer.blur is None:
        return F.unfold(key, (kh, kw)) * layer.scale
    b, c, hk, wk = key.shape
    above, below, left, right = margins(layer)
    height, width = 2 * (hk - above - below), 2 * (wk - left - right)
    taps = torch.eye(kh * kw, dtype=key.dtype, device=key.device).reshape(1, kh * kw, kh, kw)
    spread = F.conv_transpose2d(key.reshape(b * c, 1, hk, wk), taps, stride=2)  # (B C) x (kh kw) x .. x ..
    return blurred_crop(layer, spread, height, width).reshape(b, c * kh * kw, height * width) * layer.scale


def demodulation(layer: ConvLayer, weight: Tensor, style: Tensor) -> Tensor:
    """demod of each output channel: weight O x I x kh x kw, style I -> O."""
    energy = weight.square().flatten(2).sum(2) @ style.square()  # O
    return torch.rsqrt(layer.scale**2 * energy + DEMODULATION_EPSILON)


def layer_values(layer: ConvLayer, target: InsertionTarget, weight: Tensor | None = None) -> Tensor:
    """What the layer puts out on a target's crop, O x h x w. Differentiable.

    weight: O x I x kh x kw, in place of the layer's own.
    """
    weight = layer.weight if weight is None else weight
    x = conv_crop(layer, target.key[None], weight)[0]  # O x h x w
    if layer.demodulate:
        x = x * demodulation(layer, weight, target.style)[:, None, None]
    if target.noise is not None:
        x = x + target.noise
    if layer.bias is not None:
        x = x + layer.bias[:, None, None]
    if layer.negative_slope != 1:
        x = F.leaky_relu(x, layer.negative_slope)
    return x * layer.gain


# -- checks ------------------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) if x.ndim else "a scalar"


Later = list[tuple[str, Tensor, bool]]  # names, tensors, whether they are weights: numbers to be looked at together


def check_tensor(
    name: str, x: object, shape: Sequence[int | str], like: Tensor | None = None, later: Later | None = None
) -> Tensor:
    """x, detached, if it has this shape (a str: any size >= 1), like's dtype and device, and finite numbers.

    later: puts off the look at the numbers; `check_numbers` then looks at all of them.
    """
    expected = " x ".join(map(str, shape))
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a {expected} tensor, got {type(x).__name__}")
    fits = x.ndim == len(shape)
    fits = fits and all(n == s if isinstance(s, int) else n >= 1 for n, s in zip(x.shape, shape, strict=True))
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {_shape(x)}")
    if like is None:
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
    elif x.dtype != like.dtype or x.device != like.device:
        raise TypeError(f"{name}: expected {like.dtype} on {like.device}, as layer.weight, got {x.dtype} on {x.device}")
    x = x.detach()
    if later is None:
        check_numbers([(name, x, False)])
    else:
        later.append((name, x, False))
    return x


def check_numbers(numbers: Later) -> None:
    """Raises NonFiniteError for NaN and infinity, ValueError for weights below 0 or all 0. Waits for a GPU once."""
    weights = [x for _, x, is_weight in numbers if is_weight]
    found = torch.stack([*(x.sum() for _, x, _ in numbers), *(x.min() for x in weights)]).tolist()
    least = iter(found[len(numbers) :])
    for (name, x, is_weight), total in zip(numbers, found, strict=False):
        # A sum is the quicker test; where it overflows or meets NaN, every number is looked at.
        if not math.isfinite(total) and not all_finite(x):
            raise NonFiniteError(f"{name} holds NaN or infinity; expected finite numbers")
        if is_weight and (next(least) < 0 or not total > 0):
            raise ValueError(f"{name}: expected weights >= 0, some above 0")


def check_layer(layer: ConvLayer, later: Later | None = None) -> ConvLayer:
    """The layer with detached tensors. Raises TypeError, ValueError or NonFiniteError, naming the field."""
    weight = check_tensor("layer.weight", layer.weight, ("O", "I", "kh", "kw"), None, later)
    o, _, kh, kw = weight.shape
    blur = layer.blur
    if blur is not None:
        blur = check_tensor("layer.blur", blur, ("f", "f"), weight, later)
        blur_taps(layer)
    elif layer.padding is not None and not 0 <= layer.padding < min(kh, kw):
        raise ValueError(f"layer.padding: expected 0 <= padding < {min(kh, kw)} (the kernel), got {layer.padding}")
    if not layer.negative_slope > 0:
        raise ValueError(f"layer.negative_slope: expected a number above 0, got {layer.negative_slope}")
    if not (layer.gain > 0 and layer.scale > 0):
        raise ValueError(f"layer.gain and layer.scale: expected numbers above 0, got {layer.gain} and {layer.scale}")
    bias = None if layer.bias is None else check_tensor("layer.bias", layer.bias, (o,), weight, later)
    return ConvLayer(weight, layer.scale, layer.demodulate, blur, bias, layer.negative_slope, layer.gain, layer.padding)


def check_targets(
    layer: ConvLayer, targets: InsertionTarget | Sequence[InsertionTarget], later: Later | None = None
) -> list[InsertionTarget]:
    """The targets with detached tensors, at least one. `layer` comes from `check_layer`, and errors are as there."""
    numbers = [] if later is None else later
    targets = [targets] if isinstance(targets, InsertionTarget) else list(targets)
    if not targets:
        raise ValueError("targets is empty: expected at least one InsertionTarget")
    o, i = layer.weight.shape[:2]
    checked = []
    for n, target in enumerate(targets):
        name = f"targets[{n}]"
        if not isinstance(target, InsertionTarget):
            raise TypeError(f"{name}: expected an InsertionTarget, got {type(target).__name__}")
        goal = check_tensor(f"{name}.goal", target.goal, (o, "h", "w"), layer.weight, numbers)
        h, w = goal.shape[1:]
        key = check_tensor(f"{name}.key", target.key, (i, *key_size(layer, h, w)), layer.weight, numbers)
        style, noise, weight = target.style, target.noise, target.weight
        if layer.demodulate:
            if style is None:
                raise ValueError(f"{name}.style: None, but the layer demodulates; expected {i} numbers")
            style = check_tensor(f"{name}.style", style, (i,), layer.weight, numbers)
        if noise is not None:
            noise = check_tensor(f"{name}.noise", noise, (h, w), layer.weight, numbers)
        if weight is not None:
            weight = check_tensor(f"{name}.weight", weight, (h, w), layer.weight, [])
            numbers.append((f"{name}.weight", weight, True))
        checked.append(InsertionTarget(key, goal, style, noise, weight))
    if later is None:
        check_numbers(numbers)
    return checked


def check_direction(layer: ConvLayer, direction: Tensor, later: Later | None = None) -> Tensor:
    """direction as r x I, r >= 1; one direction may be given as I."""
    if isinstance(direction, Tensor) and direction.ndim == 1:
        direction = direction[None]
    return check_tensor("direction", direction, ("r", layer.weight.shape[1]), layer.weight, later)
