"""A generator's 3 x 3 convolutions, each with all that follows it in the layer.

Without gradients and on a processor they go by Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016): F(2 x 2, 3 x 3) takes 16 products where the plain sum has 36, and the
transposed convolution of an up-sampling layer, by F(2, 2) in the even outputs, 25 of 36. That is 1.3 to 2.3 times as
fast as the library's convolutions and about as accurate. Everywhere else they are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrewrite.ops import _library

CHANNELS = 16  # the kernels take multiples of it, in and out


def _finished(
    x: Tensor, out_scale: Tensor | None, noise: Tensor | None, bias: Tensor | None, negative_slope: float
) -> Tensor:
    """x: B x O x H x W, the bare convolution"""
    if out_scale is not None:
        x = x * out_scale[:, :, None, None]
    if bias is not None:
        x = x + bias[:, None, None]
    if noise is not None:
        x = x + noise
    return x if negative_slope == 1 else F.leaky_relu(x, negative_slope)


def conv3x3_ref(
    x: Tensor, weight: Tensor, *, in_scale: Tensor | None = None, out_scale: Tensor | None = None,
    noise: Tensor | None = None, bias: Tensor | None = None, negative_slope: float = 1.0, upsample: bool = False,
) -> Tensor:  # fmt: skip
    """Reference in plain torch of conv3x3."""
    if in_scale is not None:
        x = x * in_scale[:, :, None, None]
    if upsample:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    x = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=1)
    return _finished(x, out_scale, noise, bias, negative_slope)


def upconv3x3_ref(
    x: Tensor, weight: Tensor, vertical: Sequence[float], horizontal: Sequence[float], *,
    in_scale: Tensor | None = None, out_scale: Tensor | None = None, noise: Tensor | None = None,
    bias: Tensor | None = None, negative_slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """Reference in plain torch of upconv3x3."""
    if in_scale is not None:
        x = x * in_scale[:, :, None, None]
    x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # B x O x 2H + 1 x 2W + 1
    blur = x.new_tensor(vertical)[:, None] * x.new_tensor(horizontal)  # 4 x 4
    x = F.conv2d(x, blur.expand(x.shape[1], 1, 4, 4), padding=1, groups=x.shape[1])
    return _finished(x, out_scale, noise, bias, negative_slope)


def conv3x3_kernel_takes(weight: Tensor) -> bool:
    """Whether the processor's kernels are for weights like this one (O x I x kh x kw)."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _library.OPERATORS["conv3x3"].dtypes
        and tuple(weight.shape[2:]) == (3, 3)
        and weight.shape[0] % CHANNELS == 0
        and weight.shape[1] % CHANNELS == 0
        and weight.numel() > 0
    )


def prepare_conv3x3(weight: Tensor) -> Tensor | None:
    """What conv3x3 makes of a weight (O x I x 3 x 3) before it begins, for many calls with the same one; None where
    there is nothing to prepare.
    """
    return _prepare("conv3x3", weight)


def prepare_upconv3x3(weight: Tensor) -> Tensor | None:
    """As `prepare_conv3x3`, for upconv3x3."""
    return _prepare("upconv3x3", weight)


def _prepare(name: str, weight: Tensor) -> Tensor | None:
    if not conv3x3_kernel_takes(weight):
        return None
    out, in_ = weight.shape[:2]
    weight = weight.contiguous()
    prepared = torch.empty(17 * out * in_, dtype=weight.dtype)
    prepare = getattr(_library.native(name), f"{name}_prepare")
    prepare(weight.data_ptr(), out, in_, prepared.data_ptr(), torch.get_num_threads())
    return prepared


