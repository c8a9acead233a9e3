"""Uploads, downloads, brought pictures and the gallery."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from interface_session_support import Client, Refused, box, compose
from PIL import Image
from support import bits, same_bits, settled

from pyrewrite import Edit, LowRankPatch, Rewriter, load_generator
from pyrewrite.demo import demo_edits
from pyrewrite.edit import Selection
from pyrewrite.interface import Session
from pyrewrite.interface.document import Mask
from pyrewrite.interface.hints import edits_before
from pyrewrite.rewriting import encode_mask

QUICK = {"rank": 3, "steps": 31, "margin": 0}


@pytest.fixture
def session(tmp_path):
    made = Session(
        load_generator("peeps"), layer="layer4", samples=24, cache_dir=False, folder=tmp_path / "edits", strip="0-3"
    )
    yield made
    made.close()


@pytest.fixture
def client(session):
    client = Client(session)
    client.do("set", **QUICK)
    return client


def download(client: Client, **fields) -> tuple[str, bytes]:
    reply, (data,) = client.answer(client.send("do", "download", **fields))
    return reply["filename"], data


def npy(values) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def test_a_patch_goes_out_and_comes_in_again(session, client, tmp_path):
    compose(client, 1)
    number = client.do("execute")["edit"]
    edited = bits(settled(session))
    name, data = download(client, kind="patch")
    assert name.endswith(".safetensors")
    again = LowRankPatch.from_bytes(download(client, kind="patch", edit=number)[1])
    assert again.digest == LowRankPatch.from_bytes(data).digest
    with pytest.raises(Refused, match="on the stack already"):
        client.do("upload", data, kind="patch", name="hat.safetensors")
    client.do("revert")
    client.do("upload", data, kind="patch", name="hat.safetensors")
    assert same_bits(settled(session), edited)
    assert client.state["edits"][0]["report"]["loss_before"] > 0
    (tmp_path / "p.safetensors").write_bytes(data)  # and the library reads it
    patch = LowRankPatch.load(tmp_path / "p.safetensors")
    fresh = load_generator("peeps")
    patch.apply_(fresh)
    assert same_bits(fresh, edited)


def test_a_patch_of_another_generator_is_refused(session, client):
    compose(client, 0)
    client.do("execute")
    patch = session.document.edits[0].patch
    patch.generator = {"family": "stylegan2", "hash": "0" * 64}
    data = patch.to_bytes()
    client.do("revert")
    with pytest.raises(Refused, match="made for a generator with weights 000000000000"):
        client.do("upload", data, kind="patch")
    patch.generator = None
    patch.updates = (type(patch.updates[0])("layer8", patch.updates[0].direction, patch.updates[0].lambda_),)
    with pytest.raises(Refused, match="weight of layer8"):
        client.do("upload", patch.to_bytes(), kind="patch")
    assert client.state["edits"] == []


def test_the_sum_of_several_and_the_merged_checkpoint(session, client, tmp_path):
    compose(client, 1)
    client.do("execute")
    client.do("set", layer="layer6")
    client.do("execute")
    client.do("stack", edit=1, strength=0.5)
    edited = bits(settled(session))
    fresh = load_generator("peeps")
    (tmp_path / "sum.safetensors").write_bytes(download(client, kind="patch")[1])
    LowRankPatch.load(tmp_path / "sum.safetensors").apply_(fresh)
    assert same_bits(fresh, edited)
    name, data = download(client, kind="checkpoint")
    (tmp_path / name).write_bytes(data)
    merged = load_generator(tmp_path / name)
    assert torch.equal(merged.images([2]), session.model.generator.images([2]))


def test_an_edit_record_goes_out_and_comes_in_again(session, client):
    compose(client, 2)
    client.do("move", image=2, dy=5, dx=-3)
    client.do("place", image=3, on=False)
    client.do("protect")
    before = session.document
    _, data = download(client, kind="edit")
    client.do("new")
    client.do("upload", data, kind="edit", name="mine (1).json")
    for name in ("object", "paste", "context", "places", "protect", "settings", "layer"):
        assert getattr(session.document, name) == getattr(before, name)
    # what was executed is kept with the edit, whatever is selected now
    number = client.do("execute")["edit"]
    client.do("new")
    record = Edit.from_dict(json.loads(download(client, kind="edit", edit=number)[1]))
    assert record.places[2].dy == 5
    # and the record solves to the same patch elsewhere
    rewriter = Rewriter(load_generator("peeps"), "layer4", statistics=session.model.rewriter("layer4").statistics)
    patch = rewriter.solve(record)
    assert [t["image"] for t in patch.report.targets] == [1, 2]
    torch.testing.assert_close(patch.updates[0].delta(), session.document.edits[0].patch.updates[0].delta())


def test_a_record_of_another_generator_is_taken_with_a_warning(session, client):
    compose(client, 0)
    record = session.document.record("x", {"family": "stylegan2", "hash": "f" * 64}).to_dict()
    client.do("upload", json.dumps(record).encode(), kind="edit")
    client.settle()
    assert any("another generator" in m["message"] for m, _ in client.of_type("notice"))


def test_an_official_record_loads_with_its_larger_masks(session, client):
    from support import mask_url

    record = {"object": [2, mask_url(256, 40, 60, 120, 180)], "key": [[5, mask_url(256, 30, 30, 90, 90)]]}
    client.do("upload", json.dumps(record).encode(), kind="edit")
    state = client.state
    assert state["object"]["box"] == [20, 30, 60, 90]
    assert state["paste"] is None
    assert [r["image"] for r in state["context"]] == [5]
    assert client.do("execute")["edit"] == 1


@pytest.mark.parametrize("shape", [(128,), (1, 128), (12, 128), (1, 12, 128)])
def test_a_picture_of_ones_own_joins_the_strip(session, client, shape):
    g = session.model.generator
    w = g.mapped(g.latents([7])).expand(12, -1) if 12 in shape else g.mapped(g.latents([7]))
    assert g.num_ws == 12
    (number,) = client.do("upload", npy(w.numpy().reshape(shape)), kind="latent", name="me.npy")["numbers"]
    state = client.state
    assert state["strip"]["numbers"][0] == number > 1_000_000
    assert state["brought"] == [{"number": number, "name": "me.npy"}]
    _, (mine,) = client.get("pictures", numbers=[number], size=128)
    _, (seven,) = client.get("pictures", numbers=[7], size=128)
    first, second = (np.asarray(Image.open(io.BytesIO(p))).astype(int) for p in (mine, seven))
    assert np.abs(first - second).max() <= 1
    # it can be painted, solved, saved and loaded as any other
    mask = box(40, 40, 90, 90)
    client.do("paint", mask, image=number)
    client.do("copy")
    client.do("add_context")
    client.do("paint", mask, image=2)
    client.do("paste")
    targets = client.do("execute")["report"]["targets"]
    assert {t["image"] for t in targets} == {2, number}
    client.do("strip", text=f"{number},4-5")
    assert client.state["strip"]["numbers"] == [number, 4, 5]
    client.do("save", name="mine")
    while client.state["undo"]:
        client.do("undo")
    assert client.state["brought"] == []
    client.do("load", name="mine")
    assert [b["number"] for b in client.state["brought"]] == [number]
    assert session.document.object.image == number


def test_several_pictures_at_once_and_none_for_a_generator_without_w(session, client, tmp_path):
    g = session.model.generator
    assert len(client.do("upload", npy(g.mapped(g.latents(range(3))).numpy()), kind="latent")["numbers"]) == 3
    client.do("undo")
    assert client.state["brought"] == []
    other = Session(load_generator("peeps-progan"), samples=8, cache_dir=False, folder=tmp_path)
    with pytest.raises(Refused, match="need a StyleGAN2 or StyleGAN3; this is a progan"):
        Client(other).do("upload", npy(np.zeros(32, np.float32)), kind="latent")
    other.close()


def test_snapshot_and_sheet_show_before_and_after(session, client):
    compose(client, 0)
    client.do("execute")
    _, (data,) = client.answer(client.send("do", "snapshot"))
    sheet = Image.open(io.BytesIO(data))
    assert sheet.width > 4 * 128
    assert sheet.height > 2 * 128
    assert download(client, kind="sheet")[1] == data


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_the_gallery_holds_edits_of_this_very_generator(session, client, monkeypatch):
    listed = client.get("gallery")[0]["gallery"]
    assert {e["name"] for e in listed} == {"beanie", "hats-off", "sunglasses", "beard", "brimmed-hat"}
    record = next(d for d in demo_edits() if d.name == "beanie").record()
    client.do("gallery", load="beanie")
    assert client.state["settings"]["layer"] == record.layer
    client.do("new")
    monkeypatch.setattr("pyrewrite.interface.jobs.CAPTURE_BATCH", 4)
    breathe, breaths = session.breathe, []

    def watched(job=None):
        breaths.append(job and (job.steps, job.step, job.loss))
        breathe(job)

    monkeypatch.setattr(session, "breathe", watched)
    number = client.do("gallery", apply="beanie")["edit"]
    steps = record.resolve().steps
    captures = -(-len(session.model.rewriter("layer6").images_of(record)) // 4)
    assert breaths.count((steps, 0, None)) == captures > 2  # others are answered between them,
    assert breaths.count((steps, steps, breaths[-1][2])) > 1  # and while the report is made
    (edit,) = client.state["edits"]
    assert (edit["id"], edit["name"]) == (number, "a beanie on bald heads")
    assert edit["report"]["loss_after"] < edit["report"]["loss_before"]
    with pytest.raises(Refused, match="on the stack already"):
        client.do("gallery", apply="beanie")


def test_a_loaded_record_with_soft_masks_solves_as_it_does_anywhere(session, client):
    values = np.zeros((128, 128), np.float32)
    values[40:90, 40:90] = np.linspace(0.1, 1, 50)
    edges = encode_mask(values)
    record = Edit(
        object=Selection(0, edges), paste=Selection(1, edges), context=[Selection(2, edges)], layer="layer4",
        settings={"rank": 3, "steps": 11, "margin": 0},
    )  # fmt: skip
    client.do("upload", json.dumps(record.to_dict()).encode(), kind="edit")
    client.do("execute")
    (edit,) = session.document.edits
    rewriter = session.model.rewriter("layer4")
    with session.model.original():
        (expected,) = rewriter.solve(record).updates
    (found,) = edit.patch.updates
    assert torch.equal(found.direction, expected.direction)
    assert torch.allclose(found.lambda_, expected.lambda_, rtol=1e-4, atol=1e-6)
    client.do("object_mask", Mask.from_url(edges, 128).bits)  # repainted it is what was painted
    assert session.document.object.mask.given is None


def test_help_says_how_to_use_a_picture_of_ones_own(client):
    reply, _ = client.get("help")
    assert "latent w" in reply["pictures"]
    assert ["[ and ]", "brush smaller, larger"] in reply["keys"]


def test_the_hint_ranks_layers_by_what_they_do_elsewhere(session, client, monkeypatch):
    monkeypatch.setattr("pyrewrite.interface.hints.SAMPLES", 4)
    compose(client, 3)
    before = bits(settled(session))
    layers = client.do("hint")["layers"]
    assert [h["layer"] for h in layers] != list(session.model.generator.layers)
    assert {h["layer"] for h in layers} == set(session.model.generator.layers)
    scores = [h["score"] for h in layers if h["score"] is not None]
    assert scores == sorted(scores, reverse=True)
    assert all(h["why"] for h in layers)
    assert same_bits(settled(session), before)
    runs = session.model.every_layer
    monkeypatch.setattr(session.model, "every_layer", None)
    client.do("strip", text="0-9")
    assert client.do("hint")["layers"] == layers  # kept: the strip and the chosen layer have no part in it
    monkeypatch.setattr(session.model, "every_layer", runs)
    monkeypatch.setattr(session.model, "collect_quickly", None)  # nor do the statistics run again for other places
    client.do("move", dy=9, dx=0)
    assert client.do("hint")["layers"] != layers
    client.do("move", dy=18, dx=0)
    number = client.send("do", "hint")
    client.wait(lambda m: m["type"] == "progress" and m["job"] and m["job"]["kind"] == "hint")
    client.do("cancel")
    with pytest.raises(Refused, match="cancelled"):
        client.answer(number)


def test_the_hint_judges_the_generator_as_it_was_before_the_edit(session, client, monkeypatch):
    monkeypatch.setattr("pyrewrite.interface.hints.SAMPLES", 4)
    client.do("set", rank=3, steps=11)
    compose(client, 3)
    layers = client.do("hint")["layers"]
    client.do("execute")
    kept, asked = bits(settled(session)), []
    monkeypatch.setattr(session.model, "every_layer", None)
    client.do("set", layer="layer6")
    assert client.do("hint")["layers"] == layers  # at once: what was executed has no part in it
    monkeypatch.undo()
    monkeypatch.setattr("pyrewrite.interface.hints.SAMPLES", 4)
    breathe = session.breathe

    def watched(job):
        asked.append(same_bits(session.model.generator, kept))
        breathe(job)

    monkeypatch.setattr(session, "breathe", watched)
    session.hints.clear()
    assert client.do("hint")["layers"] == layers
    assert len(asked) > len(session.model.generator.layers)
    assert all(asked)  # who is answered meanwhile sees the edit
    assert same_bits(settled(session), kept)
    client.do("move", dy=9, dx=0)  # another selection: now the edit is part of the generator
    client.do("paint", box(20, 20, 60, 60), image=0)
    client.do("copy")
    assert len(edits_before(session.document)) == 1
    assert client.do("hint")["layers"] != layers


def test_a_saved_record_is_whole_or_as_it_was(session, client, monkeypatch):
    compose(client, 0)
    client.do("save", name="x")
    path = session.folder / "x.json"
    kept = path.read_bytes()
    client.do("set", rank=5)

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Refused, match="no space left"):
        client.do("save", name="x")
    assert path.read_bytes() == kept
    assert [p.name for p in session.folder.iterdir()] == ["x.json"]
