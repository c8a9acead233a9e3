"""Finding images by what their keys look like: those that a rule's direction fires on, and where in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics.collect import Progress, check_count, scan_keys
from pyrewrite.statistics.quantiles import UnitQuantiles

if TYPE_CHECKING:
    from pyrewrite.generators.base import Generator


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


def scan_direction(
    generator: Generator,
    layer: str,
    direction: Tensor,
    *,
    samples: int = 1000,
    seed: int = 1,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
) -> DirectionScan:
    """Run images 0 to samples - 1 up to a layer and score them with a direction (I, or 1 x I).

    ValueError for another length, NonFiniteError for NaN in the direction or the activations.
    """
    direction = _checked_direction(direction, generator.layers[layer].in_channels).to(generator.device)

    def begin() -> tuple[list[Tensor], UnitQuantiles]:
        # One unit only: it can afford to be exact for far longer.
        return [], UnitQuantiles(1, resolution=1 << 18, device=generator.device)

    def add(state: tuple[list[Tensor], UnitQuantiles], first: int, keys: Tensor) -> None:
        matches = match(keys, direction)  # B x h x w
        state[0].append(matches.flatten(1).amax(1))
        state[1].add(matches.unsqueeze(1))

    (scores, quantiles), _ = scan_keys(
        generator, layer, begin, add, samples=samples, seed=seed, batch_size=batch_size, progress=progress
    )
    return DirectionScan(torch.cat(scores).cpu(), quantiles)


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
    if not torch.isfinite(direction).all():
        raise NonFiniteError("the direction holds NaN or infinite values")
    return direction.detach()
