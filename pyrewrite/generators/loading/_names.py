"""Finding the generator's weights in a checkpoint, and comparing their names and shapes with those of a generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite.errors import CheckpointMismatchError, NonFiniteWeightsError
from pyrewrite.generators.base import Generator
from pyrewrite.generators.loading._plain_arrays import PlainArray

_MOST_WRAPPERS = 8
_MOST_DIGITS = 4  # of a layer's number, or a resolution
_LONGEST_NAME = 250
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}  # counters
MAX_IMAGE_SIZE = 4096  # pixels; the largest published is 1024

# Names under which files keep a generator, the averaged copy before the trained one.
_AVERAGED = ("g_ema", "G_ema", "generator_ema", "generator_smooth", "netG_ema", "Gs", "ema", "params_ema")
_GENERATORS = (
    *("g", "G", "generator", "netG", "gen", "modelG"),
    *(f"{name}_state_dict" for name in ("g", "G", "generator", "netG", "gen", "modelG")),
)
_OTHERS = (*_GENERATORS, "models", "state_dict", "model", "model_state_dict", "params")
LARGEST_FLOAT = torch.finfo(torch.float64).max
_WRAPPERS = {"module", "_orig_mod"}  # left by DataParallel and torch.compile
_SHOWN = 12


@dataclass
class Weights:
    """The tensors of one generator under the names of the file, without what wrappers added.

    beside   what stood beside the generator in the file (latent_avg, step counters, options)
    shown    from a name here to the file's, for messages, after a layout's names were translated
    """

    origin: str
    tensors: dict[str, Tensor]
    beside: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    shown: Callable[[str], str] = str

    def rename(self, tensors: dict[str, Tensor], theirs: dict[str, str]) -> None:
        """Take tensors under the names here. theirs: name here -> the file's."""
        self.tensors, self.shown = tensors, lambda name: theirs.get(name, name)


def find_weights(content: Any, origin: str) -> Weights:
    """Descend through the wrappers of a checkpoint to the tensors. Raises CheckpointMismatchError if there are none."""
    beside: dict[str, Any] = {}
    notes: list[str] = []
    taken = []
    while True:
        if not isinstance(content, Mapping):
            raise CheckpointMismatchError(
                f"{origin}{_inside(taken)} holds a {type(content).__name__}; expected names and tensors"
            )
        candidates = [name for name in (*_AVERAGED, *_OTHERS) if isinstance(content.get(name), Mapping)]
        if not candidates:
            break
        others = [name for name in candidates[1:] if name in (*_AVERAGED, *_GENERATORS)]
        if others:
            notes.append(f"generator taken from {candidates[0]!r}; the file also holds {', '.join(map(repr, others))}")
        beside.update({name: value for name, value in content.items() if name != candidates[0] and name not in others})
        taken.append(candidates[0])
        if len(taken) > _MOST_WRAPPERS:
            raise CheckpointMismatchError(f"{origin} holds generators inside of generators: {' / '.join(taken)} / ...")
        content = content[candidates[0]]
    tensors = {}
    for name, value in content.items():
        if isinstance(value, PlainArray):
            value = torch.from_numpy(value.array)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            beside[str(name)] = value
            continue
        _require_sane(origin, name, value)
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in tensors:
            raise CheckpointMismatchError(f"{origin} holds {short!r} twice, once behind a wrapper's prefix")
        tensors[short] = value
    if not tensors:
        raise CheckpointMismatchError(
            f"{origin}{_inside(taken)} holds no tensors, only {_listed(map(str, content)) or 'nothing'}"
        )
    return Weights(origin, _of_one_network(tensors, notes), beside, notes)


def _require_sane(origin: str, name: str, value: Tensor) -> None:
    """CheckpointMismatchError for a number in a name, or a size, that would take all memory before it is noticed."""
    if len(name) > _LONGEST_NAME:
        raise CheckpointMismatchError(f"{origin} holds {name[:80] + ' ...'!r}, a name of {len(name)} characters")
    if value.dtype not in _DTYPES:
        raise CheckpointMismatchError(
            f"{origin} holds {name!r} of {value.dtype}: expected floating point numbers of 16, 32 or 64 bits"
        )
    if any(len(number) > _MOST_DIGITS for number in re.findall(r"\d+", name)):
        raise CheckpointMismatchError(f"{origin} holds {name[:80]!r}: no generator has so many layers")
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > stored:
        raise CheckpointMismatchError(
            f"{origin} holds {name!r} of {tuple(value.shape)} in {stored} bytes: the same numbers again and again"
        )


