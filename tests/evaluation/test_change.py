from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from pyrewrite.errors import NonFiniteError
from pyrewrite.evaluation import AttributeClassifier, edit_report, image_change, region_distance, ssim_map
from pyrewrite.generators import load_generator


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_change_inside_and_outside():
    before = pictures(2, 3, 20, 15)
    after = before.clone()
    after[:, :, 5:10, 3:9] = (after[:, :, 5:10, 3:9] + 0.5).clamp(-1, 1)
    mask = torch.zeros(20, 15)
    mask[5:10, 3:9] = 1
    change = image_change(before, after, mask)
    difference = (before - after).double()[:, :, 5:10, 3:9]
    assert change.inside.l1 == pytest.approx(difference.abs().mean().item())
    assert change.inside.psnr == pytest.approx(10 * math.log10(4 / difference.square().mean().item()))
    assert change.inside.ssim < 0.9
    assert (change.outside.l1, change.outside.psnr) == (0, math.inf)
    assert 0.8 < change.outside.ssim < 1  # windows at the border reach into the mask
    record = json.loads(json.dumps(change.as_dict(), allow_nan=False))
    assert record["outside"]["psnr"] is None
    for other in (mask.bool(), mask.expand(2, 20, 15), mask.expand(2, 1, 20, 15), mask.half()):
        assert image_change(before, after, other) == change


def test_pictures_that_did_not_change():
    x = pictures(1, 3, 7, 30)
    change = image_change(x, x.clone(), torch.ones(7, 30))
    assert change.outside is None
    assert (change.inside.l1, change.inside.psnr) == (0, math.inf)
    assert change.inside.ssim == pytest.approx(1)
    assert image_change(x, x, torch.zeros(7, 30)).inside is None


def test_soft_masks_weigh_pixels():
    before = torch.zeros(1, 3, 2, 2)
    after = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).expand(1, 3, 2, 2)
    mask = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    assert image_change(before, after, mask).inside.l1 == pytest.approx((0.1 + 0.1 + 0.2) / 2)


def test_ssim_against_the_definition():
    a, b = pictures(1, 1, 31, 40).double(), pictures(1, 1, 31, 40, seed=1).double()
    b = 0.7 * a + 0.3 * b
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    x, y = a[0, 0, 10:21, 12:23].numpy(), b[0, 0, 10:21, 12:23].numpy()  # the window around pixel 15, 17
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy, cov = ((window * p).sum() for p in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
    c1, c2 = 0.02**2, 0.06**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim_map(a, b)[0, 0, 15, 17].item() == pytest.approx(expected, rel=1e-9)
    flat = torch.full((1, 3, 1, 1), 0.3)
    assert ssim_map(flat, flat).item() == pytest.approx(1)


def test_values_beyond_the_range_are_clamped():
    before, mask = torch.ones(1, 3, 4, 4), torch.ones(4, 4)
    assert image_change(before, before * 9, mask).inside.l1 == 0


def test_region_distance():
    before, pasted = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    pasted[:, :, :2] = 0.8
    alpha = torch.zeros(4, 4)
    alpha[:2] = 1
    assert region_distance(pasted, pasted, before, alpha).ratio == 0
    unchanged = region_distance(before, pasted, before, alpha)
    assert unchanged.ratio == 1
    assert unchanged.baseline.tolist() == pytest.approx([0.8, 0.8])
    half = region_distance(torch.stack([pasted[0], pasted[1] / 2]), pasted, before, alpha)
    assert half.distance.tolist() == pytest.approx([0, 0.4])
    assert half.ratio == pytest.approx(0.25)
    assert half.as_dict() == pytest.approx({"distance": 0.2, "baseline": 0.8, "ratio": 0.25})
    nothing = region_distance(before, before, before, alpha)
    assert math.isnan(nothing.ratio)
    assert nothing.as_dict()["ratio"] is None
    with pytest.raises(ValueError, match=r"empty in picture \[1\]"):
        region_distance(before, pasted, before, torch.stack([alpha, 0 * alpha]))


@pytest.mark.parametrize(
    ("a", "b", "mask", "error"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.ones(4, 4), ValueError),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.ones(4, 4), ValueError),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4), torch.ones(4, 4), ValueError),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.ones(4, 5), ValueError),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.ones(3, 4, 4), ValueError),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.full((4, 4), 1.5), ValueError),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.full((4, 4), float("nan")), ValueError),
        (torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), float("nan")), torch.ones(4, 4), NonFiniteError),
        (torch.zeros(1, 3, 4, 4).byte(), torch.zeros(1, 3, 4, 4).byte(), torch.ones(4, 4), TypeError),
    ],
)
def test_refused(a, b, mask, error):
    with pytest.raises(error):
        image_change(a, b, mask)


