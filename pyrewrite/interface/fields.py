"""Checking what a client sent: every field has a kind and bounds, and an error says which were expected."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}")
MAX_TEXT = 4096


class NotYet(Exception):
    """A read that has done a part of its work: it is to be asked again, after what is more urgent."""


class Fields:
    """The fields of one message. Each method takes one and raises ValueError where it is not of that kind; `end` raises
    for those that nothing has asked for.
    """

    def __init__(self, message: dict[str, Any], known: Iterable[str] = ("type", "id", "action", "what")) -> None:
        self._message = message
        self._taken = set(known)

    def __contains__(self, name: str) -> bool:
        return name in self._message

    def any(self, name: str) -> Any:
        self._taken.add(name)
        if name not in self._message:
            raise ValueError(f"field {name!r} is missing")
        return self._message[name]

    def rest(self) -> dict[str, Any]:
        """All fields that nothing has asked for yet."""
        found = {n: v for n, v in self._message.items() if n not in self._taken}
        self._taken.update(found)
        return found

    def end(self) -> None:
        unknown = sorted(str(n) for n in set(self._message) - self._taken)
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r:.60}")

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int:
        if default is not None and name not in self._message:
            return default
        return checked_integer(name, self.any(name), least, most)

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float:
        if default is not None and name not in self._message:
            return default
        return checked_number(name, self.any(name), least, most)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        if default is not None and name not in self._message:
            return default
        value = self.any(name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.60}; expected true or false")
        return value

    def text(self, name: str) -> str:
        value = self.any(name)
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise ValueError(f"{name} is {value!r:.60}; expected a text of at most {MAX_TEXT} characters")
        return value

    def name(self, name: str) -> str:
        """A file name without a path."""
        value = self.any(name)
        if not isinstance(value, str) or not NAME.fullmatch(value) or value.endswith((".", " ")):
            raise ValueError(
                f"{name} is {value!r:.80}; expected 1 to 64 letters, digits, spaces and _ . - that begin with a letter "
                "or digit"
            )
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        if default is not None and name not in self._message:
            return default
        value = self.any(name)
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} is {value!r:.60}; expected one of {', '.join(allowed)}")
        return value

    def integers(self, name: str, least: int, most: int, count: int) -> list[int]:
        value = self.any(name)
        if not isinstance(value, list) or len(value) > count:
            raise ValueError(f"{name}: expected a list of at most {count} whole numbers, got {value!r:.60}")
        return [checked_integer(name, v, least, most) for v in value]


def checked_integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r:.60}; expected a whole number from {least} to {most}")
    return value


def checked_number(name: str, value: Any, least: float, most: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not least <= value <= most:  # NaN is not either
        raise ValueError(f"{name} is {value!r:.60}; expected a number from {least:g} to {most:g}")
    return float(value)


def one_buffer(buffers: Sequence[bytes], what: str, most: int | None = None) -> bytes:
    if len(buffers) != 1:
        raise ValueError(f"{what}: {len(buffers)} buffers; expected one")
    if most is not None and len(buffers[0]) > most:
        raise ValueError(f"{what}: {len(buffers[0])} bytes; expected at most {most}")
    return buffers[0]
