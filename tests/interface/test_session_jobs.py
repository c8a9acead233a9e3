"""Long work: it breathes, is cancelled, fails, loses its client, and the weights are always what the document says."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest
import torch
from interface_session_support import Client, Refused, box, compose
from support import bits, same_bits, settled

from pyrewrite import load_generator
from pyrewrite.interface import Session
from pyrewrite.interface.session import Session as SessionType
from pyrewrite.statistics import collect

LONG = {"layer": "layer8", "rank": 20, "steps": 5001, "margin": 4}
QUICK = {"rank": 3, "steps": 11, "margin": 0}


@pytest.fixture
def session(tmp_path):
    made = Session(
        load_generator("peeps"), layer="layer4", samples=24, cache_dir=False, folder=tmp_path / "edits", strip="0-3"
    )
    yield made
    made.close()


@pytest.fixture
def client(session):
    client = compose(Client(session), 1)
    client.settle()
    return client


def running(client: Client, kind: str = "execute") -> int:
    number = client.send("do", kind)
    client.wait(lambda m: m["type"] == "progress" and m["job"] and m["job"]["kind"] == kind and m["job"]["step"] > 0)
    return number


def agrees(session: SessionType, kept: dict) -> None:
    """The weights are W0 plus the document's active edits, computed here anew."""
    expected = {name: tensor.clone() for name, tensor in kept.items()}
    names = {layer.weight.data_ptr(): name for name, layer in session.model.generator.layers.items()}
    parameters = {n: p for n, p in session.model.generator.named_parameters() if p.data_ptr() in names}
    for name, parameter in parameters.items():
        layer = names[parameter.data_ptr()]
        deltas = [u.delta() for e in session.document.active for u in e.effective.updates if u.layer == layer]
        if deltas:
            expected[name] = (kept[name].double() + sum(deltas).view(kept[name].shape)).float()
    assert same_bits(settled(session), expected)


def test_painting_and_pictures_do_not_wait_for_a_solve(session, client):
    client.do("set", **LONG)
    number = running(client)
    client.do("paint", box(3, 3, 30, 30), image=3)
    client.do("add_context")
    client.do("set", rank=5)
    reply, _ = client.get("pictures", numbers=[0, 1, 2, 3], size=64)
    assert len(reply["numbers"]) == 4
    assert not [m for m, _ in client.messages if m.get("id") == number]  # it is still running
    assert client.messages[-1][0]["type"] in ("done", "state", "progress")
    for action, fields in (("execute", {}), ("erase", {}), ("search", {}), ("undo", {}), ("revert", {}),
                           ("stack", {"edit": 1, "on": False}), ("load", {"name": "x"}), ("new", {})):  # fmt: skip
        with pytest.raises(Refused, match="Execute is running"):
            client.do(action, **fields)
    client.do("cancel")
    with pytest.raises(Refused, match="cancelled"):
        client.answer(number)
    assert [r["image"] for r in client.state["context"]] == [2, 3]  # what was done meanwhile stays
    assert client.state["settings"]["rank"] == 5


def test_what_is_solved_is_what_was_there_at_the_start(session, client):
    client.do("set", **{**LONG, "steps": 600})
    number = running(client)
    client.do("remove", what="object")
    reply, _ = client.answer(number)
    assert {t["image"] for t in reply["report"]["targets"]} == {1, 2}
    assert client.state["object"] is None
    assert len(client.state["edits"]) == 1


def test_cancel_leaves_everything_as_it_was(session, client):
    client.do("set", **LONG)
    kept, document = bits(settled(session)), session.document
    number = running(client)
    client.do("cancel")
    with pytest.raises(Refused, match="Execute: cancelled"):
        client.answer(number)
    assert client.state["job"] is None
    assert session.document is document
    assert same_bits(settled(session), kept)
    assert session.model.generator.patches is None
    client.do("set", **QUICK)
    client.do("execute")  # and it goes on


def test_a_client_that_leaves_in_the_middle_of_a_solve_loses_nothing(session, client):
    client.do("set", **{**LONG, "steps": 600})
    other = Client(session)
    running(client)
    session.disconnect(client.handle)
    assert len(other.state["edits"]) == 1
    again = Client(session)  # a reload
    assert len(again.messages[0][0]["edits"]) == 1


