"""StyleGAN2 (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020).

Parameters carry the names of the rosinality checkpoints. Modulation is applied to the input of a convolution and
demodulation to its output (section 2.2 there): the convolution itself is shared by the batch, which makes it the linear
associative memory of the rewriting paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrewrite.generators.base import PRECISIONS, Activation, EditableLayer, batch_independent
from pyrewrite.generators.filters import blur_padding, filtered, separated, upsampled_by_two
from pyrewrite.generators.styles import EPSILON, GAIN, SLOPE, EqualLinear, StyleBased, style_number
from pyrewrite.ops.convolution import (
    conv3x3,
    conv3x3_kernel_takes,
    prepare_conv3x3,
    prepare_upconv3x3,
    upconv3x3,
)
from pyrewrite.ops.modulation import colours, colours_kernel_takes, demodulated_scale

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import ConvLayer

NOISE_MODES = ("fixed", "random", "none")


class FilterKernel(nn.Module):
    """Holds a low-pass filter under the name that the checkpoints give it."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.register_buffer("kernel", torch.empty(height, width))


class ModulatedConv(nn.Module):
    """Weight (1 x O x I x k x k) and the linear layer that turns w into the style of the input channels."""

    def __init__(self, o: int, i: int, k: int, style_dim: int, blur: tuple[int, int] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, o, i, k, k))
        self.modulation = EqualLinear(style_dim, i)
        self.scale = 1 / math.sqrt(i * k * k)
        if blur is not None:
            self.blur = FilterKernel(*blur)

    @property
    def kernel(self) -> Tensor | None:
        return self.blur.kernel if hasattr(self, "blur") else None


class NoiseStrength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))


class Bias(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))


class StyledConv(nn.Module):
    """clamp: bound of the value, as networks have it that were trained with 16-bit layers; None: no bound."""

    clamp: float | None = None

    def __init__(self, conv: ModulatedConv):
        super().__init__()
        self.conv = conv
        self.noise = NoiseStrength()
        self.activate = Bias(conv.weight.shape[1])


class ToRGB(nn.Module):
    """clamp: bound of what it adds to the colours; None: no bound."""

    clamp: float | None = None

    def __init__(self, channels: int, i: int, style_dim: int, upsample: tuple[int, int] | None):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1))
        if upsample is not None:
            self.upsample = FilterKernel(*upsample)
        self.conv = ModulatedConv(channels, i, 1, style_dim)

    def forward(self, x: Tensor, w: Tensor, skip: Tensor | None) -> Tensor:
        """x: B x I x H x W, skip: B x C x H/2 x W/2 or None -> B x C x H x W"""
        style = self.conv.modulation.style(w) * self.conv.scale  # B x I
        matrix = self.conv.weight[0, :, :, 0, 0] * style[:, None]  # B x C x I
        kernel = self.upsample.kernel if hasattr(self, "upsample") else None
        if colours_kernel_takes(x, matrix, bias := self.bias[0, :, 0, 0], skip, kernel):
            return colours(x, matrix, bias, self.clamp, skip, kernel)
        rgb = torch.bmm(matrix.to(x.dtype), x.flatten(2)).unflatten(2, x.shape[2:]) + self.bias
        if self.clamp is not None:
            rgb = rgb.clamp(-self.clamp, self.clamp)
        return rgb if skip is None else rgb + upsampled_by_two(skip, kernel)


class SkipConv(nn.Module):
    """The residual connection of a block: half of the energy of its input, on twice as many pixels."""

    def __init__(self, o: int, i: int, upsample: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(o, i, 1, 1))
        self.upsample = FilterKernel(*upsample)
        self.scale = math.sqrt(0.5 / i)

    def forward(self, x: Tensor) -> Tensor:  # B x I x H x W -> B x O x 2H x 2W
        return upsampled_by_two(F.conv2d(x, (self.weight * self.scale).to(x.dtype)), self.upsample.kernel)


