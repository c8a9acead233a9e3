"""The widget without a browser: the session over a notebook's comm, pictures as messages only."""

from __future__ import annotations

import itertools
import json
import os
import threading

import numpy as np
import pytest

pytest.importorskip("anywidget", reason="the widget needs anywidget: pip install 'pyrewrite[ui]'")

import anywidget
import comm
from interface_session_support import box
from interface_support import until

from pyrewrite.generators.loading import generator_path
from pyrewrite.interface import RewriteApp, Session, serve
from pyrewrite.interface.widget import session_of

OPTIONS = {"layer": "layer4", "samples": 8, "cache_dir": False, "strip": "0-7"}


class RecordingComm(comm.DummyComm):
    """Keeps what the widget would send to its front end: (kind of message, data, buffers)."""

    def __init__(self, *args, **kwargs):
        self.sent = []
        super().__init__(*args, **kwargs)

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **keys):
        self.sent.append((msg_type, json.loads(json.dumps(data or {})), [bytes(b) for b in buffers or ()]))


class Front:
    """The front end's side of a widget: hands messages in as a kernel does, and reads the answers."""

    ids = itertools.count()

    def __init__(self, app: RewriteApp) -> None:
        self.app = app

    def send(self, message, *buffers: bytes) -> None:
        data = {"method": "custom", "content": message}
        self.app._handle_msg({"content": {"data": data}, "buffers": [memoryview(b) for b in buffers]})

    def ask(self, kind: str, name: str, *buffers: bytes, **fields):
        """(answer, buffers) of one request."""
        key, number = "action" if kind == "do" else "what", f"f{next(self.ids)}"
        self.send({"type": kind, "id": number, key: name, **fields}, *buffers)
        return until(lambda: next((p for p in self.heard() if p[0].get("id") == number), None), 60)

    def heard(self):
        return [(d["content"], b) for _, d, b in list(self.app.comm.sent) if d.get("method") == "custom"]

    def synchronised(self):
        """What is not a message of the session: opening, and traits."""
        return [(d, b) for _, d, b in self.app.comm.sent if d.get("method") != "custom"]


