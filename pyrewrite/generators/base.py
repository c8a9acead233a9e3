"""What every generator offers: named editable layers, their activations, and images from replaced activations."""

from __future__ import annotations

import abc
import numbers as number_types
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite._memory import is_out_of_memory, lowered
from pyrewrite.generators.network import Activation, EditableLayer, EditableNetwork

# Image number n needs the first (n + 1) * z_dim draws of the random stream: a mistyped number must not run for hours.
MAX_NUMBER = 1_000_000
_ROWS_PER_DRAW = 4096
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def image_numbers(numbers: int | Iterable[int]) -> list[int]:
    """Checked image numbers: TypeError for what is no integer, ValueError for one below 0 or above MAX_NUMBER."""
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

    Row n is row n of `numpy.random.RandomState(seed).standard_normal((size, z_dim))` cut to float32, whatever the size,
    as in the official tool (utils/zdataset.py): image number n is the same picture for everyone.

    Raises TypeError for numbers that are not integers, ValueError for one below 0 or above MAX_NUMBER and for a seed
    that is no number of 32 bits.
    """
    wanted = image_numbers(numbers)
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed is {seed}; expected 0 to {(1 << 32) - 1}")
    rows = np.empty((len(wanted), z_dim), np.float32)
    order = np.argsort(wanted, kind="stable")
    sorted_numbers = np.asarray(wanted, np.int64)[order]
    stream = np.random.RandomState(seed)  # this very stream is the definition
    last = int(sorted_numbers[-1]) if wanted else -1
    for first in range(0, last + 1, _ROWS_PER_DRAW):
        draw = stream.standard_normal((min(_ROWS_PER_DRAW, last + 1 - first), z_dim))
        begin, end = np.searchsorted(sorted_numbers, [first, first + len(draw)])
        rows[order[begin:end]] = draw[sorted_numbers[begin:end] - first]
    return torch.from_numpy(rows)


def batch_independent(convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The convolution of x (B x C x H x W), rounded alike whatever B is.

    For a batch of one small map, oneDNN takes another algorithm than for two or more: the last bits of a picture would
    depend on its company. They depend on the order of the numbers in memory, too, which `cat` keeps.
    """
    if len(x) == 1 and x.device.type == "cpu":
        return convolution(torch.cat([x, x]))[:1]
    return convolution(x)


def side_by_side(run: Callable[[int], Any], count: int) -> list[Any]:
    """[run(0), ..., run(count - 1)], on a CPU as many at once as torch has threads, each on one of them.

    Images that run one by one are independent: that scales better than all threads at each small map, where they wait
    for each other after every operation. Under autocast, which belongs to a thread, they run in this one.
    """
    threads = min(torch.get_num_threads(), count)
    if threads < 2 or torch.is_autocast_enabled("cpu"):
        return [run(number) for number in range(count)]
    grad = torch.is_grad_enabled()  # belongs to a thread too

    def one(number: int) -> Any:
        with torch.set_grad_enabled(grad):
            return run(number)

    return list(_workers(torch.get_num_threads(), os.getpid()).map(one, range(count)))


def _on_one_thread() -> None:
    torch.get_num_threads()  # a thread's first call takes torch's default over, so it comes before the setting
    torch.set_num_threads(1)


