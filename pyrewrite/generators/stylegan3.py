"""StyleGAN3, T and R (Karras et al., "Alias-Free Generative Adversarial Networks", NeurIPS 2021).

A layer's map is a sampled signal: it has a sampling rate, in pixels over the width of the picture, and a margin of
pixels around the picture. The leaky ReLU runs at a higher rate, between an up- and a down-sampling filter
(`filtered_lrelu`), and so mixes neighbouring pixels: a layer's value is taken before it, after the convolution, its
demodulation and its bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrewrite.generators.base import PRECISIONS, EditableLayer
from pyrewrite.generators.filters import filtered_lrelu
from pyrewrite.generators.styles import EPSILON, GAIN, SLOPE, EqualLinear, StyleBased, style_number

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import ConvLayer


@dataclass(frozen=True)
class StyleGAN3LayerShape:
    """Sizes of one layer: its convolution with full padding, then `filtered_lrelu`.

    weight     O, I, k
    in_size    height and width of the key map
    out_size   height and width of the next layer's key map
    up, down   factors of the sampling rate before and after the leaky ReLU
    up_filter, down_filter  shapes of the filters: (taps,), (taps, taps), or None for none
    """

    weight: tuple[int, int, int]
    in_size: int
    out_size: int
    up: int = 1
    down: int = 1
    up_filter: tuple[int, ...] | None = None
    down_filter: tuple[int, ...] | None = None

    @property
    def padding(self) -> tuple[int, int]:
        """Pixels before and after, of the up-sampled map: the samples stay centred (appendix C.3 of the paper)."""
        taps = sum(shape[0] - 1 for shape in (self.up_filter, self.down_filter) if shape is not None)
        total = (self.out_size - 1) * self.down + 1 + taps - (self.in_size + self.weight[2] - 1) * self.up
        before = (total + self.up) // 2
        return before, total - before


@dataclass(frozen=True)
class StyleGAN3Shape:
    """Every size of a network, and the settings that belong to the published model and not to its weights.

    mapping        widths of the mapping network: z (and the embedded label after it), hidden ..., w
    input_rate     sampling rate of the Fourier features
    bandwidth      the largest frequency of theirs that is not dampened
    layers         those that can be edited, in order; the first one's in_size is that of the Fourier features
    rgb            of the last layer, which makes the colours
    output_scale   factor on the picture
    clamp          bound of a layer's output, one for each layer and one for the colours; None: no bound
    labels         number of classes and width of their embedding; None for a generator without
    """

    mapping: tuple[int, ...]
    input_rate: int
    bandwidth: float
    layers: tuple[StyleGAN3LayerShape, ...]
    rgb: StyleGAN3LayerShape
    output_scale: float
    clamp: tuple[float | None, ...]
    labels: tuple[int, int] | None = None


class FourierFeatures(nn.Module):
    """Sine waves over the plane, which w turns and moves, mixed by a matrix."""

    def __init__(self, channels: int, w_dim: int, size: int, rate: int, bandwidth: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels))
        self.affine = EqualLinear(w_dim, 4)
        self.register_buffer("transform", torch.empty(3, 3))
        self.register_buffer("freqs", torch.empty(channels, 2))
        self.register_buffer("phases", torch.empty(channels))
        self.size, self.rate, self.bandwidth = size, rate, bandwidth

    def forward(self, w: Tensor) -> Tensor:  # B x w_dim -> B x C x size x size
        if len(w) == 0:
            return w.new_empty(0, len(self.phases), self.size, self.size)
        return torch.cat([self._of_one(row) for row in w])  # each rounded alike, whatever the batch

    def _of_one(self, w: Tensor) -> Tensor:  # w_dim -> 1 x C x size x size
        cosine, sine, x, y = self.affine(w.double()[None])[0]
        length = torch.hypot(cosine, sine)
        cosine, sine, x, y = cosine / length, sine / length, x / length, y / length
        turned = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])  # 2 x 2
        rest = self.transform.double()
        moved = torch.cat([rest[:2, :2], rest[:2, 2:] - torch.stack([x, y])[:, None] * rest[2, 2]], 1)  # 2 x 3
        matrix = turned @ moved
        waves = self.freqs.double() @ matrix[:, :2]  # C x 2
        phases = self.phases.double() + self.freqs.double() @ matrix[:, 2]  # C
        beyond = (waves.norm(dim=1) - self.bandwidth) / (self.rate / 2 - self.bandwidth)
        at = (torch.arange(self.size, dtype=torch.float64, device=w.device) + 0.5 - self.size / 2) / self.rate
        rows, columns = at[:, None, None] * waves[:, 1], at[:, None] * waves[:, 0]  # size x 1 x C, size x C
        turns = rows + columns + phases  # size x size x C
        # Whole turns are taken off in float64: the sine of what is left is exact in float32.
        features = torch.sin((turns - turns.round()).to(w.dtype) * (2 * math.pi)) * (1 - beyond).clamp(0, 1).to(w.dtype)
        return (features @ self.weight.t() / math.sqrt(len(self.phases))).permute(2, 0, 1)[None]


class FilteredConv(nn.Module):
    """The weights of one layer; magnitude_ema is the mean square of its input, which training measured."""

    def __init__(self, shape: StyleGAN3LayerShape, w_dim: int, clamp: float | None):
        super().__init__()
        o, i, k = shape.weight
        self.weight = nn.Parameter(torch.empty(o, i, k, k))
        self.bias = nn.Parameter(torch.empty(o))
        self.affine = EqualLinear(w_dim, i)
        self.register_buffer("magnitude_ema", torch.empty(()))
        for name, size in (("up_filter", shape.up_filter), ("down_filter", shape.down_filter)):
            self.register_buffer(name, None if size is None else torch.empty(size))
        self.shape, self.clamp = shape, clamp
        self.scale = 1 / math.sqrt(i * k * k)

    def style(self, w: Tensor) -> Tensor:
        """w: B x w_dim -> B x I with a mean square of 1, in float64.

        The published code takes the mean over the batch: demodulation divides it out again, but for its epsilon.
        """
        style = self.affine(w.double())
        return style * torch.rsqrt(style.square().mean(1, keepdim=True))

    def activated(self, x: Tensor) -> Tensor:  # B x O x H x W, with the bias -> B x O x out_size x out_size
        s = self.shape
        return filtered_lrelu(
            x, self.up_filter, self.down_filter, up=s.up, down=s.down, padding=s.padding,
            slope=SLOPE, gain=GAIN, clamp=self.clamp,
        )  # fmt: skip


class StyleGAN3(StyleBased):
    """Layers layer2 (on the Fourier features, which are layer1), layer3, ...; the colours follow the last of them."""

    family = "stylegan3"
    precisions = tuple(PRECISIONS)

    def __init__(self, shape: StyleGAN3Shape):
        super().__init__(shape.mapping, shape.labels)
        first, rate = shape.layers[0], shape.input_rate
        self.image_channels = shape.rgb.weight[0]
        self.image_size = shape.rgb.out_size
        self.output_scale = shape.output_scale
        self.input = FourierFeatures(first.weight[1], self.w_dim, first.in_size, rate, shape.bandwidth)
        self.convs = nn.ModuleList()
        for n, layer in enumerate(shape.layers):
            o, i, k = layer.weight
            conv = FilteredConv(layer, self.w_dim, shape.clamp[n])
            self.convs.append(conv)
            name, size = f"layer{n + 2}", layer.in_size + k - 1
            self._layers[name] = EditableLayer(
                name, size, layer.in_size, i, o, k, False, conv,
                margin=(size - rate) // 2, key_margin=(layer.in_size - rate) // 2,
            )  # fmt: skip
            rate = rate * layer.up // layer.down
        self.to_rgb = FilteredConv(shape.rgb, self.w_dim, shape.clamp[-1])
        self.requires_grad_(False).eval()

    @property
    def num_ws(self) -> int:
        """How many styles W+ has: one for the Fourier features, one for each layer, and one for the colours."""
        return len(self._layers) + 2

    def file_state(self) -> dict[str, Tensor]:
        from pyrewrite.generators.loading.stylegan3 import file_name

        return {file_name(self, name): tensor for name, tensor in super().file_state().items()}

    def file_settings(self) -> dict[str, float]:
        from pyrewrite.generators.loading.stylegan3 import file_settings

        return file_settings(self)

    # -- layers ------------------------------------------------------

    def _begin_w(self, w: Tensor, render: bool) -> tuple[Tensor, Tensor]:
        return self.input(style_number(w, 0)), w

    def _key(self, index: int, x: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        conv = self.convs[index]
        style = conv.style(style_number(carry, index + 1))  # B x I
        gained = (style * torch.rsqrt(conv.magnitude_ema.double())).to(x.dtype)
        return x * gained[:, :, None, None], style.to(self.dtype)

    def _value(self, index: int, key: Tensor, style: Tensor) -> Tensor:
        conv = self.convs[index]
        energy = conv.weight.square().sum((2, 3)).double()  # O x I
        norm = style.double().square() @ energy.t() * conv.scale**2
        demodulation = torch.rsqrt(norm + EPSILON).to(key.dtype)  # B x O
        x = F.conv2d(key, (conv.weight * conv.scale).to(key.dtype), padding=conv.weight.shape[-1] - 1)
        return x * demodulation[:, :, None, None] + conv.bias.to(key.dtype)[:, None, None]

    def _advance(self, index: int, value: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return self.convs[index].activated(value), carry

    def _image(self, x: Tensor, carry: Tensor) -> Tensor:
        rgb = self.to_rgb
        gain = torch.rsqrt(rgb.magnitude_ema.double()) / math.sqrt(rgb.weight.shape[1])
        style = (rgb.affine(style_number(carry, self.num_ws - 1).double()) * gain).to(self.dtype)  # B x I
        matrix = (rgb.weight[:, :, 0, 0] * style[:, None]).to(x.dtype)  # B x C x I
        image = torch.bmm(matrix, x.flatten(2)).unflatten(2, x.shape[2:]) + rgb.bias[:, None, None]
        if rgb.clamp is not None:
            image = image.clamp(-rgb.clamp, rgb.clamp)
        return image * self.output_scale

    def _one_by_one(self, index: int) -> bool:
        return self.device.type == "cpu"  # maps outweigh weights from the first layer on

    def _one_of(self, carry: Tensor, row: int) -> Tensor:
        return carry[row : row + 1]

    def _joined(self, carries: list[Tensor]) -> Tensor:
        return torch.cat(carries)

    def mean_style(self, layer: str | EditableLayer) -> Tensor:
        """I: the style of the layer at the mean latent."""
        with torch.no_grad():
            return self.find_layer(layer).conv.style(self.latent_avg[None])[0].to(self.dtype)

    def conv_layer(self, layer: str | EditableLayer) -> ConvLayer:
        from pyrewrite.ops.insertion import ConvLayer

        conv = self.find_layer(layer).conv
        return ConvLayer(
            weight=conv.weight.detach(),
            scale=conv.scale,
            demodulate=True,
            bias=conv.bias.detach(),
            padding=conv.weight.shape[-1] - 1,
        )
