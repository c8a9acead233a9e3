"""The page as a stranger meets it: tries to get in, and messages that are none. No browser and no generator."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import struct
import threading
from urllib.parse import urlsplit

import pytest

pytest.importorskip("tornado", reason="the page needs tornado: pip install 'pyrewrite[ui]'")

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClosedError, websocket_connect

from pyrewrite.interface import page as page_module
from pyrewrite.interface.page import HEADER_LIMIT, MessageError, Outbox, Page, pack, serve, unpack


class Recorder:
    """A session that keeps what it is told, and echoes."""

    def __init__(self):
        self.clients, self.received, self.left = {}, [], []
        self.heard = threading.Event()

    def connect(self, callback):
        client = len(self.clients)
        self.clients[client] = callback
        callback({"type": "state", "revision": 1}, [])
        return client

    def receive(self, client, message, buffers):
        self.received.append((message, [bytes(b) for b in buffers]))
        # From another thread, as the real one does.
        threading.Thread(target=self.clients[client], args=({"type": "done", "id": message.get("id")}, buffers)).start()
        self.heard.set()

    def disconnect(self, client):
        self.left.append(client)


@pytest.fixture
def session():
    return Recorder()


@pytest.fixture
def page(session):
    running = serve(session, port=0)
    yield running
    running.close()


def ask(page, path=None, method="GET", body=None, **headers):
    """(status, headers, body) of one request; path None is the page's own address."""
    parts = urlsplit(page.address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    try:
        connection.putrequest(method, parts.path if path is None else path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def talk(page, conversation, origin="http://127.0.0.1", path=None, **headers):
    """Runs `conversation(websocket)` on an open websocket; the HTTP error of a refusal is raised."""
    address = page.address.replace("http", "ws") + "socket" if path is None else path

    async def run():
        head = {**({"Origin": origin} if origin else {}), **headers}
        websocket = await websocket_connect(HTTPRequest(address, headers=head, request_timeout=10))
        try:
            return await asyncio.wait_for(conversation(websocket), 10)
        finally:
            stream = websocket.protocol.stream
            websocket.close()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                while await asyncio.wait_for(websocket.read_message(), 0.1) is not None:
                    pass
            stream.close()

    return asyncio.run(run())


async def first(websocket):
    return unpack(await websocket.read_message())


def refusal(page, origin="http://127.0.0.1", path=None, **headers):
    """(status, text) of a websocket's opening request that is refused."""
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="} | ({"Origin": origin} if origin else {}) | headers
    status, _, body = ask(page, urlsplit(page.address).path + "socket" if path is None else path, **upgrade)
    return status, body.decode()


# ------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("buffers", [[], [b""], [b"abc", b"", bytes(range(256))]])
def test_frames_there_and_back(buffers):
    message = {"type": "do", "id": "a1", "text": "höhe \u2028", "n": [1, 2.5, None, True]}
    assert unpack(pack(message, buffers)) == (message, buffers)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ("{}", "text"),
        (b"", "at least 4 bytes"),
        (b"\x00\x00", "at least 4 bytes"),
        (struct.pack("<I", 9) + b"{}", "ends within"),
        (struct.pack("<I", 0xFFFFFFFF), "over the limit"),
        (struct.pack("<I", HEADER_LIMIT + 1) + b" " * (HEADER_LIMIT + 1), "over the limit"),
        (struct.pack("<I", 2) + b"[]", "JSON object"),
        (struct.pack("<I", 3) + b"\xff\xfe{", "not JSON"),
        (struct.pack("<I", 10) + b'{"a": NaN}', "not a number"),
        (struct.pack("<I", HEADER_LIMIT) + b"[" * HEADER_LIMIT, "not JSON"),
        (struct.pack("<I", 2) + b"{}" + b"left over", "9 bytes, and the header says 0"),
    ]
    + [
        (struct.pack("<I", len(h)) + h + b"12345678", "buffers")
        for h in (
            b'{"buffers": [9]}',
            b'{"buffers": [-1, 9]}',
            b'{"buffers": [true, 7]}',
            b'{"buffers": [8.0]}',
            b'{"buffers": 8}',
            b'{"buffers": [1e400]}',
        )
    ],
)
def test_frames_that_are_none(frame, reason):
    with pytest.raises(MessageError, match=re.escape(reason)):
        unpack(frame)


def test_pack_refuses_what_is_not_json():
    with pytest.raises(ValueError):
        pack({"loss": float("nan")})


# ------------------------------------------------------------------------------------------------- the open door


def test_it_binds_loopback_only_and_its_token_is_long(page, session):
    assert page.socket.getsockname()[0] == "127.0.0.1"
    assert len(page.token) >= 40
    other = serve(session, port=0)
    try:
        assert other.token != page.token
    finally:
        other.close()
    assert page.address in repr(page)
    assert page.address in page._repr_html_()


def test_the_page_and_its_files(page):
    for name, kind, content in [
        ("", "text/html", b"pyrewrite.js"),
        ("pyrewrite.js", "text/javascript", b"export default"),
        ("pyrewrite.css", "text/css", b".pyrewrite"),
    ]:
        status, headers, body = ask(page, urlsplit(page.address).path + name)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, kind)
        assert content in body
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert page.token.encode() not in body


