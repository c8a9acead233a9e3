"""What patches change in numbered images of any generator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from pyrewrite.edit import Edit
from pyrewrite.evaluation.change import image_change
from pyrewrite.evaluation.classifier import ATTRIBUTES, AttributeClassifier
from pyrewrite.evaluation.sheets import contact_sheet
from pyrewrite.generators import Generator
from pyrewrite.rewriting import LowRankPatch, mask_on_map

CHANGED = 0.02  # mean |difference| of a picture, of a range of 2, from which on a person tends to see it


def measure_patches(
    generator: Generator,
    patches: Sequence[LowRankPatch],
    numbers: Sequence[int],
    *,
    seed: int = 1,
    edit: str | os.PathLike | None = None,
    attributes: bool = False,
    force: bool = False,
    sheet: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Render the numbered images without and with the patches (all of them together) and compare.

    edit: a record; the change is then told apart inside and outside its paste's (or first context) mask, else it is
    that of the whole pictures (`everywhere`).
    attributes: rates by the bundled classifier, which knows the bundled generators' drawn busts only.
    sheet: where to write a contact sheet. The generator is left as it was. ValueError without numbers.
    """
    numbers = list(numbers)
    if not numbers:
        raise ValueError("no image numbers to measure")
    mask = _edit_mask(edit, generator.image_size) if edit is not None else None
    before = generator.images(numbers, seed)
    applied: list[LowRankPatch] = []
    try:
        for patch in patches:
            applied.append(patch.apply_(generator, force=force))
        after = generator.images(numbers, seed)
    finally:
        for patch in reversed(applied):
            patch.remove_(generator)
    difference = (after - before).abs().mean((1, 2, 3))  # B
    data: dict[str, Any] = {
        "images": len(numbers),
        "mean_change": float(difference.mean()),
        "largest_change": float(difference.max()),
        "images_changed": float((difference > CHANGED).float().mean()),
        "change": _change(before, after, mask),
    }
    if attributes:
        classifier = AttributeClassifier()
        found = [classifier.predict(images.cpu()) for images in (before, after)]
        data["attributes"] = {
            name: {
                "before": {str(v): float((found[0][name] == v).float().mean()) for v in values},
                "after": {str(v): float((found[1][name] == v).float().mean()) for v in values},
                "flipped": float((found[0][name] != found[1][name]).float().mean()),
            }
            for name, values in ((n, range(-1, 2) if n == "mood" else range(c)) for n, c in ATTRIBUTES.items())
        }
    if sheet is not None:
        shown = slice(0, 48)
        contact_sheet(
            [before[shown], after[shown]], ["before", "after"], sheet, labels=[str(n) for n in numbers[shown]]
        )
    return data


def _change(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    """before, after: B x 3 x H x W; mask: H x W or None -> L1, PSNR and SSIM of each part."""
    if mask is not None:
        return image_change(before, after, mask).as_dict()
    return {"everywhere": image_change(before, after, torch.ones(before.shape[-2:])).as_dict()["inside"]}


def _edit_mask(path: str | os.PathLike, image_size: int) -> torch.Tensor:
    """The painted area of a record's paste, or of its first context image: H x W in [0, 1]."""
    record = Edit.load(path)
    selection = record.paste or (record.context[0] if record.context else record.object)
    if selection is None:
        raise ValueError(f"{path}: the record has no mask")
    return mask_on_map(selection.mask, (image_size, image_size), (image_size, image_size))
