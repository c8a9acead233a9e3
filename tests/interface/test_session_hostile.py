"""What clients may send by mistake or by intent: each is an error that reaches them, and nothing has changed."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from interface_session_support import Client, Refused, box, compose
from support import bits, mask_url, same_bits, settled

from pyrewrite import load_generator
from pyrewrite.interface import Session, actions


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root") / "edits"
    made = Session(load_generator("peeps"), layer="layer4", samples=24, cache_dir=False, folder=folder, strip="0-3")
    yield made
    made.close()


@pytest.fixture
def client(session):
    client = Client(session)
    kept, document = bits(settled(session)), session.document
    yield client
    client.settle()
    assert session.document is document
    assert same_bits(settled(session), kept)
    session.disconnect(client.handle)


MASK = box(10, 10, 40, 40)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (None, "expected an object"),
        ([], "expected an object"),
        ("do", "expected an object"),
        ({}, "type is None"),
        ({"type": "undo", "id": 1}, "expected 'do' or 'get'"),
        ({"type": "do", "action": "undo"}, "id is None"),
        ({"type": "do", "action": "undo", "id": [1]}, "id is"),
        ({"type": "do", "action": "undo", "id": True}, "id is True"),
        ({"type": "do", "id": 1}, "action is None"),
        ({"type": "do", "id": 1, "action": "__init__"}, "expected one of strip, paint"),
        ({"type": "do", "id": 1, "action": {"a": 1}}, "expected one of"),
        ({"type": "get", "id": 1, "what": "../../etc/passwd"}, "expected one of pictures"),
        ({"type": "get", "id": 1, "what": ["mask"]}, "expected one of pictures"),
        ({"type": "do", "id": 1, "action": "undo", "step": 3}, "unknown field 'step'"),
    ],
)
def test_messages_that_are_none(client, message, text):
    client.session.receive(client.handle, message)
    answer, _ = client.wait(lambda m: m["type"] == "error")
    assert text in answer["message"]


@pytest.mark.parametrize(
    ("fields", "buffers", "text"),
    [
        ({"image": 0}, [], "0 buffers; expected one"),
        ({"image": 0}, [MASK, MASK], "2 buffers; expected one"),
        ({"image": 0}, [MASK[:-1]], "2047 bytes; expected 2048"),
        ({"image": 0}, [MASK + b"\0"], "2049 bytes; expected 2048"),
        ({"image": 0}, [b""], "0 bytes"),
        ({"image": -1}, [MASK], "whole number from 0"),
        ({"image": 24}, [MASK], "from 0 to 23"),
        ({"image": 1.0}, [MASK], "whole number"),
        ({"image": True}, [MASK], "whole number"),
        ({"image": "0"}, [MASK], "whole number"),
        ({"image": 10**30}, [MASK], "whole number"),
        ({"image": [0]}, [MASK], "whole number"),
        ({"image": {}}, [MASK], "whole number"),
        ({}, [MASK], "'image' is missing"),
        ({"image": 0, "size": 64}, [MASK], "unknown field 'size'"),
    ],
)
def test_paint(client, fields, buffers, text):
    with pytest.raises(Refused, match=text):
        client.do("paint", *buffers, **fields)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/b", "a\\b", "", ".", "..", ".hidden", "x" * 65, "a\0b", "a\nb", "ü", "x.", 5, None, ["x"]],
)
@pytest.mark.parametrize("action", ["save", "load"])
def test_names_are_no_paths(session, client, action, name):
    with pytest.raises(Refused, match="expected 1 to 64 letters"):
        client.do(action, name=name)
    assert not session.folder.exists()
    assert list(session.folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "fields", "text"),
    [
        ("strip", {"text": "0-8,x"}, "'x' is not a number or a range"),
        ("strip", {"text": "8-3"}, "ends before it begins"),
        ("strip", {"text": "-5"}, "is not a number"),
        ("strip", {"text": "1e3"}, "is not a number"),
        ("strip", {"text": "٣"}, "is not a number"),
        ("strip", {"text": "9" * 12}, "is not a number"),
        ("strip", {"text": "500"}, "no picture is left"),
        ("strip", {"text": ""}, "no picture is left"),
        ("strip", {"text": 5}, "expected a text"),
        ("strip", {"text": "1," * 3000}, "expected a text of at most"),
        ("click", {"image": 0, "y": 128, "x": 0}, "y is 128"),
        ("click", {"image": 0, "y": 0, "x": 0, "alike": float("nan")}, "alike is nan"),
        ("click", {"image": 0, "y": 0, "x": 0, "add": 1}, "true or false"),
        ("copy", {}, "nothing is painted"),
        ("paste", {}, "nothing is painted"),
        ("object_mask", {}, "0 buffers"),
        ("move", {"dy": 0, "dx": 0}, "not pasted anywhere"),
        ("move", {"image": 3, "dy": 0, "dx": 0}, "neither the paste"),
        ("move", {"image": 3, "dy": 1e9, "dx": 0}, "dy is"),
        ("move", {"dy": 10**400, "dx": 0}, "dy is 1000"),
        ("click", {"image": 0, "y": 0, "x": 0, "alike": 10**400}, "alike is 1000"),
        ("click", {"image": 0, "y": 0, "x": 0, "alike": -(10**400)}, "alike is -1000"),
        ("matches", {"on": True, "quantile": float("-inf")}, "quantile is -inf"),
        ("set", {"strength": 10**400}, "strength is 1000"),
        ("set", {"preserve": float("nan")}, "preserve is nan"),
        ("set", {"layer": "\ud800"}, "there is no layer"),
        ("set", {"method": ["low_rank"]}, "expected a number, a text or a boolean"),
        ("place", {"image": {}, "on": True}, "neither the paste"),
        ("remove", {"what": "everything"}, "expected one of object"),
        ("remove", {"what": "context", "image": 3}, "not in context"),
        ("remove", {"what": "paste"}, "there is no paste"),
        ("set", {}, "expected one of layer"),
        ("set", {"seed": 2}, "belongs to the session"),
        ("set", {"rank": 10**9}, "rank is"),
        ("set", {"steps": -1}, "steps is"),
        ("toggle", {"shown": "both"}, "expected one of edited, original"),
        ("execute", {}, "copy one first"),
        ("erase", {"method": "rm"}, "expected one of units, zero"),
        ("search", {"k": 0}, "k is 0"),
        ("hint", {}, "copy an object"),
        ("cancel", {}, "nothing is running"),
        ("stack", {"edit": 1, "on": True}, "id of an edit: none"),
        ("stack", {}, "'edit' is missing"),
        ("stack", {"order": "1"}, "expected the ids"),
        ("stack", {"order": [{}]}, "expected the ids"),
        ("download", {"kind": "weights"}, "expected one of patch"),
        ("download", {"kind": "patch"}, "no edit is active"),
        ("download", {"kind": "patch", "edit": 3}, "expected the id"),
        ("gallery", {"apply": "../sunglasses"}, "expected one of"),
        ("upload", {"kind": "pickle"}, "expected one of edit, patch, latent"),
        ("load", {"name": "nothing"}, "there is no saved edit"),
    ],
)  # fmt: skip
def test_actions(client, action, fields, text):
    with pytest.raises(Refused, match=text):
        client.do(action, **fields)


@pytest.mark.parametrize(
    ("what", "fields", "text"),
    [
        ("pictures", {"numbers": [0] * 129, "size": 64}, "at most 128"),
        ("pictures", {"numbers": "0-3", "size": 64}, "expected a list"),
        ("pictures", {"numbers": [0.5], "size": 64}, "whole number"),
        ("pictures", {"numbers": [10**9], "size": 64}, "whole number from 0 to 23"),
        ("pictures", {"numbers": [[]], "size": 64}, "whole number"),
        ("pictures", {"numbers": [0], "size": 7}, "size is 7"),
        ("pictures", {"numbers": [0], "size": 10**6}, "size is"),
        ("pictures", {"numbers": [0], "size": 64, "weights": "0123456789abcdef"}, "are gone"),
        ("mask", {"hash": "../mask"}, "is gone"),
        ("mask", {"hash": None}, "expected a text"),
        ("outline", {"numbers": [0], "quantile": 2}, "quantile is 2"),
        ("outline", {"numbers": [0]}, "turn matches on"),
        ("files", {"folder": "/"}, "unknown field 'folder'"),
    ],
)
def test_reads(client, what, fields, text):
    with pytest.raises(Refused, match=text):
        client.get(what, **fields)


def npy(values) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


RECORD = {"object": [0, mask_url(128, 10, 10, 40, 40)]}


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        ("edit", b"", "expected JSON"),
        ("edit", b"\xff\xfe", "expected JSON"),
        ("edit", b"[" * 100_000, "expected JSON"),
        ("edit", b"[]", "expected a JSON object"),
        ("edit", b"{}", "not an edit record"),
        ("edit", b" " * (8 << 20) + b" ", "bytes; expected at most"),
        ("edit", json.dumps({"object": [0, "file:///etc/passwd"]}).encode(), "expected a data URL"),
        ("edit", json.dumps({"object": [200_000, RECORD["object"][1]]}).encode(), "expected at most 100000"),
        ("edit", json.dumps({**RECORD, "pyrewrite": {"layer": "layer99"}}).encode(), "there is no layer"),
        ("edit", json.dumps({**RECORD, "pyrewrite": {"settings": {"lr": float("nan")}}}).encode(), "'lr' is nan"),
        ("edit", json.dumps({**RECORD, "pyrewrite": {"settings": {"seed": 7}}}).encode(), "seed is 7"),
        ("edit", json.dumps({**RECORD, "pyrewrite": {"places": {"x": {}}}}).encode(), "not an image number"),
        ("edit", json.dumps({**RECORD, "pyrewrite": {"places": {"1": {"dy": 0.5}}}}).encode(), "whole number"),
        ("edit", json.dumps({**RECORD, "pyrewrite": {"places": {"1": {"on": 1}}}}).encode(), "true or false"),
        ("edit", json.dumps({**RECORD, "pyrewrite": {"latents": {"1": "x"}}}).encode(), "expected a data URL"),
        ("edit", json.dumps({"object": [0, mask_url(128, 0, 0, 0, 0)]}).encode(), "object mask is empty"),
        ("edit", json.dumps({**RECORD, "key": [RECORD["object"]] * 1001}).encode(), "1002 masks; expected at most"),
        ("patch", b"", "not a .safetensors file"),
        ("patch", b"PK\x03\x04" + bytes(64), "not a .safetensors file"),
        ("patch", (1 << 60).to_bytes(8, "little") + b"{}", "not a .safetensors file"),
        ("latent", b"", "expected an .npy file"),
        ("latent", b"\x93NUMPY", "expected an .npy file"),
        ("latent", npy(np.array([{"a": 1}], dtype=object)), "expected floating-point"),
        ("latent", npy(np.zeros(128, np.int64)), "expected floating-point"),
        ("latent", npy(np.full(128, np.nan, np.float32)), "not finite"),
        ("latent", npy(np.zeros(127, np.float32)), "expected 128 numbers"),
        ("latent", npy(np.float32(3)), "expected 128 numbers"),
        ("latent", npy(np.zeros((0, 128), np.float32)), "no latents"),
        ("latent", npy(np.zeros((100, 128), np.float32))[:-4], "its header says"),
        ("latent", npy(np.arange(100 * 128, dtype=np.float32).reshape(100, 128)), "expected at most 64"),
    ],
)  # fmt: skip
def test_uploads(client, kind, data, text):
    with pytest.raises(Refused, match=text):
        client.do("upload", data, kind=kind, name="../../evil")


def test_a_header_that_asks_for_more_than_there_is(client):
    body = npy(np.zeros(16, np.float32))
    lie = body.replace(b"'shape': (16,), }        ", b"'shape': (1152921504,), }")
    assert lie != body
    with pytest.raises(Refused, match="its header says 1152921504"):
        client.do("upload", lie, kind="latent")


def test_every_action_answers_to_an_empty_message(client):
    """Whatever an action is: a message without its fields is done or refused, never lost."""
    before = {"undo", "redo", "revert", "new", "names", "snapshot", "gallery", "cancel"}
    for name in actions.known("do"):
        if name not in before:
            with pytest.raises(Refused):
                client.do(name)
    for name in ("names", "gallery", "revert"):
        client.do(name)
    for name in actions.known("get"):
        sent = client.send("get", name)
        client.wait(lambda m, sent=sent: m.get("id") == sent)


@pytest.mark.parametrize("field", ["id", "action", "what", "image", "numbers", "text", "name", "order", "layer"])
def test_a_field_that_is_nested_deeper_than_anything_can_print(client, field):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for kind, name in (("do", "set"), ("do", "strip"), ("do", "save"), ("do", "stack"), ("get", "pictures")):
        message = {"type": kind, "id": "deep", "action" if kind == "do" else "what": name, field: deep}
        client.messages.clear()
        client.session.receive(client.handle, message)
        answer, _ = client.wait(lambda m: m["type"] == "error")
        assert len(json.dumps(answer)) < 2000
        assert "Error" not in answer["message"]
    while deep:  # its own end would be a recursion too
        deep = deep.pop()


def test_an_image_that_is_no_whole_number_is_none_of_the_context(tmp_path):
    session = Session(load_generator("peeps"), layer="layer4", samples=8, cache_dir=False, folder=tmp_path)
    client = compose(Client(session), 1, MASK)
    for image in (1.0, True, "1", [1], float("nan"), 10**400):
        with pytest.raises(Refused, match="neither the paste"):
            client.do("move", image=image, dy=3, dx=0)
        with pytest.raises(Refused, match="neither the paste"):
            client.do("place", image=image, on=False)
        with pytest.raises(Refused, match="is not in context"):
            client.do("remove", what="context", image=image)
    assert session.document.places == {}
    session.close()


def test_a_flood_is_refused_and_the_others_are_served(session, client, monkeypatch):
    monkeypatch.setattr("pyrewrite.interface.session.MAX_WAITING", 50)
    flood = Client(session)
    for _ in range(100_000):
        flood.send("get", "files")
    other = client.do("names")
    assert other["type"] == "done"
    session.settle()
    answered = [m for m, _ in flood.messages if m["type"] in ("done", "error")]
    assert len(answered) == 100_000  # each of them
    refused = [m for m in answered if m["type"] == "error"]
    assert 0 < len(refused) < 100_000
    assert all("50 messages are waiting already" in m["message"] for m in refused)
    assert flood.get("files")[0]["type"] == "done"
    session.disconnect(flood.handle)


def test_many_bytes_that_wait_are_refused(session, client, monkeypatch):
    monkeypatch.setattr("pyrewrite.interface.session.MAX_WAITING_BYTES", 5000)
    numbers = [client.send("do", "upload", bytes(4000), kind="patch") for _ in range(50)]
    refused = 0
    for number in numbers:
        with pytest.raises(Refused) as caught:
            client.answer(number)
        refused += "bytes are waiting already" in str(caught.value)
    assert refused > 0
    with pytest.raises(Refused, match="not a"):  # one alone may be larger: it has its own limit
        client.do("upload", bytes(6000), kind="patch")


def test_a_client_that_leaves_takes_its_reads_with_it_and_no_one_elses(session, client):
    gone = Client(session)
    for n in range(20):
        gone.send("get", "pictures", numbers=list(range(24)), size=100 + n)
    session.disconnect(gone.handle)
    assert client.get("pictures", numbers=[0], size=32)[0]["numbers"] == [0]
    client.settle()
    session.receive(gone.handle, {"type": "do", "id": 1, "action": "names"})  # too late, and no harm
    client.settle()


def test_a_closed_session_answers_that_it_is(tmp_path):
    session = Session(load_generator("peeps"), layer="layer4", samples=8, cache_dir=False, folder=tmp_path)
    client = compose(Client(session), 1, MASK)
    numbers = [client.send("do", "execute"), *(client.send("get", "pictures", numbers=[n], size=64) for n in range(8))]
    session.close()
    numbers += [client.send("do", "names"), client.send("get", "files")]
    for number in numbers:
        message, _ = client.wait(lambda m, number=number: m.get("id") == number)
        assert message["type"] == "done" or "closed" in message["message"] or "cancelled" in message["message"]
    session.close()


def test_a_solve_that_cannot_work_says_so_and_changes_nothing(tmp_path):
    session = Session(load_generator("peeps"), layer="layer4", samples=8, cache_dir=False, folder=tmp_path)
    client = compose(Client(session), 1, box(60, 60, 70, 70))
    kept = bits(settled(session))
    client.do("set", rank=128)
    document = session.document
    with pytest.raises(Refused, match="key pixels under the context's masks"):
        client.do("execute")
    client.do("set", rank=2, lr=1.0, steps=5, key_method="mean")
    with pytest.raises(Refused, match="'mean' gives one direction"):
        client.do("execute")
    client.settle()
    assert session.job is None
    assert session.document.edits == document.edits == ()
    assert same_bits(settled(session), kept)
    assert session.model.generator.patches is None
    session.close()
