"""Pictures for people: 8-bit values, and contact sheets with the pictures before an edit above those after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pyrewrite._files import write_atomically
from pyrewrite.errors import NonFiniteError

_INK, _FAINT, _PAPER = (24, 24, 24), (110, 110, 110), (255, 255, 255)


def to_uint8(images: Tensor) -> Tensor:
    """B x 3 x H x W (or B x 1 x H x W) in [-1, 1] -> B x H x W x 3 uint8 on the CPU.

    The one place where pictures become bytes: values beyond [-1, 1] are clamped, never wrapped, and no picture is
    rescaled by its own extremes. NonFiniteError on NaN.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(f"expected B x 3 x H x W images in [-1, 1], got {images.dtype} {tuple(images.shape)}")
    images = images.detach().float()
    if torch.isnan(images).any():
        raise NonFiniteError("the images hold NaN")
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().cpu()


def save_image(image: Image.Image, path: str | os.PathLike) -> Path:
    """Write a PIL image whole or not at all; the format is that of the extension, PNG without one."""
    suffix = Path(path).suffix.lower() or ".png"
    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise ValueError(f"{path}: pictures cannot be written as {suffix!r}; use .png, .jpg or .webp")
    # Level 3 takes half the time of the default for 8 % more bytes.
    options = {"compress_level": 3} if kind == "PNG" else {}
    return write_atomically(path, lambda file: image.save(file, kind, **options))


def contact_sheet(
    rows: Sequence[Tensor],
    captions: Sequence[str],
    path: str | os.PathLike | None = None,
    *,
    title: str = "",
    labels: Sequence[str] | None = None,
    columns: int = 12,
    scale: int = 1,
) -> Image.Image:
    """A sheet of the same pictures in several states, one state under the other.

    rows: batches B x 3 x H x W of the same size, usually the pictures before and after an edit. captions: one per row,
    written in the margin. labels: one per picture, written above it. More pictures than `columns` continue in another
    block of rows. scale: every pixel is drawn as scale x scale. Saved to `path` if one is given.
    """
    if not rows or len(rows) != len(captions):
        raise ValueError(f"expected one caption per row of pictures, got {len(rows)} rows and {len(captions)} captions")
    if len({tuple(row.shape) for row in rows}) != 1 or rows[0].ndim != 4 or len(rows[0]) == 0:
        raise ValueError(f"rows must be batches of one shape, got {[tuple(row.shape) for row in rows]}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    count, _, height, width = rows[0].shape
    if labels is not None and len(labels) != count:
        raise ValueError(f"expected one label per picture, got {len(labels)} for {count}")
    pixels = [to_uint8(row).numpy() for row in rows]  # each B x H x W x 3

    height, width, columns = height * scale, width * scale, min(columns, count)
    size = max(12, min(20, height // 7))
    font, heading = ImageFont.load_default(size), ImageFont.load_default(size + 6)
    gap, pad = 3, size // 2 + 4
    margin = 2 * pad + max(int(font.getlength(caption)) for caption in captions)
    top = pad + (size + 6 + pad if title else 0)
    label_height = size + 9 if labels is not None else 0
    block = label_height + len(rows) * (height + gap) + pad
    blocks = -(-count // columns)
    inner = max(columns * (width + gap), int(heading.getlength(title)) + pad - margin)
    sheet = Image.new("RGB", (margin + inner + pad, top + blocks * block), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((pad, pad), title, fill=_INK, font=heading)
    for i in range(count):
        x, y = margin + i % columns * (width + gap), top + i // columns * block
        if labels is not None:
            draw.text(
                (x + width / 2, y + label_height - 2 - size // 3),
                _fit(labels[i], font, width),
                _FAINT,
                font,
                anchor="ms",
            )
        for r, images in enumerate(pixels):
            picture = Image.fromarray(images[i]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y + label_height + r * (height + gap)))
    for b in range(blocks):
        for r, caption in enumerate(captions):
            middle = top + b * block + label_height + r * (height + gap) + height / 2
            draw.text((margin - pad, middle), caption, fill=_INK, font=font, anchor="rm")
    if path is not None:
        save_image(sheet, path)
    return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
