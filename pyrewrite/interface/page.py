"""The page: one Session behind a local web server, for people without a notebook. http for four files, one websocket.

It is closed: it binds 127.0.0.1, every address begins with a random token, Host and Origin must be loopback names (or
be allowed by name), no address names a file, every message has a bound, and the content-security policy allows nothing
but the page's own script and style. All addresses in the page are relative: it works behind a proxy, and the token
travels with them without a cookie (cookies are shared by all ports of a host).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from . import module

ADDRESS = "127.0.0.1"
PORTS = range(8765, 8785)  # the first free one, where none is asked for
HEADER_LIMIT = 64 << 10  # bytes of a message's JSON
MESSAGE_LIMIT = (64 << 20) + HEADER_LIMIT + 4  # the largest upload, with its header
WAITING_LIMIT = 512  # answers that a client may leave unread
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FILES = {
    "": (lambda: module.read("index.html"), "text/html; charset=utf-8"),
    "pyrewrite.js": (module.module, "text/javascript; charset=utf-8"),
    "pyrewrite.css": (module.style, "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "pyrewrite",
}


class MessageError(ValueError):
    """A frame that is not a message."""


def pack(message: dict[str, Any], buffers: Sequence[bytes] = ()) -> bytes:
    """A message as one binary frame: uint32 (little endian) length of the JSON, the JSON, the buffers."""
    header = json.dumps({**message, "buffers": [len(b) for b in buffers]}, allow_nan=False).encode()
    return b"".join([struct.pack("<I", len(header)), header, *buffers])


def unpack(frame: bytes | str) -> tuple[dict[str, Any], list[bytes]]:
    """The message and the buffers of a frame; MessageError says what is wrong with one that is not whole."""
    if isinstance(frame, str):
        raise MessageError("expected a binary frame, and this one is text")
    if len(frame) < 4:
        raise MessageError(f"expected at least 4 bytes, and the frame has {len(frame)}")
    (length,) = struct.unpack_from("<I", frame)
    if length > HEADER_LIMIT:
        raise MessageError(f"the header of {length} bytes is over the limit of {HEADER_LIMIT}")
    if len(frame) < 4 + length:
        raise MessageError(f"the frame of {len(frame)} bytes ends within its header of {length}")
    try:
        message = json.loads(frame[4 : 4 + length].decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the header is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise MessageError(f"expected a JSON object as header, and it is a {type(message).__name__}")
    lengths = message.pop("buffers", [])
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        raise MessageError("expected `buffers` to be a list of byte lengths")
    if 4 + length + sum(lengths) != len(frame):
        raise MessageError(f"the buffers have {len(frame) - 4 - length} bytes, and the header says {sum(lengths)}")
    buffers, start = [], 4 + length
    for size in lengths:
        buffers.append(frame[start : start + size])
        start += size
    return message, buffers


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


class Page:
    """A running page. It lives in a thread of its own, so that a notebook's kernel, too, can show one.

    address: where to open it, token included. Raises OSError where the port is taken and ValueError for an origin or
    a base path that is none. `close()` ends it; the session lives on.
    """

    def __init__(
        self, session: Any, port: int | None = None, allow_origin: Iterable[str] = (), base_path: str = "/"
    ) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(32)
        self.origins = frozenset(_origin(text) for text in allow_origin)
        self.hosts = frozenset(urlsplit(origin).hostname for origin in self.origins)
        if not base_path.startswith("/") or any(c in base_path for c in "?#\\ ") or ".." in base_path:
            raise ValueError(f"base path {base_path!r}: expected a path such as /tools/pyrewrite/")
        self.base = base_path.rstrip("/") + "/"
        self.socket = _bind(PORTS if port is None else [port])
        self.port = self.socket.getsockname()[1]
        self.address = f"http://{ADDRESS}:{self.port}{self.base}{self.token}/"
        self.files = {name: text().encode() for name, (text, _) in FILES.items()}
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="pyrewrite page", daemon=True)
        self._thread.start()
        self._started.wait()

    def __repr__(self) -> str:
        return f"the page is at {self.address}"

    def _repr_html_(self) -> str:
        return f'pyrewrite is at <a href="{self.address}" target="_blank" rel="noreferrer">{self.address}</a>'

    def close(self) -> None:
        """Stop serving: clients are let go, the session is not."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def open(self) -> bool:
        """Whether it is being served."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until `close` is called or Ctrl-C is pressed."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # in pieces, or Ctrl-C would not get through

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.clients: set[Socket] = set()
        application = Application(
            [(r"/.*?socket", Socket, {"page": self}), (r"/.*", File, {"page": self})],
            default_handler_class=File,
            default_handler_args={"page": self},
            websocket_max_message_size=MESSAGE_LIMIT,
            websocket_ping_interval=20,
            log_function=lambda handler: None,  # an address would put the token into a log
        )
        server = HTTPServer(application, max_body_size=0, max_header_size=HEADER_LIMIT, idle_connection_timeout=60)
        server.add_socket(self.socket)
        self._started.set()
        await self._stop.wait()
        server.stop()
        for client in list(self.clients):
            client.close(1001, "the page was closed")
        await server.close_all_connections()


def _bind(ports: Iterable[int]) -> socket.socket:
    """A listening socket on the first free one of `ports`; OSError where none is."""
    problem = OSError("no port to try")
    for port in ports:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((ADDRESS, port))
            sock.listen(64)
        except (OSError, OverflowError) as error:
            sock.close()
            problem = OSError(f"port {port} of {ADDRESS} cannot be taken: {error}")
            continue
        sock.setblocking(False)
        return sock
    raise problem


def _origin(text: str) -> str:
    """ "https://hub.example:8443/" -> as a browser writes it; ValueError for what is no origin."""
    parts = urlsplit(text.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or "*" in text:
        raise ValueError(f"origin {text!r}: expected a scheme and a host such as https://hub.example")
    default = {"http": 80, "https": 443}[parts.scheme]
    port = "" if parts.port in (None, default) else f":{parts.port}"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}"


class Guarded:
    """What every request passes, whatever it asks for: Host, Origin, token, in this order."""

    def initialize(self, page: Page) -> None:
        self.page = page

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        host = self.request.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in LOOPBACK and name not in self.page.hosts:
            raise HTTPError(
                403,
                "Host %s is no name of this machine's loopback. If you reach the page through a proxy on purpose, "
                "start it with --allow-origin and the origin the browser shows, such as --allow-origin https://%s",
                ascii(host[:100]),
                name[:100] if name.isascii() and name.replace(".", "").replace("-", "").isalnum() else "hub.example",
            )
        origin = self.request.headers.get("Origin")
        needs_one = isinstance(self, WebSocketHandler)  # browsers always send it there
        if (origin is not None or needs_one) and not self._is_allowed(origin or ""):
            raise HTTPError(
                403,
                "Origin %s may not use this page. If that is where you opened it, start it with --allow-origin %s",
                ascii((origin or "")[:100]),
                ascii(origin[:100]) if origin else "and that origin",
            )
        path, token = self.request.path, ""
        if path.startswith(self.page.base):
            token, _, self.name = path[len(self.page.base) :].partition("/")
        if not hmac.compare_digest(token.encode(), self.page.token.encode()):
            raise HTTPError(403, "this address lacks the token: open the one that was printed at the start")

    def _is_allowed(self, origin: str) -> bool:
        try:
            origin = _origin(origin)
        except ValueError:  # "null", file:, extensions
            return False
        return origin in self.page.origins or urlsplit(origin).hostname in LOOPBACK

    def write_error(self, status_code: int, **details: Any) -> None:
        error = details.get("exc_info", (None, None))[1]
        text = "something went wrong"
        if isinstance(error, HTTPError) and error.log_message:
            text = error.log_message % error.args if error.args else error.log_message
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code}: {text}\n")

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, HTTPError):
            super().log_exception(kind, error, trace)


class File(Guarded, RequestHandler):
    """index.html, the module and the style, by exact name: no path ever becomes the name of a file."""

    SUPPORTED_METHODS = ("GET", "HEAD")

    def get(self) -> None:
        if self.name not in FILES:
            raise HTTPError(404, "there is nothing at this address")
        self.set_header("Content-Type", FILES[self.name][1])
        self.finish(self.page.files[self.name])

    head = get


class Socket(Guarded, WebSocketHandler):
    """One client of the session. The session answers from any thread; this marshals to the server's."""

    def check_origin(self, origin: str) -> bool:
        return True  # `prepare` has checked it, and said more

    def prepare(self) -> None:
        super().prepare()
        if self.name != "socket":
            raise HTTPError(404, "there is nothing at this address")

    def open(self) -> None:
        self.outbox = Outbox(self.write_message)
        self.page.clients.add(self)
        loop = asyncio.get_running_loop()

        def callback(message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
            frame = pack(message, buffers)
            key = (message["type"], message.get("kind")) if message["type"] in NEWEST_ONLY else None
            loop.call_soon_threadsafe(self._send, frame, key)

        self.client = self.page.session.connect(callback)

    def _send(self, frame: bytes, key: Any) -> None:
        if self.outbox.put(frame, key) > WAITING_LIMIT:
            self.close(1013, "too many answers unread")

    def on_message(self, frame: bytes | str) -> None:
        try:
            message, buffers = unpack(frame)
        except MessageError as error:
            self.close(1003, str(error)[:120])
            return
        self.page.session.receive(self.client, message, buffers)

    def on_close(self) -> None:
        self.page.clients.discard(self)
        if hasattr(self, "client"):
            self.page.session.disconnect(self.client)


NEWEST_ONLY = ("progress", "preview")  # not states: what follows one may speak of its revision


class Outbox:
    """What a client has not taken yet. On a slow line a newer progress or preview replaces the waiting one."""

    def __init__(self, write: Callable[..., Any]) -> None:
        self.write = write
        self.waiting: list[tuple[bytes, Any]] = []
        self.task: asyncio.Task | None = None

    def put(self, frame: bytes, key: Any = None) -> int:
        """Number of frames that now wait."""
        if key is not None:
            self.waiting = [entry for entry in self.waiting if entry[1] != key]
        self.waiting.append((frame, key))
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self._drain())
        return len(self.waiting)

    async def _drain(self) -> None:
        while self.waiting:
            frame, _ = self.waiting.pop(0)
            try:
                await self.write(frame, binary=True)
            except WebSocketClosedError:
                self.waiting.clear()


def serve(session: Any, port: int | None = None, allow_origin: Iterable[str] = (), base_path: str = "/") -> Page:
    """Show `session` as a page on 127.0.0.1 and say where: the returned Page's `address`.

    port: None takes the first free one from 8765 on, 0 any. allow_origin: origins of proxies through which the page
    is opened, such as "https://hub.example". base_path: the path that a proxy leaves in front, where it does.
    """
    return Page(session, port, allow_origin, base_path)
