"""Where the object lands: nudged, left out, and on pictures that were brought as w."""

from __future__ import annotations

import pytest
import torch
from support import mask_url

from pyrewrite import Edit, Selection
from pyrewrite.edit import Place, read_latent
from pyrewrite.errors import EditError
from pyrewrite.rewriting.selection import connected_region, islands

QUICK = {"rank": 2, "steps": 11, "margin": 0}


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
@pytest.mark.parametrize("layer", ["layer4", "layer5"])
def test_a_nudge_is_as_good_as_a_mask_that_lies_there(rewriters, layer):
    """dy, dx in picture pixels move the goal; the context, and with it the directions, stays where it was painted."""
    rw = rewriters("peeps", layer)
    here, there = mask_url(128, 32, 32, 64, 64), mask_url(128, 48, 16, 80, 48)
    nudged = Edit(object=Selection(0, here), context=[Selection(2, here), Selection(3, here)])
    nudged.places = {2: Place(16, -16)}
    moved = Edit(object=Selection(0, here), context=[Selection(2, there), Selection(3, here)])
    settings = nudged.resolve(**QUICK)
    captured = rw.capture(rw.images_of(nudged, settings))
    ours, theirs = (rw._targets(captured, e, settings) for e in (nudged, moved))
    assert ours[0].box == theirs[0].box != ours[1].box
    assert torch.equal(ours[0].target.goal, theirs[0].target.goal)
    plain = Edit(object=nudged.object, context=nudged.context)
    assert torch.equal(rw.directions(nudged, settings), rw.directions(plain, settings))
    assert [t["image"] for t in rw.solve(nudged, **QUICK).report.targets] == [2, 3]


def test_a_nudge_cannot_leave_the_picture(rewriters):
    rw = rewriters("peeps", "layer4")
    url = mask_url(128, 32, 32, 64, 64)
    edit = Edit(object=Selection(0, url), paste=Selection(1, url), places={1: Place(10_000, -10_000)})
    settings = edit.resolve(**QUICK)
    (placed,) = rw._targets(rw.capture([0, 1]), edit, settings)
    assert (placed.box.bottom, placed.box.left) == (8, 0)


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_a_place_that_is_off_is_context_only(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    record = edit(128)
    record.places = {2: Place(on=False)}
    assert [t["image"] for t in rw.solve(record, **QUICK).report.targets] == [1, 3]
    settings = record.resolve(**QUICK)
    assert torch.equal(rw.directions(record, settings), rw.directions(edit(128), settings))
    record.places = {n: Place(on=False) for n in (1, 2, 3)}
    with pytest.raises(EditError, match="every place is switched off"):
        rw.solve(record, **QUICK)


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_a_brought_picture_solves_as_the_one_it_is(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    record = edit(128)
    w = rw.generator.mapped(rw.generator.latents([0, 2]))
    url = record.object.mask
    brought = Edit(
        object=Selection(1_000_100, url), paste=record.paste,
        context=[Selection(1_000_200, url), Selection(3, url)], latents={1_000_100: w[0], 1_000_200: w[1]},
    )  # fmt: skip
    again = Edit.from_dict(brought.to_dict())
    mine, theirs = rw.solve(again, **QUICK), rw.solve(record, **QUICK)
    assert mine.report.loss_after == pytest.approx(theirs.report.loss_after, rel=1e-3)
    assert {t["image"] for t in mine.report.targets} == {1, 3, 1_000_200}
    again.latents[1_000_100] = torch.zeros(5)
    with pytest.raises(EditError, match=r"latents.*w is B x 128"):
        rw.solve(again, **QUICK)
    progan = rewriters("peeps-progan", "layer4")
    with pytest.raises(EditError, match="need a StyleGAN2 or StyleGAN3; this is a progan"):
        progan.capture([5], {5: torch.zeros(32)})


def test_the_record_carries_places_and_pictures_and_stays_official(tmp_path):
    url = mask_url(16, 2, 2, 9, 9)
    record = Edit(object=Selection(0, url), context=[Selection(4, url)], places={4: Place(3, -2, False)})
    record.latents = {0: torch.randn(3, 4)}
    record.save(tmp_path / "e.json")
    again = Edit.load(tmp_path / "e.json")
    assert again.places == record.places
    assert torch.equal(again.latents[0], record.latents[0])
    assert set(again.to_dict()) == {"object", "key", "pyrewrite"}
    assert again.to_dict()["key"] == [[4, url]]


def test_latents_that_are_no_numbers():
    for data in (b"", b"PK", b"\x93NUMPY\x01\x00"):
        with pytest.raises(EditError, match=r"expected an \.npy file"):
            read_latent(data)


@pytest.mark.parametrize("seed", range(3))
def test_connected_regions_are_the_islands(seed):
    area = torch.rand(13, 17, generator=torch.Generator().manual_seed(seed)) > 0.45
    sizes, left = [], area.clone()
    while left.any():
        y, x = left.nonzero()[0].tolist()
        region = connected_region(area, y, x)
        assert region[y, x]
        assert not (region & ~area).any()
        # nothing painted touches it from outside
        grown = torch.nn.functional.max_pool2d(region[None, None].float(), (3, 1), 1, (1, 0))
        grown = torch.maximum(grown, torch.nn.functional.max_pool2d(region[None, None].float(), (1, 3), 1, (0, 1)))
        assert not ((grown[0, 0] > 0) & area & ~region).any()
        sizes.append(int(region.sum()))
        left &= ~region
    assert sorted(sizes, reverse=True) == islands(area)
    assert not connected_region(torch.zeros(3, 3), 1, 1).any()
