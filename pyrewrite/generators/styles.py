"""What generators with a mapping network have in common: latents, W, W+, truncation, style mixing, class labels.

Karras et al., "A Style-Based Generator Architecture for Generative Adversarial Networks", CVPR 2019.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrewrite.generators.base import Activation, EditableLayer, Generator, numbered_latents
from pyrewrite.ops.modulation import wide_linear

# The learning rate multiplier of the mapping network is part of the published model, not of its weights.
MAPPING_RATE = 0.01
SLOPE = 0.2
GAIN = math.sqrt(2)
EPSILON = 1e-8
MEAN_SAMPLES = 4096


class EqualLinear(nn.Module):
    """x -> x W^T rate / sqrt(fan in) + rate * bias, then leaky ReLU * sqrt 2 if activated."""

    def __init__(self, fan_in: int, fan_out: int, rate: float = 1.0, activated: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(fan_out))
        self.scale, self.rate, self.activated = rate / math.sqrt(fan_in), rate, activated

    def forward(self, x: Tensor) -> Tensor:  # B x fan_in -> B x fan_out
        y = F.linear(x * self.scale, self.weight.to(x.dtype), self.bias.to(x.dtype) * self.rate)
        return F.leaky_relu(y, SLOPE) * GAIN if self.activated else y

    def style(self, w: Tensor) -> Tensor:
        """w: B x fan_in -> B x fan_out, in float64 inside, so that the rounding does not depend on B; not activated."""
        return wide_linear(w, self.weight, self.bias, self.scale, self.rate)


def style_number(w: Tensor, n: int) -> Tensor:
    """w: B x w_dim, the same everywhere, or B x num_ws x w_dim -> B x w_dim"""
    return w if w.ndim == 2 else w[:, n]


def normalised(x: Tensor) -> Tensor:  # B x C, to a mean square of 1 in each row
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPSILON)


class LabelTable(nn.Module):
    """A row for each class."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))


