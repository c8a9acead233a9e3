"""The widget: one Session in a notebook (JupyterLab, VS Code, marimo), as custom messages over the widget's comm.

Nothing but the front end itself is synchronised state: pictures and masks travel as messages, so a saved notebook
holds none of them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget

from ..generators import Generator, load_generator
from ..generators.loading import generator_path
from . import module
from .page import Page, serve
from .session import Client, Session

_sessions: dict[int, tuple[weakref.ref[Session], dict[str, Any]]] = {}  # id of a generator -> its session, its options


def session_of(generator: Generator, options: dict[str, Any]) -> Session:
    """The session of a generator: the one that it has, so that a cell that runs again shows again what was there.

    ValueError where its session was made with other options: two sessions would write into the same weights.
    """
    found, known = _sessions.get(id(generator), (lambda: None, {}))
    session = found()
    if session is not None and session.model.generator is generator and not session.closed:
        if options not in ({}, known):
            raise ValueError(
                f"this generator is in a session with the options {known}, and these are {options}: close that one "
                "first (`.session.close()`, unsaved work is lost), or leave the options out to show it again"
            )
        return session
    session = Session(generator, **options)
    _sessions[id(generator)] = weakref.ref(session), options
    return session


_files: list[tuple[Any, weakref.ref[Session], dict[str, Any]]] = []  # which file as it was, its session, its options


def session_of_file(name: str | Path, options: dict[str, Any]) -> Session:
    """The session of a file or bundled name: the one that was opened with the same options, or with any where none are
    given, so that a cell that runs again goes on with the same document and keeps no second generator. A file that has
    changed and other options open another session.
    """
    status = (path := generator_path(name)).stat()
    mark = (str(path.resolve()), status.st_mtime_ns, status.st_size)
    _files[:] = [entry for entry in _files if (found := entry[1]()) is not None and not found.closed]
    for known, found, given in reversed(_files):
        session = found()
        if session is not None and known == mark and options in ({}, given):
            return session
    session = Session(load_generator(name), **{"name": Path(name).name, **options})
    _files.append((mark, weakref.ref(session), options))
    return session


class RewriteApp(anywidget.AnyWidget):
    """The interface as a cell's output.

    session: a Session, or a generator, or the file or bundled name of one; `options` are then Session's. A generator
    or file that is already shown is shown again with what was painted and solved: `app.session.close()` ends that and
    frees its memory, and the next one begins anew. Where nothing shows (a viewer without
    widgets), `serve()` opens the same session as a page and says where. TypeError for anything else.
    """

    _esm = module.module()
    _css = module.style()

    _client: Client | None = None

    def __init__(self, session: Session | Generator | str | Path, **options: Any) -> None:
        if isinstance(session, (str, Path)):
            session = session_of_file(session, options)
        elif isinstance(session, Generator):
            session = session_of(session, options)
        elif not isinstance(session, Session):
            expected = "a session, a generator, or the file or bundled name of one"
            raise TypeError(f"expected {expected}, got {type(session).__name__}")
        elif options:
            raise TypeError(f"{', '.join(options)}: options of a session that is already made")
        super().__init__()
        self.session = session
        self._views: set[str] = set()  # that show this widget
        self._turn = threading.Lock()  # the session answers from its own thread, and a comm's send is not one step
        self._page: Page | None = None
        self.on_msg(self._hear)
        self._client = self.session.connect(self._tell)

    def serve(self, port: int | None = None, **options: Any) -> Page:
        """The same session as a page: what `pyrewrite.interface.serve` takes and gives. Served once at a time."""
        if self._page is None or not self._page.open:
            self._page = serve(self.session, port, **options)
        return self._page

    def close(self) -> None:
        """Takes the widget off; the session, and a page that serves it, live on."""
        self._disconnect()
        super().close()

    def _disconnect(self) -> None:
        if self._client is not None:
            self.session.disconnect(self._client)
            self._client = None

    def __repr__(self) -> str:
        """Also what a viewer without widgets shows in the widget's place."""
        return f"RewriteApp({self.session.name:.40}). If nothing shows here: .serve() opens it as a page"

    # Not _send: the base class has that name for something else.
    def _tell(self, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        with self._turn:
            self.send(message, list(buffers))

    def _hear(self, _: Any, message: dict[str, Any], buffers: list[memoryview]) -> None:
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "leave":
            # Its cell was run again or cleared. The host keeps this object, so that without this the session would go
            # on sending it everything. Another view may come: a long notebook takes off what is not in sight.
            self._views.discard(str(message.get("view")))
            if not self._views:
                self._disconnect()
            return
        if self._client is None:
            self._client = self.session.connect(self._tell)
        if kind == "view":
            self._views.add(str(message.get("view")))
            return
        self.session.receive(self._client, message, [bytes(b) for b in buffers])