@pytest.mark.parametrize("where", ["solve", "apply", "report"])
def test_a_solve_that_fails_leaves_the_bits(session, client, monkeypatch, where):
    client.do("set", **QUICK)
    client.do("execute")
    kept, document = bits(settled(session)), session.document
    rewriter = session.model.rewriter("layer4")

    def fails(*args, **kwargs):
        raise RuntimeError("no such luck")

    if where == "solve":
        monkeypatch.setattr(rewriter, "_insert", fails)
    elif where == "report":
        monkeypatch.setattr(rewriter, "_protection", fails)  # while the patch is applied and taken off again
    else:
        monkeypatch.setattr("pyrewrite.interface.model.set_patches", fails)
    with pytest.raises(Refused, match="RuntimeError: no such luck"):
        client.do("execute")
    monkeypatch.undo()
    assert session.document is document
    assert same_bits(settled(session), kept)
    assert client.state["job"] is None
    client.do("execute")
    agrees(session, bits(load_generator("peeps")))


def test_weights_that_cannot_be_written_leave_document_and_bits(session, client, monkeypatch):
    client.do("set", **QUICK)
    client.do("execute")
    kept, document = bits(settled(session)), session.document

    def breaks(self, generator, layers):
        raise OSError("device lost")

    from pyrewrite.rewriting import PatchSet

    original = PatchSet._write_layers
    calls = []

    def once(self, generator, layers):
        calls.append(layers)
        if len(calls) == 1:
            layer = generator.layers[layers[0]]
            with torch.no_grad():
                layer.weight.zero_()  # half done
            breaks(self, generator, layers)
        return original(self, generator, layers)

    monkeypatch.setattr(PatchSet, "_write_layers", once)
    with pytest.raises(Refused, match="device lost"):
        client.do("undo")
    assert session.document is document
    assert same_bits(settled(session), kept)
    client.do("undo")
    assert same_bits(settled(session), bits(load_generator("peeps")))


def test_closing_in_the_middle_of_a_solve(session, client):
    client.do("set", **LONG)
    running(client)
    session.close()
    assert same_bits(session.model.generator, bits(load_generator("peeps")))


def test_statistics_are_dropped_for_a_layer_that_is_no_longer_wanted(tmp_path):
    session = Session(load_generator("peeps"), layer="layer8", samples=400, cache_dir=False, folder=tmp_path)
    client = Client(session)
    client.do("paint", box(1, 1, 9, 9), image=0)
    client.wait(lambda m: m["type"] == "progress" and m["statistics"]["done"] > 0)
    client.do("set", layer="layer2")
    client.settle()
    assert session.model.has_statistics("layer2")
    assert not session.model.has_statistics("layer8")
    session.close()