class FixedClassifier(AttributeClassifier):
    """Reads the attributes off the first pixels: red, green, blue of (0, 0) for hat, glasses, beard; red of (0, 1)."""

    def predict(self, images):
        first = images[:, :, 0, 0].sign().clamp_min(0).long()
        mood = images[:, 0, 0, 1].round().long()
        return {"hat": first[:, 0], "glasses": first[:, 1], "beard": first[:, 2], "mood": mood}


def coded(*rows: tuple[int, int, int, int]) -> torch.Tensor:
    images = torch.zeros(len(rows), 3, 4, 4)
    for image, (hat, glasses, beard, mood) in zip(images, rows, strict=True):
        image[:, 0, 0] = torch.tensor([hat, glasses, beard]) * 1.0
        image[0, 0, 1] = mood
    return images


def test_report_counts_only_where_the_rule_applies():
    before = coded((0, 0, 0, 1), (0, 1, 0, 0), (0, 0, 0, -1), (0, 0, 1, -1), (1, 1, 1, 1))
    after = coded((1, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 1), (1, 0, 1, 0), (1, 0, 0, 0))
    applies = torch.tensor([True, True, True, True, False])
    report = edit_report(
        before,
        after,
        attribute="hat",
        wanted=1,
        applies=applies,
        mask=torch.ones(4, 4),
        pasted=after,
        alpha=torch.ones(1, 4, 4),
        classifier=FixedClassifier(),
    )
    assert (report.images, report.applies, report.success) == (5, 4, 0.75)
    assert report.flips == {"glasses": 0.25, "beard": 0, "mood": 0.5}
    assert report.rates_before["hat"] == {0: 1, 1: 0}
    assert report.rates_after["hat"] == {0: 0.25, 1: 0.75}
    assert report.rates_before["mood"] == {-1: 0.5, 0: 0.25, 1: 0.25}
    assert report.change.inside.l1 == pytest.approx((before - after)[:4].abs().mean().item())
    assert report.region.ratio == 0
    assert report.untouched == pytest.approx((before - after)[4].abs().mean().item())
    record = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert record["rates_after"]["mood"]["-1"] == 0
    assert record["region"]["ratio"] == 0
    shared = edit_report(
        before,
        after,
        attribute="hat",
        wanted=1,
        applies=applies,
        classifier=FixedClassifier(),
        found_before=FixedClassifier().predict(before),
    )
    assert (shared.flips, shared.rates_before) == (report.flips, report.rates_before)
    everywhere = edit_report(before, after, attribute="hat", wanted=1, classifier=FixedClassifier())
    assert (everywhere.applies, everywhere.success, everywhere.untouched) == (5, 0.8, None)
    assert everywhere.as_dict()["change"] is None


def test_report_refuses():
    x = coded((0, 0, 0, 1), (1, 1, 0, 0))
    for options, message in (
        ({"applies": [False, False]}, "none of the 2"),
        ({"applies": [True]}, "each of 2"),
        ({"attribute": "scarf"}, "scarf"),
        ({"attribute": "hat", "wanted": 2}, "hat = 2"),
        ({"pasted": x}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            edit_report(x, x, **{"attribute": "hat", "wanted": 1, "classifier": FixedClassifier(), **options})


def test_report_of_real_pictures():
    generator = load_generator("peeps")
    images = generator.images(range(12))
    report = edit_report(images, images, attribute="hat", wanted=0)
    assert report.success == report.rates_before["hat"][0]
    assert set(report.flips.values()) == {0.0}
    assert sum(report.rates_after["mood"].values()) == pytest.approx(1)
