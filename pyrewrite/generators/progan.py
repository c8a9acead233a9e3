"""The generator of Progressive GAN (Karras et al., "Progressive Growing of GANs", ICLR 2018), without its growing.

Parameters carry the names of the official rewriting tool's files: layerN.conv.weight, layerN.wscale.b, output_RxR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrewrite.generators.base import PRECISIONS, EditableLayer, Generator, batch_independent
from pyrewrite.ops.convolution import conv3x3, conv3x3_kernel_takes, prepare_conv3x3
from pyrewrite.ops.modulation import colours, colours_kernel_takes

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import ConvLayer

SLOPE = 0.2
EPSILON = 1e-8


class Conv(nn.Module):
    def __init__(self, o: int, i: int, k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(o, i, k, k))


class ScaledBias(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.b = nn.Parameter(torch.empty(channels))


class Block(nn.Module):
    """A convolution, then times gain / (k sqrt(in)) (the equalised learning rate), plus a bias."""

    def __init__(self, o: int, i: int, k: int, gain: float):
        super().__init__()
        self.conv = Conv(o, i, k)
        self.wscale = ScaledBias(o)
        self.scale = gain / (k * math.sqrt(i))

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale + self.wscale.b[:, None, None]


@dataclass(frozen=True)
class ProGANShape:
    """(out, in, kernel size) of layer1, layer2, ... and the channels of the image."""

    convs: tuple[tuple[int, int, int], ...]
    image_channels: int = 3

    @property
    def image_size(self) -> int:
        return self.convs[0][2] * 2 ** (len(self.convs) // 2 - 1)

    @property
    def output(self) -> str:
        return f"output_{self.image_size}x{self.image_size}"


def _pixel_norm(x: Tensor) -> Tensor:
    """B x C x H x W, each pixel to a mean square of 1 over the channels; channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    if x.dtype in (torch.float16, torch.bfloat16):  # squares may be beyond 16 bits
        square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square() / x.shape[1]
        return x * torch.rsqrt(square + EPSILON).to(x.dtype)
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPSILON)


class ProGAN(Generator):
    """Layers layer1 (the latent, 4 x 4 convolution with full padding), layer2, layer3 (on the up-sampled map), ..."""

    family = "progan"
    precisions = tuple(PRECISIONS)

    def __init__(self, shape: ProGANShape):
        super().__init__()
        self.z_dim = shape.convs[0][1]
        self.image_size, self.image_channels = shape.image_size, shape.image_channels
        resolution = shape.convs[0][2]
        for n, (o, i, k) in enumerate(shape.convs):
            name = f"layer{n + 1}"
            block = Block(o, i, k, gain=math.sqrt(2))
            self.add_module(name, block)
            if n and n % 2 == 0:
                resolution *= 2
            self._layers[name] = EditableLayer(name, resolution, resolution if n else 1, i, o, k, False, block.conv)
        self._output_name = shape.output
        self.add_module(shape.output, Block(shape.image_channels, shape.convs[-1][0], 1, gain=1.0))
        self.requires_grad_(False).eval()

    def _block(self, index: int) -> Block:
        return getattr(self, f"layer{index + 1}")

    def _padding(self, index: int) -> int:
        k = self._block(index).conv.weight.shape[-1]
        return k - 1 if index == 0 else k // 2

    def _begin(self, z: Tensor, render: bool) -> tuple[Tensor, Mapping[int, Tensor | None]]:
        """What is carried: layer number -> its prepared weight, where the images of a batch run one by one."""
        return z[:, :, None, None], {}

    def _upsamples(self, index: int) -> bool:
        return index > 0 and index % 2 == 0

    def _plain(self, index: int) -> bool:
        """Whether this package's convolution is for the layer."""
        return index > 0 and conv3x3_kernel_takes(self._block(index).conv.weight)

    def _key(self, index: int, x: Tensor, carry: Any) -> tuple[Tensor, None]:
        x = _pixel_norm(x)
        if self._upsamples(index):
            x = F.interpolate(x, scale_factor=2, mode="nearest").contiguous(memory_format=torch.channels_last)
        return x, None

    def _value(self, index: int, key: Tensor, style: None) -> Tensor:
        weight, padding = self._block(index).conv.weight.to(key.dtype), self._padding(index)
        if self._plain(index) and key.dtype == self.dtype:
            return conv3x3(key, weight)
        if self._one_by_one(index):
            return F.conv2d(key, weight, padding=padding)
        return batch_independent(lambda x: F.conv2d(x, weight, padding=padding), key)

    def _captured_value(self, index: int, x: Tensor, key: Tensor, style: None) -> Tensor:
        if self._plain(index):
            return conv3x3(_pixel_norm(x), self._block(index).conv.weight, upsample=self._upsamples(index))
        return super()._captured_value(index, x, key, style)

    def _advance(self, index: int, value: Tensor, carry: Any) -> tuple[Tensor, Any]:
        return F.leaky_relu(self._block(index).scaled(value), SLOPE), carry

    def _step(self, index: int, x: Tensor, carry: Mapping[int, Tensor | None]) -> tuple[Tensor, Any]:
        """Key, value and what follows, rounded alike, but in place once the convolution has made a new map, and
        without the up-sampled map.
        """
        block = self._block(index)
        if self._plain(index) and x.dtype == self.dtype:
            weight, prepared = block.conv.weight, carry.get(index)
            x = conv3x3(_pixel_norm(x), weight, upsample=self._upsamples(index), prepared=prepared)
        else:
            x = self._value(index, self._key(index, x, carry)[0], None)
        return F.leaky_relu_(x.mul_(block.scale).add_(block.wscale.b[:, None, None]), SLOPE), carry

    def _prepared(self, index: int, carry: Any, end: int) -> Mapping[int, Tensor | None]:
        return {i: prepare_conv3x3(self._block(i).conv.weight) for i in range(index, end) if self._plain(i)}

    def _joined(self, carries: list[Any]) -> Mapping[int, Tensor | None]:
        return {}  # weights may change before the images go on

    def _image(self, x: Tensor, carry: Any) -> Tensor:
        block = getattr(self, self._output_name)
        x, weight, bias = _pixel_norm(x), block.conv.weight, block.wscale.b  # weight: C x I x 1 x 1
        matrix = (weight[:, :, 0, 0] * block.scale).expand(len(x), -1, -1)  # B x C x I
        if colours_kernel_takes(x, matrix, bias, None, None):
            return colours(x, matrix, bias, None, None, None)
        return block.scaled(F.conv2d(x, weight.to(x.dtype)))

    def mean_style(self, layer: str | EditableLayer) -> None:
        self.find_layer(layer)

    def conv_layer(self, layer: str | EditableLayer) -> ConvLayer:
        from pyrewrite.ops.insertion import ConvLayer

        layer = self.find_layer(layer)
        return ConvLayer(weight=layer.weight.detach(), padding=self._padding(self._index(layer)))
