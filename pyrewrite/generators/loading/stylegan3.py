"""StyleGAN3 in the layout of NVIDIA's stylegan3 repository: pickles, and state dicts of the same names.

Names as in training/networks_stylegan3.py there: mapping.fcN, mapping.w_avg; synthesis.input; synthesis.LN_S_C, the
layer number N of which maps of S pixels and C channels come; the last makes the colours. Sampling rates and factors
stand beside the weights in a pickle. A state dict has none: then they follow from the sizes, for all maps have the same
margin around the picture, and rates are powers of two.
"""

from __future__ import annotations

import re

import torch

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading._names import (
    MAX_IMAGE_SIZE,
    Weights,
    fill,
    positive_setting,
    require_names,
    require_shape,
)
from pyrewrite.generators.loading.nvidia import require_known_layers
from pyrewrite.generators.stylegan3 import StyleGAN3, StyleGAN3LayerShape, StyleGAN3Shape
from pyrewrite.generators.styles import MEAN_SAMPLES

WHAT = "StyleGAN3 generator in NVIDIA's layout"
_NAMES = re.compile(r"synthesis\.(L\d+_\d+_\d+|input)\.|mapping\.(fc\d+|embed)\.|mapping\.w_avg$")
_LAYER = re.compile(r"synthesis\.(L(\d+)_(\d+)_(\d+))\.")
_INPUT = ("weight", "transform", "freqs", "phases", "affine.weight", "affine.bias")
_PARTS = ("weight", "bias", "magnitude_ema", "affine.weight", "affine.bias")

# The published values of what only pickles say.
_MARGIN, _BANDWIDTH, _CLAMP, _OUTPUT_SCALE, _LRELU_RATE = 10, 2.0, 256.0, 0.25, 2
_LARGEST_MARGIN, _LARGEST_FACTOR, _LARGEST_SIZE = 64, 16, 2 * MAX_IMAGE_SIZE


def matching_names(tensors: dict[str, torch.Tensor]) -> int:
    """How many of the names are those of this layout, where any is that of a layer."""
    count = sum(bool(_NAMES.match(name)) for name in tensors)
    return count if any(name.startswith("synthesis.L") for name in tensors) else 0


def file_name(generator: StyleGAN3, name: str) -> str:
    """NVIDIA's name of a parameter or buffer of the generator."""
    first, _, rest = name.partition(".")
    if first == "latent_avg":
        return "mapping.w_avg"
    if first == "embed":
        return f"mapping.{name}"
    if first == "input":
        return f"synthesis.{name}"
    if first == "style":
        number, part = rest.split(".")
        return f"mapping.fc{int(number) - 1}.{part}"
    number, _, part = rest.partition(".") if first == "convs" else (len(generator.convs), "", rest)
    return f"synthesis.{_layer_name(generator, int(number))}.{part}"


def _layer_name(generator: StyleGAN3, number: int) -> str:
    shape = [*generator.convs, generator.to_rgb][number].shape
    return f"L{number}_{shape.out_size}_{shape.weight[0]}"


def file_settings(generator: StyleGAN3) -> dict[str, float]:
    """What NVIDIA's pickles say beside the weights, and `load` reads there."""
    settings: dict[str, float] = {
        "synthesis.output_scale": generator.output_scale,
        "synthesis.input.sampling_rate": generator.input.rate,
        "synthesis.input.bandwidth": generator.input.bandwidth,
    }
    for number, conv in enumerate([*generator.convs, generator.to_rgb]):
        name = f"synthesis.{_layer_name(generator, number)}"
        settings |= {f"{name}.up_factor": conv.shape.up, f"{name}.down_factor": conv.shape.down}
        if conv.clamp is not None:
            settings[f"{name}.conv_clamp"] = conv.clamp
    return settings