def _of_one_network(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The generator's tensors, where the names of all networks of a training run begin with the network's."""
    networks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        network, _, rest = name.partition(".")
        networks.setdefault(network, {})[rest] = tensor
    found = [name for name in (*_AVERAGED, *_GENERATORS) if name in networks and "" not in networks[name]]
    if not found:
        return tensors
    left = [name for name in networks if name != found[0]]
    also = f"; the file also holds {_listed(repr(name[:80]) for name in left)}" if left else ""
    notes.append(f"generator taken from the names that begin with {found[0] + '.'!r}{also}")
    return networks[found[0]]


def _inside(taken: list[str]) -> str:
    return f" ({' / '.join(taken)})" if taken else ""


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def require_names(weights: Weights, expected: Iterable[str], what: str) -> None:
    """Raise CheckpointMismatchError, listing what is missing and what is extra, unless the names are those expected."""
    expected = list(expected)
    missing = [weights.shown(name) for name in expected if name not in weights.tensors]
    known = set(expected)
    extra = [weights.shown(name) for name in weights.tensors if name not in known]
    if not missing and not extra:
        return
    parts = [f"{weights.origin} is not a whole {what}"]
    if missing:
        parts.append(f"missing ({len(missing)}): {_listed(missing)}")
    if extra:
        parts.append(f"extra ({len(extra)}): {_listed(extra)}")
    parts.append(
        f"expected {len(expected)} names such as {_listed(map(weights.shown, expected[:3]))}; nothing was loaded"
    )
    raise CheckpointMismatchError("; ".join(parts))


def fill(generator: Generator, weights: Weights, what: str) -> None:
    """Copy the tensors into the generator, in float32. Raises before that if a shape, type or value is wrong."""
    state = generator.state_dict(keep_vars=True)
    wrong = [
        f"{weights.shown(name)} is {tuple(weights.tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if weights.tensors[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointMismatchError(
            f"{weights.origin} is not a consistent {what}: {_listed(wrong)}; nothing was loaded"
        )
    types = [f"{weights.shown(name)} is {t.dtype}" for name, t in weights.tensors.items() if not t.is_floating_point()]
    if types:
        raise CheckpointMismatchError(
            f"{weights.origin}: weights are dense floating point numbers, but {_listed(types)}"
        )
    bad = [
        f"{weights.shown(name)} ({int((~t.isfinite()).sum())} of {t.numel()})"
        for name, t in weights.tensors.items()
        if not all_finite(t)
    ]
    if bad:
        raise NonFiniteWeightsError(f"{weights.origin} holds NaN or infinite weights: {_listed(bad)}")
    stored = sorted({str(t.dtype).removeprefix("torch.") for t in weights.tensors.values()} - {"float32"})
    if stored:
        generator.notes.append(f"weights stored as {', '.join(stored)}, computed in float32")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(weights.tensors[name])
    require_finite(generator, weights)


def positive_setting(weights: Weights, name: str, otherwise: float | None) -> float | None:
    """A finite number above 0 that stands beside the weights, or `otherwise`. Raises CheckpointMismatchError."""
    value = weights.beside.get(name, otherwise)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= LARGEST_FLOAT):
        shown = repr(value) if not isinstance(value, int) or abs(value) <= LARGEST_FLOAT else "beyond any float"
        raise CheckpointMismatchError(f"{weights.origin}: {name} is {shown}, expected a finite number above 0")
    return value


def require_image_size(weights: Weights, size: int) -> None:
    """Raise CheckpointMismatchError where the layers, however small they are, would make too large pictures."""
    if size > MAX_IMAGE_SIZE:
        shown = str(size) if size < 10**12 else "more than 10^12"
        raise CheckpointMismatchError(
            f"{weights.origin} makes images of {shown} pixels, by the number of its layers; up to {MAX_IMAGE_SIZE} "
            "are supported"
        )


def require_finite(generator: Generator, weights: Weights) -> None:
    """Raise NonFiniteWeightsError where float32 could not hold a weight, or what was made of it."""
    state = generator.state_dict()
    overflow = [weights.shown(name) for name, tensor in state.items() if not all_finite(tensor)]
    if overflow:
        raise NonFiniteWeightsError(f"{weights.origin} holds weights beyond the range of float32: {_listed(overflow)}")


def require_shape(weights: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must have so many dimensions, none of them empty."""
    shape = tuple(weights.tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointMismatchError(
            f"{weights.origin}: {weights.shown(name)} is {shape}, expected {dimensions} dimensions, none of them 0"
        )
    return shape