@dataclass(frozen=True)
class StyleGAN2Shape:
    """Every size of a network, as read from its weights.

    mapping    widths of the mapping network: z (and the embedded label after it), hidden ..., w
    base       height and width of the learned constant
    input      channels of the constant
    convs      (out, in, kernel size) of conv1, convs.0, convs.1, ...
    blurs      (height, width) of the filter of each up-sampling convolution
    upsamples  (height, width) of the filter of each skip connection, of colours or residual; none in "orig"
    labels     number of classes and width of their embedding; None for a generator without
    joined     how the embedding is used: see `StyleBased`
    architecture  "skip": every block adds to the colours; "orig": only the last one makes them; "resnet": that too, and
               each block's input is added to what it puts out
    """

    mapping: tuple[int, ...]
    base: int
    input: int
    convs: tuple[tuple[int, int, int], ...]
    blurs: tuple[tuple[int, int], ...]
    upsamples: tuple[tuple[int, int], ...]
    image_channels: int = 3
    labels: tuple[int, int] | None = None
    joined: bool = False
    architecture: str = "skip"


class _Constants(NamedTuple):
    """What a layer needs beside the map. The activation's gain is in scale, noise and bias, for gain * lrelu(x) is
    lrelu(gain * x).

    style   B x I, of the inputs; None where they have it already
    scale   B x O, of the outputs
    noise   H x W
    bias    O
    weight  as `prepare_conv3x3` or `prepare_upconv3x3` made it, or None
    """

    style: Tensor | None
    scale: Tensor
    noise: Tensor
    bias: Tensor
    weight: Tensor | None


class _Carry(NamedTuple):
    """What flows past the layers.

    w         B x w_dim, or B x num_ws x w_dim
    rgb       B x C x H x W, the colours so far; None before the first
    render    whether colours are made
    prepared  layer number -> its constants, where the images of a batch run one by one
    block     B x I x h x w, the input of the block; None where blocks have no residual connection
    """

    w: Tensor
    rgb: Tensor | None
    render: bool
    prepared: Mapping[int, _Constants] = MappingProxyType({})
    block: Tensor | None = None


