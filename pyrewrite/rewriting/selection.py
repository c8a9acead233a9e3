"""Painted masks and where they lie on a layer's maps.

A mask is read as the official tool reads it: the red channel of the image as RGB (never alpha), resized bilinearly.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..edit import Edit
from ..errors import EditError

MAX_MASK_BYTES = 16 << 20
MAX_MASK_PIXELS = 8192 * 8192
KEPT_URL, KEPT_PIXELS = 1 << 16, 1 << 14  # what `mask_on_map` keeps: characters of a mask, pixels of a map
MASK_FORMATS = ("PNG", "JPEG", "WEBP")  # what browsers write; no other decoder meets a stranger's bytes


class Box(NamedTuple):
    """Half-open rows top..bottom and columns left..right of a map."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def center(self) -> tuple[int, int]:
        return (self.top + self.bottom) // 2, (self.left + self.right) // 2

    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def decode_mask(url: str, what: str = "mask") -> Image.Image:
    """PNG data URL -> single-channel image (mode L) in the size it was painted. EditError names `what`."""
    head, _, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise EditError(f"{what}: expected a data URL 'data:image/png;base64,...', got {url[:32]!r}")
    if len(body) > MAX_MASK_BYTES:
        raise EditError(f"{what}: {len(body)} characters; expected at most {MAX_MASK_BYTES}")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=MASK_FORMATS)
        size = (image.width, image.height)
        if image.width * image.height <= MAX_MASK_PIXELS:
            return image.convert("RGB").getchannel("R")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise EditError(f"{what}: expected at most {MAX_MASK_PIXELS} pixels ({error})") from error
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise EditError(f"{what}: the data URL does not hold an image: expected PNG, JPEG or WebP ({error})") from error
    raise EditError(f"{what}: {size[0]} x {size[1]} pixels; expected at most {MAX_MASK_PIXELS}")


def encode_mask(mask: np.ndarray | Tensor) -> str:
    """H x W array, bool or in [0, 1] -> PNG data URL, white where set, as the interfaces write it."""
    values = np.asarray(mask, dtype=np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise EditError(f"mask: expected a finite H x W array, got shape {values.shape}")
    file = io.BytesIO()
    Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB").save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def mask_on_map(
    url: str, size: tuple[int, int], image_size: tuple[int, int], what: str = "mask", margin: int = 0
) -> Tensor:
    """The mask on a map of `size` (rows, columns): float32 H x W in [0, 1].

    margin: pixels of the map around the picture, on every side; nothing is painted there.
    The mask may be of another size than the image (the official tool paints on 256 x 256 canvases for every
    generator) but must have the image's proportions, else EditError.
    """
    if len(url) <= KEPT_URL and size[0] * size[1] <= KEPT_PIXELS:
        return _kept_area(url, size, image_size, what, margin).clone()
    return _area(url, size, image_size, what, margin)


def _area(url: str, size: tuple[int, int], image_size: tuple[int, int], what: str, margin: int) -> Tensor:
    image = decode_mask(url, what)
    if image.width * image_size[0] != image.height * image_size[1]:
        raise EditError(
            f"{what}: the mask is {image.width} x {image.height} pixels and the image "
            f"{image_size[1]} x {image_size[0]}: expected the same proportions"
        )
    resized = image.resize((size[1] - 2 * margin, size[0] - 2 * margin), resample=Image.Resampling.BILINEAR)
    area = torch.from_numpy(np.array(resized)).float() / 255
    return torch.nn.functional.pad(area, (margin,) * 4) if margin else area  # H x W


_kept_area = functools.lru_cache(maxsize=512)(_area)  # a live preview asks for the same masks after every stroke


def bounding_box(area: Tensor, what: str = "mask") -> Box:
    """The box around area > 0 (H x W). An empty mask is an EditError."""
    rows, columns = (area > 0).any(1).nonzero(), (area > 0).any(0).nonzero()
    if len(rows) == 0:
        raise EditError(f"{what}: the mask is empty: expected painted pixels")
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def place(height: int, width: int, center: tuple[int, int], size: tuple[int, int]) -> Box:
    """A box of height x width centred at `center`, moved inside a map of `size` (official rule)."""
    top = max(0, min(size[0] - height, center[0] - height // 2))
    left = max(0, min(size[1] - width, center[1] - width // 2))
    return Box(top, left, min(top + height, size[0]), min(left + width, size[1]))


def align(box: Box, stride: int) -> Box:
    """The smallest box on multiples of `stride` that contains `box`."""
    return Box(
        box.top // stride * stride,
        box.left // stride * stride,
        -(-box.bottom // stride) * stride,
        -(-box.right // stride) * stride,
    )


def grow(box: Box, margin: int, size: tuple[int, int]) -> Box:
    """The box with `margin` more pixels on every side, as far as the map of `size` reaches."""
    return Box(
        max(0, box.top - margin),
        max(0, box.left - margin),
        min(size[0], box.bottom + margin),
        min(size[1], box.right + margin),
    )


def islands(area: Tensor) -> list[int]:
    """The sizes in pixels of the 4-connected regions of area > 0 (H x W), largest first."""
    runs, root = _runs(area)
    sizes: dict[int, int] = {}
    for number, (_, start, end) in enumerate(runs):
        sizes[root(number)] = sizes.get(root(number), 0) + end - start
    return sorted(sizes.values(), reverse=True)


def edit_islands(edit: Edit) -> dict[str, list[int]]:
    """Mask -> the sizes of its separate regions, for the masks of a record that have several."""
    named = [("object mask", edit.object), ("paste mask", edit.paste)]
    named += [(f"context mask {i}", s) for i, s in enumerate(edit.context)]
    named += [(f"protect mask {i}", s) for i, s in enumerate(edit.protect)]
    found = {}
    for what, selection in named:
        if selection is not None:
            image = decode_mask(selection.mask, what)
            regions = islands(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, -1))
            if len(regions) > 1:
                found[what] = regions
    return found


def connected_region(area: Tensor, y: int, x: int) -> Tensor:
    """The 4-connected region of area > 0 (H x W) that pixel (y, x) is in, H x W bool; empty where it is in none."""
    runs, root = _runs(area)
    region = torch.zeros(area.shape, dtype=torch.bool)
    here = [i for i, (row, start, end) in enumerate(runs) if row == y and start <= x < end]
    for number, (row, start, end) in enumerate(runs):
        if here and root(number) == root(here[0]):
            region[row, start:end] = True
    return region


def _runs(area: Tensor) -> tuple[list[tuple[int, int, int]], Callable[[int], int]]:
    """The runs of area > 0 in each row, (row, start, end), and a function from a run's number to its region's."""
    parent: list[int] = []  # of a run's region; a root is its own parent

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    painted = np.asarray((area > 0).cpu(), dtype=np.int8)
    edges = np.diff(painted, axis=1, prepend=0, append=0)  # 1 where a run of painted pixels starts, -1 after its end
    rows, starts = (edges == 1).nonzero()
    ends = (edges == -1).nonzero()[1]
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    above = here = range(0)  # numbers of the runs in the row above, and in this one so far
    current = -1
    for number, (row, start, end) in enumerate(runs):
        if row != current:
            above, here, current = here if row == current + 1 else range(0), range(number, number), row
        parent.append(number)
        for other in above:
            if runs[other][1] < end and start < runs[other][2]:
                parent[root(other)] = root(number)
        here = range(here.start, number + 1)
    return runs, root
