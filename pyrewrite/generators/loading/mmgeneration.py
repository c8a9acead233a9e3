"""StyleGAN2 in the layout of mmgeneration and mmagic (StyleGANv2Generator).

The network is rosinality's; the names are longer: style_mapping.N.linear.weight_orig, conv1.conv.style_modulation,
noise_injector, injected_noise_N.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading import stylegan2
from pyrewrite.generators.loading._names import Weights
from pyrewrite.generators.stylegan2 import StyleGAN2

WHAT = "StyleGAN2 generator in the layout of mmgeneration"
_NAMES = re.compile(
    r"style_mapping\.\d+\.(linear\.weight_orig|bias)$|constant_input\.input$|injected_noise_\d+$|"
    r"(conv1|convs\.\d+|to_rgb1|to_rgbs\.\d+)\.(conv\.(weight_orig|style_modulation\.(linear\.weight_orig|bias)|"
    r"blur\.kernel)|noise_injector\.weight|activate\.bias|bias|upsample\.kernel)$"
)
_OWN = re.compile(r"style_mapping\.|constant_input\.|injected_noise_|.*weight_orig$|.*\.style_modulation\.")


def matching_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of this layout; none where not one is of this layout alone."""
    return sum(bool(_NAMES.match(name)) for name in tensors) if any(map(_OWN.match, tensors)) else 0


def load(weights: Weights, noise_seed: int) -> StyleGAN2:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    weights.tensors.pop("steps", None)  # how often the average was updated
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        ours = rosinality_name(name)
        if ours in renamed:
            raise CheckpointMismatchError(f"{weights.origin} holds {name!r} twice, in two layouts")
        renamed[ours] = tensor
    weights.tensors = renamed
    weights.shown = _file_name
    weights.notes.append(
        "mmgeneration: what it trains itself makes pictures in the order BGR, what it converted makes RGB; "
        "the file does not say which, and its order is kept"
    )
    return stylegan2.load(weights, noise_seed)


# Names here and ours; {} stands for what both have.
_PAIRS = (
    ("style_mapping.{}.linear.weight_orig", "style.{}.weight"),
    ("style_mapping.{}.bias", "style.{}.bias"),
    ("constant_input.input", "input.input"),
    ("injected_noise_{}", "noises.noise_{}"),
    ("{}.conv.style_modulation.linear.weight_orig", "{}.conv.modulation.weight"),
    ("{}.conv.style_modulation.bias", "{}.conv.modulation.bias"),
    ("{}.conv.weight_orig", "{}.conv.weight"),
    ("{}.noise_injector.weight", "{}.noise.weight"),
)


def _translated(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for pattern, wanted in pairs:
        if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", "(.+)"), name):
            return wanted.format(*match.groups())
    return name


def rosinality_name(name: str) -> str:
    """The rosinality name of a tensor of this layout; other names come back as they are."""
    return _translated(name, _PAIRS)


def _file_name(name: str) -> str:
    return _translated(name, ((ours, theirs) for theirs, ours in _PAIRS))