@pytest.fixture
def comms(monkeypatch):
    """The comms that are opened."""
    opened = []

    def create(*args, **kwargs):
        opened.append(RecordingComm(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(comm, "create_comm", create)
    return opened


@pytest.fixture
def make(comms, tmp_path):
    """RewriteApp on a comm that records; all is closed afterwards."""
    made = []

    def app(session="peeps", **options):
        if not isinstance(session, Session):
            options = {**OPTIONS, "folder": tmp_path, **options}
        made.append(RewriteApp(session, **options))
        return made[-1]

    yield app
    for one in made:
        one.session.close()
        if one._page is not None:
            one._page.close()
        one.close()


def test_messages_go_both_ways_and_pictures_are_not_state(make):
    app = make()
    front = Front(app)
    before = app.get_state()
    assert front.heard()[0][0]["type"] == "state"
    answer, (sheet,) = front.ask("get", "pictures", numbers=[0, 1], size=64)
    assert answer["type"] == "done"
    assert sheet.startswith((b"\x89PNG", b"\xff\xd8"))
    for image, action in [(0, "copy"), (1, "paste"), (2, "add_context")]:
        answer, _ = front.ask("do", "paint", box(40, 40, 90, 90), image=image)
        assert answer["pixels"] == 2500
        front.ask("do", action)
    front.ask("do", "set", steps=11, rank=2)
    answer, _ = front.ask("do", "execute")
    assert answer["type"] == "done", answer
    assert app.session.settle()
    assert any(m["type"] == "preview" and b for m, b in front.heard())
    # All of that left the synchronised state as it was: the module and its style, and what every widget has.
    assert app.get_state() == before
    assert len(json.dumps(before, default=str)) < 200_000
    module = before["_esm"] + before["_css"]
    assert "data:image" not in module
    for data, buffers in front.synchronised():
        assert buffers == []
        assert len(json.dumps(data)) < 200_000
        assert not {"numbers", "columns", "buffers"} & set(data.get("state", {}))


@pytest.mark.parametrize(
    "message", [None, 3, "paint", [], {}, {"type": "do"}, {"type": "do", "id": "x", "action": "../../etc/passwd"}]
)
def test_what_is_no_message_is_answered_with_an_error(make, message):
    app = make()
    front = Front(app)
    front.send(message, b"\0" * 7)
    said, _ = until(lambda: next((p for p in front.heard() if p[0]["type"] == "error"), None))
    assert "expected" in said["message"]
    assert front.ask("get", "files")[0]["type"] == "done"


def test_a_stroke_of_the_wrong_size_is_refused_and_nothing_painted(make):
    app = make()
    front = Front(app)
    for buffers in ([], [b""], [b"\xff" * 2047], [b"\xff" * 2049], [b"\xff" * 2048] * 2):
        assert front.ask("do", "paint", *buffers, image=0)[0]["type"] == "error"
    assert app.session.document.painted is None


def test_nothing_of_the_base_class_is_hidden_by_accident():
    ours = {name for name in vars(RewriteApp) if not name.startswith("__") and callable(getattr(RewriteApp, name))}
    assert {name for name in ours if hasattr(anywidget.AnyWidget, name)} == {"close"}


def test_the_module_is_what_a_host_of_anywidget_takes(make):
    state = make().get_state()
    assert "export default" in state["_esm"]
    assert ".pyrewrite" in state["_css"]
    assert state["_view_module"] == state["_model_module"] == "anywidget"


def test_where_nothing_shows_the_text_says_what_to_do(make):
    app = make(name="peeps of mine" + "!" * 100)
    data = app._repr_mimebundle_()
    text = (data[0] if isinstance(data, tuple) else data)["text/plain"]
    assert ".serve()" in text
    assert "peeps of mine" in text


def test_serve_shows_the_same_session_as_a_page(make):
    app = make()
    page = app.serve(port=0)
    assert page.session is app.session
    assert app.serve() is page
    page.close()
    again = app.serve(port=0)
    assert again is not page
    assert again.address != page.address
    assert serve is not app.serve


def test_a_generator_that_is_shown_is_shown_again(make, peeps):
    first = make(peeps)
    front = Front(first)
    front.ask("do", "paint", box(0, 0, 9, 9), image=3)
    again = make(peeps)  # the cell runs again
    assert again.session is first.session
    assert Front(again).heard()[0][0]["painted"]["image"] == 3
    assert RewriteApp(peeps).session is first.session
    with pytest.raises(ValueError, match="close that one first"):
        make(peeps, samples=9)
    first.session.close()
    assert session_of(peeps, dict(OPTIONS)) is not first.session
    session_of(peeps, dict(OPTIONS)).close()


def test_a_cell_with_a_name_that_runs_again_goes_on(make, tmp_path):
    first = make("peeps")
    Front(first).ask("do", "paint", box(0, 0, 9, 9), image=3)
    threads = threading.active_count()
    again = make("peeps")
    assert again.session is first.session
    assert Front(again).heard()[0][0]["painted"]["image"] == 3
    assert RewriteApp("peeps").session is first.session  # without options
    assert threading.active_count() == threads
    other = make("peeps", strip="4-6")
    assert other.session is not first.session
    assert other.session.document.painted is None
    first.session.close()
    fresh = make("peeps")
    assert fresh.session is not first.session
    assert fresh.session.document.painted is None


def test_a_file_that_has_changed_is_opened_anew(make, tmp_path):
    file = tmp_path / "mine.pt"
    file.write_bytes(generator_path("peeps").read_bytes())
    first = make(str(file))
    assert make(file).session is first.session
    assert first.session.name == "mine.pt"
    os.utime(file, ns=(1, 1))
    assert make(file).session is not first.session


def test_every_view_hears_and_a_closed_one_does_not(make, peeps):
    one = make(peeps)
    two = make(one.session)
    Front(one).ask("do", "strip", text="4-6")
    assert one.session.settle()
    assert Front(two).heard()[-1][0]["strip"]["numbers"] == [4, 5, 6]
    two.close()
    two.close()
    count = len(Front(one).heard())
    Front(one).ask("do", "strip", text="0-7")
    assert len(Front(one).heard()) > count
    assert not one.session.closed


def test_what_nobody_sees_is_not_sent(make):
    """A cell that runs again leaves its old widget behind without a view."""
    old, new = make(), make()
    assert old.session is new.session
    gone, seen = Front(old), Front(new)
    for view in ("a", "b"):
        gone.send({"type": "view", "view": view})
    gone.send({"type": "leave", "view": "a"})
    seen.send({"type": "view", "view": "c"})
    seen.ask("do", "strip", text="0-3")
    assert old.session.settle()
    assert gone.heard()[-1][0]["strip"]["numbers"] == [0, 1, 2, 3]  # one view is left
    gone.send({"type": "leave", "view": "b"})
    count = len(gone.heard())
    seen.ask("do", "strip", text="0-4")
    assert old.session.settle()
    assert len(gone.heard()) == count
    assert len(old.session._clients) == 1
    gone.send({"type": "view", "view": "d"})  # back in sight: with what has happened meanwhile
    assert gone.heard()[count][0]["strip"]["numbers"] == [0, 1, 2, 3, 4]
    assert gone.ask("get", "files")[0]["type"] == "done"


@pytest.mark.parametrize("thing", [3, None, b"peeps", [], np.zeros(3)])
def test_what_cannot_be_shown(thing):
    with pytest.raises(TypeError, match="expected a session, a generator, or the file or bundled name of one, got"):
        RewriteApp(thing)


def test_a_failed_start_leaves_no_widget_behind(make, comms, peeps, tmp_path):
    with pytest.raises(FileNotFoundError):
        RewriteApp(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no_layer"):
        RewriteApp(peeps, layer="no_layer")
    with pytest.raises(TypeError, match="horse"):
        RewriteApp(peeps, horse=1)
    assert comms == []
    app = make(peeps)  # the generator is free
    opened = len(comms)
    with pytest.raises(TypeError, match="strip: options of a session that is already made"):
        RewriteApp(app.session, strip="0-3")
    assert len(comms) == opened
