"""Weights under the names and in the layouts of NVIDIA's TensorFlow code: its pickles, and files of converters.

Progressive GAN: 4x4/Dense, 4x4/Conv, RxR/Conv0_up or Conv0, RxR/Conv1 and ToRGB_lodN, each with weight and bias.
Convolutions there are k x k x I x O; Conv0_up is the weight of a transposed one, k x k x O x I, and turned round; Dense
is z x (O 4 4).

StyleGAN2: mapping/DenseN, dlatent_avg, synthesis/RxR/Conv0_up, Conv1 and ToRGB, each with mod_weight and mod_bias, and
synthesis/noiseN. Here Conv0_up is k x k x I x O as well, for a convolution that is turned round; each style has 1 added
to its bias.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading import progan, stylegan2
from pyrewrite.generators.loading._names import Weights, require_names, require_shape
from pyrewrite.generators.progan import ProGAN
from pyrewrite.generators.stylegan2 import StyleGAN2
from pyrewrite.generators.styles import MAPPING_RATE

STYLEGAN2 = "StyleGAN2 generator with TensorFlow's names"
WHAT = "Progressive GAN generator with TensorFlow's names"
_NAMES = re.compile(
    r"(?:.*[/.])?((?:\d+x\d+)[/.](?:Dense|Conv|Conv0|Conv0_up|Conv1)|ToRGB_lod\d+)[/.](weight|bias)$|(?:.*[/.])?lod$"
)


def matching_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of this layout."""
    return sum(bool(_NAMES.match(name)) for name in tensors)


def load(weights: Weights, noise_seed: int) -> ProGAN:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    _shorten(weights)
    lod = weights.tensors.pop("lod", None)
    if lod is not None and float(lod) != 0:
        raise CheckpointMismatchError(
            f"{weights.origin} is a {WHAT} that has not finished growing: its lod is {float(lod):g}, expected 0"
        )
    sizes = [int(m[1]) for name in weights.tensors if (m := re.match(r"(\d+)x\d+/", name))]
    size, layers = 4, ["4x4/Dense", "4x4/Conv"]
    while size < max(sizes, default=4):
        size *= 2
        up = f"{size}x{size}/Conv0"
        layers += [f"{up}_up" if f"{up}_up/weight" in weights.tensors else up, f"{size}x{size}/Conv1"]
    smaller = [name for name in weights.tensors if re.match(r"ToRGB_lod[1-9]", name)]
    expected = [f"{name}/{part}" for name in (*layers, "ToRGB_lod0") for part in ("weight", "bias")]
    require_names(weights, [*expected, *smaller], WHAT)
    if smaller:
        weights.notes.append("colours taken from 'ToRGB_lod0', those of the highest resolution")
    renamed, theirs = {}, {}
    for n, name in enumerate((*layers, "ToRGB_lod0")):
        ours = f"layer{n + 1}" if n < len(layers) else f"output_{size}x{size}"
        renamed |= {f"{ours}.conv.weight": _weight(weights, name), f"{ours}.wscale.b": weights.tensors[f"{name}/bias"]}
        theirs |= {f"{ours}.conv.weight": f"{name}/weight", f"{ours}.wscale.b": f"{name}/bias"}
    weights.rename(renamed, theirs)
    return progan.load(weights)


def _shorten(weights: Weights) -> None:
    """Take off the scope before a name (Gs/4x4/...) and write it with slashes."""
    short: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        match = _NAMES.match(name)
        new = name if match is None else "lod" if match[1] is None else f"{match[1]}/{match[2]}".replace(".", "/")
        if new in short:
            raise CheckpointMismatchError(f"{weights.origin} holds {new!r} twice, in two scopes")
        short[new] = tensor
    weights.tensors = short


