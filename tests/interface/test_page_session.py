"""The page with a real session behind it: tabs that come, go, flood and undo while a solve runs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

pytest.importorskip("tornado", reason="the page needs tornado: pip install 'pyrewrite[ui]'")

from interface_session_support import box
from support import bits, same_bits, settled
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from pyrewrite import load_generator
from pyrewrite.interface import Session, serve
from pyrewrite.interface.page import pack, unpack

LONG = {"layer": "layer8", "rank": 4, "steps": 5001, "margin": 4}


class Tab:
    """One open page."""

    numbers = itertools.count()

    def __init__(self, websocket) -> None:
        self.websocket = websocket

    @classmethod
    async def open(cls, page) -> Tab:
        address = page.address.replace("http", "ws") + "socket"
        return cls(await websocket_connect(HTTPRequest(address, headers={"Origin": "http://127.0.0.1"})))

    def vanish(self) -> None:
        """As a lost connection does: without a word."""
        self.websocket.protocol.stream.close()
        self.websocket.close()  # says nothing any more: for the garbage collector

    async def until(self, test) -> dict:
        while True:
            frame = await asyncio.wait_for(self.websocket.read_message(), 60)
            assert frame is not None, "the connection was closed"
            message, _ = unpack(frame)
            if test(message):
                return message

    async def send(self, kind: str, name: str, *buffers: bytes, **fields) -> str:
        number = f"t{next(self.numbers)}"
        key = "action" if kind == "do" else "what"
        await self.websocket.write_message(pack({"type": kind, "id": number, key: name, **fields}, buffers), True)
        return number

    async def ask(self, kind: str, name: str, *buffers: bytes, **fields) -> dict:
        number = await self.send(kind, name, *buffers, **fields)
        return await self.until(lambda m: m.get("id") == number)

    async def compose(self) -> None:
        for image, action in ((0, "copy"), (1, "paste"), (2, "add_context")):
            await self.ask("do", "paint", box(40, 40, 90, 90), image=image)
            assert (await self.ask("do", action))["type"] == "done"


@pytest.fixture
def page(tmp_path):
    session = Session(load_generator("peeps"), layer="layer4", samples=24, cache_dir=False, folder=tmp_path)
    page = serve(session, 0)
    yield page
    page.close()
    session.close()


def run(conversation) -> None:
    asyncio.run(asyncio.wait_for(conversation, 120))


def test_a_reload_and_a_second_tab_in_the_middle_of_a_solve(page):
    kept = bits(settled(page.session))

    async def conversation() -> None:
        one = await Tab.open(page)
        await one.compose()
        await one.ask("do", "set", **LONG)
        await one.send("do", "execute")
        await one.until(lambda m: m["type"] == "progress" and m["job"] and m["job"]["step"] > 0)
        one.vanish()
        two, three = await Tab.open(page), await Tab.open(page)
        state = await two.until(lambda m: m["type"] == "state")
        assert state["job"]["kind"] == "execute"
        assert [r["image"] for r in state["context"]] == [2]
        for action, fields in (("undo", {}), ("revert", {}), ("new", {}), ("execute", {})):
            answer = await three.ask("do", action, **fields)
            assert answer["type"] == "error"
            assert "Execute is running" in answer["message"]
        await two.until(lambda m: m["type"] == "progress" and m["job"] and m["job"]["step"] > 0)  # it went on
        assert (await three.ask("do", "cancel"))["type"] == "done"
        await two.until(lambda m: m["type"] == "state" and m["job"] is None)
        await three.ask("do", "set", steps=11)
        assert (await two.ask("do", "execute"))["type"] == "done"
        assert (await three.ask("do", "undo"))["type"] == "done"  # what another tab did
        two.vanish()
        three.vanish()

    run(conversation())
    assert page.session.settle()
    assert page.session.document.edits == ()
    assert same_bits(settled(page.session), kept)


def test_a_tab_that_floods_does_not_keep_the_others_waiting(page):
    async def conversation() -> None:
        flood, other = await Tab.open(page), await Tab.open(page)

        async def pour() -> None:
            with contextlib.suppress(Exception):  # it may be closed in the middle
                for _ in range(4000):
                    await flood.send("get", "pictures", numbers=[0, 1, 2, 3], size=64)

        pouring = asyncio.create_task(pour())
        for _ in range(5):
            assert (await other.ask("do", "names"))["type"] == "done"
        await pouring
        assert (await other.ask("get", "pictures", numbers=[5], size=64))["type"] == "done"
        flood.vanish()
        other.vanish()

    run(conversation())
    assert page.session.settle()
