"""Loading generators: family and layout are recognised from the content of the file, all sizes from the weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrewrite.errors import CheckpointError, CheckpointMismatchError
from pyrewrite.generators.base import Generator
from pyrewrite.generators.loading import dcgan, genforce, mmgeneration, nvidia, progan, stylegan2, stylegan3, tensorflow
from pyrewrite.generators.loading._content import checkpoint_kind
from pyrewrite.generators.loading._names import Weights, find_weights, require_finite
from pyrewrite.generators.loading._network_pickle import read_network_pickle
from pyrewrite.generators.loading._safetensors_file import file_settings, read_safetensors
from pyrewrite.generators.loading._torch_file import read_torch_file

_ASSETS = Path(__file__).parent.parent.parent / "assets"
BUNDLED = {"peeps": "stylegan2-peeps-128.pt", "peeps-progan": "progan-peeps-64.pth"}
FAMILIES = ("stylegan2", "stylegan3", "progan", "dcgan")


@dataclass(frozen=True)
class Layout:
    """One way in which files name the weights of a family.

    matches  names and tensors -> how many of the names are those of the layout
    load     builds the generator from weights and the seed for missing noise
    """

    name: str
    family: str
    what: str
    matches: Callable[[dict[str, Tensor]], int]
    load: Callable[[Weights, int], Generator]


# Where two know equally many names of a file, the first is taken: mmgeneration uses some of rosinality's names.
LAYOUTS = [
    Layout("mmgeneration", "stylegan2", mmgeneration.WHAT, mmgeneration.matching_names, mmgeneration.load),
    Layout("official", "stylegan2", stylegan2.WHAT, stylegan2.matching_sequential_names, stylegan2.load),
    Layout("rosinality", "stylegan2", stylegan2.WHAT, stylegan2.matching_names, stylegan2.load),
    Layout("NVIDIA", "stylegan2", nvidia.WHAT, nvidia.matching_names, nvidia.load),
    Layout("GenForce", "stylegan2", genforce.STYLEGAN2, genforce.matching_stylegan2_names, genforce.load_stylegan2),
    Layout(
        "TensorFlow",
        "stylegan2",
        tensorflow.STYLEGAN2,
        tensorflow.matching_stylegan2_names,
        tensorflow.load_stylegan2,
    ),
    Layout(
        "NVIDIA", "stylegan3", stylegan3.WHAT, stylegan3.matching_names, lambda weights, seed: stylegan3.load(weights)
    ),
    Layout(
        "InterFaceGAN",
        "progan",
        progan.WHAT,
        progan.matching_interfacegan_names,
        lambda weights, seed: progan.load(weights),
    ),
    Layout("official", "progan", progan.WHAT, progan.matching_names, lambda weights, seed: progan.load(weights)),
    Layout("GenForce", "progan", genforce.PGGAN, genforce.matching_pggan_names, genforce.load_pggan),
    Layout("TensorFlow", "progan", tensorflow.WHAT, tensorflow.matching_names, tensorflow.load),
    Layout("PyTorch tutorial", "dcgan", dcgan.WHAT, dcgan.matching_names, dcgan.load),
]

_REGISTERED: dict[str, Layout] = {}

# Names that give away what else a file can be: (part of a name, what it is).
_FOREIGN = (
    ("final_linear", "a discriminator of StyleGAN2, not a generator"),
    (".fromrgb.", "a discriminator in NVIDIA's layout, not a generator"),
    ("progression.", "a StyleGAN of the first generation, which is not read here"),
    (".lambda", "a patch, not a generator: `pyrewrite apply` puts it into one"),
)


def register_family(
    name: str,
    *,
    matches: Callable[[dict[str, Tensor]], int],
    load: Callable[[dict[str, Tensor]], Generator],
    what: str | None = None,
    replace: bool = False,
) -> None:
    """Teach `load_generator` a family of your own, for this process.

    name     of the family; it must be the `family` of what `load` makes
    matches  tensors by name -> how many of the names are those of the family. Of all families, built in or not, the one
             that knows most names of a file loads it; yours where as many are known.
    load     tensors by name -> the generator, a subclass of `pyrewrite.generators.Generator`. KeyError, ValueError and
             RuntimeError (as load_state_dict raises them) become a CheckpointMismatchError that names the file.
    what     it is, for messages; the name where it is None
    replace  whether a family that was registered under the name may be replaced

    The tensors are those of the averaged generator where a file holds several, without what wrappers put before their
    names. docs/generators.md has a complete example.
    Raises ValueError for the name of a built-in family, or one that is taken; TypeError for what cannot be called.
    """
    if name in FAMILIES:
        raise ValueError(f"{name!r} is a built-in family: choose another name than {', '.join(FAMILIES)}")
    if name in _REGISTERED and not replace:
        raise ValueError(f"a family {name!r} is registered already: replace=True replaces it")
    if not callable(matches) or not callable(load):
        raise TypeError("matches and load are functions of the tensors by name")
    shown = what or name

    def checked(weights: Weights, seed: int) -> Generator:
        try:
            generator = load(weights.tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointMismatchError(f"{weights.origin} is not a whole {shown}: {reason}") from error
        if not isinstance(generator, Generator) or generator.family != name:
            found = getattr(generator, "family", None)
            raise TypeError(
                f"load of the family {name!r} returned a {type(generator).__name__} of the family {found!r}; "
                f"expected a Generator of the family {name!r}"
            )
        require_finite(generator, weights)
        generator.notes[:0] = weights.notes
        return generator

    _REGISTERED[name] = Layout("registered", name, shown, matches, checked)


def load_generator(
    path_or_name: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    truncation: float = 1.0,
    family: str | None = None,
    seed: int = 1,
    precision: str = "fp32",
) -> Generator:
    """A generator from a checkpoint, or a bundled one by its name.

    Bundled are "peeps" (StyleGAN2, 128 x 128) and "peeps-progan" (Progressive GAN, 64 x 64).

    Reads StyleGAN2 (rosinality, official rewriting, NVIDIA's pickles, GenForce, mmgeneration), StyleGAN3 (NVIDIA's),
    Progressive GAN (official, features.N, GenForce, TensorFlow's names) and DCGAN (PyTorch tutorial), from torch
    checkpoints, safetensors and, for NVIDIA's networks, pickles; docs/generators.md has the list. The content decides,
    not the extension. A file that has the name of a bundled generator wins over it.

    truncation  StyleGAN2 and 3 only; see Generator.truncation
    family      "stylegan2", "stylegan3", "progan", "dcgan" or a registered one makes a file of another family an error;
                None takes what the file holds
    seed        for the noise of layers whose noise the file does not hold
    precision   "fp32", "bf16" or "fp16", of the maps of whole images; see Generator.precision
    device      ValueError for one that this machine or this torch does not have, before the file is read

    Raises FileNotFoundError, IsADirectoryError, CheckpointError (not a checkpoint, damaged, wrong names or shapes, NaN;
    always a ValueError that names the file) and ValueError for the other arguments. Nothing is loaded in part, and
    nothing of a file is run.
    """
    known = (*FAMILIES, *_REGISTERED)
    if family is not None and family not in known:
        raise ValueError(f"family is one of {', '.join(known)} or None, got {family!r}")
    if not math.isfinite(truncation):
        raise ValueError(f"truncation is a finite number, got {truncation}")
    _require_device(device)
    path = generator_path(path_or_name)
    weights = find_weights(_content(path), str(path))
    layout = _layout(weights)
    if family not in (None, layout.family):
        raise CheckpointMismatchError(f"{path} holds a {layout.what}, but family={family!r} was asked for")
    try:
        generator = layout.load(weights, seed)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, ValueError, RuntimeError) as error:
        # Shapes that no layout foresees, such as a weight without any dimension.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointMismatchError(f"{path} is not a whole {layout.what}: {reason}") from error
    generator.path, generator.layout = path, layout.name
    generator.truncation, generator.precision = truncation, precision
    return generator.to(device)


def _require_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all of them
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from error


def _content(path: Path) -> Any:
    kind = checkpoint_kind(path)
    if kind == "pickle":
        return read_network_pickle(path)
    if kind == "safetensors":
        tensors, metadata = read_safetensors(path)
        return {**file_settings(path, metadata), **tensors}
    return read_torch_file(path)


def generator_path(path_or_name: str | os.PathLike) -> Path:
    """The file of a path or bundled name. FileNotFoundError where there is neither."""
    path = Path(path_or_name)
    if not path.exists() and str(path_or_name) in BUNDLED:
        return _ASSETS / BUNDLED[str(path_or_name)]
    if not path.exists():
        names = ", ".join(BUNDLED)
        raise FileNotFoundError(
            f"there is no file {str(path_or_name)!r}, and no bundled generator of that name (there are {names})"
        )
    return path


def _layout(weights: Weights) -> Layout:
    layouts = [*_REGISTERED.values(), *LAYOUTS]
    scores = [layout.matches(weights.tensors) for layout in layouts]
    best = layouts[scores.index(max(scores))]
    if max(scores) and best in _REGISTERED.values():
        return best
    for part, what in _FOREIGN:
        if any(part in name for name in weights.tensors):
            raise CheckpointMismatchError(f"{weights.origin} holds {what}")
    if not max(scores):
        shown = ", ".join(list(weights.tensors)[:8])
        raise CheckpointMismatchError(
            f"{weights.origin} holds {len(weights.tensors)} tensors, but not those of a generator known here "
            "(StyleGAN2: convs.0.conv.weight, synthesis.b8.conv0.weight, synthesis.layer1.weight, ...; StyleGAN3: "
            "synthesis.L0_36_512.weight, ...; Progressive GAN: layer1.conv.weight, ...; DCGAN: main.0.weight, ...). "
            f"It holds {shown} ..."
        )
    return best
