"""Masks: read as the official tool reads them, placed by its rule, and refused by name."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pyrewrite.errors import EditError
from pyrewrite.rewriting.selection import (
    Box,
    align,
    bounding_box,
    decode_mask,
    encode_mask,
    grow,
    islands,
    mask_on_map,
    place,
)


def url_of(image: Image.Image, format: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, format=format)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_encode_then_decode():
    mask = np.zeros((5, 7))
    mask[1:3, 2:6] = 1
    mask[4, 0] = 0.5
    decoded = np.asarray(decode_mask(encode_mask(mask)))
    assert decoded.shape == (5, 7)
    assert np.array_equal(decoded, (mask * 255).round().astype(np.uint8))


def test_the_red_channel_is_the_mask_and_alpha_is_not():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[1, 1] = (200, 0, 0, 0)  # painted, wholly transparent
    pixels[2, 2] = (0, 255, 255, 255)  # opaque, no red
    area = mask_on_map(url_of(Image.fromarray(pixels, "RGBA")), (4, 4), (4, 4))
    assert area[1, 1] == pytest.approx(200 / 255)
    assert area.sum() == area[1, 1]


def test_resizing_is_that_of_the_whole_rgb_image():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8).astype(np.uint8))
    expected = np.asarray(image.resize((8, 8), resample=Image.Resampling.BILINEAR))[..., 0] / 255
    assert torch.allclose(mask_on_map(url_of(image), (8, 8), (64, 64)), torch.from_numpy(expected).float())


def test_a_mask_of_another_size_but_the_same_proportions():
    mask = np.zeros((256, 256))
    mask[64:128, 64:192] = 1
    area = mask_on_map(encode_mask(mask), (16, 16), (1024, 1024))
    assert bounding_box(area > 0.5) == Box(4, 4, 8, 12)


@pytest.mark.parametrize("shape", [(256, 128), (1, 2), (100, 101)])
def test_other_proportions_are_refused(shape):
    with pytest.raises(EditError, match=f"paste mask: the mask is {shape[1]} x {shape[0]} pixels"):
        mask_on_map(encode_mask(np.ones(shape)), (8, 8), (64, 64), "paste mask")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "data:image/png;base64,",
        "data:image/png;base64,!!!",
        "data:text/plain;base64,AAAA",
        "file:///etc/passwd",
        "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\nnothing").decode(),
    ],
)
def test_not_an_image(url):
    with pytest.raises(EditError, match="object mask"):
        decode_mask(url, "object mask")


def test_cut_off_image():
    whole = url_of(Image.new("RGB", (64, 64), "white"))
    with pytest.raises(EditError, match="does not hold an image"):
        decode_mask(whole[: 4 * (len(whole) // 8)], "mask")


def claimed_png(width, height):
    """A PNG that claims a size and holds no pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


@pytest.mark.parametrize("size", [8193, 10000, 20000, 2**31 - 1])
def test_a_mask_that_claims_to_be_huge(size):
    with pytest.raises(EditError, match=r"object mask: .*(pixels|image)"):
        decode_mask(claimed_png(size, size), "object mask")


def test_only_the_decoders_that_browsers_need():
    with pytest.raises(EditError, match="expected PNG, JPEG or WebP"):
        decode_mask(url_of(Image.new("RGB", (8, 8), "white"), "tiff"), "mask")


def test_empty_mask():
    with pytest.raises(EditError, match="context mask 2: the mask is empty"):
        bounding_box(torch.zeros(3, 3), "context mask 2")


def test_mask_with_nan():
    with pytest.raises(EditError, match="finite"):
        encode_mask(np.full((2, 2), np.nan))


def test_bounding_box_of_one_pixel_and_of_a_slice():
    area = torch.zeros(9, 9)
    area[4, 7] = 0.01
    assert bounding_box(area) == Box(4, 7, 5, 8)
    assert bounding_box(area.t()) == Box(7, 4, 8, 5)
    assert bounding_box(area[:, 1::2]) == Box(4, 3, 5, 4)


@pytest.mark.parametrize("center", [(0, 0), (3, 5), (15, 15), (8, 0)])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (16, 16)])
def test_place_is_the_official_rule(center, size):
    (cy, cx), (h, w) = center, size
    box = place(h, w, center, (16, 16))
    assert box.top == max(0, min(16 - h, cy - h // 2))
    assert box.left == max(0, min(16 - w, cx - w // 2))
    assert (box.height, box.width) == size
    assert min(box) >= 0
    assert max(box) <= 16


def test_grow():
    assert grow(Box(3, 4, 7, 8), 2, (16, 16)) == Box(1, 2, 9, 10)
    assert grow(Box(1, 4, 7, 8), 9, (16, 12)) == Box(0, 0, 16, 12)  # as far as the map reaches
    assert grow(Box(3, 4, 7, 8), 0, (16, 16)) == Box(3, 4, 7, 8)


def test_align():
    assert align(Box(3, 4, 7, 8), 2) == Box(2, 4, 8, 8)
    assert align(Box(3, 4, 7, 8), 1) == Box(3, 4, 7, 8)


def test_islands_are_counted():
    area = torch.zeros(8, 8)
    assert islands(area) == []
    area[0:3, 0:3] = 1
    area[7, 7] = 0.5
    area[6, 6] = 0.5  # diagonal neighbours are separate
    assert islands(area) == [9, 1, 1]
    assert islands(torch.ones(5, 1)) == [5]
    assert islands(torch.zeros(0, 4)) == []


def test_islands_of_any_shape():
    """Against filling from every pixel, on masks whose regions meet again further down."""
    for seed in range(20):
        area = torch.rand(13, 17, generator=torch.Generator().manual_seed(seed)) > 0.45
        left = {(y, x) for y, x in area.nonzero().tolist()}
        sizes = []
        while left:
            stack, size = [left.pop()], 0
            while stack:
                y, x = stack.pop()
                size += 1
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
                left -= near
                stack.extend(near)
            sizes.append(size)
        assert islands(area) == sorted(sizes, reverse=True)
