"""Progressive GAN weights under the names and in the layouts of its TensorFlow code, as some converters keep them.

4x4/Dense, 4x4/Conv, RxR/Conv0_up or Conv0, RxR/Conv1 and ToRGB_lodN, each with weight and bias. Convolutions there are
k x k x I x O; Conv0_up is the weight of a transposed one, k x k x O x I, and turned round; Dense is z x (O 4 4).
"""

from __future__ import annotations

import re

from torch import Tensor

from pyrewrite.errors import CheckpointMismatchError
from pyrewrite.generators.loading import progan
from pyrewrite.generators.loading._names import Weights, require_names, require_shape
from pyrewrite.generators.progan import ProGAN

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
