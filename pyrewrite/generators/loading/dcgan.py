"""DCGAN state dicts as the PyTorch tutorial writes them: main.N, every third entry a transposed convolution."""

from __future__ import annotations

import re

from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.dcgan import DCGAN, DCGANShape
from pyrewrite.generators.loading._names import Weights, fill, require_image_size, require_names, require_shape

WHAT = "DCGAN generator"
_NAMES = re.compile(r"main\.(\d+)\.(weight|bias|running_mean|running_var|num_batches_tracked)$")
_NORM = ("weight", "bias", "running_mean", "running_var")


def matching_names(tensors: dict[str, Tensor]) -> int:
    """How many of the names are those of this family."""
    return sum(bool(_NAMES.match(name)) for name in tensors)


def load(weights: Weights, seed: int) -> DCGAN:
    """Build the generator that the weights describe. Raises CheckpointMismatchError or NonFiniteWeightsError.

    Strides and padding are not in the file: they are the tutorial's, by which each layer but the first doubles the
    resolution whatever its (even) kernel.
    """
    weights.tensors = {n: t for n, t in weights.tensors.items() if not n.endswith(".num_batches_tracked")}
    _refuse_discriminators(weights)
    count = max(-(-int(m[1]) // 3) for name in weights.tensors if (m := _NAMES.match(name))) + 1
    convs = [f"main.{3 * n}" for n in range(count)]
    names = [f"{conv}.weight" for conv in convs]
    names += [f"main.{3 * n + 1}.{part}" for n in range(count - 1) for part in _NORM]
    biased = [f"{conv}.bias" in weights.tensors for conv in convs]
    require_names(weights, names + [f"{c}.bias" for c, has in zip(convs, biased, strict=True) if has], WHAT)

    sizes, channels = [], None
    for n, conv in enumerate(convs):
        i, o, kh, kw = require_shape(weights, f"{conv}.weight", 4)
        if kh != kw or (channels is not None and i != channels) or (n and kh % 2):
            expected = "(z, channels, k, k)" if n == 0 else f"({channels}, channels, k, k) with k even"
            raise CheckpointMismatchError(
                f"{weights.origin}: {conv}.weight is {(i, o, kh, kw)}, expected {expected} in a {WHAT}"
            )
        sizes.append((o, i, kh, biased[n]))
        channels = o
    if channels not in (1, 3):
        raise CheckpointMismatchError(
            f"{weights.origin} makes images of {channels} channels; 1 (grey) and 3 (RGB) are supported"
        )
    require_image_size(weights, sizes[0][2] * 2 ** (count - 1))
    generator = DCGAN(DCGANShape(tuple(sizes)))
    generator.notes += weights.notes
    _rename(weights, count)
    fill(generator, weights, WHAT)
    return generator


def _rename(weights: Weights, count: int) -> None:
    renamed, theirs = {}, {}
    for n in range(count):
        for number, part in ((3 * n, "conv"), (3 * n + 1, "norm")):
            for name in _NORM:
                if (name_there := f"main.{number}.{name}") in weights.tensors:
                    theirs[f"layer{n + 1}.{part}.{name}"] = name_there
    for ours, name in theirs.items():
        tensor = weights.tensors[name]
        if ours.endswith(".conv.weight"):  # I x O x k x k -> O x I x k x k
            tensor = tensor.transpose(0, 1).flip(2, 3) if ours.startswith("layer1.") else tensor.transpose(0, 1)
        renamed[ours] = tensor
    weights.rename(renamed, theirs)


def _refuse_discriminators(weights: Weights) -> None:
    """Raise for the tutorial's other network: it ends in one number and has no batch norm after its first layer."""
    shapes = {int(m[1]): t.shape for n, t in weights.tensors.items() if (m := re.fullmatch(r"main\.(\d+)\.weight", n))}
    convs = [shapes[n] for n in sorted(shapes) if len(shapes[n]) == 4]
    if 2 in shapes and len(shapes[2]) == 4 and convs[-1][0] == 1:
        raise CheckpointMismatchError(f"{weights.origin} holds a discriminator of DCGAN, not a generator")
