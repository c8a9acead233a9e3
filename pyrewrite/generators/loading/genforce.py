"""Generators in the layout of the GenForce library: StyleGAN2 and Progressive GAN (its models/ folder).

StyleGAN2: mapping.denseN, truncation.w_avg, synthesis.early_layer, synthesis.layerN and outputN. Its up-sampling turns
the weight round before a transposed convolution, its filters are for correlations, and each style has 1 added to its
bias. Progressive GAN: layerN and outputN with weight and bias, one output for each resolution; the last is used.
"""

from __future__ import annotations

import re

from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading import progan, stylegan2
from pyrewrite.generators.loading._names import Weights, require_image_size, require_names, require_shape
from pyrewrite.generators.progan import ProGAN
from pyrewrite.generators.stylegan2 import StyleGAN2

STYLEGAN2 = "StyleGAN2 generator in GenForce's layout"
PGGAN = "Progressive GAN generator in GenForce's layout"
_STYLEGAN2_NAMES = re.compile(
    r"mapping\.(dense\d+\.|label_weight$)|truncation\.w_avg$|synthesis\.(early_layer|layer\d+|output\d+|upsample)\."
)
_PGGAN_NAMES = re.compile(r"(layer|output)\d+\.(weight|bias)$|lod$")


def matching_stylegan2_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of the StyleGAN2 layout."""
    return sum(bool(_STYLEGAN2_NAMES.match(name)) for name in tensors)


def matching_pggan_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of the Progressive GAN layout."""
    return sum(bool(_PGGAN_NAMES.match(name)) for name in tensors)


# -- StyleGAN2 ---------------------------------------------------------------------------------------------------------


