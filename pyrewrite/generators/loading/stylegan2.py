"""StyleGAN2 checkpoints: the rosinality layout, and the sequential names of the official rewriting tool."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading._names import (
    Weights,
    fill,
    positive_setting,
    require_image_size,
    require_names,
    require_shape,
)
from pyrewrite.generators.stylegan2 import StyleGAN2, StyleGAN2Shape
from pyrewrite.generators.styles import MEAN_SAMPLES

WHAT = "StyleGAN2 generator"
_NAMES = re.compile(
    r"(style|convs|to_rgbs|noises|conv1|to_rgb\d+|up_rgb\d+|input|latents)\.|layer\d+\.s?conv\.(mconv|noise|activate)\."
)
_SEQUENTIAL = re.compile(r"layer\d+\.s?conv\.mconv\.")
_MEAN_NAMES = (
    "latent_avg",
    "latents.latent_avg",
    "style.latent_avg",
    "mean_latent",
    "latent_mean",
    "w_avg",
    "dlatent_avg",
    "mean_w",
    "w_mean",
    "truncation_latent",
)


def matching_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of this family."""
    return sum(bool(_NAMES.match(name)) for name in tensors)


def matching_sequential_names(tensors: dict[str, Tensor]) -> int:
    """The same of a file with the official tool's names; 0 for one with rosinality's."""
    return matching_names(tensors) if any(_SEQUENTIAL.match(name) for name in tensors) else 0


def rosinality_name(name: str) -> str:
    """The name in the rosinality layout of a tensor of the sequential layout; other names come back as they are.

    layer2.conv is conv1; layerN.sconv is convs.(N - 3); within both, mconv is conv, with the weight in mconv or in
    mconv.dconv.
    to_rgb1.rgb is to_rgb1; to_rgbN.rgb is to_rgbs.(N - 2), whose skip filter is up_rgb(N - 1).
    """
    if match := re.fullmatch(r"layer(\d+)\.s?conv\.(.+)", name):
        number, rest = int(match[1]), match[2]
        rest = re.sub(r"^mconv\.(dconv\.)?", "conv.", rest)
        return f"conv1.{rest}" if number == 2 else f"convs.{number - 3}.{rest}"
    if match := re.fullmatch(r"to_rgb(\d+)\.rgb\.(.+)", name):
        number = int(match[1])
        return f"to_rgb1.{match[2]}" if number == 1 else f"to_rgbs.{number - 2}.{match[2]}"
    if match := re.fullmatch(r"up_rgb(\d+)\.kernel", name):
        return f"to_rgbs.{int(match[1]) - 1}.upsample.kernel"
    return name


def load(weights: Weights, noise_seed: int) -> StyleGAN2:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    _rename(weights)
    mean = _take_mean(weights)
    mapping = _count(weights, r"style\.(\d+)\.")
    convs = max(
        _count(weights, r"convs\.(\d+)\.") + 1,
        _count(weights, r"noises\.noise_(\d+)$"),
        2 * _count(weights, r"to_rgbs\.(\d+)\.") + 1,
    )
    convs += 1 - convs % 2  # conv1, then two for each doubling
    _refuse_other_labels(weights)
    architecture = _architecture(weights, convs)
    if architecture == "orig":  # a filter that such a network may have and does not use
        weights.tensors.pop(f"to_rgbs.{convs // 2 - 1}.upsample.kernel", None)
    noises = [f"noises.noise_{n}" for n in range(convs)]
    missing_noises = [name for name in noises if name not in weights.tensors]
    names = _expected_names(max(mapping - 1, 1), convs, architecture)
    if any(name.startswith("embed.") for name in weights.tensors):
        names += ["embed.weight", "embed.bias"]
    if "label_concat.weight" in weights.tensors:
        names.append("label_concat.weight")
    require_names(weights, [*names, *(name for name in noises if name in weights.tensors)], WHAT)

    shape = _shape(weights, max(mapping - 1, 1), convs, architecture)
    generator = StyleGAN2(shape)
    generator.notes += weights.notes
    if generator.classes:
        generator.notes.append(f"{generator.classes} class labels: images are of class 0 until `label` is set")
    for name, part in generator.clamping_parts().items():
        part.clamp = positive_setting(weights, f"{name}.conv_clamp", None)
    _make_noises(generator, weights, missing_noises, noise_seed)
    weights.tensors["latent_avg"] = torch.zeros(shape.mapping[-1]) if mean is None else mean
    fill(generator, weights, WHAT)
    if mean is None:
        generator.latent_avg.copy_(generator.estimated_mean_latent())
        generator.notes.append(f"the file holds no mean latent: estimated from {MEAN_SAMPLES} seeded latents")
    return generator