def conv3x3(
    x: Tensor, weight: Tensor, *, in_scale: Tensor | None = None, out_scale: Tensor | None = None,
    noise: Tensor | None = None, bias: Tensor | None = None, negative_slope: float = 1.0, upsample: bool = False,
    prepared: Tensor | None = None, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """lrelu(out_scale * conv(in_scale * x) + bias + noise), B x O x H x W, with zeros around x.

    x: B x I x H x W, or B x I x H/2 x W/2 with `upsample`, where each pixel stands for 2 x 2 of them; weight: O x I x 3
    x 3; in_scale: B x I (a style), out_scale: B x O (a demodulation), noise: H x W, bias: O, each of them may be
    missing; negative_slope: 1 for no activation. prepared: what `prepare_conv3x3` gave for this weight.

    The processor's kernel takes float32 and channels in multiples of 16; impl=None takes it where it can and no
    gradient is asked for. Its result is channels_last, and an image's bits do not depend on its batch. NaN or
    infinity in x makes NaN of the outputs of every tile of 2 x 2 whose inputs hold it.

    Raises ValueError or TypeError for shapes, data types and devices that do not fit, MissingKernelError for an `impl`
    that is not there.
    """
    extras = {"in_scale": in_scale, "out_scale": out_scale, "noise": noise, "bias": bias}
    size = tuple(2 * n if upsample else n for n in x.shape[2:])
    if _takes_torch("conv3x3", x, weight, extras, size, impl):
        return conv3x3_ref(x, weight, **extras, negative_slope=negative_slope, upsample=upsample)
    return _conv3x3(x, weight, prepared, in_scale, out_scale, noise, bias, negative_slope, upsample, impl)


def upconv3x3(
    x: Tensor, weight: Tensor, vertical: Sequence[float], horizontal: Sequence[float], *,
    in_scale: Tensor | None = None, out_scale: Tensor | None = None, noise: Tensor | None = None,
    bias: Tensor | None = None, negative_slope: float = 1.0, prepared: Tensor | None = None, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """lrelu(out_scale * blur(conv_transpose(in_scale * x)) + bias + noise), B x O x 2H x 2W: StyleGAN2's up-sampling.

    The transposed convolution has stride 2; output n of the blur is the sum over k of filter[k] * map[n + k - 1], with
    zeros around the map. x: B x I x H x W; weight: O x I x 3 x 3; vertical, horizontal: 4 numbers each; noise: 2H x 2W.
    The rest is as for conv3x3, with `prepare_upconv3x3`.
    """
    for name, taps in (("vertical", vertical), ("horizontal", horizontal)):
        if len(taps) != 4:
            raise ValueError(f"upconv3x3: {name} has {len(taps)} numbers, expected 4")
    extras = {"in_scale": in_scale, "out_scale": out_scale, "noise": noise, "bias": bias}
    if _takes_torch("upconv3x3", x, weight, extras, tuple(2 * n for n in x.shape[2:]), impl):
        return upconv3x3_ref(x, weight, vertical, horizontal, **extras, negative_slope=negative_slope)
    filters = [float(tap) for tap in (*vertical, *horizontal)]
    return _upconv3x3(x, weight, filters, prepared, in_scale, out_scale, noise, bias, negative_slope, impl)


def _takes_torch(
    name: str, x: Tensor, weight: Tensor, extras: dict[str, Tensor | None], size: tuple[int, ...], impl: str | None
) -> bool:
    """Whether this call is for plain torch, and not for the kernel. size: height and width of the result. Raises where
    the arguments do not fit.
    """
    _check(name, x, weight, extras, size, impl)
    tensors = [x, weight, *(t for t in extras.values() if t is not None)]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if impl == "torch" or (impl is None and (grad or not conv3x3_kernel_takes(weight))):
        return True
    if grad:
        raise RuntimeError(f"{name}: impl='cpu' has no gradient: call it under torch.no_grad(), or with impl='torch'")
    return False


@_library.torch_operator("pyrewrite::conv3x3")
def _conv3x3(
    x: Tensor, weight: Tensor, prepared: Tensor | None, in_scale: Tensor | None, out_scale: Tensor | None,
    noise: Tensor | None, bias: Tensor | None, negative_slope: float, upsample: bool, impl: str | None = None,
) -> Tensor:  # fmt: skip
    x, prepared = _ready("conv3x3", x, weight, prepared, impl)
    y = _empty(x, weight, upsample)
    b, o, h, w = y.shape
    if y.numel():
        tensors = [x, prepared, *_contiguous(in_scale, out_scale, noise, bias), y]
        _library.native("conv3x3").conv3x3_cpu(
            [0 if t is None else t.data_ptr() for t in tensors],
            (b, h, w, x.shape[1], o),
            upsample,
            negative_slope,
            torch.get_num_threads(),
        )
    return y


@_conv3x3.register_fake
def _(
    x: Tensor, weight: Tensor, prepared: Tensor | None, in_scale: Tensor | None, out_scale: Tensor | None,
    noise: Tensor | None, bias: Tensor | None, negative_slope: float, upsample: bool, impl: str | None = None,
) -> Tensor:  # fmt: skip
    return _empty(x, weight, upsample)


@_library.torch_operator("pyrewrite::upconv3x3")
def _upconv3x3(
    x: Tensor, weight: Tensor, filters: Sequence[float], prepared: Tensor | None, in_scale: Tensor | None,
    out_scale: Tensor | None, noise: Tensor | None, bias: Tensor | None, negative_slope: float, impl: str | None = None,
) -> Tensor:  # fmt: skip
    x, prepared = _ready("upconv3x3", x, weight, prepared, impl)
    y = _empty(x, weight, True)
    b, i, h, w = x.shape
    if y.numel():
        between = x.new_empty(b, 2 * h + 1, 2 * w + 1, y.shape[1])  # the map before the blur
        tensors = [x, prepared, *_contiguous(in_scale, out_scale, noise, bias), between, y]
        _library.native("upconv3x3").upconv3x3_cpu(
            [0 if t is None else t.data_ptr() for t in tensors],
            (b, h, w, i, y.shape[1]),
            filters[:4],
            filters[4:],
            negative_slope,
            torch.get_num_threads(),
        )
    return y


@_upconv3x3.register_fake
def _(
    x: Tensor, weight: Tensor, filters: Sequence[float], prepared: Tensor | None, in_scale: Tensor | None,
    out_scale: Tensor | None, noise: Tensor | None, bias: Tensor | None, negative_slope: float, impl: str | None = None,
) -> Tensor:  # fmt: skip
    return _empty(x, weight, True)


def _ready(
    name: str, x: Tensor, weight: Tensor, prepared: Tensor | None, impl: str | None
) -> tuple[Tensor, Tensor | None]:
    """The maps as channels_last, and the prepared weight."""
    _library.resolve(name, impl, x)
    if not conv3x3_kernel_takes(weight):
        raise ValueError(
            f"{name}: impl='cpu' takes channels in multiples of {CHANNELS}, got a weight of {_shape(weight)}"
        )
    if prepared is None:
        prepared = _prepare(name, weight)
    elif tuple(prepared.shape) != (17 * weight[:, :, 0, 0].numel(),) or prepared.dtype != weight.dtype:
        raise ValueError(
            f"{name}: prepared is {_shape(prepared)} of {prepared.dtype}, expected what prepare_{name} gives for a "
            f"weight of {_shape(weight)}"
        )
    return x.contiguous(memory_format=torch.channels_last), prepared


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _empty(x: Tensor, weight: Tensor, doubled: bool) -> Tensor:
    b, _, h, w = x.shape
    size = (b, weight.shape[0], *((2 * h, 2 * w) if doubled else (h, w)))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _check(
    name: str, x: Tensor, weight: Tensor, extras: dict[str, Tensor | None], size: tuple[int, ...], impl: str | None
) -> None:
    _library.check_impl(impl)
    if x.ndim != 4 or weight.ndim != 4 or tuple(weight.shape[2:]) != (3, 3) or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{name} takes maps B x I x H x W and a weight O x I x 3 x 3, got {_shape(x)} and {_shape(weight)}"
        )
    b, i = x.shape[:2]
    expected = {"in_scale": (b, i), "out_scale": (b, weight.shape[0]), "noise": size, "bias": (weight.shape[0],)}
    for what, tensor in (("weight", weight), *extras.items()):
        if tensor is None:
            continue
        if what in expected and tuple(tensor.shape) != expected[what]:
            wanted = " x ".join(map(str, expected[what]))
            raise ValueError(f"{name}: {what} is {_shape(tensor)}, expected {wanted}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise TypeError(
                f"{name}: {what} is {tensor.dtype} on {tensor.device}, expected {x.dtype} on {x.device} like the maps"
            )
