"""Finding images by what their keys look like: those that a rule's direction fires on, and where in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics.collect import Keep, Progress, check_count, key_pixels, report, scan_keys
from pyrewrite.statistics.quantiles import UnitQuantiles

if TYPE_CHECKING:
    from pyrewrite.generators.base import EditableLayer, Generator


@dataclass(frozen=True)
class DirectionScan:
    """How strongly one direction fires on every image of a seed.

    scores: float32, one per image, the largest d . k of its pixels. quantiles: of d . k over all pixels of all images
    (one unit), for the threshold of `match_mask`.
    """

    scores: Tensor
    quantiles: UnitQuantiles

    def top(self, k: int = 12, *, exclude: Iterable[int] = ()) -> list[tuple[int, float]]:
        """The k best images as (number, score), best first, equal scores by number; fewer where there are fewer."""
        check_count("k", k)
        left_out = set(exclude)
        scores = self.scores.tolist()
        order = sorted((-score, number) for number, score in enumerate(scores) if number not in left_out)
        return [(number, -score) for score, number in order[:k]]

    def threshold(self, quantile: float = 0.999) -> float:
        """The value that d . k exceeds in the rest of all pixels: 0.999 marks the strongest thousandth."""
        return float(self.quantiles.quantile(quantile))


class KeptKeys:
    """The keys of a pass over images 0 to n - 1, in half precision: another direction is scanned without running them.

    add: what a pass hands out batch after batch (`keep` of `scan_direction` and `collect`). Values are kept as float16
    parts of the largest one of their batch: a score is off by about 1e-4 of itself.
    """

    def __init__(self) -> None:
        self.images = 0
        self._parts: list[tuple[Tensor, float]] = []  # B x I x h x w float16, what one is worth

    @staticmethod
    def bytes_of(layer: EditableLayer, images: int) -> int:
        """What the keys of so many images take."""
        return 2 * images * layer.in_channels * key_pixels(layer)

    def add(self, first: int, keys: Tensor) -> None:
        """keys: B x I x h x w, of image number `first` on. Image 0 begins again."""
        if first == 0:
            self.images, self._parts = 0, []
        unit = float(keys.abs().amax()) or 1.0
        self._parts.append(((keys.detach() / unit).to("cpu", torch.float16), unit))
        self.images += len(keys)

    def scan(self, direction: Tensor, progress: Progress | bool | None = None) -> DirectionScan:
        """`scan_direction` of the images whose keys are kept."""
        if not self._parts:
            raise ValueError("no keys have been kept yet")
        direction = _checked_direction(direction, self._parts[0][0].shape[1]).cpu()
        scanning, done = _Scanning(torch.device("cpu")), 0
        with report(progress, self.images, "kept keys") as advance:
            for part, unit in self._parts:
                scanning.add(unit * match(part, direction))
                done += len(part)
                advance(done)
        return scanning.result()


class _Scanning:
    """A DirectionScan in the making."""

    def __init__(self, device: torch.device) -> None:
        self.scores: list[Tensor] = []
        # One unit only: it can afford to be exact for far longer.
        self.quantiles = UnitQuantiles(1, resolution=1 << 18, device=device)

    def add(self, matches: Tensor) -> None:
        """matches: B x h x w."""
        self.scores.append(matches.flatten(1).amax(1))
        self.quantiles.add(matches.unsqueeze(1))

    def result(self) -> DirectionScan:
        return DirectionScan(torch.cat(self.scores).cpu(), self.quantiles)


def scan_direction(
    generator: Generator,
    layer: str,
    direction: Tensor,
    *,
    samples: int = 1000,
    seed: int = 1,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
    keep: Keep | None = None,
) -> DirectionScan:
    """Run images 0 to samples - 1 up to a layer and score them with a direction (I, or 1 x I).

    keep: gets (number of the first image, keys) of every batch, as KeptKeys.add does.
    ValueError for another length, NonFiniteError for NaN in the direction or the activations.
    """
    direction = _checked_direction(direction, generator.layers[layer].in_channels).to(generator.device)

    def add(scanning: _Scanning, first: int, keys: Tensor) -> None:
        scanning.add(match(keys, direction))
        if keep is not None:
            keep(first, keys)

    scanning, _ = scan_keys(
        generator, layer, lambda: _Scanning(generator.device), add,
        samples=samples, seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    return scanning.result()


def top_images(
    generator: Generator,
    layer: str,
    direction: Tensor,
    *,
    samples: int = 1000,
    seed: int = 1,
    k: int = 12,
    exclude: Iterable[int] = (),
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
) -> list[tuple[int, float]]:
    """The k images on which a direction (I) fires most, as (number, score), best first.

    score: the largest d . k of the image's pixels. exclude: image numbers to leave out. See `scan_direction`.
    """
    check_count("k", k)
    scan = scan_direction(
        generator, layer, direction, samples=samples, seed=seed, batch_size=batch_size, progress=progress
    )
    return scan.top(k, exclude=exclude)


def match(keys: Tensor, direction: Tensor) -> Tensor:
    """d . k at every pixel: keys B x I x h x w (or I x h x w), direction I -> B x h x w (or h x w) float32."""
    if keys.ndim not in (3, 4):
        raise ValueError(f"expected keys B x I x h x w or I x h x w, got shape {tuple(keys.shape)}")
    direction = _checked_direction(direction, keys.shape[-3])
    return torch.einsum("i,...ihw->...hw", direction.to(keys.device, torch.float32), keys.to(torch.float32))


def match_mask(keys: Tensor, direction: Tensor, threshold: float) -> Tensor:
    """Where a direction fires: d . k > threshold, bool, of the shape of `match`."""
    return match(keys, direction) > threshold


def _checked_direction(direction: Tensor, length: int) -> Tensor:
    if direction.ndim == 2 and direction.shape[0] == 1:
        direction = direction[0]
    if direction.ndim != 1 or direction.shape[0] != length:
        raise ValueError(f"expected a direction of length {length}, got shape {tuple(direction.shape)}")
    if not all_finite(direction):
        raise NonFiniteError("the direction holds NaN or infinite values")
    return direction.detach()