def _rename(weights: Weights) -> None:
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        new = rosinality_name(name)
        if new in renamed:
            raise CheckpointMismatchError(
                f"{weights.origin} holds {new!r} twice, in the rosinality and in the sequential layout"
            )
        renamed[new] = tensor
    weights.tensors = renamed


def _count(weights: Weights, pattern: str) -> int:
    """One more than the largest number in the names that match."""
    return max((int(match[1]) + 1 for name in weights.tensors if (match := re.match(pattern, name))), default=0)


def _take_mean(weights: Weights) -> Tensor | None:
    """Remove the mean latent from wherever it stands.

    None where there is none, or only the scalar that the official tool starts with.
    """
    for name in _MEAN_NAMES:
        mean = weights.tensors.pop(name, None)
        if mean is None:
            mean = weights.beside.get(name)
        if isinstance(mean, Tensor) and mean.ndim > 0:
            rows = mean.reshape(-1, mean.shape[-1])
            if not torch.equal(rows, rows[:1].expand_as(rows)):
                raise CheckpointMismatchError(
                    f"{weights.origin}: {name} is {tuple(mean.shape)} with different rows, expected one mean latent"
                )
            if name != "latent_avg":
                weights.notes.append(f"mean latent taken from {name!r}")
            return rows[0]
    return None


def _architecture(weights: Weights, convs: int) -> str:
    if any(name.startswith("skips.") for name in weights.tensors):
        return "resnet"
    outputs = {match[0] for name in weights.tensors if (match := re.match(r"to_rgb1|to_rgbs\.\d+", name))}
    return "orig" if convs > 1 and outputs == {f"to_rgbs.{convs // 2 - 1}"} else "skip"


def _refuse_other_labels(weights: Weights) -> None:
    known = {"embed.weight", "embed.bias"}  # as NVIDIA's: a linear layer; a table of embeddings has no bias
    labels = [name for name in weights.tensors if "embed" in name or "label" in name]
    if known <= set(labels):
        labels = [name for name in labels if name not in known]
    elif labels == ["label_concat.weight"]:  # as TensorFlow's and GenForce's
        labels = []
    if labels:
        raise CheckpointMismatchError(
            f"{weights.origin} is a generator with class labels ({', '.join(labels[:3])}): not supported"
        )


def _expected_names(mapping: int, convs: int, architecture: str) -> list[str]:
    modulated = ("conv.weight", "conv.modulation.weight", "conv.modulation.bias")
    names = [f"style.{n}.{part}" for n in range(1, mapping + 1) for part in ("weight", "bias")]
    names.append("input.input")
    for n in range(convs):
        prefix = "conv1" if n == 0 else f"convs.{n - 1}"
        names += [f"{prefix}.{part}" for part in (*modulated, "noise.weight", "activate.bias")]
        if n % 2:
            names.append(f"{prefix}.conv.blur.kernel")
            if architecture == "resnet":
                names += [f"skips.{n // 2}.weight", f"skips.{n // 2}.upsample.kernel"]
        elif architecture == "skip" or n == convs - 1:
            rgb = "to_rgb1" if n == 0 else f"to_rgbs.{n // 2 - 1}"
            names += [f"{rgb}.{part}" for part in ("bias", *modulated)]
            if n and architecture == "skip":
                names.append(f"{rgb}.upsample.kernel")
    return names


