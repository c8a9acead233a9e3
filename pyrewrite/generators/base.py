"""What every generator offers: named editable layers, the activations at one of them, and images from replaced activations."""

from __future__ import annotations

import abc
import hashlib
import numbers as number_types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyrewrite.errors import UnknownLayerError

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import ConvLayer

# Image number n needs the first (n + 1) * z_dim draws of the random stream; beyond this a typing error would run for minutes.
MAX_NUMBER = 1_000_000
_ROWS_PER_DRAW = 4096


@dataclass(frozen=True)
class Activation:
    """One layer's input and output for a batch, with what it takes to go on from there.

    key    B x I x h x w, the input of the convolution (StyleGAN2: after modulation; ProGAN: after PixelNorm and up-sampling)
    value  B x O x H x W, the output (StyleGAN2: after demodulation, blur, noise, bias and leaky ReLU; ProGAN: of the convolution)
    style  B x I, or None where the family has no modulation
    noise  H x W, already times the noise strength, the same for every image; None where the family has no noise
    carry  what else flows past the layer; only `Generator.finish` of the same generator knows what it is
    """

    key: Tensor
    value: Tensor
    style: Tensor | None
    noise: Tensor | None
    carry: Any


@dataclass(frozen=True, eq=False)
class EditableLayer:
    """A convolution of a generator under its public name.

    resolution is the height of the value map, key_resolution that of the key map. upsample: the convolution itself doubles the resolution
    (StyleGAN2, odd layers). conv is the module that holds the weight.
    """

    name: str
    resolution: int
    key_resolution: int
    in_channels: int
    out_channels: int
    kernel_size: int
    upsample: bool
    conv: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The only place where the weight lives: 1 x O x I x k x k (StyleGAN2) or O x I x k x k (ProGAN). Change it in place."""
        return self.conv.weight

    def __repr__(self) -> str:
        up = ", upsample" if self.upsample else ""
        channels = f"{self.in_channels} -> {self.out_channels}"
        return f"EditableLayer({self.name}: {channels}, {self.kernel_size}x{self.kernel_size}, {self.resolution}x{self.resolution}{up})"


class Layers(dict):
    """Editable layers by name, in the order in which they run."""

    def __missing__(self, name: object) -> EditableLayer:
        raise UnknownLayerError(f"there is no layer {name!r}; this generator has {', '.join(self)}")


def _image_numbers(numbers: int | Iterable[int]) -> list[int]:
    if isinstance(numbers, number_types.Integral):
        numbers = [numbers]
    if isinstance(numbers, (Tensor, np.ndarray)):
        numbers = numbers.tolist() if numbers.ndim else [numbers.item()]
    checked = []
    for n in numbers:
        if isinstance(n, (bool, np.bool_)) or not isinstance(n, number_types.Integral):
            raise TypeError(f"image numbers are integers, got {n!r} ({type(n).__name__})")
        if not 0 <= n <= MAX_NUMBER:
            raise ValueError(f"image number {n} is out of range: 0 to {MAX_NUMBER}")
        checked.append(int(n))
    return checked


def numbered_latents(numbers: int | Iterable[int], z_dim: int, seed: int = 1) -> Tensor:
    """The latents of numbered images, B x z_dim, float32, on the CPU.

    Row n is row n of `numpy.random.RandomState(seed).standard_normal((size, z_dim))` cut to float32, whatever the size, as in the official
    tool (utils/zdataset.py): image number n is the same picture for everyone.

    Raises TypeError for numbers that are not integers, ValueError for one below 0 or above MAX_NUMBER.
    """
    wanted = _image_numbers(numbers)
    rows = np.empty((len(wanted), z_dim), np.float32)
    order = np.argsort(wanted, kind="stable")
    sorted_numbers = np.asarray(wanted, np.int64)[order]
    stream = np.random.RandomState(seed)  # noqa: NPY002 - this very stream is the definition
    last = int(sorted_numbers[-1]) if wanted else -1
    for first in range(0, last + 1, _ROWS_PER_DRAW):
        draw = stream.standard_normal((min(_ROWS_PER_DRAW, last + 1 - first), z_dim))
        begin, end = np.searchsorted(sorted_numbers, [first, first + len(draw)])
        rows[order[begin:end]] = draw[sorted_numbers[begin:end] - first]
    return torch.from_numpy(rows)


class Generator(nn.Module, abc.ABC):
    """A pretrained generator as a sequence of named, editable layers.

    family      "stylegan2" or "progan"
    z_dim       length of a latent
    image_size  height and width of the images
    layers      name -> EditableLayer, in order
    truncation  w is pulled towards the mean latent: w_mean + truncation * (w - w_mean); 1 is off
    notes       what was decided while loading, for `info`
    patches     the patches applied to the weights; belongs to `pyrewrite.rewriting`
    """

    family: str
    z_dim: int
    image_size: int
    image_channels: int

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.patches: Any = None
        self._layers = Layers()
        self._hash: tuple[tuple, str] | None = None

    # -- what a family defines -------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _begin(self, z: Tensor, render: bool) -> tuple[Tensor, Any]:
        """z (B x z_dim) -> the input of the first layer and the carry. render: whether an image will be asked for."""

    @abc.abstractmethod
    def _key(self, index: int, x: Tensor, carry: Any) -> tuple[Tensor, Tensor | None]:
        """The key map and the style of layer number `index` from its input; may not change x."""

    @abc.abstractmethod
    def _value(self, index: int, key: Tensor, style: Tensor | None) -> Tensor:
        """The value map from the key map; may not change the key."""

    @abc.abstractmethod
    def _advance(self, index: int, value: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """The input of the next layer and the new carry; may not change the value."""

    @abc.abstractmethod
    def _image(self, x: Tensor, carry: Any) -> Tensor:
        """The image, not yet clamped, after the last layer."""

    def _noise(self, index: int) -> Tensor | None:
        """H x W, times the noise strength."""
        return None

    @abc.abstractmethod
    def conv_layer(self, layer: str | EditableLayer) -> ConvLayer:
        """What the layer computes, with its current weight: a view, no copy."""

    @abc.abstractmethod
    def mean_style(self, layer: str | EditableLayer) -> Tensor | None:
        """The style (I) of the layer at the mean latent; None where the family has no modulation."""

    # -- layers and latents ----------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> Layers:
        return self._layers

    def find_layer(self, layer: str | EditableLayer) -> EditableLayer:
        """The layer of that name. Raises UnknownLayerError (a KeyError and a ValueError), which lists the names there are."""
        return self._layers[layer.name if isinstance(layer, EditableLayer) else layer]

    def _index(self, layer: str | EditableLayer) -> int:
        return list(self._layers).index(self.find_layer(layer).name)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def latents(self, numbers: int | Iterable[int], seed: int = 1) -> Tensor:
        """The latents of numbered images, B x z_dim, float32, on the generator's device. See `numbered_latents`."""
        return numbered_latents(numbers, self.z_dim, seed).to(self.device)

    def _checked_latents(self, z: Tensor) -> Tensor:
        if not isinstance(z, Tensor):
            raise TypeError(f"latents are a tensor of B x {self.z_dim} numbers, got {type(z).__name__}")
        if z.ndim == 4 and z.shape[2:] == (1, 1):  # the official tool's ProGAN latents
            z = z[:, :, 0, 0]
        if z.ndim != 2 or z.shape[1] != self.z_dim or not z.is_floating_point():
            raise ValueError(f"latents are B x {self.z_dim} floating point numbers, got {tuple(z.shape)} of {z.dtype}")
        return z.to(self.device, self.dtype)

    # -- running ---------------------------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor) -> Tensor:
        """Images (B x 3 x H x W in [-1, 1]; one channel for a grey generator) of the latents z (B x z_dim)."""
        return self._render(self._checked_latents(z))

    def _render(self, z: Tensor) -> Tensor:
        x, carry = self._begin(z, render=True)
        return self._render_from(0, x, carry)

    def _render_from(self, index: int, x: Tensor, carry: Any) -> Tensor:
        for i in range(index, len(self._layers)):
            key, style = self._key(i, x, carry)
            x, carry = self._advance(i, self._value(i, key, style), carry)
        return self._image(x, carry).clamp(-1, 1)

    def _run_to(self, index: int, z: Tensor, render: bool) -> tuple[Tensor, Tensor | None, Any]:
        x, carry = self._begin(self._checked_latents(z), render)
        for i in range(index):
            key, style = self._key(i, x, carry)
            x, carry = self._advance(i, self._value(i, key, style), carry)
        return *self._key(index, x, carry), carry

    def keys(self, layer: str | EditableLayer, z: Tensor) -> Tensor:
        """The key maps (B x I x h x w) of a layer. Runs the layers before it and nothing else."""
        return self._run_to(self._index(layer), z, render=False)[0]

    def capture(self, layer: str | EditableLayer, z: Tensor) -> Activation:
        """The layer's key, value, style and noise for the latents z, with what `finish` needs to go on. Stops after the layer."""
        index = self._index(layer)
        key, style, carry = self._run_to(index, z, render=True)
        return Activation(key, self._value(index, key, style), style, self._noise(index), carry)

    def finish(self, layer: str | EditableLayer, activation: Activation, value: Tensor | None = None) -> Tensor:
        """Images (B x 3 x H x W in [-1, 1]) that follow when the layer's value is `value` (B x O x H x W; None: as captured).

        Raises ValueError when value has another shape than the captured one.
        """
        index = self._index(layer)
        if value is None:
            value = activation.value
        elif value.shape != activation.value.shape:
            expected = tuple(activation.value.shape)
            raise ValueError(f"the value of {self.find_layer(layer).name} is {expected}, got {tuple(value.shape)}")
        x, carry = self._advance(index, value.to(activation.value), activation.carry)
        return self._render_from(index + 1, x, carry)

    def images(self, numbers: int | Iterable[int], seed: int = 1, batch_size: int | None = None) -> Tensor:
        """The numbered images, B x 3 x H x W in [-1, 1], on the generator's device, rendered in batches without gradients.

        batch_size: how many at once; by default what fits the machine's caches. It does not change the images.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        z = self.latents(numbers, seed)
        step = batch_size or self._batch_size()
        out = torch.empty(
            len(z), self.image_channels, self.image_size, self.image_size, dtype=self.dtype, device=self.device
        )
        with torch.no_grad():
            for first in range(0, len(z), step):
                out[first : first + step] = self(z[first : first + step])
        return out

    def _batch_size(self) -> int:
        return 8 if self.device.type == "cpu" else 32

    # -- identity --------------------------------------------------------------------------------------------------------------------

    def weights_hash(self) -> str:
        """sha256 (hex) over the names, shapes, types and bytes of all weights and buffers; another one after every edit.

        The result is kept until a tensor's version counter moves: an edit through `.data` does not move it, one with copy_ or add_ does.
        """
        state = self.state_dict()
        seen = tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in self._named_tensors())
        if self._hash is None or self._hash[0] != seen:
            digest = hashlib.sha256()
            for name in sorted(state):
                tensor = state[name].detach().cpu().contiguous()
                digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
                digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            self._hash = (seen, digest.hexdigest())
        return self._hash[1]

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.named_parameters(), *self.named_buffers()]