def test_statistics_that_fail_are_said_once_and_not_tried_for_ever(session, client, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("keys of sand")

    monkeypatch.setattr("pyrewrite.interface.model.collect", fails)
    client.do("set", layer="layer6")
    client.settle()
    notices = [m["message"] for m, _ in client.of_type("notice")]
    assert notices == ["statistics of layer6: keys of sand"]
    with pytest.raises(Refused, match="keys of sand"):
        client.do("execute")


def test_only_the_newest_preview_is_made(session, client):
    client.do("set", **QUICK)
    client.settle()
    before = len(client.of_type("preview"))
    for n in range(30):
        client.send("do", "paint", box(10, 10, 40 + n, 60), image=1)
        client.send("do", "paste")
    client.settle()
    previews = [m for m, _ in client.of_type("preview")[before:]]
    assert len(previews) < 45  # not 30 times three
    assert [m["kind"] for m in previews[-3:]] == ["paste", "context", "row"]
    assert previews[-1]["key"] == client.state["live"]["key"]
    assert len({m["key"] for m in previews[-3:]}) == 1


def test_what_is_shown_during_a_solve_leaves_no_trace_in_it(session, client):
    """Strokes with their previews, pictures and both weights in the middle of a solve: the same patch, bit for bit."""
    client.do("set", layer="layer6", rank=8, steps=1501, margin=2)
    client.do("execute")
    (alone,) = session.document.edits
    client.do("undo")
    document = session.document
    client.settle()
    number = running(client)
    before = len(client.of_type("preview"))
    for n in range(4):
        client.do("paint", box(30, 30, 70 + n, 80), image=1)
        client.do("paste")
        client.get("pictures", numbers=[n, 20 + n], size=32, weights=("edited", "original")[n % 2])
    key = session.live.key
    client.wait(lambda m: m["type"] == "preview" and m["kind"] == "paste" and m["key"] == key)
    assert session.job is not None  # all of that in the middle
    assert len(client.of_type("preview")) > before
    client.answer(number)
    (edit,) = session.document.edits
    assert edit.digest == alone.digest
    assert session.document.paste != document.paste
    agrees(session, bits(load_generator("peeps")))


def test_a_preview_that_fails_does_not_end_the_job(session, client, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no such luck")

    client.do("set", **LONG)
    number = running(client)
    monkeypatch.setattr(session.model, "rendered_with", fails)
    client.do("paint", box(30, 30, 70, 80), image=1)
    client.do("paste")
    client.wait(lambda m: m["type"] == "notice" and "no such luck" in m["message"])
    assert session.job is not None
    client.do("cancel")
    with pytest.raises(Refused, match="cancelled"):
        client.answer(number)


def test_statistics_of_a_stack_that_moves_are_none_of_half_and_half(tmp_path):
    """An edit below the layer is switched off while the layer's statistics are collected: nothing of it is kept."""
    generator = load_generator("peeps")
    session = Session(generator, layer="layer4", samples=120, cache_dir=tmp_path / "cache", folder=tmp_path)
    client = compose(Client(session), 1)
    client.do("set", **QUICK)
    client.do("execute")
    client.settle()
    files = len(list((tmp_path / "cache").iterdir()))
    client.do("set", layer="layer8")
    client.wait(lambda m: m["type"] == "progress" and m["statistics"]["layer"] == "layer8" and m["statistics"]["done"])
    (edit,) = session.document.edits
    client.do("stack", edit=edit.id, on=False)
    client.settle()
    plain = collect(load_generator("peeps"), "layer8", samples=120, cache_dir=False).moment.matrix
    assert torch.allclose(session.model.rewriter("layer8").moment.matrix, plain, rtol=1e-4, atol=1e-5)
    client.do("stack", edit=edit.id, on=True)
    client.settle()
    edited = collect(session.model.generator, "layer8", samples=120, cache_dir=False).moment.matrix
    found = session.model.rewriter("layer8").moment.matrix
    assert (found - edited).abs().max() < 0.01 * (plain - edited).abs().max()
    assert len(list((tmp_path / "cache").iterdir())) == files + 2
    session.close()


def test_cancel_ends_statistics_until_something_changes(tmp_path):
    session = Session(load_generator("peeps"), layer="layer8", samples=400, cache_dir=False, folder=tmp_path)
    client = Client(session)
    with pytest.raises(Refused, match="nothing is running"):
        client.do("cancel")
    client.do("paint", box(1, 1, 9, 9), image=0)
    client.wait(lambda m: m["type"] == "state" and m["can"]["cancel"] is True)
    client.do("cancel")
    client.settle()
    assert not session.model.has_statistics("layer8")
    assert client.state["can"]["cancel"] == "nothing is running"
    assert client.state["painted"] is not None
    client.do("paint", box(1, 1, 9, 10), image=0)
    client.wait(lambda m: m["type"] == "progress" and m["statistics"]["done"] > 0)
    session.close()


def test_a_hint_does_not_wait_for_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrewrite.interface.hints.SAMPLES", 4)
    session = Session(load_generator("peeps"), layer="layer4", samples=1000, cache_dir=False, folder=tmp_path)
    client = compose(Client(session), 1)
    client.wait(lambda m: m["type"] == "progress" and m["statistics"]["done"] > 0)
    assert client.do("hint")["layers"]
    assert session.collecting is not None  # they go on
    session.close()


def test_many_pictures_are_drawn_between_what_is_more_urgent(session, client):
    client.settle()
    number = client.send("get", "pictures", numbers=list(range(24)), size=32)
    client.do("paint", box(1, 1, 9, 9), image=0)
    assert not [m for m, _ in client.messages if m.get("id") == number]
    message, _ = client.answer(number)
    assert message["numbers"] == list(range(24))


def test_a_snapshot_can_be_cancelled(session, client):
    client.do("strip", text="0-23")
    number = client.send("do", "snapshot")
    client.do("cancel")
    with pytest.raises(Refused, match="cancelled"):
        client.answer(number)
    client.do("snapshot")


def test_two_clients_at_once_never_mix_the_weights(session, client):
    """Both execute, switch and undo as fast as they can; in the end document and weights agree."""
    kept = bits(load_generator("peeps"))
    other = Client(session)
    client.do("set", **QUICK)

    def play(who: Client, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            try:
                action = chance.choice(["execute", "undo", "redo", "revert", "set"])
                who.do(action, **({"layer": chance.choice(["layer4", "layer6"])} if action == "set" else {}))
            except Refused:
                pass

    threads = [threading.Thread(target=play, args=(c, i)) for i, c in enumerate((client, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.settle()
    agrees(session, kept)


@pytest.mark.parametrize("seed", [0, 1])
def test_any_sequence_of_actions_undone_is_bit_exact(session, seed):
    """Random actions, sensible or not; after each the weights are the document's, and undone all is as at the start."""
    kept, start = bits(settled(session)), session.document
    client, chance = Client(session), random.Random(seed)
    client.do("set", **QUICK)

    def mask() -> bytes:
        top, left = chance.randrange(0, 90), chance.randrange(0, 90)
        return box(top, left, top + chance.randrange(1, 38), left + chance.randrange(1, 38))

    def edit() -> int:
        ids = [e.id for e in session.document.edits]
        return chance.choice(ids) if ids else 1

    image = lambda: chance.randrange(0, 6)  # noqa: E731
    moves = [
        lambda: client.do("paint", mask(), image=image()),
        lambda: client.do("paint", mask(), image=image()),
        lambda: client.do("copy"),
        lambda: client.do("paste"),
        lambda: client.do("add_context"),
        lambda: client.do("protect"),
        lambda: client.do("match_selection"),
        lambda: client.do("object_mask", mask()),
        lambda: client.do("click", image=image(), y=60, x=60, alike=0.4),
        lambda: client.do("move", image=image(), dy=chance.randrange(-40, 40), dx=0),
        lambda: client.do("place", image=image(), on=chance.random() < 0.5),
        lambda: client.do("remove", what=chance.choice(["object", "paste", "query"])),
        lambda: client.do("remove", what=chance.choice(["context", "protect"]), image=image()),
        lambda: client.do("set", rank=chance.randrange(1, 6)),
        lambda: client.do("set", layer=chance.choice(["layer4", "layer5"]), strength=chance.choice([0.0, 0.5, 1.0])),
        lambda: client.do("execute"),
        lambda: client.do("execute"),
        lambda: client.do("erase", method=chance.choice(["units", "zero"])),
        lambda: client.do("stack", edit=edit(), on=chance.random() < 0.5),
        lambda: client.do("stack", edit=edit(), strength=chance.choice([0.0, 0.3, -1.0])),
        lambda: client.do("stack", remove=edit()),
        lambda: client.do("stack", order=[e.id for e in reversed(session.document.edits)]),
        lambda: client.do("revert"),
        lambda: client.do("undo"),
        lambda: client.do("redo"),
        lambda: client.do("toggle", shown=chance.choice(["edited", "original"])),
        lambda: client.do("save", name="fuzz"),
        lambda: client.do("load", name="fuzz"),
        lambda: client.get("pictures", numbers=[image()], size=32, weights=chance.choice(["edited", "original"])),
    ]  # fmt: skip
    done = 0
    for _ in range(90):
        try:
            chance.choice(moves)()
            done += 1
        except Refused:
            pass
        client.settle()
        agrees(session, kept)
    assert done > 20
    while client.state["undo"] is not None:
        client.do("undo")
        agrees(session, kept)
    assert session.document == start
    assert same_bits(settled(session), kept)
    assert session.model.generator.patches is None


def test_an_applied_edit_is_not_shown_twice_over(session, client):
    """After Execute the pictures show it; live pictures come back as soon as something else would be solved."""
    client.do("set", **QUICK)
    client.settle()
    assert client.state["live"]["key"] is not None
    done = client.do("execute")
    client.settle()
    assert (client.state["live"]["key"], client.state["live"]["solved"]) == (None, True)
    client.do("match_selection")  # plays no part in what is solved
    client.settle()
    assert client.state["live"]["solved"]
    client.do("stack", edit=done["edit"], on=False)
    client.settle()
    assert (client.state["live"]["key"] is not None, client.state["live"]["solved"]) == (True, False)
    client.do("stack", edit=done["edit"], on=True)
    client.do("move", image=None, dy=3, dx=0)
    client.settle()
    assert (client.state["live"]["key"] is not None, client.state["live"]["solved"]) == (True, False)


def test_matches_that_are_refused_stay_off(session, client):
    client.do("set", **LONG)
    running(client)
    assert client.of_type("state")[-1][0]["can"]["matches"] == "Execute is running"
    with pytest.raises(Refused, match="Execute is running"):
        client.do("matches", on=True)
    assert not session.document.matches
    client.do("cancel")
    client.settle()
    client.do("matches", on=True)
    client.settle()
    assert client.state["matches"] == {"on": True, "ready": True}


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.4])
def test_a_script_that_ends_while_the_session_works_ends_quietly(moment, tmp_path):
    code = (
        "import time; from pyrewrite import load_generator; from pyrewrite.interface import Session; "
        f"session = Session(load_generator('peeps'), cache_dir=False); time.sleep({moment})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
