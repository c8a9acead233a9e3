"""Selecting by a click: the connected region whose whitened keys resemble the one that was clicked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EditError
from ..rewriting.selection import connected_region, mask_on_map
from .document import Document, Mask, Region
from .model import Model


def resemblance(model: Model, document: Document, image: int, y: int, x: int) -> Tensor:
    """How alike every key of a picture is to the one under picture pixel (y, x): h x w on the key map, in [-1, 1].

    The cosine between whitened keys: what many pictures have in common says little about what was clicked.
    """
    (activation,) = model.activations(document.layer, [image], document.latents)
    key = activation.key[0].double()  # I x h x w
    key = key[(slice(None), *activation.shown())]
    whitener = model.rewriter(document.layer).moment.whitener(document.settings.shrinkage).to(key.device)
    white = torch.nn.functional.normalize(torch.einsum("ij,jhw->ihw", whitener, key), dim=0)
    size = model.generator.image_size
    row, column = y * key.shape[1] // size, x * key.shape[2] // size
    return torch.einsum("i,ihw->hw", white[:, row, column], white)


def key_pixels(model: Model, layer: str, regions: Sequence[Region]) -> int:
    """Key pixels under the masks at a layer, at most its channels: the highest rank there can be.

    EditError where one of the masks covers none.
    """
    info, size = model.generator.layers[layer], model.generator.image_size
    maps = (info.key_resolution, info.key_resolution)
    counts = [int((mask_on_map(r.mask.url, maps, (size, size), margin=info.key_margin) > 0).sum()) for r in regions]
    if 0 in counts:
        raise EditError(f"a mask has no pixel on the map of {layer}: expected a larger one, or a finer layer")
    return min(sum(counts), info.in_channels)


def region_by_click(model: Model, document: Document, image: int, y: int, x: int, alike: float) -> Mask:
    """The region around picture pixel (y, x): 4-connected on the picture, everywhere at least `alike` (0 to 1)."""
    size = model.generator.image_size
    alike_map = resemblance(model, document, image, y, x)[None, None]
    smooth = torch.nn.functional.interpolate(alike_map, (size, size), mode="bilinear", align_corners=False)
    inside = (smooth[0, 0] >= alike).cpu()
    inside[y, x] = True
    return Mask.of(connected_region(inside, y, x))
