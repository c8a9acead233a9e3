"""What the interface's users wait for, on the bundled StyleGAN2: `python -m bench.interface`.

Prints median and best milliseconds of each, beside its target on two CPU cores. Statistics of 300 samples are collected
first, or read from the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pyrewrite import load_generator
from pyrewrite.interface import Session

TARGETS = {
    "thumbnails": 2000,
    "paint": 50,
    "paste": 150,
    "row": 600,
    "execute": 3000,
    "picture in a solve": 500,  # asked for while Execute runs
    "hint": 5000,
    "hint, moved": 2000,  # another place, the same weights
    "search": 10000,  # a pass over the 300 samples
    "search again": 1000,  # another context, the same layer
}
BOX = (54, 46, 75, 118)  # about where sunglasses are


class Client:
    """Asks and waits."""

    def __init__(self, session: Session) -> None:
        self.session, self.messages, self._count = session, [], 0
        self._arrived = threading.Condition()
        self.handle = session.connect(self._take)

    def _take(self, message: dict[str, Any], buffers: list[bytes]) -> None:
        with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    def wait(self, test: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        with self._arrived:
            seen = 0
            while True:
                for message in self.messages[seen:]:
                    if test(message):
                        return message
                seen = len(self.messages)
                if not self._arrived.wait(600):
                    raise TimeoutError("the session does not answer")

    def send(self, kind: str, name: str, *buffers: bytes, **fields: Any) -> int:
        self._count += 1
        key = "action" if kind == "do" else "what"
        self.session.receive(self.handle, {"type": kind, "id": self._count, key: name, **fields}, buffers)
        return self._count

    def ask(self, kind: str, name: str, *buffers: bytes, **fields: Any) -> dict[str, Any]:
        number = self.send(kind, name, *buffers, **fields)
        answer = self.wait(lambda m: m.get("id") == number)
        if answer["type"] == "error":
            raise RuntimeError(answer["message"])
        return answer


def mask(bottom: int = BOX[2], right: int = BOX[3]) -> bytes:
    area = np.zeros((128, 128), bool)
    area[BOX[0] : bottom, BOX[1] : right] = True
    return np.packbits(area).tobytes()


def measure(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each thing that has a target."""
    times: dict[str, list[float]] = {name: [] for name in TARGETS}
    generator = load_generator("peeps")

    def timed(name: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        times[name].append(1e3 * (time.perf_counter() - start))

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        session = Session(generator, folder=folder, samples=300)
        client = Client(session)
        client.ask("get", "pictures", numbers=list(range(32)), size=128)
        times["thumbnails"].append(1e3 * (time.perf_counter() - start))
        client.ask("do", "paint", mask(), image=1)
        client.ask("do", "copy")
        for image in (0, 2, 3, 4, 6, 7, 10, 11):  # eight targets
            client.ask("do", "paint", mask(), image=image)
            client.ask("do", "paste" if image == 0 else "add_context")
        session.settle(600)
        for n in range(repeats):
            stroke = mask(75 + n % 5, 118 - n % 7)
            timed("paint", lambda stroke=stroke: client.ask("do", "paint", stroke, image=0))
            client.messages.clear()
            client.ask("do", "paste")
            session.settle(600)
            for message in client.messages:
                if message["type"] == "preview" and message["kind"] in times:
                    times[message["kind"]].append(message["ms"])
        for _ in range(max(1, repeats // 5)):
            timed("execute", lambda: client.ask("do", "execute"))
            client.ask("do", "undo")
            session.settle(600)
        client.ask("do", "set", steps=5001)
        client.messages.clear()
        asked = client.send("do", "execute")
        client.wait(lambda m: m["type"] == "progress" and m["job"] is not None and m["job"]["step"] > 0)
        for number in range(200, 200 + repeats):
            if session.job is None:
                break
            timed("picture in a solve", lambda number=number: client.ask("get", "pictures", numbers=[number], size=128))
        if session.job is not None:
            client.ask("do", "cancel")
        client.wait(lambda m: m.get("id") == asked)
        session.settle(600)
        for name, box in (("hint", mask()), ("hint, moved", mask(90))):
            client.ask("do", "paint", box, image=0)
            client.ask("do", "paste")
            session.settle(600)
            timed(name, lambda: client.ask("do", "hint"))
        for name, box in (("search", mask()), ("search again", mask(80))):
            client.ask("do", "paint", box, image=2)
            client.ask("do", "add_context")
            session.settle(600)
            timed(name, lambda: client.ask("do", "search", k=12))
        session.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    times = measure(arguments.repeats)
    if arguments.json:
        print(json.dumps(times))
        return
    print(f"{'':20} {'median ms':>10} {'best ms':>10} {'target':>8}")
    for name, values in times.items():
        middle = f"{statistics.median(values):10.1f} {min(values):10.1f}" if values else f"{'-':>10} {'-':>10}"
        print(f"{name:20} {middle} {TARGETS[name]:8}")


if __name__ == "__main__":
    main()