def test_nothing_in_the_page_is_inline_or_absolute(page):
    body = ask(page)[2].decode()
    assert not re.search(r"<style|style=|<script(?![^>]*src=)|\son\w+=|javascript:", body)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', body)
    assert addresses == ["data:,", "pyrewrite.css", "pyrewrite.js"]  # relative: any proxy's path may stand in front
    module = ask(page, urlsplit(page.address).path + "pyrewrite.js")[2].decode()
    assert not re.search(r"https?://(?!\w*\))[a-z]", module)  # nothing is loaded from elsewhere
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", module)


def test_messages_go_both_ways(page, session):
    async def conversation(websocket):
        state = await first(websocket)
        await websocket.write_message(pack({"type": "do", "id": "x", "action": "paint"}, [b"mask"]), binary=True)
        return state, unpack(await websocket.read_message())

    state, answer = talk(page, conversation)
    assert state == ({"type": "state", "revision": 1}, [])
    assert answer == ({"type": "done", "id": "x"}, [b"mask"])
    assert session.received == [({"type": "do", "id": "x", "action": "paint"}, [b"mask"])]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_any_port_of_a_loopback_name_passes(page, host):
    # What a browser sends through `ssh -L 9000:127.0.0.1:8765`.
    assert ask(page, Host=f"{host}:9000")[0] == 200
    assert talk(page, first, origin=f"http://{host}:9000")[0]["type"] == "state"


# ------------------------------------------------------------------------------------------------- tries to get in


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/index.html",
        "/pyrewrite.js",
        "/socket",
        "//",
        "/%00",
        "/" + "a" * 43 + "/",
        "/?token=",
        "/..",
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/%C3%A9/",
    ],
)
def test_without_the_token_there_is_nothing(page, path):
    status, headers, body = ask(page, path)
    assert status in (400, 403)
    if status == 403:
        assert b"Origin" in body if path == "/socket" else b"token" in body
        assert headers["Content-Type"].startswith("text/plain")
        assert "Content-Security-Policy" in headers


def test_a_token_that_is_nearly_right(page):
    for token in (page.token[:-1], page.token + "x", page.token.swapcase(), page.token[:-1] + "%C3%A9"):
        assert ask(page, f"/{token}/")[0] == 403
        assert refusal(page, path=f"/{token}/socket")[0] == 403
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as raw:  # bytes that no client library sends
        raw.sendall(f"GET /{page.token[:-1]}é/ HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert raw.recv(100).startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "name",
    [
        "index.html",
        "front/pyrewrite.js",
        "../page.py",
        "..%2fpage.py",
        "%2e%2e/page.py",
        "....//page.py",
        "/etc/passwd",
        "//etc/passwd",
        "pyrewrite.js/",
        "pyrewrite.js%00.css",
        "C:\\Windows",
        "__init__.py",
    ],
)
def test_no_path_becomes_a_file(page, name):
    status, _, body = ask(page, urlsplit(page.address).path + name)
    assert status == 404
    assert b"import" not in body
    assert b"root:" not in body


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example@127.0.0.1.x",
        "0.0.0.0",
        "192.168.1.7:8765",
        "",
        "[::1",
        "<script>alert(1)</script>",
    ],
)
def test_a_foreign_host_is_refused_by_the_option_that_would_allow_it(page, host):
    # DNS rebinding: a name of the attacker's that resolves to 127.0.0.1.
    status, headers, body = ask(page, Host=host)
    assert status in (400, 403)  # 400: tornado's own, for what is no host at all
    if status == 403:
        assert b"--allow-origin" in body
        assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example:80",
        "http://evil.example/#http://127.0.0.1",
        "http://127.0.0.1@evil.example",
        "null",
        "file://",
        "chrome-extension://abcdef",
        "http://[::1",
        "",
    ],
)
def test_a_foreign_origin_is_refused_even_with_the_token(page, session, origin):
    if origin:
        assert ask(page, Origin=origin)[0] == 403
    code, body = refusal(page, origin=origin)
    assert code == 403
    assert "--allow-origin" in body
    assert session.clients == {}


def test_only_reading_methods(page):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        status, _, _ = ask(page, method=method)
        assert status in (403, 405)
    assert ask(page, method="HEAD")[0] == 200


def test_a_body_is_not_read(page):
    try:
        status, _, _ = ask(page, method="POST", body=b"x" * 5_000_000)
    except ConnectionError:  # closed while it was still being sent
        status = 413
    assert status in (400, 405, 413)
    assert ask(page)[0] == 200


def test_a_header_without_end_is_cut(page):
    parts = urlsplit(page.address)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n")
        closed = False
        for _ in range(64):
            try:
                raw.sendall(b"X-A: " + b"a" * 65536 + b"\r\n")
            except OSError:
                closed = True
                break
        if not closed:
            answer = raw.recv(65536)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert ask(page)[0] == 200


