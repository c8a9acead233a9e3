"""StyleGAN2 in the layout of NVIDIA's PyTorch repositories (stylegan2-ada-pytorch, and stylegan3's `stylegan2` config).

Names as in training/networks.py there: mapping.fcN, mapping.embed, mapping.w_avg; synthesis.bR with const or conv0,
conv1, torgb. A weight is O x I x k x k; that of an up-sampling layer is for a true convolution, as is that of a
transposed one here, so that nothing is turned round. Low-pass filters sum to 1 there and to 4 here, after the zeros
between the pixels.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading import stylegan2
from pyrewrite.generators.loading._names import Weights, positive_setting, require_names, require_shape
from pyrewrite.generators.stylegan2 import StyleGAN2
from pyrewrite.generators.styles import MAPPING_RATE

WHAT = "StyleGAN2 generator in NVIDIA's layout"
_NAMES = re.compile(r"synthesis\.b\d+\.|mapping\.(fc\d+|embed)\.|mapping\.w_avg$")
_LAYER = ("weight", "bias", "affine.weight", "affine.bias")


def matching_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of this layout."""
    return sum(bool(_NAMES.match(name)) for name in tensors)


def load(weights: Weights, noise_seed: int) -> StyleGAN2:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    require_known_layers(weights, "StyleGAN2")
    architecture = _architecture(weights)
    resolutions = sorted({int(m[1]) for name in weights.tensors if (m := re.match(r"synthesis\.b(\d+)\.", name))})
    base = resolutions[0] if resolutions else 4
    if resolutions != [base * 2**n for n in range(len(resolutions))]:
        raise CheckpointMismatchError(
            f"{weights.origin} is a {WHAT} with blocks of {resolutions} pixels, expected each twice the one before"
        )
    count = max((int(m[1]) + 1 for n in weights.tensors if (m := re.match(r"mapping\.fc(\d+)\.", n))), default=1)
    table = _names(weights, resolutions or [base], count, architecture)
    # Filters that these layers have and do not use.
    unused = {f"synthesis.b{base}.resample_filter", *(f"synthesis.b{r}.conv1.resample_filter" for r in resolutions)}
    if architecture != "skip":
        unused |= {f"synthesis.b{r}.resample_filter" for r in resolutions}
    weights.tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in unused}
    _silent_layers(weights)
    optional = [n for n in table if n.endswith("noise_const") or n == "mapping.w_avg"]
    require_names(weights, [n for n in table if n not in optional or n in weights.tensors], WHAT)
    _take_clamps(weights, table)
    renamed = {table[name]: _converted(weights, name) for name in weights.tensors}
    weights.rename(renamed, {ours: name for name, ours in table.items()})
    return stylegan2.load(weights, noise_seed)


def _names(weights: Weights, resolutions: list[int], mapping: int, architecture: str) -> dict[str, str]:
    """The name here of each name there."""
    table = {f"mapping.fc{n}.{part}": f"style.{n + 1}.{part}" for n in range(mapping) for part in ("weight", "bias")}
    table["mapping.w_avg"] = "latent_avg"
    if any(name.startswith("mapping.embed.") for name in weights.tensors):
        table.update({f"mapping.embed.{part}": f"embed.{part}" for part in ("weight", "bias")})
    table[f"synthesis.b{resolutions[0]}.const"] = "input.input"
    for level, resolution in enumerate(resolutions):
        block = f"synthesis.b{resolution}"
        for part, number in (("conv0", 2 * level - 1), ("conv1", 2 * level)):
            if number < 0:
                continue
            ours = f"convs.{number - 1}" if number else "conv1"
            table |= dict(zip((f"{block}.{part}.{name}" for name in _LAYER), _ours(ours), strict=True))
            table[f"{block}.{part}.noise_strength"] = f"{ours}.noise.weight"
            table[f"{block}.{part}.noise_const"] = f"noises.noise_{number}"
        if level:
            table[f"{block}.conv0.resample_filter"] = f"convs.{2 * level - 2}.conv.blur.kernel"
        if level and architecture == "resnet":
            table[f"{block}.skip.weight"] = f"skips.{level - 1}.weight"
            table[f"{block}.skip.resample_filter"] = f"skips.{level - 1}.upsample.kernel"
        if architecture != "skip" and resolution != resolutions[-1]:
            continue
        rgb = f"to_rgbs.{level - 1}" if level else "to_rgb1"
        names = (f"{rgb}.conv.weight", f"{rgb}.bias", f"{rgb}.conv.modulation.weight", f"{rgb}.conv.modulation.bias")
        table |= dict(zip((f"{block}.torgb.{name}" for name in _LAYER), names, strict=True))
        if level and architecture == "skip":
            table[f"{block}.resample_filter"] = f"{rgb}.upsample.kernel"
    return table