def load(weights: Weights) -> StyleGAN3:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError."""
    require_known_layers(weights, "StyleGAN3")
    names, sizes = _layers(weights)
    count = max((int(m[1]) + 1 for n in weights.tensors if (m := re.match(r"mapping\.fc(\d+)\.", n))), default=1)
    rate, factors = _rates(weights, names, sizes)
    expected = [f"mapping.fc{n}.{part}" for n in range(count) for part in ("weight", "bias")]
    if any(name.startswith("mapping.embed.") for name in weights.tensors):
        expected += ["mapping.embed.weight", "mapping.embed.bias"]
    expected += [f"synthesis.input.{part}" for part in _INPUT]
    for name, (up, down) in zip(names, factors, strict=True):
        expected += [f"synthesis.{name}.{part}" for part in _PARTS]
        expected += [f"synthesis.{name}.{kind}_filter" for kind, factor in (("up", up), ("down", down)) if factor > 1]
    mean = weights.tensors.pop("mapping.w_avg", None)
    require_names(weights, expected, WHAT)

    generator = StyleGAN3(_shape(weights, names, sizes, rate, factors, count))
    generator.notes += weights.notes
    if generator.classes:
        generator.notes.append(f"{generator.classes} class labels: images are of class 0 until `label` is set")
    weights.tensors["mapping.w_avg"] = torch.zeros(generator.w_dim) if mean is None else mean
    theirs = {name: file_name(generator, name) for name in generator.state_dict()}
    weights.rename({name: weights.tensors[their] for name, their in theirs.items()}, theirs)
    fill(generator, weights, WHAT)
    if mean is None:
        generator.latent_avg.copy_(generator.estimated_mean_latent())
        generator.notes.append(f"the file holds no mean latent: estimated from {MEAN_SAMPLES} seeded latents")
    return generator


def _layers(weights: Weights) -> tuple[list[str], list[int]]:
    """Names such as L0_36_512, in order, and the sizes of the maps that the layers put out."""
    found = {(int(m[2]), m[1], int(m[3])) for name in weights.tensors if (m := _LAYER.match(name))}
    layers = sorted(found)
    if [number for number, *_ in layers] != list(range(len(layers))) or len(layers) < 2:
        raise CheckpointMismatchError(
            f"{weights.origin} is not a whole {WHAT}: its layers are {', '.join(name for _, name, _ in layers[:20])}; "
            "expected L0_..., L1_... and so on, two at least"
        )
    sizes = [size for *_, size in layers]
    if not all(0 < size <= _LARGEST_SIZE for size in sizes):
        raise CheckpointMismatchError(
            f"{weights.origin}: layers of {sizes} pixels, expected 1 to {_LARGEST_SIZE}: no generator is larger"
        )
    return [name for _, name, _ in layers], sizes


def _rates(weights: Weights, names: list[str], sizes: list[int]) -> tuple[int, list[tuple[int, int]]]:
    """The sampling rate of the Fourier features, and the factors before and after each leaky ReLU."""
    if "synthesis.input.sampling_rate" not in weights.beside:
        return _rates_from_sizes(weights, sizes)
    rate = _number(weights, "synthesis.input.sampling_rate", 1, _LARGEST_SIZE)
    factors, current = [], rate
    for name in names:
        up, down = (_number(weights, f"synthesis.{name}.{f}_factor", 1, _LARGEST_FACTOR) for f in ("up", "down"))
        if current * up % down:
            raise CheckpointMismatchError(
                f"{weights.origin}: {name} brings a rate of {current} to {current * up / down}"
            )
        factors.append((up, down))
        current = current * up // down
    return rate, factors


def _rates_from_sizes(weights: Weights, sizes: list[int]) -> tuple[int, list[tuple[int, int]]]:
    for margin in (_MARGIN, *range(_LARGEST_MARGIN + 1)):
        rates = [*(size - 2 * margin for size in sizes[:-2]), sizes[-1], sizes[-1]]
        powers = all(rate > 2 * _BANDWIDTH and rate & (rate - 1) == 0 for rate in rates)
        if powers and rates == sorted(rates) and sizes[-2] == sizes[-1]:
            break
    else:
        raise CheckpointMismatchError(
            f"{weights.origin} says nothing of its sampling rates, and sizes of {sizes} pixels do not tell them: "
            "expected powers of two and a margin that is the same everywhere, the last two without it"
        )
    weights.notes.append(
        f"the file holds weights alone: rates are taken from the sizes (a margin of {margin} pixels), layers are "
        f"clamped at {_CLAMP:g} and pictures scaled by {_OUTPUT_SCALE:g}, as published"
    )
    factors = []
    for before, after in zip([rates[0], *rates], rates[:-1], strict=False):
        high = _LRELU_RATE * max(before, after)
        factors.append((high // before, high // after))
    return rates[0], [*factors[: len(sizes) - 1], (1, 1)]


def _number(weights: Weights, name: str, least: int, most: int) -> int:
    value = weights.beside.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or not least <= value <= most:
        raise CheckpointMismatchError(
            f"{weights.origin}: {name} is {value!r}, expected a whole number from {least} to {most}"
        )
    if value != int(value):
        raise CheckpointMismatchError(f"{weights.origin}: {name} is {value!r}, expected a whole number")
    return int(value)


def _shape(
    weights: Weights, names: list[str], sizes: list[int], rate: int, factors: list[tuple[int, int]], mapping: int
) -> StyleGAN3Shape:
    alone = "synthesis.input.sampling_rate" not in weights.beside
    widths = [require_shape(weights, f"mapping.fc{n}.weight", 2) for n in range(mapping)]
    labels = (
        require_shape(weights, "mapping.embed.weight", 2)[::-1] if "mapping.embed.weight" in weights.tensors else None
    )
    if labels is not None and labels[1] >= widths[0][1]:
        raise CheckpointMismatchError(
            f"{weights.origin}: mapping.embed.weight is {labels[::-1]}, expected fewer rows than the {widths[0][1]} "
            "inputs of the mapping, which are z and these"
        )
    layers, channels = [], require_shape(weights, "synthesis.input.weight", 2)[0]
    for name, size, before, (up, down) in zip(names, sizes, [sizes[0], *sizes], factors, strict=False):
        o, i, kh, kw = require_shape(weights, f"synthesis.{name}.weight", 4)
        if i != channels or kh != kw or o != int(name.rsplit("_", 1)[1]):
            raise CheckpointMismatchError(
                f"{weights.origin}: synthesis.{name}.weight is {(o, i, kh, kw)}, expected (as the name says, "
                f"{channels}, k, k)"
            )
        filters = [_filter_shape(weights, f"synthesis.{name}.{kind}_filter") for kind in ("up", "down")]
        layers.append(StyleGAN3LayerShape((o, i, kh), before, size, up, down, *filters))
        channels = o
    rgb = layers.pop()
    if rgb.weight[2] != 1 or (rgb.up, rgb.down) != (1, 1) or rgb.in_size != rgb.out_size:
        raise CheckpointMismatchError(
            f"{weights.origin}: the last layer, {names[-1]}, is not one of 1 x 1 filters that keeps the size of "
            f"{rgb.in_size} pixels"
        )
    if rgb.weight[0] not in (1, 3):
        raise CheckpointMismatchError(
            f"{weights.origin} makes images of {rgb.weight[0]} channels; 1 (grey) and 3 (RGB) are supported"
        )
    largest = float(weights.tensors["synthesis.input.freqs"].double().norm(dim=-1).max())
    bandwidth = positive_setting(weights, "synthesis.input.bandwidth", max(_BANDWIDTH, largest))
    if not bandwidth < rate / 2:
        raise CheckpointMismatchError(
            f"{weights.origin}: Fourier features of frequencies up to {bandwidth:g} need a sampling rate above "
            f"{2 * bandwidth:g}, this is {rate}"
        )
    clamp = _CLAMP if alone else None
    return StyleGAN3Shape(
        mapping=(widths[0][1], *(o for o, _ in widths)),
        input_rate=rate,
        bandwidth=float(bandwidth),
        layers=tuple(layers),
        rgb=rgb,
        output_scale=float(positive_setting(weights, "synthesis.output_scale", _OUTPUT_SCALE)),
        clamp=tuple(positive_setting(weights, f"synthesis.{name}.conv_clamp", clamp) for name in names),
        labels=labels,
    )


def _filter_shape(weights: Weights, name: str) -> tuple[int, ...] | None:
    if name not in weights.tensors:
        return None
    shape = require_shape(weights, name, max(1, min(2, weights.tensors[name].ndim)))
    if shape[0] != shape[-1]:
        raise CheckpointMismatchError(f"{weights.origin}: {weights.shown(name)} is {shape}, expected a square filter")
    return shape
