"""The widget: one Session in a notebook (JupyterLab, VS Code, marimo), as custom messages over the widget's comm.

Nothing but the front end itself is synchronised state: pictures and masks travel as messages, so a saved notebook
holds none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import anywidget

from ..generators import Generator, load_generator
from .page import Page, serve
from .session import Session

FRONT = resources.files("pyrewrite.interface") / "front"


class RewriteApp(anywidget.AnyWidget):
    """The interface as a cell's output.

    session: a Session, or a generator, or the file or bundled name of one; `options` are then Session's. Where nothing
    shows (a viewer without widgets), `serve()` opens the same session as a page and says where.
    """

    _esm = (FRONT / "pyrewrite.js").read_text(encoding="utf-8")
    _css = (FRONT / "pyrewrite.css").read_text(encoding="utf-8")

    def __init__(self, session: Any, **options: Any) -> None:
        super().__init__()
        if isinstance(session, (str, Path)):
            options = {"name": Path(session).name, **options}
            session = load_generator(session)
        if isinstance(session, Generator):
            session = Session(session, **options)
        elif options:
            raise TypeError(f"{', '.join(options)}: options of a session that is already made")
        self.session = session
        self._lock = threading.Lock()  # the session answers from its own thread, and a comm's send is not one step
        self._page: Page | None = None
        self.on_msg(self._receive)
        self._client = self.session.connect(self._send)

    def serve(self, port: int | None = None, **options: Any) -> Page:
        """The same session as a page: what `pyrewrite.interface.serve` takes and gives. Served once."""
        if self._page is None:
            self._page = serve(self.session, port, **options)
        return self._page

    def close(self) -> None:
        """Takes the widget off; the session, and a page that serves it, live on."""
        self.session.disconnect(self._client)
        super().close()

    def _send(self, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        with self._lock:
            self.send(message, list(buffers))

    def _receive(self, _: Any, message: dict[str, Any], buffers: list[memoryview]) -> None:
        self.session.receive(self._client, message, [bytes(b) for b in buffers])
