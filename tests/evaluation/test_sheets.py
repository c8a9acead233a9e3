from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pyrewrite.errors import NonFiniteError
from pyrewrite.evaluation import contact_sheet, save_image, to_uint8


def test_values_become_bytes():
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).view(1, 1, 1, 5)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 64, 128, 191, 255]
    assert to_uint8(x).shape == (1, 1, 5, 3)
    assert to_uint8(x.expand(2, 3, 4, 5).half())[0, 0, :, 2].tolist() == [0, 64, 128, 191, 255]
    assert to_uint8(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5, 3)


def test_values_beyond_the_range_do_not_wrap():
    x = torch.tensor([-9.0, -1.01, 1.01, 3.0, float("inf")]).view(1, 1, 1, 5)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 255, 255, 255]


def test_a_picture_is_not_rescaled_by_its_extremes():
    faint, bright = torch.full((1, 3, 2, 2), 0.1), torch.ones(1, 3, 2, 2)
    assert to_uint8(torch.cat([faint, bright])).unique().tolist() == [140, 255]


def test_bytes_refused():
    for x in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected B x 3"):
            to_uint8(x)
    with pytest.raises(NonFiniteError):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def colours(*values: float, size: int = 24) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def place(sheet: Image.Image, image: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height, width of the only picture with the colour of image 1 x 3 x H x W; text is grey."""
    found = (np.asarray(sheet) == to_uint8(image)[0, 0, 0].numpy()).all(-1)
    rows, columns = found.any(1).nonzero()[0], found.any(0).nonzero()[0]
    assert found.sum() == len(rows) * len(columns)
    return rows[0], columns[0], len(rows), len(columns)


def test_before_stands_above_after(tmp_path):
    hue = torch.tensor([1.0, -0.5, -1.0]).view(1, 3, 1, 1)
    before, after = colours(-1.0, -0.9, -0.8) * hue, colours(0.5, 0.6, 0.7) * hue
    sheet = contact_sheet([before, after], ["before", "after"], tmp_path / "s.png", labels=["0", "1", "2"], columns=2)
    above = [place(sheet, image[None]) for image in before]
    below = [place(sheet, image[None]) for image in after]
    for top, bottom in zip(above, below, strict=True):
        assert top[2:] == bottom[2:] == (24, 24)
        assert top[0] + 24 <= bottom[0]
        assert top[1] == bottom[1]
    assert above[2][0] > below[0][0]  # the third begins another block
    assert above[2][1] == above[0][1] < above[1][1]
    with Image.open(tmp_path / "s.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(sheet))
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]


def test_captions_titles_and_labels_are_drawn_and_fit():
    x = colours(0.0)
    plain = contact_sheet([x], [""])
    titled = contact_sheet([x], [""], title="A title much wider than one picture of a bust")
    captioned = contact_sheet([x], ["as pasted by hand"])
    labelled = contact_sheet([x], [""], labels=["a label that is too long for its picture"])
    assert titled.width > plain.width
    assert titled.height > plain.height
    assert captioned.width > plain.width
    assert labelled.height > plain.height
    for sheet in (titled, captioned, labelled):
        pixels = np.asarray(sheet).astype(int)
        assert (pixels < 120).any()  # something is written
        edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert all((edge == 255).all() for edge in edges)  # and nothing is cut off


def test_scale_and_one_pixel():
    assert contact_sheet([torch.zeros(1, 3, 1, 1)], ["x"]).height > 0
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 24, 24)
    assert place(contact_sheet([red], ["x"], scale=3), red)[2:] == (72, 72)


def test_sheet_refused(tmp_path):
    x = colours(0.0, 0.1)
    for rows, captions, options in (
        ([], [], {}),
        ([x, x], ["one"], {}),
        ([x, x[:1]], ["a", "b"], {}),
        ([x[:0]], ["a"], {}),
        ([x], ["a"], {"labels": ["only one"]}),
        ([x], ["a"], {"columns": 0}),
        ([x], ["a"], {"scale": 0}),
    ):
        with pytest.raises(ValueError):
            contact_sheet(rows, captions, tmp_path / "s.png", **options)
    with pytest.raises(ValueError, match=r"\.txt"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "s.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["s.png", "s.PNG", "s.jpg", "s.webp", "s"])
def test_formats(tmp_path, name):
    save_image(Image.new("RGB", (4, 4), (255, 0, 0)), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.size == (4, 4)