def load_stylegan2(weights: Weights, noise_seed: int) -> StyleGAN2:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    tensors = weights.tensors
    layers = [int(m[1]) for name in tensors if (m := re.match(r"synthesis\.layer(\d+)\.", name))]
    convs = max(layers, default=0) + 1
    convs += 1 - convs % 2
    outputs = {m[1] for name in tensors if (m := re.match(r"synthesis\.output(\d+)\.", name))}
    alone = convs > 1 and outputs == {str(convs // 2)}  # the architecture "orig"
    mapping = max((int(m[1]) + 1 for n in tensors if (m := re.match(r"mapping\.dense(\d+)\.", n))), default=1)
    table = _stylegan2_names(mapping, convs, alone)
    if "mapping.label_weight" in tensors:
        table["mapping.label_weight"] = "label_concat.weight"
    optional = [n for n in table if n.endswith(".noise") or n == "truncation.w_avg"]
    shared = "synthesis.upsample.kernel"  # one filter for all skip connections
    if alone:
        tensors.pop(shared, None)
    expected = [n for n in table if n not in optional or n in tensors]
    require_names(weights, [*expected, *([shared] if convs > 1 and not alone else [])], STYLEGAN2)
    filter_of_skips = tensors.pop(shared, None)
    renamed = {table[name]: _converted(weights, name) for name in tensors}
    theirs = {ours: name for name, ours in table.items()}
    for level in range(0 if alone else convs // 2):
        name = f"to_rgbs.{level}.upsample.kernel"
        renamed[name], theirs[name] = _filter(filter_of_skips), shared
    weights.rename(renamed, theirs)
    return stylegan2.load(weights, noise_seed)


def _stylegan2_names(mapping: int, convs: int, alone: bool) -> dict[str, str]:
    """The name here of each name there. alone: whether the last block alone makes colours."""
    table = {f"mapping.dense{n}.{part}": f"style.{n + 1}.{part}" for n in range(mapping) for part in ("weight", "bias")}
    table |= {"truncation.w_avg": "latent_avg", "synthesis.early_layer.const": "input.input"}
    styled = {"weight": "conv.weight", "style.weight": "conv.modulation.weight", "style.bias": "conv.modulation.bias"}
    for n in range(convs):
        ours = f"convs.{n - 1}" if n else "conv1"
        parts = {**styled, "bias": "activate.bias", "noise_strength": "noise.weight"}
        table |= {f"synthesis.layer{n}.{name}": f"{ours}.{part}" for name, part in parts.items()}
        table[f"synthesis.layer{n}.noise"] = f"noises.noise_{n}"
        if n % 2:
            table[f"synthesis.layer{n}.filter.kernel"] = f"{ours}.conv.blur.kernel"
        elif not alone or n == convs - 1:
            rgb = f"to_rgbs.{n // 2 - 1}" if n else "to_rgb1"
            parts = {**styled, "bias": "bias"}
            table |= {f"synthesis.output{n // 2}.{name}": f"{rgb}.{part}" for name, part in parts.items()}
    return table


def _filter(kernel: Tensor) -> Tensor:
    """1 x 1 x f x f, for a correlation -> f x f, for a convolution."""
    return kernel.reshape(kernel.shape[-2:]).flip(0, 1) if kernel.ndim == 4 else kernel


def _converted(weights: Weights, name: str) -> Tensor:
    tensor = weights.tensors[name]
    if match := re.fullmatch(r"synthesis\.(layer|output)(\d+)\.weight", name):
        require_shape(weights, name, 4)
        turned = match[1] == "layer" and int(match[2]) % 2
        return (tensor.flip(2, 3) if turned else tensor)[None]
    if name.endswith(".style.bias"):
        return tensor + 1
    if name.endswith(".filter.kernel"):
        return _filter(tensor)
    if name.endswith(".noise_strength"):
        return tensor.reshape(-1)
    if re.fullmatch(r"synthesis\.output\d+\.bias", name):
        return tensor.reshape(1, -1, 1, 1)
    return tensor


# -- Progressive GAN ---------------------------------------------------------------------------------------------------


def load_pggan(weights: Weights, noise_seed: int) -> ProGAN:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    tensors = weights.tensors
    lod = tensors.pop("lod", None)
    if lod is not None and float(lod) != 0:
        raise CheckpointMismatchError(
            f"{weights.origin} is a {PGGAN} that has not finished growing: its lod is {float(lod):g}, expected 0"
        )
    count = max((int(m[1]) + 1 for name in tensors if (m := re.match(r"layer(\d+)\.", name))), default=1)
    count = max(count + count % 2, 2)
    outputs = range(count // 2)
    names = [f"{kind}.{part}" for kind in (f"layer{n}" for n in range(count)) for part in ("weight", "bias")]
    smaller = [f"output{n}.{part}" for n in outputs[:-1] for part in ("weight", "bias")]
    last = f"output{outputs[-1]}"
    present = [name for name in smaller if name in tensors]
    require_names(weights, [*names, f"{last}.weight", f"{last}.bias", *present], PGGAN)
    if present:
        weights.notes.append(f"colours taken from {last!r}, those of the highest resolution")
    size = require_shape(weights, "layer0.weight", 4)[-1] * 2 ** (count // 2 - 1)
    require_image_size(weights, size)
    renamed, theirs = {}, {}
    fused = _fused(weights, count)
    for n, name in [*enumerate(f"layer{n}" for n in range(count)), (-1, last)]:
        weight = tensors[f"{name}.weight"]
        if fused and n > 0 and n % 2 == 0:  # I x O x k x k of a transposed convolution: the kernel is turned round
            weight = weight.transpose(0, 1).flip(2, 3)
        ours = f"layer{n + 1}" if n >= 0 else f"output_{size}x{size}"
        renamed |= {f"{ours}.conv.weight": weight, f"{ours}.wscale.b": tensors[f"{name}.bias"]}
        theirs |= {f"{ours}.conv.weight": f"{name}.weight", f"{ours}.wscale.b": f"{name}.bias"}
    weights.rename(renamed, theirs)
    return progan.load(weights)


def _fused(weights: Weights, count: int) -> bool:
    """Whether the up-sampling layers hold transposed weights, as the shape of at least one tells."""
    fused = False
    for n in range(2, count, 2):
        before = require_shape(weights, f"layer{n - 1}.weight", 4)[0]
        o, i = require_shape(weights, f"layer{n}.weight", 4)[:2]
        if i == before and o != before:
            return False
        fused |= o == before and i != before
    return fused
