"""Masks, records and history of the interface's document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import mask_url

from pyrewrite import Edit, Selection, Settings
from pyrewrite.edit import Place
from pyrewrite.errors import EditError
from pyrewrite.interface.document import Brought, Document, History, Mask, Region
from pyrewrite.rewriting import encode_mask


def blank() -> Document:
    return Document("layer4", Settings())


@pytest.mark.parametrize("size", [1, 7, 8, 31])
def test_a_mask_goes_there_and_back_at_every_size(size):
    area = np.random.default_rng(0).random((size, size)) > 0.5
    mask = Mask(size, np.packbits(area).tobytes())
    assert (mask.area == area).all()
    assert Mask.of(area) == mask
    assert Mask.from_url(mask.url, size) == mask
    assert mask.pixels == area.sum()


def test_bits_behind_the_last_pixel_do_not_count():
    one, other = bytes([0xFF, 0x80]), bytes([0xFF, 0xFF])
    assert Mask(3, one) == Mask(3, other)
    assert Mask(3, one).hash == Mask(3, other).hash


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_mask_of_another_size_is_refused(length):
    with pytest.raises(EditError, match=f"{length} bytes; expected 32"):
        Mask(16, bytes(length))


def test_masks_of_records_come_in_the_pictures_own_pixels():
    """The official tool paints at 256 whatever the generator's size."""
    mask = Mask.from_url(mask_url(256, 64, 32, 128, 96), 128)
    assert mask.size == 128
    assert mask.box == (32, 16, 64, 48)
    with pytest.raises(EditError, match="square"):
        Mask.from_url(encode_mask(np.ones((8, 16))), 16)


def test_a_soft_mask_is_solved_with_and_saved_as_it_was_given():
    values = np.zeros((32, 32), np.float32)
    values[8:16, 8:20] = 1
    values[8:16, 20:24] = (0.8, 0.6, 0.4, 0.2)
    soft = encode_mask(values)
    record = Edit(object=Selection(3, soft), context=[Selection(4, soft)])
    document = blank().from_record(record, 32)
    mask = document.object.mask
    assert mask.box == (8, 8, 16, 22)  # what is half covered is shown
    assert document.record().object == record.object
    assert document.record().context == record.context
    assert mask != Mask(32, mask.bits)  # nothing that was made with the hard one passes for it
    assert mask.hash != Mask(32, mask.bits).hash
    repainted = Mask(32, mask.bits)
    assert Mask.from_url(repainted.url, 32).given is None
    # faint all over is not empty
    assert Mask.from_url(encode_mask(0.3 * values), 32).box == (8, 8, 16, 24)


def test_islands_and_boxes():
    area = np.zeros((16, 16), bool)
    area[2:6, 2:6] = True
    area[10, 12] = True
    mask = Mask.of(area)
    assert mask.islands == (16, 1)
    assert mask.box == (2, 2, 11, 13)
    assert Mask.of(np.zeros((16, 16))).box is None


def test_a_second_context_mask_of_a_picture_replaces_the_first():
    first, second = (Region(5, Mask.of(np.eye(8, k=k))) for k in (0, 1))
    other = Region(6, first.mask)
    document = blank().with_context(first).with_context(other).with_context(second)
    assert document.context == (second, other)


def test_places_follow_their_pictures():
    region = Region(5, Mask.of(np.eye(8)))
    document = blank().with_context(region).with_place(5, dy=3).with_place(5, on=False)
    assert document.places[5] == Place(3, 0, False)
    assert document.replace(context=()).tidied().places == {}
    assert document.with_place(5, dy=0, on=True).places == {}


def test_a_record_and_back_is_the_same_document():
    mask = Mask.of(np.pad(np.ones((3, 4)), ((2, 3), (2, 2))))
    w = Brought.of("mine", torch.arange(4.0))
    document = blank().replace(
        object=Region(w.number, mask), paste=Region(1, mask), query=Region(9, mask), brought={w.number: w},
        settings=Settings(rank=3, protect_rank=4), layer="layer6",
    )  # fmt: skip
    document = document.with_context(Region(4, mask)).with_protect(Region(7, mask)).with_place(4, dx=-2)
    record = Edit.from_dict(document.record("x", {"family": "f", "hash": "h"}).to_dict())
    again = blank().from_record(record, 8)
    for name in ("object", "paste", "query", "context", "protect", "places", "settings", "layer"):
        assert getattr(again, name) == getattr(document, name), name
    assert torch.equal(again.latents[w.number], torch.arange(4.0))
    assert again.painted is None


def test_brought_pictures_get_the_number_of_what_they_are():
    record = Edit(object=Selection(3, mask_url(8, 1, 1, 5, 5)), latents={3: torch.ones(4)}, places={3: Place(1, 1)})
    loaded = blank().from_record(record, 8)
    (number,) = loaded.brought
    assert number == Brought.of("", torch.ones(4)).number > 1_000_000
    assert loaded.object.image == number
    assert Brought.of("", torch.ones(4)).number != Brought.of("", torch.zeros(4)).number


def test_an_empty_mask_in_a_record_is_refused():
    with pytest.raises(EditError, match="paste mask is empty"):
        blank().from_record(Edit(paste=Selection(0, mask_url(8, 0, 0, 0, 0))), 8)


def test_history_merges_what_a_slider_does_and_forgets_the_future():
    a, b, c, d = (blank().replace(strip=s) for s in "abcd")
    history = History(a)
    history.push("set", b, merge=("set", "rank"))
    history.push("set", c, merge=("set", "rank"))
    history.undo()
    assert history.document is a
    assert history.redo_label == "set"
    history.redo()
    assert history.document is c
    history.push("set", d, merge=("set", "rank"))  # after a redo it is another slide
    history.undo()
    assert history.document is c
    history.push("other", a)
    assert history.redo_label is None
    with pytest.raises(EditError, match="nothing to redo"):
        history.redo()
    for _ in range(2):
        history.undo()
    with pytest.raises(EditError, match="nothing to undo"):
        history.undo()


def test_history_is_bounded():
    history = History(blank())
    for n in range(2 * History.LIMIT):
        history.push("paint", blank().replace(strip=str(n)))
    steps = 0
    while history.undo_label:
        history.undo()
        steps += 1
    assert steps == History.LIMIT
