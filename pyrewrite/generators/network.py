"""What every network with editable layers offers: named layers, their activations, and results from replaced ones."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyrewrite._memory import free_memory
from pyrewrite.errors import UnknownLayerError

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import ConvLayer


@dataclass(frozen=True)
class Activation:
    """One layer's input and output for a batch, with what it takes to go on from there.

    key    B x I x h x w, the input of the convolution
           (StyleGAN2 and 3: after modulation; ProGAN: after PixelNorm and up-sampling)
    value  B x O x H x W, the output
           (StyleGAN2: after demodulation, blur, noise, bias and leaky ReLU; StyleGAN3: after demodulation and bias,
           before the filtered leaky ReLU; ProGAN: the bare convolution)
    style  B x I, or None where the family has no modulation
    noise  H x W, already times the noise strength, the same for every image; None where the family has no noise
    carry  what else flows past the layer; only `Generator.finish` of the same generator knows what it is
    margin, key_margin  pixels of the value and of the key map around the picture, on every side: see EditableLayer
    """

    key: Tensor
    value: Tensor
    style: Tensor | None
    noise: Tensor | None
    carry: Any
    margin: int = 0
    key_margin: int = 0

    def shown(self) -> tuple[slice, slice]:
        """Rows and columns of the key map that the picture shows: without the margin."""
        return tuple(slice(self.key_margin, n - self.key_margin) for n in self.key.shape[2:])


@dataclass(frozen=True, eq=False)
class EditableLayer:
    """A convolution of a generator under its public name.

    resolution is the height of the value map, key_resolution that of the key map; key_size its height and width where
    it is not square. upsample: the convolution itself
    doubles the resolution (StyleGAN2, odd layers). conv is the module that holds the weight.
    margin, key_margin: pixels around the picture, on every side of the value map and of the key map (StyleGAN3).
    """

    name: str
    resolution: int
    key_resolution: int
    in_channels: int
    out_channels: int
    kernel_size: int
    upsample: bool
    conv: nn.Module
    key_size: tuple[int, int] | None = None
    margin: int = 0
    key_margin: int = 0

    @property
    def weight(self) -> nn.Parameter:
        """Where the weight lives: 1 x O x I x k x k (StyleGAN2) or O x I x k x k (ProGAN). Change it in place."""
        return self.conv.weight

    def __repr__(self) -> str:
        up = ", upsample" if self.upsample else ""
        k, r = self.kernel_size, self.resolution
        return f"EditableLayer({self.name}: {self.in_channels} -> {self.out_channels}, {k}x{k}, at {r}x{r}{up})"


class Layers(dict):
    """Editable layers by name, in the order in which they run."""

    def at(self, index: int) -> EditableLayer:
        """Layer number `index`, the first is 0."""
        return next(islice(self.values(), index, None))

    def __missing__(self, name: object) -> EditableLayer:
        raise UnknownLayerError(f"there is no layer {name!r}; this generator has {', '.join(self)}")


class EditableNetwork(nn.Module, abc.ABC):
    """A network with named, editable layers: what statistics, solvers and patches work on.

    family      what kind of network it is; part of what a patch says of its network
    image_size  height and width of the pictures that masks are painted on
    layers      name -> EditableLayer, in order
    truncation  1 where there is no intermediate latent to truncate
    notes       what was decided while loading, for `info`
    patches     the patches applied to the weights; belongs to `pyrewrite.rewriting`
    """

    family: str
    image_size: int

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.patches: Any = None
        self._layers = Layers()
        self._hash: tuple[tuple, str] | None = None

    @abc.abstractmethod
    def latents(self, numbers: int | Iterable[int], seed: int = 1) -> Tensor:
        """The inputs of numbered images, a batch, on the network's device. Number n is always the same input."""

    @abc.abstractmethod
    def keys(self, layer: str | EditableLayer, z: Tensor) -> Tensor:
        """The key maps (B x I x h x w) of a layer. Runs the layers before it and nothing else."""

    @abc.abstractmethod
    def capture(self, layer: str | EditableLayer, z: Tensor) -> Activation:
        """The layer's key, value, style and noise for the latents z, and what `finish` needs. Stops after the layer."""

    @abc.abstractmethod
    def value(self, layer: str | EditableLayer, activation: Activation) -> Tensor:
        """The layer's value (B x O x H x W) from the captured key, with the layer's weights as they are now."""

    @abc.abstractmethod
    def finish(self, layer: str | EditableLayer, activation: Activation, value: Tensor | None = None) -> Any:
        """What the network makes of the layer's value (B x O x H x W; None: as captured)."""

    @abc.abstractmethod
    def conv_layer(self, layer: str | EditableLayer) -> ConvLayer:
        """What the layer computes, with its current weight: a view, no copy."""

    @abc.abstractmethod
    def mean_style(self, layer: str | EditableLayer) -> Tensor | None:
        """The style (I) of the layer at the mean latent; None where the family has no modulation."""

    # -- layers ------------------------------------------------------

    @property
    def layers(self) -> Layers:
        return self._layers

    def find_layer(self, layer: str | EditableLayer) -> EditableLayer:
        """The layer of that name, or UnknownLayerError (a KeyError and ValueError), which lists the names."""
        return self._layers[layer.name if isinstance(layer, EditableLayer) else layer]

    def _index(self, layer: str | EditableLayer) -> int:
        return list(self._layers).index(self.find_layer(layer).name)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def truncation(self) -> float:
        return 1.0

    @truncation.setter
    def truncation(self, value: float) -> None:
        if value != 1:
            raise ValueError(f"a {self.family} has no intermediate latent to truncate: truncation is 1, got {value}")

    def settings(self) -> dict[str, Any]:
        """What else than weights, latents and truncation decides the images; only what is not the default."""
        return {}

    def has_settings(self, settings: Mapping[str, Any]) -> bool:
        """Whether these, as an edit record keeps them, are the settings here; what they do not say is the default."""
        return dict(settings) == self.settings()

    def batch_size(self) -> int:
        """How many images to run at once: what a part of the free memory holds, several maps of each alive."""
        sizes = [
            32 * (layer.in_channels * layer.key_resolution**2 + layer.out_channels * layer.resolution**2)
            for layer in self._layers.values()
        ]
        most = 16 if self.device.type == "cpu" else 32
        return max(1, min(most, free_memory(self.device) // 4 // max([1, *sizes])))

    def value_bound(self, layer: str | EditableLayer) -> float | None:
        """What the layer's values are clamped to, on both sides of 0, after what the solvers compute; None: nothing."""
        self.find_layer(layer)
        return None

    # -- identity ----------------------------------------------------

    def weights_hash(self) -> str:
        """sha256 (hex) over the names, shapes, types and bytes of all weights and buffers; another after every edit.

        The result is kept while the version counters and the sums of all tensors stay what they were: an edit through
        `.data` moves no counter.
        """
        named = [*self.named_parameters(), *self.named_buffers()]
        sums = torch.stack([tensor.detach().sum(dtype=torch.float64) for _, tensor in named]).tolist()
        seen = tuple((name, t.data_ptr(), t._version, total) for (name, t), total in zip(named, sums, strict=True))
        if self._hash is None or self._hash[0] != seen:
            digest = hashlib.sha256()
            for name, tensor in sorted(named, key=lambda pair: pair[0]):
                tensor = tensor.detach().cpu().contiguous()
                digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
                digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            self._hash = (seen, digest.hexdigest())
        return self._hash[1]