def _ours(layer: str) -> tuple[str, ...]:
    return (
        f"{layer}.conv.weight",
        f"{layer}.activate.bias",
        f"{layer}.conv.modulation.weight",
        f"{layer}.conv.modulation.bias",
    )


def _converted(weights: Weights, name: str) -> Tensor:
    tensor = weights.tensors[name]
    if name.endswith("resample_filter"):
        if tensor.ndim == 1:  # stored as one dimension of a product where it is long
            tensor = torch.outer(tensor, tensor)
        return 4 * tensor
    if re.search(r"(conv\d|torgb)\.weight$", name):
        require_shape(weights, name, 4)
        return tensor[None]
    if name.endswith("torgb.bias"):
        return tensor.reshape(1, -1, 1, 1)
    if name.endswith("noise_const"):
        require_shape(weights, name, 2)
        return tensor[None, None]
    if name.endswith("noise_strength"):
        return tensor.reshape(-1)
    if name.endswith(".const"):
        require_shape(weights, name, 3)
        return tensor[None]
    return tensor


def _architecture(weights: Weights) -> str:
    """As the settings say, or the names where there are none."""
    kinds = {value for name, value in weights.beside.items() if re.fullmatch(r"synthesis\.b\d+\.architecture", name)}
    if len(kinds) == 1:
        (kind,) = kinds
        if kind not in ("skip", "orig", "resnet"):
            raise CheckpointMismatchError(
                f"{weights.origin} is a StyleGAN2 of the architecture {kind!r}; known are skip, orig and resnet"
            )
        return kind
    if any(re.match(r"synthesis\.b\d+\.skip\.", name) for name in weights.tensors):
        return "resnet"
    colours = {m[1] for name in weights.tensors if (m := re.match(r"synthesis\.(b\d+)\.torgb\.", name))}
    blocks = {m[1] for name in weights.tensors if (m := re.match(r"synthesis\.(b\d+)\.conv1\.", name))}
    return "orig" if len(blocks) > 1 and len(colours) == 1 else "skip"


def require_known_layers(weights: Weights, what: str) -> None:
    """Raise CheckpointMismatchError where the settings beside the weights ask for other layers than those here."""
    for name, value in weights.beside.items():
        wanted = "linear" if re.search(r"(affine|embed|skip)\.activation$", name) else "lrelu"
        if name.startswith(("synthesis.", "mapping.")) and name.endswith(".activation") and value != wanted:
            raise CheckpointMismatchError(
                f"{weights.origin} is a {what} whose {name} is {value!r}: not supported, only {wanted!r}"
            )
        if re.fullmatch(r"mapping\.fc\d+\.bias_gain", name):
            rate = positive_setting(weights, name, None)
            if rate is None or not math.isclose(rate, MAPPING_RATE):
                raise CheckpointMismatchError(
                    f"{weights.origin} is a {what} whose mapping learns at {rate}: not supported, only {MAPPING_RATE}"
                )


def _take_clamps(weights: Weights, table: dict[str, str]) -> None:
    """The bounds of layers, which networks have that were trained with 16-bit layers, under the names here."""
    ours = {theirs.removesuffix(".bias"): name.removesuffix(".bias") for theirs, name in table.items()}
    for name in [name for name in weights.beside if name.endswith(".conv_clamp")]:
        part = ours.get(name.removesuffix(".conv_clamp"))
        if part is not None:
            weights.beside[f"{part.removesuffix('.activate')}.conv_clamp"] = weights.beside[name]


def _silent_layers(weights: Weights) -> None:
    """Layers trained without noise have neither a map nor a strength: strength 0, with a map that does not matter."""
    for name in [n for n in weights.beside if n.endswith(".use_noise") and weights.beside[n] is False]:
        weights.tensors.setdefault(f"{name.removesuffix('use_noise')}noise_strength", torch.zeros(1))
