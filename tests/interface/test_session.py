"""The session as its clients see it: what each message does, and that document, state and weights always agree."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import stylegan3_reference
import torch
from interface_session_support import Client, Refused, box, compose
from PIL import Image
from support import bits, same_bits, settled

from pyrewrite import Edit, load_generator
from pyrewrite.evaluation.sheets import to_uint8
from pyrewrite.interface import Session

QUICK = {"rank": 3, "steps": 31, "margin": 0}


@pytest.fixture
def session(tmp_path):
    made = Session(
        load_generator("peeps"), layer="layer4", samples=24, cache_dir=False, folder=tmp_path / "edits", strip="0-7"
    )
    yield made
    made.close()


@pytest.fixture
def client(session):
    return Client(session)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_connecting_gives_the_state_at_once(session):
    client = Client(session)
    message, buffers = client.messages[0]
    assert message["type"] == "state"
    assert buffers == []
    assert message["generator"]["image_size"] == 128
    assert message["strip"] == {"text": "0-7", "numbers": list(range(8))}
    assert message["can"]["execute"] == "copy an object first"
    assert message["settings"]["layer"] == "layer4"
    assert set(message["ranges"]) <= set(message["settings"])


def test_the_first_layer_of_a_session_is_one_that_usually_fits():
    for name, layer in (("peeps", "layer6"), ("peeps-progan", "layer6")):
        session = Session(load_generator(name), samples=8, cache_dir=False)
        assert session.document.layer == layer
        session.close()


def test_pictures_are_those_of_the_generator(session, client):
    reply, (data,) = client.get("pictures", numbers=[3, 0, 5], size=128)
    assert (reply["size"], reply["weights"]) == (128, client.state["weights"]["edited"])
    assert reply["media"] == "image/png"
    pixels = decoded(data)
    expected = to_uint8(session.model.generator.images([3, 0, 5])).numpy()
    for i in range(3):
        y, x = i // reply["columns"] * 128, i % reply["columns"] * 128
        assert np.array_equal(pixels[y : y + 128, x : x + 128], expected[i])
    reply, (data,) = client.get("pictures", numbers=[3, 0], size=40)
    assert decoded(data).shape[0] == 40
    reply, _ = client.get("pictures", numbers=[3], size=4096)  # never larger than they are
    assert reply["size"] == 128
    _, (data,) = client.get("pictures", numbers=[], size=64)
    assert decoded(data).shape == (1, 1, 3)


def test_a_mask_is_content_addressed_and_comes_back_as_it_went(client):
    mask = box(10, 20, 31, 47)
    reply = client.do("paint", mask, image=2)
    assert reply["pixels"] == 21 * 27
    assert client.state["painted"] == {"image": 2, "hash": reply["hash"], "pixels": 567, "islands": [567]}
    answer, (data,) = client.get("mask", hash=reply["hash"])
    assert data == mask
    assert (answer["image"], answer["size"]) == (2, 128)
    client.do("paint", mask, image=3)  # one picture is painted at a time
    assert client.state["painted"]["image"] == 3
    assert client.do("paint", bytes(2048), image=3)["hash"] is None
    assert client.state["painted"] is None
    with pytest.raises(Refused, match="gone"):
        client.get("mask", hash=reply["hash"])


def test_stray_pixels_are_counted(client):
    mask = np.zeros((128, 128), bool)
    mask[20:40, 20:40] = True
    mask[100, 100] = mask[110, 3] = True
    assert client.do("paint", np.packbits(mask).tobytes(), image=0)["islands"] == [400, 1, 1]


def test_copy_paste_context_and_where_the_object_lands(client):
    state = compose(client, 2).state
    assert [r["image"] for r in state["context"]] == [2, 3]
    assert state["paste"]["box"] == [40, 40, 90, 90] or state["paste"]["box"][0] % 16 == 0  # on a map of 8 x 8
    before = state["context"][0]["box"]
    client.do("move", image=2, dy=16, dx=-32)
    moved = client.state["context"][0]
    assert (moved["dy"], moved["dx"]) == (16, -32)
    assert moved["box"] == [before[0] + 16, before[1] - 32, before[2] + 16, before[3] - 32]
    client.do("move", image=None, dy=0, dx=16)
    assert client.state["paste"]["dx"] == 16
    client.do("place", image=3, on=False)
    assert [r["on"] for r in client.state["context"]] == [True, False]
    client.do("remove", what="context", image=2)
    assert [r["image"] for r in client.state["context"]] == [3]
    client.do("remove", what="paste")
    assert client.state["paste"] is None
    client.do("object_mask", box(50, 50, 70, 70))
    assert client.state["object"]["box"] == [50, 50, 70, 70]
    client.do("object_mask", bytes(2048))  # an empty one drops it
    assert client.state["object"] is None


def test_the_object_lands_where_the_solver_puts_it(session, client):
    compose(client, 1)
    client.do("move", image=2, dy=-16, dx=16)
    state = client.state
    record = session.document.record()
    rewriter = session.model.rewriter("layer4")
    settings = record.resolve(margin=0)
    placed = rewriter._targets(rewriter.capture(rewriter.images_of(record, settings)), record, settings)
    shown = [state["paste"]["box"], state["context"][0]["box"]]
    assert [[16 * edge for edge in p.box] for p in placed] == shown


def test_a_click_selects_the_region_that_was_clicked(session, client):
    sizes = []
    for alike in (0.2, 0.5, 0.9, 1.0):
        reply = client.do("click", image=1, y=64, x=70, alike=alike)
        _, (data,) = client.get("mask", hash=reply["hash"])
        area = np.unpackbits(np.frombuffer(data, np.uint8)).reshape(128, 128)
        assert area[64, 70]
        assert len(reply["islands"]) == 1
        sizes.append(reply["pixels"])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    added = client.do("click", image=1, y=5, x=5, alike=0.9, add=True)
    assert added["pixels"] > sizes[-1]


def test_settings_are_checked_and_a_slider_is_one_step(client):
    for rank in range(1, 9):
        client.do("set", rank=rank)
    client.do("set", layer="layer6", strength=0.5, preserve=2)
    state = client.state
    assert (state["settings"]["rank"], state["settings"]["layer"], state["settings"]["strength"]) == (8, "layer6", 0.5)
    client.do("undo")
    client.do("undo")
    assert client.state["settings"]["rank"] == 10  # the default, not 7
    for name, value, text in (
        ("rank", 0, "whole number from 1"),
        ("rank", True, "whole number"),
        ("rank", 2.5, "whole number"),
        ("lr", float("nan"), "expected a number"),
        ("preserve", float("inf"), "expected a number"),
        ("preserve", "1", "expected a number"),
        ("method", "magic", "expected one of low_rank"),
        ("layer", "layer99", "there is no layer"),
        ("samples", 5, "belongs to the session"),
        ("warm_start", 1, "true or false"),
        ("colour", 1, "unknown setting"),
        ("shrinkage", None, "expected a number"),
        ("method", [1], "expected a number, a text"),
    ):
        with pytest.raises(Refused, match=text):
            client.do("set", **{name: value})


def test_the_preview_comes_paste_first_and_leaves_the_weights(session, client):
    kept = bits(settled(session))
    client.do("set", **QUICK)
    compose(client, 2)
    client.settle()
    kinds = [m["kind"] for m, _ in client.of_type("preview")]
    assert kinds[-3:] == ["paste", "context", "row"]
    state = client.state
    last = client.of_type("preview")[-1][0]
    assert last["key"] == state["live"]["key"]
    assert last["numbers"] == state["live"]["row"]
    assert not {0, 1, 2, 3} & set(last["numbers"])
    assert last["weights"] == state["weights"]["edited"]
    assert same_bits(settled(session), kept)
    # the pictures are those of the closed form, applied
    record = session.document.record()
    rewriter = session.model.rewriter("layer4")
    patch = rewriter.closed_form(record, rewriter.capture(rewriter.images_of(record)))
    message, (data,) = next((m, b) for m, b in reversed(client.of_type("preview")) if m["kind"] == "paste")
    with patch.applied(session.model.generator):
        expected = to_uint8(session.model.generator.images([1])).numpy()[0]
    original = to_uint8(session.model.generator.images([1])).numpy()[0]
    assert message["media"] == "image/jpeg"
    difference = np.abs(decoded(data).astype(int) - np.stack([expected, original])).mean((1, 2, 3))
    assert difference[0] < 2 < difference[1]
    (update,) = patch.updates
    (shown,) = session.model.rendered_with(update, session.model.activations("layer4", [1], {}))
    assert np.abs(shown.astype(int) - expected).max() <= 1


def test_a_front_end_that_comes_later_gets_the_present_previews(session, client):
    compose(client)
    assert session.settle(60)
    late = Client(session)
    late.get("state")
    assert session.settle(60)
    assert [m["kind"] for m, _ in late.of_type("preview")] == ["paste", "context", "row"]
    assert {m["key"] for m, _ in late.of_type("preview")} == {late.state["live"]["key"]}
    client.do("remove", what="object")
    later = Client(session)
    later.get("state")
    assert session.settle(60)
    assert later.of_type("preview") == []


def test_the_first_pictures_are_drawn_before_anybody_asks(session):
    assert session.settle(60)
    assert session.model.has_pictures(range(8), original=True)


def test_a_preview_of_lower_rank_or_none_and_the_state_says_why(client):
    compose(client, 0, box(60, 60, 66, 66))  # four pixels of an 8 x 8 map
    client.do("set", rank=128)
    state = client.state
    assert state["live"]["error"] is None
    assert "shown with rank 4: the context's masks cover no more key pixels" in state["live"]["note"]
    client.do("remove", what="object")
    assert client.state["live"]["key"] is None
    assert client.state["live"]["error"] is None


def test_execute_changes_the_model_and_revert_restores_its_bits(session, client):
    kept = bits(settled(session))
    client.do("set", **QUICK)
    compose(client, 2)
    reply = client.do("execute")
    report = reply["report"]
    assert report["loss_after"] < report["loss_before"]
    assert 0 < report["change_elsewhere"] < 0.5
    state = client.state
    (edit,) = state["edits"]
    assert (edit["id"], edit["layer"], edit["rank"], edit["on"]) == (reply["edit"], "layer4", 3, True)
    assert state["weights"]["edited"] != state["weights"]["original"]
    assert not same_bits(settled(session), kept)
    assert client.of_type("progress")
    edited, (new,) = client.get("pictures", numbers=[1], size=128, weights="edited")
    _, (old,) = client.get("pictures", numbers=[1], size=128, weights=state["weights"]["original"])
    assert edited["weights"] == state["weights"]["edited"]
    assert not np.array_equal(decoded(new), decoded(old))
    client.do("toggle", shown="original")
    assert client.state["shown"] == "original"
    assert not same_bits(settled(session), kept)  # rendering only
    client.do("revert")
    assert same_bits(settled(session), kept)
    with pytest.raises(Refused, match="gone"):
        client.get("pictures", numbers=[1], size=128, weights=edited["weights"])
    client.do("undo")
    assert client.state["weights"]["edited"] == edited["weights"]


def test_the_stack_is_a_sum_in_any_order(session, client):
    kept = bits(settled(session))
    client.do("set", **QUICK)
    compose(client, 1)
    first = client.do("execute")["edit"]
    client.do("set", layer="layer6")
    second = client.do("execute")["edit"]
    both = bits(settled(session))
    state = client.state
    assert np.array(state["overlap"]).shape == (2, 2)
    assert state["overlap"][0][1] == 0  # other layers
    client.do("stack", edit=first, on=False)
    assert not same_bits(settled(session), both)
    client.do("stack", edit=first, on=True)
    assert same_bits(settled(session), both)
    client.do("stack", order=[second, first])
    assert [e["id"] for e in client.state["edits"]] == [second, first]
    assert same_bits(settled(session), both)
    client.do("stack", edit=second, strength=0)
    client.do("stack", edit=first, strength=0.0)
    assert same_bits(settled(session), kept)  # strength 0 gives the original bits
    client.do("stack", edit=first, strength=1.0)
    client.do("stack", remove=second)
    assert [e["id"] for e in client.state["edits"]] == [first]
    client.do("stack", edit=first, name="a hat")
    assert client.state["edits"][0]["name"] == "a hat"
    for _ in range(8):  # changes of one slider that follow each other soon are one step
        if client.state["edits"] != state["edits"]:
            client.do("undo")
    assert client.state["edits"] == state["edits"]
    assert same_bits(settled(session), both)
    with pytest.raises(Refused, match="each once"):
        client.do("stack", order=[first, first])
    with pytest.raises(Refused, match="expected the id"):
        client.do("stack", edit=99, on=True)


def test_erase_protect_and_zero(session, client):
    client.do("set", **QUICK, units=20)
    client.do("paint", box(20, 20, 60, 100), image=2)
    client.do("add_context")
    client.do("paint", box(80, 40, 120, 90), image=3)
    client.do("protect")
    assert [r["image"] for r in client.state["protect"]] == [3]
    assert client.do("erase")["report"]["protected"]["dimensions"] > 0
    assert client.do("erase", method="zero")["report"]["method"] == "zero"
    assert len(client.state["edits"]) == 2
    client.do("remove", what="protect", image=3)
    assert client.state["protect"] == []


def test_search_and_matches(session, client):
    client.do("paint", box(20, 20, 60, 100), image=2)
    client.do("match_selection")
    reply = client.do("search", k=5)
    assert len(reply["numbers"]) == 5
    assert reply["scores"] == sorted(reply["scores"], reverse=True)
    assert client.state["strip"]["numbers"] == reply["numbers"]
    client.do("remove", what="query")
    with pytest.raises(Refused, match="no context"):
        client.do("search", k=5)
    client.do("add_context")
    record = session.document.record()
    expected = [n for n, _ in session.model.rewriter("layer4").search(record, k=5)]
    assert client.do("search", k=5)["numbers"] == expected
    client.do("set", shrinkage=0.7)
    with pytest.raises(Refused, match="turn matches on"):
        client.get("outline", numbers=[0], quantile=0.95)
    client.do("matches", on=True, quantile=0.95)
    assert client.state["matches"] == {"on": True, "ready": True}
    _, masks = client.get("outline", numbers=list(range(24)), quantile=0.95)
    share = np.mean([np.unpackbits(np.frombuffer(m, np.uint8)).mean() for m in masks])
    assert 0.02 < share < 0.08
    _, fewer = client.get("outline", numbers=list(range(24)), quantile=0.999)
    assert sum(map(sum, fewer)) < sum(map(sum, masks))


def test_undo_and_redo_of_everything(session, client):
    client.do("set", **QUICK)
    compose(client, 2)
    client.do("move", image=2, dy=3, dx=4)
    client.do("place", image=3, on=False)
    client.do("protect")
    client.do("match_selection")
    client.do("execute")
    client.do("strip", text="3-6")
    client.do("revert")
    client.do("new")
    final = session.document
    labels = []
    while (label := client.state["undo"]) is not None:
        labels.append(label)
        client.do("undo")
    start = client.state
    assert (start["object"], start["paste"], start["context"], start["edits"]) == (None, None, [], [])
    assert start["weights"]["edited"] == start["weights"]["original"]
    while client.state["redo"] is not None:
        client.do("redo")
    assert session.document == final
    assert {"copy", "paste", "add to the context", "protect", "move", "execute", "revert", "new edit"} <= set(labels)
    with pytest.raises(Refused, match="nothing to redo"):
        client.do("redo")


def test_what_can_be_done_is_what_is_not_refused(client):
    painted = ("copy", "paste", "add_context", "protect", "match_selection")
    tried = {name: {} for name in (*painted, "execute", "erase", "undo", "redo", "cancel", "hint")}
    tried.update(save={"name": "x"}, search={"k": 1})
    for action, fields in tried.items():
        reason = client.state["can"][action]
        assert isinstance(reason, str), action
        with pytest.raises(Refused):
            client.do(action, **fields)
    client.do("set", **QUICK)
    compose(client, 1)
    can = client.state["can"]
    assert all(can[a] is True for a in ("copy", "paste", "add_context", "execute", "erase", "undo", "save", "search"))


def test_the_official_tool_reads_what_is_saved(session, client):
    compose(client, 2)
    client.do("move", image=2, dy=8, dx=0)
    assert client.do("save", name="my edit")["names"] == ["my edit"]
    record = Edit.load(session.folder / "my edit.json").to_dict()
    assert record["object"][0] == 0
    assert [n for n, _ in record["key"]] == [2, 3]
    assert all(url.startswith("data:image/png;base64,") for _, url in record["key"])
    before = session.document
    client.do("new")
    client.do("load", name="my edit")
    for name in ("object", "paste", "context", "places", "settings", "layer"):
        assert getattr(session.document, name) == getattr(before, name)
    assert client.get("files")[0]["names"] == ["my edit"]


def test_two_clients_see_the_same_and_one_may_leave(session, client):
    other = Client(session)
    client.do("paint", box(1, 1, 9, 9), image=0)
    assert other.state["painted"] == client.state["painted"]
    assert [m for m, _ in other.messages if "id" in m] == []  # replies are for who asked
    session.disconnect(other.handle)
    count = len(other.messages)
    client.do("copy")
    client.settle()
    assert len(other.messages) == count
    session.disconnect(other.handle)  # twice does no harm


def test_a_client_that_fails_does_not_take_the_others_down(session, client, caplog):
    def broken(message, buffers):
        if message["type"] == "state" and message["revision"] > 1:
            raise ConnectionError("gone")

    session.connect(broken)
    client.do("paint", box(1, 1, 9, 9), image=0)
    client.do("copy")
    assert client.state["object"] is not None
    assert "is disconnected" in caplog.text


def test_messages_come_from_any_thread_and_keep_their_order(session, client):
    numbers = []

    def paint(image: int) -> None:
        for _ in range(10):
            numbers.append(client.send("do", "paint", box(image, 0, image + 1, 8), image=image))

    threads = [threading.Thread(target=paint, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.settle()
    assert len([m for m, _ in client.messages if m["type"] == "done"]) == 40


def test_closing_takes_the_edits_off(tmp_path):
    generator = load_generator("peeps")
    kept = bits(generator)
    session = Session(generator, layer="layer4", samples=8, cache_dir=False, folder=tmp_path)
    client = Client(session)
    client.do("set", **QUICK)
    compose(client, 1)
    client.do("execute")
    assert not same_bits(settled(session), kept)
    session.close()
    assert same_bits(generator, kept)
    assert generator.patches is None
    session.close()


def test_another_family_works_the_same(tmp_path):
    generator = load_generator("peeps-progan")
    session = Session(generator, layer="layer4", samples=8, cache_dir=False, folder=tmp_path)
    client = Client(session)
    client.do("set", **QUICK)
    compose(client, 1, box(16, 16, 48, 48, 64))
    assert client.do("execute")["report"]["loss_after"] > 0
    assert client.state["generator"]["brings"] is False
    session.close()


def test_statistics_are_collected_with_progress_when_something_is_painted(session, client):
    assert client.state["statistics"] == {"layer": "layer4", "ready": False, "done": 0, "of": 0}
    client.do("paint", box(1, 1, 9, 9), image=0)
    assert client.state["statistics"]["ready"]
    client.do("set", layer="layer6")
    client.settle()
    told = [m["statistics"] for m, _ in client.of_type("progress")] + [
        m["statistics"] for m, _ in client.of_type("state")
    ]
    assert any(s["of"] == 24 for s in told)
    assert torch.isfinite(session.model.rewriter("layer6").moment.matrix).all()


def test_maps_wider_than_the_picture(tmp_path):
    """StyleGAN3: what lies around the picture is in no mask, no box and no outline."""
    state, settings = stylegan3_reference.random_state(channels=(16, 16, 12, 8, 4))
    torch.save({"G_ema": state, **settings}, tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    size = generator.image_size
    session = Session(generator, samples=8, cache_dir=False, folder=tmp_path, strip="0-3")
    client = Client(session)
    client.do("set", rank=1, steps=5, margin=0)
    compose(client, 1, box(0, 0, size // 2, size // 2, size))
    state = client.state
    layer = generator.layers[state["settings"]["layer"]]
    assert layer.margin > 0
    top, left, bottom, right = state["paste"]["box"]
    assert 0 <= top < bottom <= size
    assert 0 <= left < right <= size
    assert abs((top + bottom) / 2 - size / 4) <= 0.2 * size
    reply = client.do("click", image=1, y=size - 1, x=size - 1, alike=0.5)
    assert reply["pixels"] > 0
    client.do("execute")
    client.do("matches", on=True, quantile=0.9)
    _, masks = client.get("outline", numbers=[0, 1], quantile=0.9)
    assert [len(m) for m in masks] == [-(-size * size // 8)] * 2
    session.close()