class StyleBased(Generator):
    """A generator whose layers take their styles from w, which a mapping network makes of z.

    mapping  widths of the mapping network: z (and the embedded label after it), hidden ..., w
    labels   number of classes and width of their embedding; None for a generator without
    joined   whether the embedding is a table whose rows are joined to z before both are normalised, as in the first
             code of StyleGAN2; otherwise it is a linear layer that is normalised alone, as in StyleGAN2-ADA and later
    """

    def __init__(self, mapping: tuple[int, ...], labels: tuple[int, int] | None, joined: bool = False) -> None:
        super().__init__()
        self.z_dim, self.w_dim = mapping[0], mapping[-1]
        self.embed = self.label_concat = None
        if labels is not None:
            self.classes, embedding = labels
            if joined:
                self.label_concat = LabelTable(self.classes, embedding)
            else:
                self.embed = EqualLinear(self.classes, embedding)
            self.z_dim -= embedding
            self._label = 0
        # style.0 is the normalisation, which has no weights; the names begin at style.1.
        layers = [EqualLinear(a, b, MAPPING_RATE, activated=True) for a, b in pairwise(mapping)]
        self.style = nn.ModuleList([nn.Identity(), *layers])
        self.register_buffer("latent_avg", torch.empty(self.w_dim))
        self._truncation, self._truncation_layers = 1.0, None

    @abc.abstractmethod
    def _begin_w(self, w: Tensor, render: bool) -> tuple[Tensor, Any]:
        """`_begin` from w, B x w_dim or B x num_ws x w_dim."""

    def _begin(self, z: Tensor, render: bool) -> tuple[Tensor, Any]:
        return self._begin_w(self.truncated(self.mapped(z)), render)

    @property
    def truncation(self) -> float:
        return self._truncation

    @truncation.setter
    def truncation(self, value: float) -> None:
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"truncation is a finite number, got {value}")
        self._truncation = value

    def mapped(self, z: Tensor) -> Tensor:
        """z: B x z_dim -> w: B x w_dim, before truncation; of the class `label` where the generator has classes.

        In float64: the mapping is a small part of the work, and its rounding is the largest error in the images.
        """
        z, dtype = z.double(), z.dtype
        if self.label_concat is not None:
            z = torch.cat([z, self.label_concat.weight[self._label].double().expand(len(z), -1)], 1)
        w = normalised(z)
        if self.embed is not None:
            one_hot = F.one_hot(torch.tensor([self._label], device=z.device), self.classes)  # 1 x classes
            label = normalised(self.embed(one_hot.double()))  # 1 x embedding
            w = torch.cat([w, label.expand(len(w), -1)], 1)
        for layer in self.style[1:]:
            w = layer(w)
        return w.to(dtype)

    @property
    def num_ws(self) -> int:
        """How many styles W+ has: one for each layer and one more for the last colours.

        Layer number n takes style n, the colours after it style n + 1, as in rosinality's and NVIDIA's code.
        """
        return len(self._layers) + 1

    @property
    def truncation_layers(self) -> int | None:
        """Only the first so many styles are truncated; None: all of them."""
        return self._truncation_layers

    @truncation_layers.setter
    def truncation_layers(self, value: int | None) -> None:
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= self.num_ws
        ):
            raise ValueError(f"truncation_layers is a number of styles from 0 to {self.num_ws} or None, got {value!r}")
        self._truncation_layers = value

    def settings(self) -> dict[str, Any]:
        mine = super().settings()
        if self._truncation_layers is not None and self._truncation != 1:
            mine["truncation_layers"] = self._truncation_layers
        return mine

    def _setting_defaults(self) -> dict[str, tuple[str, Any]]:
        return super()._setting_defaults() | {"truncation_layers": ("truncation_layers", None)}

    def truncated(self, w: Tensor) -> Tensor:
        """w: B x w_dim -> the same, or B x num_ws x w_dim where only some styles are truncated."""
        if self._truncation == 1:
            return w
        near = torch.lerp(self.latent_avg, w, self._truncation)
        if self._truncation_layers is None:
            return near
        return self._cut(near, w, self._truncation_layers)

    def _cut(self, first: Tensor, rest: Tensor, count: int) -> Tensor:
        """B x num_ws x w_dim: `count` styles of one w (B x w_dim), then those of another."""
        return torch.stack([first if n < count else rest for n in range(self.num_ws)], 1)

    def mixed(self, z: Tensor, other: Tensor, layers: int) -> Tensor:
        """W+ (B x num_ws x w_dim, truncated) of style mixing: the first `layers` styles of z, the others of `other`.

        z, other: B x z_dim; either may be a batch of one. ValueError for layers outside 0 to num_ws.
        """
        if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= self.num_ws:
            raise ValueError(f"layers is a number of styles from 0 to {self.num_ws}, got {layers!r}")
        ws = [self._spread(self.truncated(self.mapped(self._checked_latents(latent)))) for latent in (z, other)]
        first, rest = torch.broadcast_tensors(*ws)
        return torch.cat([first[:, :layers], rest[:, layers:]], 1)

    def _spread(self, w: Tensor) -> Tensor:
        """B x w_dim or B x num_ws x w_dim -> B x num_ws x w_dim"""
        return w if w.ndim == 3 else w[:, None].expand(-1, self.num_ws, -1)

    def _checked_w(self, w: Tensor) -> Tensor:
        shapes = f"B x {self.w_dim} (W) or B x {self.num_ws} x {self.w_dim} (W+)"
        if not isinstance(w, Tensor):
            raise TypeError(f"w is a tensor of {shapes}, got {type(w).__name__}")
        if not w.is_floating_point() or tuple(w.shape[1:]) not in ((self.w_dim,), (self.num_ws, self.w_dim)):
            raise ValueError(f"w is {shapes} floating point numbers, got {tuple(w.shape)} of {w.dtype}")
        return w.to(self.device, self.dtype).contiguous()

    def synthesis(self, w: Tensor) -> Tensor:
        """Images (B x 3 x H x W in [-1, 1]) of w, B x w_dim (W) or B x num_ws x w_dim (W+), as it is: not truncated."""
        return self._render(*self._begin_w(self._checked_w(w), render=True))

    def capture_w(self, layer: str | EditableLayer, w: Tensor) -> Activation:
        """`capture` for w, B x w_dim (W) or B x num_ws x w_dim (W+), as it is: not truncated."""
        return self._captured(layer, *self._begin_w(self._checked_w(w), render=True))

    def captures_w(self, w: Tensor) -> Iterator[Activation]:
        """`captures` for w, B x w_dim (W) or B x num_ws x w_dim (W+), as it is: not truncated."""
        return self._captures(*self._begin_w(self._checked_w(w), render=True))

    def estimated_mean_latent(self) -> Tensor:
        """The mean of w (w_dim) over MEAN_SAMPLES seeded latents, for files that do not hold it."""
        z = numbered_latents(range(MEAN_SAMPLES), self.z_dim, seed=0).to(self.device, self.dtype)
        with torch.no_grad():
            return self.mapped(z).mean(0)
