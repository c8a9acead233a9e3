"""How much an edit changed: pictures inside and outside a region, the pasted region itself, and attributes.

All pictures are B x 3 x H x W in [-1, 1]; values beyond are clamped, as everywhere they are shown. Distances are on
that scale: an L1 of 0.02 is one per cent of the range from black to white.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyrewrite.errors import NonFiniteError
from pyrewrite.evaluation.classifier import AttributeClassifier

_RANGE = 2.0  # of the values
_CHUNK = 16  # pictures at a time, for the caches


@dataclass(frozen=True)
class RegionChange:
    """Change of a region of pictures, over all of them: mean absolute difference, PSNR in dB (inf: identical), SSIM."""

    l1: float
    psnr: float
    ssim: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: psnr is None where nothing changed."""
        return {**asdict(self), "psnr": self.psnr if math.isfinite(self.psnr) else None}


@dataclass(frozen=True)
class ImageChange:
    """Change inside and outside a mask; None for a part that has no pixels."""

    inside: RegionChange | None
    outside: RegionChange | None

    def as_dict(self) -> dict[str, Any]:
        return {name: part and part.as_dict() for name, part in vars(self).items()}


def image_change(before: Tensor, after: Tensor, mask: Tensor) -> ImageChange:
    """L1, PSNR and SSIM between pictures inside and outside a mask, pooled over the batch.

    mask: H x W, B x H x W or B x 1 x H x W, bool or weights in [0, 1]; its complement is the outside.
    """
    before, after = _pictures(before, after)
    weight = _weights(mask, before)  # B x 1 x H x W
    difference = before - after
    absolute, square = difference.abs().mean(1, keepdim=True), difference.square().mean(1, keepdim=True)
    maps = torch.cat([absolute, square, ssim_map(before, after)], 1)  # B x 3 x H x W
    area, everywhere = float(weight.sum(dtype=torch.float64)), weight.numel()
    inside = (maps * weight).sum((0, 2, 3), dtype=torch.float64)  # 3
    outside = (maps * (1 - weight)).sum((0, 2, 3), dtype=torch.float64)

    def region(sums: Tensor, area: float) -> RegionChange | None:
        if area <= 0:
            return None
        l1, mse, ssim = (sums / area).tolist()
        return RegionChange(l1, 10 * math.log10(_RANGE**2 / mse) if mse > 0 else math.inf, ssim)

    return ImageChange(region(inside, area), region(outside, everywhere - area))


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity at every pixel, B x 1 x H x W of the pictures' type, the mean over the channels.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE TIP 2004: Gaussian window of 11 x 11, sigma 1.5,
    K1 = 0.01, K2 = 0.03. At the borders the window is the part of it that lies in the picture.
    """
    vertical, horizontal = (_gaussian_window(n, a) for n in a.shape[2:])  # H x H, W x W
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2

    def mean(x: Tensor) -> Tensor:
        return vertical @ x @ horizontal.T  # windows as matrices: many times faster than a depthwise convolution

    parts = []
    for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):  # B x C x H x W
        mean_x, mean_y = mean(x), mean(y)
        var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
        ssim = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        parts.append(ssim.mean(1, keepdim=True))
    return torch.cat(parts)


def _gaussian_window(n: int, like: Tensor) -> Tensor:
    """n x n: row i weighs the pixels of a line around pixel i, at most 5 away, with a sum of 1."""
    places = torch.arange(n, dtype=torch.float64, device=like.device)
    distance = places[:, None] - places
    weights = torch.exp(-distance.square() / (2 * 1.5**2)) * (distance.abs() <= 5)
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


@dataclass(frozen=True)
class RegionDistance:
    """How far edited pictures are from the object as pasted, over the object's area.

    distance, baseline: B float64 each, the mean |edited - pasted| and |before - pasted|. ratio: the sum of the one over
    the sum of the other: 0 is the object as pasted, 1 no change; NaN where the paste changed nothing to begin with.
    """

    distance: Tensor
    baseline: Tensor

    @property
    def ratio(self) -> float:
        whole = float(self.baseline.sum())
        return float(self.distance.sum()) / whole if whole > 0 else math.nan

    def as_dict(self) -> dict[str, float | None]:
        ratio = self.ratio
        return {
            "distance": float(self.distance.mean()),
            "baseline": float(self.baseline.mean()),
            "ratio": None if math.isnan(ratio) else ratio,
        }


def region_distance(edited: Tensor, pasted: Tensor, before: Tensor, alpha: Tensor) -> RegionDistance:
    """Distance of edited pictures to the same pictures with the object pasted by hand, weighted by its alpha.

    alpha: H x W, B x H x W or B x 1 x H x W in [0, 1]. ValueError where it is empty in a picture.
    """
    edited, pasted = _pictures(edited, pasted)
    before, _ = _pictures(before, pasted)
    weight = _weights(alpha, edited)  # B x 1 x H x W
    area = weight.flatten(1).sum(1, dtype=torch.float64)  # B
    empty = (area == 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"the object's area is empty in picture{'s' * (len(empty) > 1)} {empty} of the batch")

    def distance(a: Tensor) -> Tensor:
        return ((a - pasted).abs().mean(1, keepdim=True) * weight).flatten(1).sum(1, dtype=torch.float64) / area

    return RegionDistance(distance(edited), distance(before))


@dataclass(frozen=True)
class EditReport:
    """What an edit did to the attributes of pictures, as the classifier sees them.

    images: how many pictures were given; applies: on how many of them the rule applies, the only ones counted below.
    rates_before, rates_after: the share of each value of each attribute, ``{"hat": {0: 0.8, 1: 0.2}, ...}``.
    success: the share that has the wanted value afterwards. flips: the share whose value changed, for every other
    attribute. change, region: over the same pictures, None where no mask or paste was given. untouched: L1 between
    before and after on the pictures where the rule does not apply, None without any.
    """

    attribute: str
    wanted: int
    images: int
    applies: int
    success: float
    flips: dict[str, float]
    rates_before: dict[str, dict[int, float]]
    rates_after: dict[str, dict[int, float]]
    change: ImageChange | None
    region: RegionDistance | None
    untouched: float | None

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts and None only, for JSON."""
        plain = dict(vars(self))
        for name in ("rates_before", "rates_after"):
            plain[name] = {a: {str(value): rate for value, rate in r.items()} for a, r in plain[name].items()}
        return {
            **plain,
            "change": self.change and self.change.as_dict(),
            "region": self.region and self.region.as_dict(),
        }


