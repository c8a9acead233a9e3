"""Progressive GAN checkpoints: layerN names (plain or under `state_dict`) and the older features.N names."""

from __future__ import annotations

import math
import re

from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading._names import Weights, fill, require_image_size, require_names, require_shape
from pyrewrite.generators.progan import ProGAN, ProGANShape

WHAT = "Progressive GAN generator"
_NAMES = re.compile(r"(layer\d+|features\.\d+|output(_\d+x\d+)?)\.(conv\.weight|wscale\.\w+)$")


def matching_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of this family."""
    return sum(bool(_NAMES.match(name)) for name in tensors)


def matching_interfacegan_names(tensors: dict[str, Tensor]) -> int:
    """The same of a file whose biases have InterFaceGAN's names; 0 for one with the official tool's."""
    return matching_names(tensors) if any(name.endswith(".wscale.bias") for name in tensors) else 0


def load(weights: Weights) -> ProGAN:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    _number_from_one(weights)
    old = any(name.startswith("features.") for name in weights.tensors)
    weights.tensors = {
        re.sub(r"^features\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.", name): t
        for name, t in weights.tensors.items()
    }
    count = max((int(m[1]) for name in weights.tensors if (m := re.match(r"layer(\d+)\.", name))), default=0)
    count = max(count + count % 2, 2)  # two layers for each resolution
    layers = [f"layer{n}" for n in range(1, count + 1)]
    base = weights.tensors["layer1.conv.weight"].shape[-1] if "layer1.conv.weight" in weights.tensors else 4
    size = base * 2 ** (count // 2 - 1)
    require_image_size(weights, size)
    output = f"output_{size}x{size}"
    if old:
        weights.tensors = {re.sub(r"^output\.", f"{output}.", name): t for name, t in weights.tensors.items()}
    scales = {name: weights.tensors.pop(name) for name in list(weights.tensors) if name.endswith(".wscale.scale")}
    require_names(
        weights, [f"{name}.{part}" for name in (*layers, output) for part in ("conv.weight", "wscale.b")], WHAT
    )

    sizes, channels = [], None
    for n, name in enumerate(layers):
        o, i, kh, kw = require_shape(weights, f"{name}.conv.weight", 4)
        if kh != kw or (channels is not None and i != channels) or (n and kh % 2 == 0):
            expected = "(channels, z, 4, 4)" if n == 0 else f"(channels, {channels}, k, k) with k odd"
            raise CheckpointMismatchError(
                f"{weights.origin}: {weights.shown(f'{name}.conv.weight')} is {(o, i, kh, kw)}, expected {expected}"
            )
        sizes.append((o, i, kh))
        channels = o
    image_channels = require_shape(weights, f"{output}.conv.weight", 4)[0]
    if image_channels not in (1, 3):
        raise CheckpointMismatchError(
            f"{weights.origin} makes images of {image_channels} channels; 1 (grey) and 3 (RGB) are supported"
        )
    generator = ProGAN(ProGANShape(tuple(sizes), image_channels))
    generator.notes += weights.notes
    _check_scales(generator, weights, scales)
    fill(generator, weights, WHAT)
    return generator


def _number_from_one(weights: Weights) -> None:
    """The names of InterFaceGAN's files: layers from 0, and the bias under its full name."""
    if not any(name.endswith(".wscale.bias") for name in weights.tensors):
        return
    weights.tensors.pop("lod", None)
    first = 1 if any(name.startswith("layer0.") for name in weights.tensors) else 0
    renamed, theirs = {}, {}
    for name, tensor in weights.tensors.items():
        ours = re.sub(r"^layer(\d+)\.", lambda m: f"layer{int(m[1]) + first}.", name)
        ours = ours.replace(".wscale.bias", ".wscale.b")
        renamed[ours], theirs[ours] = tensor, name
    weights.rename(renamed, theirs)


def _check_scales(generator: ProGAN, weights: Weights, scales: dict[str, Tensor]) -> None:
    """Old files store the constant that follows each convolution; it is part of the architecture here."""
    for name, stored in scales.items():
        block = getattr(generator, name.removesuffix(".wscale.scale"), None)
        if block is None or stored.numel() != 1 or not math.isclose(float(stored), block.scale, rel_tol=1e-3):
            expected = "no such layer" if block is None else f"expected {block.scale:.6g}"
            raise CheckpointMismatchError(f"{weights.origin}: {name} is {stored.flatten()[:1].tolist()}, {expected}")
