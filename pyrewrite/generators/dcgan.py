"""DCGAN (Radford et al., "Unsupervised Representation Learning with Deep Convolutional GANs", ICLR 2016).

As the PyTorch tutorial writes it: transposed convolutions, the first of stride 1 on the latent and the others of stride
2, each but the last followed by batch norm and ReLU, the last by tanh. Batch norm uses the statistics that training
left, so that a picture does not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrewrite.generators.base import PRECISIONS, EditableLayer, Generator, batch_independent

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import ConvLayer

EPSILON = 1e-5


class Conv(nn.Module):
    """Weight O x I x k x k. That of the first layer is turned round: on a latent of one pixel it is a convolution."""

    def __init__(self, o: int, i: int, k: int, biased: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(o, i, k, k))
        self.bias = nn.Parameter(torch.empty(o)) if biased else None


class Norm(nn.Module):
    """Batch norm with fixed statistics."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON)


class Block(nn.Module):
    def __init__(self, o: int, i: int, k: int, biased: bool, last: bool):
        super().__init__()
        self.conv = Conv(o, i, k, biased)
        if not last:
            self.norm = Norm(o)


@dataclass(frozen=True)
class DCGANShape:
    """(out, in, kernel size, whether it has a bias) of each transposed convolution."""

    convs: tuple[tuple[int, int, int, bool], ...]


class DCGAN(Generator):
    """Layers layer1 (the latent), layer2 (doubles the resolution), ...; the last one makes the colours."""

    family = "dcgan"
    precisions = tuple(PRECISIONS)

    def __init__(self, shape: DCGANShape):
        super().__init__()
        self.z_dim = shape.convs[0][1]
        self.image_channels = shape.convs[-1][0]
        resolution = 1
        for n, (o, i, k, biased) in enumerate(shape.convs):
            name = f"layer{n + 1}"
            block = Block(o, i, k, biased, last=n == len(shape.convs) - 1)
            self.add_module(name, block)
            before, resolution = resolution, 2 * resolution if n else k
            self._layers[name] = EditableLayer(name, resolution, before, i, o, k, n > 0, block.conv)
        self.image_size = resolution
        self.requires_grad_(False).eval()

    def _block(self, index: int) -> Block:
        return getattr(self, f"layer{index + 1}")

    def _begin(self, z: Tensor, render: bool) -> tuple[Tensor, None]:
        return z[:, :, None, None], None

    def _key(self, index: int, x: Tensor, carry: None) -> tuple[Tensor, None]:
        return x.contiguous(memory_format=torch.channels_last), None

    def _value(self, index: int, key: Tensor, style: None) -> Tensor:
        if self._one_by_one(index):
            return self._convolved(index, key)
        return batch_independent(lambda x: self._convolved(index, x), key)

    def _convolved(self, index: int, x: Tensor) -> Tensor:
        """x: B x I x h x w -> B x O x 2h x 2w (the first layer: k x k)."""
        conv = self._block(index).conv
        k, weight = conv.weight.shape[-1], conv.weight.to(x.dtype)
        bias = None if conv.bias is None else conv.bias.to(x.dtype)
        if index == 0:
            return F.conv2d(x, weight, bias, padding=k - 1)
        return F.conv_transpose2d(x, weight.transpose(0, 1), bias, stride=2, padding=(k - 2) // 2)

    def _advance(self, index: int, value: Tensor, carry: None) -> tuple[Tensor, None]:
        if index == len(self._layers) - 1:
            return value, None
        return F.relu(self._block(index).norm(value.to(self.dtype))).to(value.dtype), None

    def _image(self, x: Tensor, carry: None) -> Tensor:
        return torch.tanh(x)

    def mean_style(self, layer: str | EditableLayer) -> None:
        self.find_layer(layer)

    def conv_layer(self, layer: str | EditableLayer) -> ConvLayer:
        from pyrewrite.ops.insertion import ConvLayer

        layer = self.find_layer(layer)
        weight, bias = layer.weight.detach(), layer.conv.bias
        return ConvLayer(
            weight=weight,
            # An up-sampling layer has a filter after it; this one leaves all as it is.
            blur=weight.new_ones(1, 1) if layer.upsample else None,
            bias=None if bias is None else bias.detach(),
            padding=None if layer.upsample else layer.kernel_size - 1,
        )

    def file_state(self) -> dict[str, Tensor]:
        """The weights under the names of the tutorial: main.0.weight (I x O x k x k), main.1.running_mean, ..."""
        state = {}
        for n in range(len(self._layers)):
            block = self._block(n)
            weight = block.conv.weight.detach().transpose(0, 1)
            state[f"main.{3 * n}.weight"] = weight.flip(2, 3) if n == 0 else weight
            if block.conv.bias is not None:
                state[f"main.{3 * n}.bias"] = block.conv.bias.detach()
            if hasattr(block, "norm"):
                state.update({f"main.{3 * n + 1}.{name}": t for name, t in block.norm.state_dict().items()})
        return state