_starting = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads on which torch runs one thread each. They are kept: torch's setting is also what threads that have yet
    to call torch begin with, so it is changed once and put back at once. process: a fork has none of the threads.
    """
    with _starting:
        if (threads, process) not in _pools:
            pool = ThreadPoolExecutor(threads, initializer=_on_one_thread)
            together = threading.Barrier(threads)
            list(pool.map(lambda _: together.wait(), range(threads)))  # all of them are there
            torch.set_num_threads(threads)
            _pools[threads, process] = pool
        return _pools[threads, process]


class Generator(EditableNetwork):
    """A pretrained generator as a sequence of named, editable layers.

    family      "stylegan2", "stylegan3", "progan" or "dcgan"
    z_dim       length of a latent
    image_size  height and width of the images
    truncation  w is pulled towards the mean latent: w_mean + truncation * (w - w_mean); 1 is off
    classes     number of class labels; 0 for a generator without
    label       the class of all images, 0 to classes - 1; None for a generator without classes
    precision   "fp32", "bf16" or "fp16": the maps of whole images; weights, keys and edits are always float32
    path        the file it was loaded from
    layout      how that file named the weights, such as "rosinality"
    """

    z_dim: int
    image_channels: int
    classes: int = 0
    precisions: tuple[str, ...] = ("fp32",)  # a family whose layers compute in the map's data type lists all
    _label: int | None = None
    _precision: str = "fp32"

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.layout: str | None = None

    # -- what a family defines ---------------------------------------

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

    # -- layers and latents ------------------------------------------

    @property
    def label(self) -> int | None:
        return self._label

    @label.setter
    def label(self, value: int | None) -> None:
        if not self.classes:
            if value is not None:
                raise ValueError(f"this generator has no class labels: label is None, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.classes:
            raise ValueError(f"label is a class number from 0 to {self.classes - 1}, got {value!r}")
        self._label = value

    @property
    def precision(self) -> str:
        """The data type of the maps between the layers of `forward`, `images` and `synthesis`.

        "bf16" and "fp16" are for looking at pictures, faster on hardware that is made for them. The weights stay as
        they are, and so does what keys, statistics and edits are computed from: keys, capture and finish.
        """
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in self.precisions:
            raise ValueError(f"precision of a {self.family} is one of {', '.join(self.precisions)}, got {value!r}")
        self._precision = value

    def settings(self) -> dict[str, Any]:
        return {"label": self._label} if self.classes else {}

    def _setting_defaults(self) -> dict[str, tuple[str, Any]]:
        """Name in `settings` -> the attribute, and its default."""
        return {"label": ("label", 0 if self.classes else None)}

    def has_settings(self, settings: Mapping[str, Any]) -> bool:
        def said(given: Mapping[str, Any]) -> dict[str, Any]:
            # Class 0 is the default, and all that a generator without classes has.
            defaults = {"label": 0} | {
                name: default for name, (_, default) in self._setting_defaults().items() if default
            }
            return {name: value for name, value in given.items() if value != defaults.get(name)}

        return said(settings) == said(self.settings())

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Set what `settings()` said, as an edit record keeps it; what it did not say is set to the default.

        ValueError for a name or a value that this generator does not know; nothing changes then.
        """
        defaults = self._setting_defaults()
        if unknown := [name for name in settings if name not in defaults]:
            raise ValueError(
                f"a {self.family} has no setting {unknown[0]!r} for its images, only {', '.join(defaults)}"
            )
        before = [(attribute, getattr(self, attribute)) for attribute, _ in defaults.values()]
        try:
            for name, (attribute, default) in defaults.items():
                setattr(self, attribute, settings.get(name, default))
        except ValueError:
            for attribute, value in before:
                setattr(self, attribute, value)
            raise

    def file_state(self) -> dict[str, Tensor]:
        """The weights as they are now, under the names that the family's files give them."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def file_settings(self) -> dict[str, float]:
        """Numbers that files keep beside the weights, under the names that the family's files give them."""
        return {}

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
        return z.to(self.device, self.dtype).contiguous()

    # -- running -----------------------------------------------------

    def forward(self, z: Tensor) -> Tensor:
        """Images (B x 3 x H x W in [-1, 1]; one channel for a grey generator) of the latents z (B x z_dim)."""
        return self._render(*self._begin(self._checked_latents(z), render=True))

    def _render(self, x: Tensor, carry: Any) -> Tensor:
        """Images from the first layer's input on, with maps of `precision`."""
        if self._precision != "fp32":
            x = x.to(PRECISIONS[self._precision], memory_format=torch.channels_last)
        return self._render_from(0, x, carry)

    def _step(self, index: int, x: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """From the input of one layer to that of the next; overridden to be faster where possible."""
        key, style = self._key(index, x, carry)
        return self._advance(index, self._value(index, key, style), carry)

    def _one_by_one(self, index: int) -> bool:
        """Whether a batch runs image by image from this layer on.

        On a CPU that is faster where the maps outweigh the weights: those of one image stay in the caches.
        """
        layer = self._layers.at(index)
        if layer.weight.device.type != "cpu":
            return False
        largest = max(layer.in_channels * layer.key_resolution**2, layer.out_channels * layer.resolution**2)
        return largest >= layer.weight.numel() // 2

    def _prepared(self, index: int, carry: Any, end: int) -> Any:
        """The carry before a batch runs image by image from this layer to before layer number `end`, with what is
        cheaper for all of them.
        """
        return carry

    def _one_of(self, carry: Any, row: int) -> Any:
        """The carry of one image of the batch, as a batch of one."""
        return carry

    def _joined(self, carries: list[Any]) -> Any:
        """The opposite of `_one_of`."""
        return carries[0]

    def _input_of(self, index: int, x: Tensor, carry: Any, start: int = 0) -> tuple[Tensor, Any]:
        """The input of layer number `index` and the carry there, from those of layer number `start`."""
        for i in range(start, index):
            if len(x) > 1 and self._one_by_one(i):
                carry = self._prepared(i, carry, index)
                run = lambda b: self._input_of(index, x[b : b + 1], self._one_of(carry, b), i)  # noqa: E731, B023
                parts = side_by_side(run, len(x))
                return torch.cat([part[0] for part in parts]), self._joined([part[1] for part in parts])
            x, carry = self._step(i, x, carry)
        return x, carry

    def _render_from(self, index: int, x: Tensor, carry: Any) -> Tensor:
        for i in range(index, len(self._layers)):
            if len(x) > 1 and x.dtype == self.dtype and self._one_by_one(i):
                carry = self._prepared(i, carry, len(self._layers))
                run = lambda b: self._render_from(i, x[b : b + 1], self._one_of(carry, b))  # noqa: E731, B023
                return torch.cat(side_by_side(run, len(x)))
            x, carry = self._step(i, x, carry)
        return self._image(x, carry).to(self.dtype).clamp(-1, 1)

    def keys(self, layer: str | EditableLayer, z: Tensor) -> Tensor:
        """The key maps (B x I x h x w) of a layer. Runs the layers before it and nothing else."""
        index = self._index(layer)
        return self._key(index, *self._input_of(index, *self._begin(self._checked_latents(z), render=False)))[0]

    def capture(self, layer: str | EditableLayer, z: Tensor) -> Activation:
        """The layer's key, value, style and noise for the latents z, and what `finish` needs. Stops after the layer."""
        return self._captured(layer, *self._begin(self._checked_latents(z), render=True))

    def captures(self, z: Tensor) -> Iterator[Activation]:
        """What `capture` gives at each layer, in their order, in one run: z is B x z_dim.

        A layer's maps are made when they are asked for: one that has been dropped takes no memory.
        """
        return self._captures(*self._begin(self._checked_latents(z), render=True))

    def _captures(self, x: Tensor, carry: Any) -> Iterator[Activation]:
        """x, carry: the input of the first layer."""
        for index, layer in enumerate(self._layers.values()):
            key, style = self._key(index, x, carry)
            value = self._captured_value(index, x, key, style)
            yield Activation(key, value, style, self._noise(index), carry, layer.margin, layer.key_margin)
            x, carry = self._advance(index, value, carry)

    def _captured(self, layer: str | EditableLayer, x: Tensor, carry: Any) -> Activation:
        """x, carry: the input of the first layer."""
        index = self._index(layer)
        x, carry = self._input_of(index, x, carry)
        key, style = self._key(index, x, carry)
        value, info = self._captured_value(index, x, key, style), self.find_layer(layer)
        return Activation(key, value, style, self._noise(index), carry, info.margin, info.key_margin)

    def rows_of(self, activation: Activation) -> list[Activation]:
        """The images of an activation, each as a batch of one that shares no memory with the others."""
        return [
            replace(
                activation,
                key=activation.key[b : b + 1].clone(),
                value=activation.value[b : b + 1].clone(),
                style=None if activation.style is None else activation.style[b : b + 1].clone(),
                carry=self._one_of(activation.carry, b),
            )
            for b in range(len(activation.key))
        ]

    def joined(self, activations: Sequence[Activation]) -> Activation:
        """One batch of several activations of the same layer."""
        first = activations[0]
        return replace(
            first,
            key=torch.cat([a.key for a in activations]),
            value=torch.cat([a.value for a in activations]),
            style=None if first.style is None else torch.cat([a.style for a in activations]),
            carry=self._joined([a.carry for a in activations]),
        )

    def _captured_value(self, index: int, x: Tensor, key: Tensor, style: Tensor | None) -> Tensor:
        """The value map, rounded as `forward` rounds it."""
        if len(x) > 1 and self._one_by_one(index):
            rows = [slice(b, b + 1) for b in range(len(x))]
            styles = [None if style is None else style[row] for row in rows]
            values = [self._captured_value(index, x[r], key[r], s) for r, s in zip(rows, styles, strict=True)]
            return torch.cat(values)
        return self._value(index, key, style)

    def value(self, layer: str | EditableLayer, activation: Activation) -> Tensor:
        """The layer's value (B x O x H x W) from the captured key, with the layer's weights as they are now."""
        return self._value(self._index(layer), activation.key, activation.style)

    def finish(self, layer: str | EditableLayer, activation: Activation, value: Tensor | None = None) -> Tensor:
        """Images (B x 3 x H x W in [-1, 1]) that follow from the layer's value (B x O x H x W; None: as captured).

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
        """The numbered images, B x 3 x H x W in [-1, 1], on the generator's device, in batches and without gradients.

        batch_size: how many at once (default: what memory holds, up to 16 on a CPU and 32 elsewhere). It does not
        change the images, and is halved with a RuntimeWarning where memory runs out.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        z = self.latents(numbers, seed)
        step = batch_size or self.batch_size()
        out = torch.empty(
            len(z), self.image_channels, self.image_size, self.image_size, dtype=self.dtype, device=self.device
        )
        first = 0
        while first < len(z):
            count, short = min(step, len(z) - first), False
            try:
                with torch.no_grad():
                    out[first : first + count] = self(z[first : first + count])
                first += count
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                short = True
            if short:  # outside of the handler, which keeps what the failed batch held
                step = lowered(count, self.device, "rendering", stacklevel=2)
        return out

    def unusual_picture(self, number: int = 0, seed: int = 1) -> str | None:
        """Render one picture without clamping and say in words what is wrong with its values; None if nothing is.

        For `info`: weights that load and still make no pictures, as after a conversion that went wrong.
        """
        with torch.no_grad():
            z = self._checked_latents(self.latents([number], seed))
            image = self._image(*self._input_of(len(self._layers), *self._begin(z, render=True)))
        if not all_finite(image):
            return f"image {number} holds values that are not finite"
        outside = (image.abs() > 1.5).float().mean().item()  # trained generators overshoot a little at edges
        if outside > 0.1:
            low, high = image.min().item(), image.max().item()
            return f"{outside:.0%} of image {number} lies far outside [-1, 1]: from {low:.3g} to {high:.3g}"
        if image.std((2, 3)).max() < 0.01:
            return f"image {number} is one flat colour"
        return None
