"""Any torch module as an editable network: its convolutions and linear layers become named layers in place.

What a layer's key and value are is the same as in a generator: the key is what the layer's weight is multiplied with,
the value what comes out. They are caught by hooks while the module runs, so that nothing is known of the module but its
layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrewrite.generators.base import image_numbers
from pyrewrite.generators.network import Activation, EditableLayer, EditableNetwork

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import ConvLayer

TOLERANCE = 1e-3  # of the largest value: whether a layer computes what it is taken for


def as_editable(
    module: nn.Module,
    sample: Tensor,
    layers: Iterable[str] | None = None,
    after: Mapping[str, str] | None = None,
) -> EditableModule:
    """Make the Conv2d, ConvTranspose2d and Linear layers of a module editable in place.

    module: in eval mode, on its device. It stays as it is: patches change its weights in place and take the changes
    back, and it can be called as ever.
    sample: N x ..., a batch of inputs. Input number n is `sample[n]`: statistics, masks and edits speak of it so.
    layers: names of submodules to offer; None for all that can be edited. after: name of a layer -> name of a submodule
    after it (a LeakyReLU or Identity): the layer's value is then taken there.

    The layers carry the names of the submodules. Keys of a Linear layer on B x I are maps of one pixel; on B x T x I
    they are maps of T pixels, square where T is. What cannot be edited is in `notes` with the reason: a stride other
    than 1 (a transposed convolution: 2), groups, dilation, other paddings than zeros, weights that are computed from
    others, layers that run twice. Masks are square, whatever the proportions of the inputs.

    Raises TypeError for what is no module or tensor; ValueError for a module in training mode, a sample without inputs,
    a layer in `layers` or `after` that cannot be used so, and a module without any editable layer.
    """
    return EditableModule(module, sample, layers, after)


class _Stop(Exception):
    """Ends a run of the module after the layer that was wanted."""


@dataclass(frozen=True)
class _Kind:
    """How one layer is seen as a convolution.

    blur   the filter after an up-sampling layer, or None
    slope  of the leaky ReLU after it, 1 for none
    last   the submodule where the value is taken, if not here
    """

    module: nn.Module
    padding: int | None = None
    blur: Tensor | None = None
    slope: float = 1.0
    last: str | None = None


class _Weight(nn.Module):
    """The weight of a layer seen as O x I x k x k: a view, so that a change of it is a change of the layer."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    @property
    def weight(self) -> Tensor:
        weight = self.part.weight
        if isinstance(self.part, nn.Linear):
            return weight[:, :, None, None]
        return weight.transpose(0, 1) if isinstance(self.part, nn.ConvTranspose2d) else weight