def edit_report(
    before: Tensor,
    after: Tensor,
    *,
    attribute: str,
    wanted: int,
    applies: Tensor | Sequence[bool] | None = None,
    mask: Tensor | None = None,
    pasted: Tensor | None = None,
    alpha: Tensor | None = None,
    classifier: AttributeClassifier | None = None,
    found_before: Mapping[str, Tensor] | None = None,
) -> EditReport:
    """Score an edit that should give pictures another attribute, on pictures that were not used to make it.

    before, after: the same images, B x 3 x H x W. attribute, wanted: "hat" and 1 for an edit that puts hats on.
    applies: B bool, where the rule applies (`peeps_attributes`); default everywhere. mask: the edited region, as for
    `image_change`. pasted with alpha: the pictures with the object pasted by hand, as for `region_distance`.
    found_before: what the classifier's `predict` gave for `before`, where several edits share it.

    ValueError where the rule applies to no picture, and for an attribute or value that the classifier does not know.
    """
    before, after = _pictures(before, after)
    chosen = torch.ones(len(before), dtype=torch.bool) if applies is None else torch.as_tensor(applies).bool().cpu()
    if chosen.shape != (len(before),):
        raise ValueError(f"applies must hold one value for each of {len(before)} pictures, got {tuple(chosen.shape)}")
    if not chosen.any():
        raise ValueError(f"the rule applies to none of the {len(before)} pictures")
    if (pasted is None) != (alpha is None):
        raise ValueError("pasted and alpha belong together: give both or neither")
    classifier = classifier or AttributeClassifier()
    values = {"hat": (0, 1), "glasses": (0, 1), "beard": (0, 1), "mood": (-1, 0, 1)}
    if wanted not in values.get(attribute, ()):
        raise ValueError(f"no such attribute or value: {attribute} = {wanted!r}; known are {values}")

    def rates(found: dict[str, Tensor]) -> dict[str, dict[int, float]]:
        return {
            name: {v: float((found[name] == v).double().mean()) for v in possible} for name, possible in values.items()
        }

    def part(x: Tensor) -> Tensor:
        """The chosen pictures' part of masks or pictures; one mask is for all."""
        return x[chosen.to(x.device)] if x.ndim > 2 and len(x) == len(chosen) else x

    found_after = {name: found.cpu() for name, found in classifier.predict(after[chosen]).items()}
    if found_before is None:
        found_before = {name: found.cpu() for name, found in classifier.predict(before[chosen]).items()}
    else:
        found_before = {name: found_before[name].cpu()[chosen] for name in values}
    region = change = None
    if mask is not None:
        change = image_change(before[chosen], after[chosen], part(mask))
    if pasted is not None:
        region = region_distance(after[chosen], part(pasted), before[chosen], part(alpha))
    return EditReport(
        attribute=attribute,
        wanted=wanted,
        images=len(before),
        applies=int(chosen.sum()),
        success=float((found_after[attribute] == wanted).double().mean()),
        flips={n: float((found_before[n] != found_after[n]).double().mean()) for n in values if n != attribute},
        rates_before=rates(found_before),
        rates_after=rates(found_after),
        change=change,
        region=region,
        untouched=None if chosen.all() else float((before[~chosen] - after[~chosen]).abs().mean()),
    )


def _pictures(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of pictures that can be compared: the same shape, no NaN; clamped, float32 (float64 if either is)."""
    if a.ndim != 4 or a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"expected two batches of the same B x C x H x W, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"expected floating-point pictures in [-1, 1], got {a.dtype} and {b.dtype}")
    if torch.isnan(a).any() or torch.isnan(b).any():
        raise NonFiniteError("the pictures hold NaN")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.detach().to(wide).clamp(-1, 1), b.detach().to(wide).clamp(-1, 1)


def _weights(mask: Tensor, pictures: Tensor) -> Tensor:
    """A mask as weights in [0, 1]: B x 1 x H x W of the pictures' type."""
    weight = mask.detach().to(pictures)
    weight = weight[None, None] if weight.ndim == 2 else weight[:, None] if weight.ndim == 3 else weight
    b, _, h, w = pictures.shape
    if weight.ndim != 4 or weight.shape[0] not in (1, b) or tuple(weight.shape[1:]) != (1, h, w):
        raise ValueError(f"expected a mask {h} x {w} or {b} x {h} x {w}, got shape {tuple(mask.shape)}")
    if not ((weight >= 0) & (weight <= 1)).all():
        raise ValueError("a mask must hold values between 0 and 1")
    return weight.expand(b, 1, h, w)