def _shape(weights: Weights, mapping: int, convs: int, architecture: str) -> StyleGAN2Shape:
    widths = [require_shape(weights, f"style.{n}.weight", 2) for n in range(1, mapping + 1)]
    constant = require_shape(weights, "input.input", 4)
    if constant[2] != constant[3]:
        raise CheckpointMismatchError(
            f"{weights.origin}: {weights.shown('input.input')} is {constant}, expected a square"
        )
    require_image_size(weights, constant[2] * 2 ** (convs // 2))
    sizes, blurs, upsamples, channels = [], [], [], constant[1]
    for n in range(convs):
        name = "conv1" if n == 0 else f"convs.{n - 1}"
        one, o, i, kh, kw = require_shape(weights, f"{name}.conv.weight", 5)
        if one != 1 or kh != kw or kh % 2 == 0 or i != channels:
            shown, expected = weights.shown(f"{name}.conv.weight"), f"(1, channels, {channels}, k, k) with k odd"
            raise CheckpointMismatchError(f"{weights.origin}: {shown} is {(one, o, i, kh, kw)}, expected {expected}")
        sizes.append((o, i, kh))
        channels = o
        if n % 2:
            blurs.append(_filter_size(weights, f"{name}.conv.blur.kernel"))
        elif n and architecture != "orig":
            part = f"to_rgbs.{n // 2 - 1}" if architecture == "skip" else f"skips.{n // 2 - 1}"
            upsamples.append(_filter_size(weights, f"{part}.upsample.kernel"))
    last = "to_rgb1" if architecture == "skip" or convs == 1 else f"to_rgbs.{convs // 2 - 1}"
    image_channels = require_shape(weights, f"{last}.conv.weight", 5)[1]
    if image_channels not in (1, 3):
        raise CheckpointMismatchError(
            f"{weights.origin} makes images of {image_channels} channels; 1 (grey) and 3 (RGB) are supported"
        )
    joined, labels = "label_concat.weight" in weights.tensors, None
    if joined or "embed.weight" in weights.tensors:
        name = "label_concat.weight" if joined else "embed.weight"
        shape = require_shape(weights, name, 2)
        labels = shape if joined else shape[::-1]
        if labels[1] >= widths[0][1]:
            raise CheckpointMismatchError(
                f"{weights.origin}: {weights.shown(name)} is {shape}, an embedding of {labels[1]} numbers, expected "
                f"fewer than the {widths[0][1]} inputs of the mapping, which are z and these"
            )
    return StyleGAN2Shape(
        labels=labels,
        joined=joined,
        mapping=(widths[0][1], *(o for o, _ in widths)),
        base=constant[2],
        input=constant[1],
        convs=tuple(sizes),
        blurs=tuple(blurs),
        upsamples=tuple(upsamples),
        image_channels=image_channels,
        architecture=architecture,
    )


def _filter_size(weights: Weights, name: str) -> tuple[int, int]:
    height, width = require_shape(weights, name, 2)
    if height != width:
        raise CheckpointMismatchError(
            f"{weights.origin}: {weights.shown(name)} is {(height, width)}, expected a square filter"
        )
    return height, width


def _make_noises(generator: StyleGAN2, weights: Weights, missing: list[str], seed: int) -> None:
    """Fixed noise for the layers whose noise the file lacks: the draws of the official tool, layer after layer."""
    stream = np.random.RandomState(seed)  # this very stream is the definition
    for name, buffer in generator.noises.named_buffers():
        draw = stream.standard_normal(tuple(buffer.shape)).astype(np.float32)
        if f"noises.{name}" in missing:
            weights.tensors[f"noises.{name}"] = torch.from_numpy(draw)
    if missing:
        generator.notes.append(
            f"the file holds no noise for {len(missing)} of {len(generator.layers)} layers: made from seed {seed}"
        )