class EditableModule(EditableNetwork):
    """See `as_editable`. Calls go to the module itself, on inputs as the module takes them."""

    family = "module"

    def __init__(
        self,
        module: nn.Module,
        sample: Tensor,
        layers: Iterable[str] | None = None,
        after: Mapping[str, str] | None = None,
    ):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a torch module, got {type(module).__name__}")
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample is a batch of inputs, a tensor, got {type(sample).__name__}")
        if sample.ndim < 2 or not len(sample):
            raise ValueError(f"sample is a batch of at least one input, N x ..., got {tuple(sample.shape)}")
        if any(part.training for part in module.modules()):
            raise ValueError("the module is in training mode, where keys depend on the batch: call module.eval()")
        if next(module.parameters(), None) is None:
            raise ValueError("the module has no layer that can be edited: it has no parameters")
        self.module = module
        self.sample = sample.detach()  # not a buffer: it is no part of the weights, whose hash a patch remembers
        self._kinds: dict[str, _Kind] = {}
        self.eval()
        self._find_layers(None if layers is None else list(layers), dict(after or {}))

    # -- finding layers ----------------------------------------------

    def _find_layers(self, wanted: list[str] | None, after: dict[str, str]) -> None:
        named = {name: part for name, part in self.module.named_modules() if name}
        for name in [*(wanted or []), *after, *after.values()]:
            if name not in named:
                raise ValueError(f"the module has no submodule {name!r}; it has {', '.join(named) or 'none'}")
        runs, sizes = self._trial(named)
        for name in runs:
            if wanted is not None and name not in wanted:
                continue
            try:
                kind = _kind(named[name])
                if runs[name] > 1:
                    raise ValueError(f"it runs {runs[name]} times for one input")
                if name in after:
                    slope = _slope(named[after[name]], after[name])
                    kind = replace(kind, slope=slope, last=after[name])
                self._add(name, kind, *sizes[name])
            except ValueError as error:
                self._layers.pop(name, None)
                if wanted is not None or name in after:
                    raise ValueError(f"layer {name!r} cannot be edited: {error}") from error
                self.notes.append(f"{name} ({type(named[name]).__name__}) cannot be edited: {error}")
        for name in wanted or []:
            if name not in runs:
                raise ValueError(f"layer {name!r} is a {type(named[name]).__name__} that does not run or has no weight")
        if not self._layers:
            raise ValueError(f"the module has no layer that can be edited: {'; '.join(self.notes) or 'none runs'}")

    def _trial(self, named: dict[str, nn.Module]) -> tuple[dict[str, int], dict[str, tuple]]:
        """Run one input: how often each layer runs, in order, and the sizes of its key and value maps."""
        runs: dict[str, int] = {}
        sizes: dict[str, tuple] = {}

        def hook(name: str) -> Callable:
            def caught(part: nn.Module, args: tuple, result: Any) -> None:
                runs[name] = runs.get(name, 0) + 1
                if args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
                    sizes[name] = (_as_map(part, args[0]).shape[2:], _as_map(part, result).shape[2:])

            return caught

        hooks = [
            part.register_forward_hook(hook(name))
            for name, part in named.items()
            if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        ]
        try:
            with torch.no_grad():
                output = self.module(self.latents(0))
        finally:
            for handle in hooks:
                handle.remove()
        image = output if isinstance(output, Tensor) and output.ndim == 4 else self.sample
        self.image_size = max(image.shape[2:]) if image.ndim == 4 else 1
        return runs, {name: sizes.get(name, ((0, 0), (0, 0))) for name in runs}

    def _add(self, name: str, kind: _Kind, key: tuple[int, int], value: tuple[int, int]) -> None:
        view = _Weight(kind.module)
        o, i, k, _ = view.weight.shape
        size = None if key[0] == key[1] else (key[0], key[1])
        self._kinds[name] = kind
        self._layers[name] = EditableLayer(name, value[0], key[0], i, o, k, kind.blur is not None, view, size)
        self._require_convolution(name)

    @torch.no_grad()
    def _require_convolution(self, name: str) -> None:
        """Raise ValueError unless the layer computes what it is taken for: hooks or parametrisations may change it."""
        activation = self.capture(name, self.latents(0))
        found, true = self._convolved(name, activation.key), activation.value
        if found.shape != true.shape or (found - true).abs().max() > TOLERANCE * max(float(true.abs().max()), 1e-6):
            raise ValueError("what comes out is not the convolution of what goes in with its weight")

    def _convolved(self, name: str, key: Tensor) -> Tensor:
        """key: B x I x h x w -> the value as `conv_layer` describes it, B x O x H x W."""
        from pyrewrite.generators.filters import blur_padding, filtered

        layer = self.conv_layer(name)
        if layer.blur is None:
            x = F.conv2d(key, layer.weight, layer.bias, padding=layer.padding)
        else:
            x = F.conv_transpose2d(key, layer.weight.transpose(0, 1), stride=2)
            x = filtered(x, layer.blur, *blur_padding(layer.blur, layer.weight.shape[-1]), layer.bias)
        return F.leaky_relu(x, layer.negative_slope)

    # -- running -----------------------------------------------------

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)

    def latents(self, numbers: int | Iterable[int], seed: int = 1) -> Tensor:
        """Inputs of the sample, B x ..., by their numbers; the seed has no part in it.

        Raises ValueError for a number that the sample does not have.
        """
        wanted = image_numbers(numbers)
        if wanted and max(wanted) >= len(self.sample):
            raise ValueError(
                f"input {max(wanted)} is not in the sample, which has {len(self.sample)}: give a larger one, or "
                f"samples={len(self.sample)} or fewer"
            )
        return self.sample[torch.tensor(wanted, dtype=torch.long, device=self.sample.device)].to(self.device)

    @contextmanager
    def _hooked(self, *hooks: tuple[str | None, str, Callable]):
        named = dict(self.module.named_modules())
        handles = []
        try:
            for name, kind, hook in hooks:
                handles.append(getattr(named[name], kind)(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _caught(self, name: str, z: Tensor, until_value: bool) -> tuple[Tensor, Tensor | None]:
        """What goes into the layer and what comes out where its value is taken; the module stops there."""
        caught: list[Tensor] = []
        last = self._kinds[name].last or name

        def before(part: nn.Module, args: tuple) -> None:
            caught.append(args[0])
            if not until_value:
                raise _Stop

        def behind(part: nn.Module, args: tuple, result: Any) -> None:
            if not caught:
                raise ValueError(f"{last!r} runs before it")
            caught.append(result)
            raise _Stop

        hooks = [(name, "register_forward_pre_hook", before)]
        if until_value:
            hooks.append((last, "register_forward_hook", behind))
        with self._hooked(*hooks):
            try:
                self.module(z)
            except _Stop:
                return caught[0], caught[1] if until_value else None
        raise ValueError(f"{name} did not run for this input")

    def keys(self, layer: str | EditableLayer, z: Tensor) -> Tensor:
        name = self.find_layer(layer).name
        return _as_map(self._kinds[name].module, self._caught(name, z, False)[0])

    def capture(self, layer: str | EditableLayer, z: Tensor) -> Activation:
        name = self.find_layer(layer).name
        part = self._kinds[name].module
        key, value = self._caught(name, z, True)
        return Activation(_as_map(part, key), _as_map(part, value), None, None, (z, value.shape))

    def value(self, layer: str | EditableLayer, activation: Activation) -> Tensor:
        return self._convolved(self.find_layer(layer).name, activation.key)

    def finish(self, layer: str | EditableLayer, activation: Activation, value: Tensor | None = None) -> Any:
        """What the module returns where the layer's value (B x O x H x W; None: as captured) is replaced.

        Raises ValueError when value has another shape than the captured one.
        """
        name = self.find_layer(layer).name
        value = activation.value if value is None else value
        if value.shape != activation.value.shape:
            expected = tuple(activation.value.shape)
            raise ValueError(f"the value of {name} is {expected}, got {tuple(value.shape)}")
        z, shape = activation.carry
        replaced = _from_map(self._kinds[name].module, value.to(activation.value), shape)
        with self._hooked((self._kinds[name].last or name, "register_forward_hook", lambda *_: replaced)):
            return self.module(z)

    def images(self, numbers: int | Iterable[int], seed: int = 1, batch_size: int | None = None) -> Any:
        """What the module returns for the numbered inputs, one batch, without gradients."""
        with torch.no_grad():
            return self.module(self.latents(numbers, seed))

    # -- what is known of it -----------------------------------------

    def settings(self) -> dict[str, Any]:
        """The sample is part of what statistics mean."""
        data = self.sample.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(data.shape)}|{data.dtype}|".encode())
        digest.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
        return {"sample": digest.hexdigest()}

    def mean_style(self, layer: str | EditableLayer) -> None:
        self.find_layer(layer)

    def conv_layer(self, layer: str | EditableLayer) -> ConvLayer:
        from pyrewrite.ops.insertion import ConvLayer

        name = self.find_layer(layer).name
        kind = self._kinds[name]
        bias = kind.module.bias
        return ConvLayer(
            weight=self._layers[name].weight.detach(),
            blur=None if kind.blur is None else kind.blur.to(kind.module.weight),
            bias=None if bias is None else bias.detach(),
            negative_slope=kind.slope,
            padding=kind.padding,
        )


# -- layers as convolutions --------------------------------------------------------------------------------------------


def _kind(part: nn.Module) -> _Kind:
    """Raises ValueError with the reason where a layer is no plain convolution."""
    if "weight" not in dict(part.named_parameters(recurse=False)):
        raise ValueError("its weight is computed from other parameters")
    if isinstance(part, nn.Linear):
        return _Kind(part, padding=0)
    if part.groups != 1 or set(part.dilation) != {1}:
        raise ValueError(f"its groups are {part.groups} and its dilation {part.dilation}, expected 1")
    if part.padding_mode != "zeros":
        raise ValueError(f"its padding is {part.padding_mode!r}, expected zeros")
    k = part.kernel_size[0]
    if set(part.kernel_size) != {k}:
        raise ValueError(f"its kernel is {part.kernel_size}, expected a square")
    if isinstance(part, nn.Conv2d):
        if set(part.stride) != {1}:
            raise ValueError(f"its stride is {part.stride}, expected 1")
        padding = {"same": k // 2 if k % 2 else None, "valid": 0}.get(part.padding, part.padding)
        padding = padding if isinstance(padding, int) or padding is None else _one(padding)
        if padding is None or padding >= k:
            raise ValueError(f"its padding is {part.padding} at a kernel of {k}, expected less, the same on all sides")
        return _Kind(part, padding=padding)
    blur = _shift(k, _one(part.padding), _one(part.output_padding))
    if set(part.stride) != {2} or blur is None:
        raise ValueError(
            f"it is transposed with stride {part.stride}, kernel {k}, padding {part.padding} and output padding "
            f"{part.output_padding}; expected stride 2 and a result of twice the size"
        )
    return _Kind(part, blur=blur)


def _one(sizes: tuple[int, ...]) -> int | None:
    return sizes[0] if len(set(sizes)) == 1 else None


def _shift(k: int, padding: int | None, output_padding: int | None) -> Tensor | None:
    """The filter that leaves out as many rows at the beginning as the padding of a transposed convolution does.

    None where the result is not twice as large as the input. A filter of one or two taps does not mix any pixels.
    """
    if padding is None or output_padding is None or k - 2 * padding + output_padding != 2:
        return None
    if output_padding == 0:
        return torch.ones(1, 1)
    shift = torch.zeros(2, 2)
    shift[0, 0] = 1
    return shift


def _slope(part: nn.Module, name: str) -> float:
    if isinstance(part, nn.Identity):
        return 1.0
    if isinstance(part, nn.LeakyReLU) and part.negative_slope > 0:
        return part.negative_slope
    raise ValueError(
        f"its value is wanted after {name!r}, a {type(part).__name__}: only LeakyReLU and Identity can be undone"
    )


def _as_map(part: nn.Module, x: Tensor) -> Tensor:
    """A layer's input or output as B x C x h x w: B x C gives one pixel, B x ... x C as many as there are vectors."""
    if not isinstance(part, nn.Linear):
        return x
    rows = x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)  # B x C x T
    side = math.isqrt(rows.shape[2])
    return rows.reshape(*rows.shape[:2], *((side, side) if side * side == rows.shape[2] else (rows.shape[2], 1)))


def _from_map(part: nn.Module, x: Tensor, shape: torch.Size) -> Tensor:
    """The opposite of `_as_map`."""
    return x if not isinstance(part, nn.Linear) else x.flatten(2).transpose(1, 2).reshape(shape)