@pytest.mark.parametrize("name", ["", "pyrewrite.js", "x/socket", "socket/", "xsocket"])
def test_the_socket_is_at_one_address(page, session, name):
    status, _ = refusal(page, path=urlsplit(page.address).path + name)
    assert status == (200 if name in ("", "pyrewrite.js") else 404)  # a file is a file, whatever was asked for
    assert session.clients == {}


# ------------------------------------------------------------------------------------------------- hostile messages


@pytest.mark.parametrize("frame", [b"", b"\xff\xff\xff\xff", b"no header at all", "text", pack({})[:5]])
def test_a_frame_that_is_none_ends_that_connection_only(page, session, frame):
    async def conversation(websocket):
        await first(websocket)
        await websocket.write_message(frame, binary=isinstance(frame, bytes))
        return await websocket.read_message(), websocket.close_code, websocket.close_reason

    message, code, reason = talk(page, conversation)
    assert (message, code) == (None, 1003)
    assert reason
    assert session.received == []
    assert talk(page, first)[0]["type"] == "state"


def test_a_huge_message_is_not_read(page, session, monkeypatch):
    # The bound itself is 64 MiB and a bit; the same bound, smaller, on another page.
    monkeypatch.setattr(page_module, "MESSAGE_LIMIT", 100_000)
    small = serve(session, port=0)
    try:

        async def conversation(websocket):
            await first(websocket)
            with contextlib.suppress(WebSocketClosedError):
                await websocket.write_message(pack({"id": 1}, [b"x" * 200_000]), binary=True)
            return await websocket.read_message(), websocket.close_code

        message, code = talk(small, conversation)
        assert message is None
        assert code in (1009, 1006, None)
        assert session.received == []
        assert talk(small, first)[0]["type"] == "state"
    finally:
        small.close()


def test_a_client_that_leaves_is_forgotten_and_the_session_lives(page, session):
    talk(page, first)
    for _ in range(100):
        if session.left:
            break
        threading.Event().wait(0.02)
    assert session.left == [0]
    session.clients[0]({"type": "state", "revision": 2}, [])  # an answer to one who is gone: no harm
    assert talk(page, first)[0]["type"] == "state"


# ------------------------------------------------------------------------------------------------- proxies, ports


def test_an_allowed_origin_and_a_base_path(session):
    page = serve(session, port=0, allow_origin=["https://Hub.example:8443/"], base_path="/user/ada/proxy/1/")
    try:
        assert f"/user/ada/proxy/1/{page.token}/" in page.address
        assert ask(page, Host="hub.example:8443")[0] == 200
        assert ask(page, Host="hub.example", Origin="https://hub.example:8443")[0] == 200
        assert talk(page, first, origin="https://hub.example:8443")[0]["type"] == "state"
        assert refusal(page, origin="https://hub.example")[0] == 403
        assert refusal(page, origin="http://hub.example:8443")[0] == 403
        assert ask(page, f"/{page.token}/")[0] == 403
    finally:
        page.close()


@pytest.mark.parametrize("origin", ["*", "hub.example", "https://*.example", "https://", "ftp://a", "https://a/b", ""])
def test_an_origin_to_allow_must_be_one(session, origin):
    with pytest.raises(ValueError, match="expected a scheme and a host"):
        Page(session, port=0, allow_origin=[origin])


@pytest.mark.parametrize("base", ["", "x", "/../", "/a?b", "/a#b", "/a b"])
def test_a_base_path_must_be_one(session, base):
    with pytest.raises(ValueError, match="base path"):
        Page(session, port=0, base_path=base)


def test_a_port_that_is_taken(page, session):
    with pytest.raises(OSError, match=f"port {page.port} of 127.0.0.1 cannot be taken"):
        serve(session, port=page.port)


def test_close_lets_the_clients_go(session):
    page = serve(session, port=0)

    async def conversation(websocket):
        await first(websocket)
        await asyncio.to_thread(page.close)
        return await websocket.read_message()

    assert talk(page, conversation) is None
    with pytest.raises(OSError):
        ask(page)


# ------------------------------------------------------------------------------------------------- slow lines


def test_on_a_slow_line_the_newest_wins_and_answers_stay():
    async def run():
        written, go = [], asyncio.Event()

        async def write(frame, binary):
            await go.wait()
            written.append(frame)

        outbox = Outbox(write)
        outbox.put(b"in flight")
        await asyncio.sleep(0)
        for i in range(50):
            outbox.put(b"state %d" % i, ("state", None))
            outbox.put(b"row %d" % i, ("preview", "row"))
            outbox.put(b"paste %d" % i, ("preview", "paste"))
        outbox.put(b"done 1")
        outbox.put(b"done 2")
        go.set()
        await outbox.task
        return written

    expected = [b"in flight", b"state 49", b"row 49", b"paste 49", b"done 1", b"done 2"]
    assert asyncio.run(run()) == expected


def test_json_of_a_frame_is_what_the_module_reads():
    header = pack({"type": "state"}, [b"ab", b"c"])
    (length,) = struct.unpack_from("<I", header)
    assert json.loads(header[4 : 4 + length]) == {"type": "state", "buffers": [2, 1]}
    assert header[4 + length :] == b"abc"
