"""Pictures for the front end: sprite sheets, kept renderings, and outlines of what matches."""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..evaluation.sheets import to_uint8

PNG, JPEG = "image/png", "image/jpeg"
LARGE_SHEET = 1 << 20  # pixels above which a sheet is a JPEG: a PNG would cost more time than it is worth

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """The most recently used values, at most so many bytes of them. The newest one always stays."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._items: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def get(self, key: Hashable) -> Value | None:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        if key in self._items:
            self.size -= self._items.pop(key)[1]
        self._items[key] = value, size
        self.size += size
        while self.size > self.limit and len(self._items) > 1:
            self.size -= self._items.popitem(last=False)[1][1]

    def clear(self) -> None:
        self._items.clear()
        self.size = 0


def to_pixels(images: Tensor) -> list[np.ndarray]:
    """B x 3 x H x W in [-1, 1] -> B arrays H x W x 3 uint8."""
    return list(to_uint8(images).numpy())


def resized(picture: np.ndarray, size: int) -> np.ndarray:
    """H x W x 3 uint8 -> size x size x 3."""
    if picture.shape[0] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), resample=Image.Resampling.BOX))


def sheet(pictures: Sequence[np.ndarray], size: int, brief: bool = False) -> tuple[bytes, int, str]:
    """Pictures side by side, row after row, each size x size: the encoded file, the number of columns, the media type.

    brief: they are gone after the next stroke: a JPEG will do, which takes a fifteenth of the time and half the bytes.
    No pictures give one grey pixel, so that there always is something to decode.
    """
    if not pictures:
        return encoded(np.full((1, 1, 3), 128, np.uint8)), 0, PNG
    columns = max(1, min(len(pictures), 8192 // size, math.ceil(math.sqrt(2 * len(pictures)))))
    rows = -(-len(pictures) // columns)
    canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * size, i % columns * size
        canvas[y : y + size, x : x + size] = resized(picture, size)
    media = JPEG if brief or canvas.shape[0] * canvas.shape[1] > LARGE_SHEET else PNG
    return encoded(canvas, media), columns, media


def encoded(pixels: np.ndarray, media: str = PNG) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if media == JPEG:
        image.save(file, "JPEG", quality=92, subsampling=0)  # colours as sharp as the rest: drawings have hard edges
    else:
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def above(matches: Tensor, threshold: float, size: int) -> np.ndarray:
    """Where matches (h x w, on the key map) exceed the threshold, on the picture: size x size bool."""
    shown = torch.nn.functional.interpolate(
        matches.detach().float().cpu()[None, None], (size, size), mode="bilinear", align_corners=False
    )
    return (shown[0, 0] > threshold).numpy()
