"""A client for tests of the session: it asks and waits for the answer."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from pyrewrite.interface import Session


class Refused(Exception):
    """The session answered with an error."""


class Client:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.messages: list[tuple[dict[str, Any], list[bytes]]] = []
        self._arrived = threading.Condition()
        self._id = 0
        self.handle = session.connect(self._take)

    def _take(self, message: dict[str, Any], buffers: list[bytes]) -> None:
        with self._arrived:
            self.messages.append((message, buffers))
            self._arrived.notify_all()

    def send(self, kind: str, name: str, /, *buffers: bytes, **fields: Any) -> int:
        self._id += 1
        key = "action" if kind == "do" else "what"
        self.session.receive(self.handle, {"type": kind, "id": self._id, key: name, **fields}, buffers)
        return self._id

    def wait(self, test, timeout: float = 60) -> tuple[dict[str, Any], list[bytes]]:
        """The first message that passes the test, now or later."""
        deadline = time.monotonic() + timeout
        with self._arrived:
            seen = 0
            while True:
                for message in self.messages[seen:]:
                    if test(message[0]):
                        return message
                seen = len(self.messages)
                assert self._arrived.wait(deadline - time.monotonic()), "no answer came"

    def answer(self, number: int) -> tuple[dict[str, Any], list[bytes]]:
        message, buffers = self.wait(lambda m: m.get("id") == number)
        if message["type"] == "error":
            raise Refused(message["message"])
        return message, buffers

    def do(self, action: str, /, *buffers: bytes, **fields: Any) -> dict[str, Any]:
        return self.answer(self.send("do", action, *buffers, **fields))[0]

    def get(self, what: str, /, **fields: Any) -> tuple[dict[str, Any], list[bytes]]:
        return self.answer(self.send("get", what, **fields))

    def settle(self) -> Client:
        assert self.session.settle(60)
        return self

    @property
    def state(self) -> dict[str, Any]:
        self.settle()
        return [m for m, _ in self.messages if m["type"] == "state"][-1]

    def of_type(self, kind: str) -> list[tuple[dict[str, Any], list[bytes]]]:
        return [(m, b) for m, b in self.messages if m["type"] == kind]


def box(top: int, left: int, bottom: int, right: int, size: int = 128) -> bytes:
    """A painted rectangle as it goes over the wire."""
    area = np.zeros((size, size), bool)
    area[top:bottom, left:right] = True
    return np.packbits(area).tobytes()


def compose(client: Client, contexts: int = 2, mask: bytes | None = None) -> Client:
    """Copy an object of picture 0, paste it into 1, and add some context."""
    mask = mask or box(40, 40, 90, 90)
    client.do("paint", mask, image=0)
    client.do("copy")
    client.do("paint", mask, image=1)
    client.do("paste")
    for image in range(2, 2 + contexts):
        client.do("paint", mask, image=image)
        client.do("add_context")
    return client