def _weight(weights: Weights, name: str) -> Tensor:
    """O x I x k x k"""
    if name.endswith("/Dense"):
        z, out = require_shape(weights, f"{name}/weight", 2)
        if out % 16:
            raise CheckpointMismatchError(f"{weights.origin}: {name}/weight is {(z, out)}, expected (z, 16 channels)")
        # On a latent of one pixel, padded, a convolution lays its kernel down turned round.
        return weights.tensors[f"{name}/weight"].reshape(z, out // 16, 4, 4).transpose(0, 1).flip(2, 3)
    require_shape(weights, f"{name}/weight", 4)
    weight = weights.tensors[f"{name}/weight"]
    return weight.permute(2, 3, 0, 1).flip(2, 3) if name.endswith("Conv0_up") else weight.permute(3, 2, 0, 1)


# -- StyleGAN2 ---------------------------------------------------------------------------------------------------------

_STYLEGAN2_NAMES = re.compile(
    r"(?:.*/)?((?:G_)?synthesis/(?:\d+x\d+/(?:Const|Conv|Conv0_up|Conv1|ToRGB|Skip)/\w+|noise\d+|ToRGB_lod\d+/\w+)|"
    r"(?:G_)?mapping/(?:Dense\d+|Label\w+)/\w+|dlatent_avg|lod)$"
)
_STYLED = {"weight": "conv.weight", "mod_weight": "conv.modulation.weight", "mod_bias": "conv.modulation.bias"}


def matching_stylegan2_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of the StyleGAN2 layout."""
    return (
        sum(bool(_STYLEGAN2_NAMES.match(name)) for name in tensors) if any("Const/const" in n for n in tensors) else 0
    )


def load_stylegan2(weights: Weights, noise_seed: int) -> StyleGAN2:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    _take_off_scopes(weights)
    tensors = weights.tensors
    for unused in [name for name in tensors if name == "lod" or name.endswith("/lod")]:
        del tensors[unused]  # how far a network has grown, which StyleGAN2 does not
    _refuse_other_architectures(weights)
    sizes = [int(m[1]) for name in tensors if (m := re.match(r"synthesis/(\d+)x\1/", name))]
    levels = max(sizes, default=4).bit_length() - 2
    mapping = max((int(m[1]) + 1 for name in tensors if (m := re.match(r"mapping/Dense(\d+)/", name))), default=1)
    kind = _architecture(weights, f"synthesis/{2 ** (levels + 1)}x{2 ** (levels + 1)}")
    table = _stylegan2_names(mapping, levels, kind, any(name.startswith("mapping/LabelEmbed/") for name in tensors))
    if "mapping/LabelConcat/weight" in tensors:
        table["mapping/LabelConcat/weight"] = "label_concat.weight"
    optional = [name for name in table if name.startswith("synthesis/noise") or name == "dlatent_avg"]
    require_names(weights, [name for name in table if name not in optional or name in tensors], STYLEGAN2)
    renamed = {table[name]: _converted(weights, name) for name in tensors}
    theirs = {ours: name for name, ours in table.items()}
    kernel = _resample_kernel(weights)
    for n in range(levels - 1):
        renamed[f"convs.{2 * n}.conv.blur.kernel"] = kernel.clone()
        if kind != "orig":
            renamed[f"{'to_rgbs' if kind == 'skip' else 'skips'}.{n}.upsample.kernel"] = kernel.clone()
    weights.rename(renamed, theirs)
    return stylegan2.load(weights, noise_seed)


def _take_off_scopes(weights: Weights) -> None:
    """Names from `synthesis/`, `mapping/` or `dlatent_avg` on, without what stands before them (Gs/, G_)."""
    short: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        match = _STYLEGAN2_NAMES.match(name)
        new = name if match is None else match[1].removeprefix("G_")
        if new in short and new != "lod":
            raise CheckpointMismatchError(f"{weights.origin} holds {new!r} twice, in two scopes")
        short[new] = tensor
    weights.tensors = short


def _refuse_other_architectures(weights: Weights) -> None:
    for name, wanted in (("mapping_lrmul", MAPPING_RATE), ("mapping_nonlinearity", "lrelu"), ("nonlinearity", "lrelu")):
        value = _setting(weights, name, wanted)
        if value != wanted:
            raise CheckpointMismatchError(
                f"{weights.origin} is a StyleGAN2 whose {name} is {value!r}: not supported, only {wanted!r}"
            )
    if any("ToRGB_lod" in name for name in weights.tensors):
        raise CheckpointMismatchError(
            f"{weights.origin} is a StyleGAN2 that grew with its training (colours of every resolution): not supported"
        )


def _architecture(weights: Weights, last: str) -> str:
    """As the names say; last: the scope of the last block."""
    if any("/Skip/" in name for name in weights.tensors) and _setting(weights, "architecture", "resnet") == "resnet":
        return "resnet"
    colours = {name.split("/ToRGB/")[0] for name in weights.tensors if "/ToRGB/" in name}
    kind = "orig" if colours == {last} and last != "synthesis/4x4" else "skip"
    said = _setting(weights, "architecture", kind)
    if said != kind and last != "synthesis/4x4":
        raise CheckpointMismatchError(
            f"{weights.origin} says that its architecture is {said!r}, but its names are those of {kind!r}"
        )
    return kind


def _stylegan2_names(mapping: int, levels: int, architecture: str, labels: bool) -> dict[str, str]:
    """The name here of each name there."""
    parts = ("weight", "bias")
    table = {f"mapping/Dense{n}/{part}": f"style.{n + 1}.{part}" for n in range(mapping) for part in parts}
    if labels:
        table |= {f"mapping/LabelEmbed/{part}": f"embed.{part}" for part in parts}
    table |= {"dlatent_avg": "latent_avg", "synthesis/4x4/Const/const": "input.input"}
    for level in range(levels):
        block = f"synthesis/{4 * 2**level}x{4 * 2**level}"
        convs = (("Conv0_up", 2 * level - 1), ("Conv1", 2 * level)) if level else (("Conv", 0),)
        for name, n in convs:
            ours = f"convs.{n - 1}" if n else "conv1"
            styled = {**_STYLED, "bias": "activate.bias", "noise_strength": "noise.weight"}
            table |= {f"{block}/{name}/{part}": f"{ours}.{mine}" for part, mine in styled.items()}
            table[f"synthesis/noise{n}"] = f"noises.noise_{n}"
        if level and architecture == "resnet":
            table[f"{block}/Skip/weight"] = f"skips.{level - 1}.weight"
        if architecture != "skip" and level < levels - 1:
            continue
        rgb = f"to_rgbs.{level - 1}" if level else "to_rgb1"
        table |= {f"{block}/ToRGB/{part}": f"{rgb}.{mine}" for part, mine in {**_STYLED, "bias": "bias"}.items()}
    return table


def _converted(weights: Weights, name: str) -> Tensor:
    tensor = weights.tensors[name]
    if name == "mapping/LabelConcat/weight":
        return tensor  # classes x z
    if (name.startswith("mapping/") and name.endswith("/weight")) or name.endswith("/mod_weight"):
        require_shape(weights, name, 2)
        return tensor.t()
    if name.endswith("/weight"):
        require_shape(weights, name, 4)
        turned = tensor.flip(0, 1) if "/Conv0_up/" in name else tensor
        turned = turned.permute(3, 2, 0, 1)
        return turned if "/Skip/" in name else turned[None]
    if name.endswith("/mod_bias"):
        return tensor + 1
    if name.endswith("/noise_strength"):
        return tensor.reshape(-1)
    return tensor.reshape(1, -1, 1, 1) if name.endswith("/ToRGB/bias") else tensor


def _setting(weights: Weights, name: str, default: Any) -> Any:
    """A setting of the network, or of the part of it that it is meant for."""
    for part in ("synthesis/", "mapping/", ""):
        if f"{part}{name}" in weights.beside:
            return weights.beside[f"{part}{name}"]
    return default


def _resample_kernel(weights: Weights) -> Tensor:
    """f x f, of sum 4: the filter that the network's settings name, or the published one."""
    taps = _setting(weights, "resample_kernel", [1, 3, 3, 1])
    if not isinstance(taps, list) or not taps or any(type(tap) not in (int, float) for tap in taps) or not sum(taps):
        raise CheckpointMismatchError(f"{weights.origin}: resample_kernel is {taps!r}, expected a list of numbers")
    kernel = torch.tensor(taps, dtype=torch.float32)
    return 4 * torch.outer(kernel, kernel) / kernel.sum() ** 2