class StyleGAN2(StyleBased):
    """Layers layer2 (base resolution), layer3 (up-samples), layer4, ... as the official rewriting tool numbers them."""

    family = "stylegan2"
    precisions = tuple(PRECISIONS)

    def __init__(self, shape: StyleGAN2Shape):
        super().__init__(shape.mapping, shape.labels, shape.joined)
        style_dim = self.w_dim
        self.image_channels = shape.image_channels
        self.input = nn.Module()
        self.input.input = nn.Parameter(torch.empty(1, shape.input, shape.base, shape.base))
        self.noises = nn.Module()
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        self.architecture = shape.architecture
        self.skips = nn.ModuleList() if shape.architecture == "resnet" else None
        resolution = shape.base
        for n, (o, i, k) in enumerate(shape.convs):
            up = n % 2 == 1
            conv = StyledConv(ModulatedConv(o, i, k, style_dim, shape.blurs[n // 2] if up else None))
            if n == 0:
                self.conv1 = conv
            else:
                self.convs.append(conv)
            if not up:
                rgb: nn.Module = nn.Identity()  # in the place of one that the architecture lacks
                if shape.architecture == "skip" or n == len(shape.convs) - 1:
                    upsample = shape.upsamples[n // 2 - 1] if n and shape.architecture == "skip" else None
                    rgb = ToRGB(shape.image_channels, o, style_dim, upsample)
                if n == 0:
                    self.to_rgb1 = rgb
                else:
                    self.to_rgbs.append(rgb)
            elif self.skips is not None:
                self.skips.append(SkipConv(shape.convs[n + 1][0], i, shape.upsamples[n // 2]))
            key_resolution, resolution = resolution, resolution * (2 if up else 1)
            self.noises.register_buffer(f"noise_{n}", torch.empty(1, 1, resolution, resolution))
            name = f"layer{n + 2}"
            self._layers[name] = EditableLayer(name, resolution, key_resolution, i, o, k, up, conv.conv)
        self.image_size = resolution
        self._noise_mode = "fixed"
        self.requires_grad_(False).eval()

    def clamping_parts(self) -> dict[str, StyledConv | ToRGB]:
        """The parts that may clamp what they put out, under the names of their weights."""
        parts = {"conv1": self.conv1, "to_rgb1": self.to_rgb1}
        parts |= {f"convs.{n}": part for n, part in enumerate(self.convs)}
        parts |= {f"to_rgbs.{n}": part for n, part in enumerate(self.to_rgbs)}
        return {name: part for name, part in parts.items() if not isinstance(part, nn.Identity)}

    def file_settings(self) -> dict[str, float]:
        return {f"{n}.conv_clamp": p.clamp for n, p in self.clamping_parts().items() if p.clamp is not None}

    # -- noise ---------------------------------------------------------

    @property
    def noise_mode(self) -> str:
        """The noise of the layers: "fixed" (the file's), "none", or "random" (drawn anew for each image).

        "random" is for looking at pictures only: what statistics and edits need is the same each time.
        """
        return self._noise_mode

    @noise_mode.setter
    def noise_mode(self, value: str) -> None:
        if value not in NOISE_MODES:
            raise ValueError(f"noise_mode is one of {', '.join(NOISE_MODES)}, got {value!r}")
        self._noise_mode = value

    def settings(self) -> dict[str, Any]:
        mine = super().settings()
        return {**mine, "noise": self._noise_mode} if self._noise_mode != "fixed" else mine

    def _setting_defaults(self) -> dict[str, tuple[str, Any]]:
        return super()._setting_defaults() | {"noise": ("noise_mode", "fixed")}

    def mean_style(self, layer: str | EditableLayer) -> Tensor:
        """I: the style of the layer at the mean latent."""
        with torch.no_grad():
            return self.find_layer(layer).conv.modulation(self.latent_avg[None])[0]

    # -- layers ------------------------------------------------------

    def _styled(self, index: int) -> StyledConv:
        return self.conv1 if index == 0 else self.convs[index - 1]

    def _begin_w(self, w: Tensor, render: bool) -> tuple[Tensor, _Carry]:
        return self.input.input.expand(len(w), -1, -1, -1), _Carry(w, None, render)

    def _key(self, index: int, x: Tensor, carry: _Carry) -> tuple[Tensor, Tensor]:
        style = self._styled(index).conv.modulation.style(style_number(carry.w, index))  # B x I
        return (x * style[:, :, None, None]).contiguous(memory_format=torch.channels_last), style

    def _value(self, index: int, key: Tensor, style: Tensor) -> Tensor:
        styled = self._styled(index)
        conv, weight = styled.conv, styled.conv.weight[0]
        if self._fuses(index) and self._noise_mode != "random":
            return self._fused(index, key, self._constants_of(index, style)._replace(style=None))
        x = batch_independent(lambda x: self._convolved(conv, x, weight), key)
        x = x * demodulated_scale(weight, style, conv.scale, EPSILON)[:, :, None, None]
        x = x + self._noise_of(index, len(key)) + styled.activate.bias[:, None, None]
        return self._clamped(index, F.leaky_relu(x, SLOPE) * self._gain(index))

    def _gain(self, index: int) -> float:
        """Of the activation; a block's last layer has half the energy where its input is added to it."""
        return 1.0 if self.skips is not None and index and index % 2 == 0 else GAIN

    def value_bound(self, layer: str | EditableLayer) -> float | None:
        return self._bound(self._index(layer))

    def _bound(self, index: int) -> float | None:
        clamp = self._styled(index).clamp
        return None if clamp is None else clamp * self._gain(index) / GAIN

    def _clamped(self, index: int, x: Tensor) -> Tensor:
        """x: B x O x H x W, which may change."""
        bound = self._bound(index)
        return x if bound is None else x.clamp_(-bound, bound)

    def _fuses(self, index: int) -> bool:
        """Whether this package's convolutions are for the layer."""
        conv = self._styled(index).conv
        if not conv3x3_kernel_takes(conv.weight[0]):
            return False
        return conv.kernel is None or (tuple(conv.kernel.shape) == (4, 4) and separated(conv.kernel) is not None)

    def _convolved(self, conv: ModulatedConv, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: B x I x h x w, weight: O x I x k x k -> B x O x H x W, with the up-sampling where the layer has one."""
        if conv.kernel is None:
            return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        return filtered(x, conv.kernel, *blur_padding(conv.kernel, weight.shape[-1]), bias)

    def _step(self, index: int, x: Tensor, carry: _Carry) -> tuple[Tensor, _Carry]:
        if x.dtype != self.dtype:
            value = self._value_in_half(index, x, carry.w)
        elif len(x) == 1 and self._one_by_one(index):
            value = self._value_of_one(index, x, carry.prepared.get(index) or self._constants(index, carry.w))
        elif self._fuses(index) and self._noise_mode != "random":
            value = self._fused(index, x, self._constants(index, carry.w))
        else:
            return super()._step(index, x, carry)
        return self._advance(index, value, carry)

    def _captured_value(self, index: int, x: Tensor, key: Tensor, style: Tensor) -> Tensor:
        if len(x) == 1 and self._one_by_one(index):
            return self._value_of_one(index, x, self._constants_of(index, style))
        if self._fuses(index):
            return self._fused(index, x, self._constants_of(index, style))
        return super()._captured_value(index, x, key, style)

    def _constants(self, index: int, w: Tensor) -> _Constants:
        """w: B x w_dim or B x num_ws x w_dim -> what layer number `index` needs beside the map."""
        return self._constants_of(index, self._styled(index).conv.modulation.style(style_number(w, index)))

    def _constants_of(self, index: int, style: Tensor) -> _Constants:
        """style: B x I"""
        styled, gain, prepared = self._styled(index), self._gain(index), None
        conv, weight = styled.conv, styled.conv.weight[0]
        if self._fuses(index):
            prepared = prepare_conv3x3(weight) if conv.kernel is None else prepare_upconv3x3(weight)
        scale = demodulated_scale(weight, style, conv.scale, EPSILON, gain, prepared)
        return _Constants(style, scale, self._noise(index) * gain, styled.activate.bias * gain, prepared)

    def _fused(self, index: int, x: Tensor, c: _Constants) -> Tensor:
        """x: B x I x h x w, the input of the layer or its key -> the value, B x O x H x W."""
        conv = self._styled(index).conv
        weight, extras = conv.weight[0], {"in_scale": c.style, "out_scale": c.scale, "noise": c.noise, "bias": c.bias}
        extras |= {"negative_slope": SLOPE, "prepared": c.weight}
        if conv.kernel is None:
            return self._clamped(index, conv3x3(x, weight, **extras))
        return self._clamped(index, upconv3x3(x, weight, *separated(conv.kernel), **extras))

    def _value_of_one(self, index: int, x: Tensor, c: _Constants) -> Tensor:
        """x: 1 x I x h x w, the layer's input -> the value, 1 x O x H x W.

        Where the map is larger than the weights it is cheaper to modulate these: that leaves two passes over the map
        beside the library's convolution.
        """
        if self._fuses(index):
            return self._fused(index, x, c)
        conv = self._styled(index).conv
        weight = conv.weight[0] * (c.scale.t() * c.style)[:, :, None, None]
        x = x.contiguous(memory_format=torch.channels_last)
        x = self._convolved(conv, x, weight, c.bias)
        return self._clamped(index, F.leaky_relu_(x.add_(c.noise), SLOPE))

    def _value_in_half(self, index: int, x: Tensor, w: Tensor) -> Tensor:
        """x: B x I x h x w in 16 bits, the layer's input -> the value, B x O x H x W in 16 bits.

        What 16 bits may not hold is kept small: weights are scaled, and a style is divided by its largest number,
        before the convolution and not after it.
        """
        styled = self._styled(index)
        conv = styled.conv
        style = conv.modulation.style(style_number(w, index))  # B x I
        largest = style.abs().amax(1, keepdim=True).clamp_min(EPSILON)
        gain = self._gain(index)
        scale = demodulated_scale(conv.weight[0], style, conv.scale, EPSILON) * (largest * gain / conv.scale)  # B x O
        x = x * (style / largest).to(x.dtype)[:, :, None, None]
        x = self._convolved(conv, x, (conv.weight[0] * conv.scale).to(x.dtype))
        x = x * scale.to(x.dtype)[:, :, None, None] + (styled.activate.bias * gain).to(x.dtype)[:, None, None]
        x = x + (self._noise_of(index, len(x)) * gain).to(x.dtype)
        return self._clamped(index, F.leaky_relu_(x, SLOPE))

    def _prepared(self, index: int, carry: _Carry, end: int) -> _Carry:
        later = {i: self._constants(i, carry.w) for i in range(index, end) if self._one_by_one(i)}
        return carry._replace(prepared=later)

    def _one_of(self, carry: _Carry, row: int) -> _Carry:
        rows = slice(row, row + 1)
        return carry._replace(
            w=carry.w[rows],
            rgb=None if carry.rgb is None else carry.rgb[rows],
            block=None if carry.block is None else carry.block[rows],
            prepared={i: c._replace(style=c.style[rows], scale=c.scale[rows]) for i, c in carry.prepared.items()},
        )

    def _joined(self, carries: list[_Carry]) -> _Carry:
        ws, rgbs, blocks = ([getattr(carry, name) for carry in carries] for name in ("w", "rgb", "block"))
        rgb, block = (None if parts[0] is None else torch.cat(parts) for parts in (rgbs, blocks))
        return _Carry(torch.cat(ws), rgb, carries[0].render, block=block)

    def _noise(self, index: int) -> Tensor:
        noise = getattr(self.noises, f"noise_{index}")[0, 0]
        return torch.zeros_like(noise) if self._noise_mode == "none" else noise * self._styled(index).noise.weight

    def _noise_of(self, index: int, count: int) -> Tensor:
        """H x W, or count x 1 x H x W where each image has its own."""
        if self._noise_mode != "random":
            return self._noise(index)
        size = getattr(self.noises, f"noise_{index}").shape[2:]
        drawn = torch.randn(count, 1, *size, device=self.device, dtype=self.dtype)
        return drawn * self._styled(index).noise.weight

    def _one_by_one(self, index: int) -> bool:
        # Random noise comes from one stream: images side by side would take from it in any order.
        return self._noise_mode != "random" and super()._one_by_one(index)

    def _require_fixed_noise(self) -> None:
        if self._noise_mode == "random":
            raise ValueError("noise_mode is 'random': statistics and edits need the same noise each time, set 'fixed'")

    def keys(self, layer: str | EditableLayer, z: Tensor) -> Tensor:
        self._require_fixed_noise()
        return super().keys(layer, z)

    def _captured(self, layer: str | EditableLayer, x: Tensor, carry: _Carry) -> Activation:
        self._require_fixed_noise()
        return super()._captured(layer, x, carry)

    def _captures(self, x: Tensor, carry: _Carry) -> Iterator[Activation]:
        self._require_fixed_noise()
        return super()._captures(x, carry)

    def _advance(self, index: int, value: Tensor, carry: _Carry) -> tuple[Tensor, _Carry]:
        if index % 2:
            return value, carry
        if self.skips is not None:
            if index:
                value = value + self.skips[index // 2 - 1](carry.block)
            carry = carry._replace(block=value)
        to_rgb = self.to_rgb1 if index == 0 else self.to_rgbs[index // 2 - 1]
        if carry.render and isinstance(to_rgb, ToRGB):
            carry = carry._replace(rgb=to_rgb(value, style_number(carry.w, index + 1), carry.rgb))
        return value, carry

    def _image(self, x: Tensor, carry: _Carry) -> Tensor:
        return carry.rgb

    def conv_layer(self, layer: str | EditableLayer) -> ConvLayer:
        from pyrewrite.ops.insertion import ConvLayer

        layer = self.find_layer(layer)
        conv = layer.conv
        return ConvLayer(
            weight=conv.weight.detach()[0],
            scale=conv.scale,
            demodulate=True,
            blur=conv.kernel,
            bias=self._styled(self._index(layer)).activate.bias.detach(),
            negative_slope=SLOPE,
            gain=self._gain(self._index(layer)),
            padding=layer.kernel_size // 2,
        )
