"""A machine for pickles that only ever builds plain data.

Python's own unpickler imports what a file names and calls it. This one knows the opcodes that pickle protocols 2 to 5
write for plain data, asks its caller what a name stands for, and refuses everything else by its name: nothing is
imported, and only functions of the caller run. It works within bounds: a number of opcodes, a depth, lengths within the
file, keys whose hash takes no time, and a memory budget for what a file may have built again and again.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

MAX_OPCODES = 300_000  # a 1024 x 1024 network of NVIDIA needs about 11,000, a training run with two optimisers 20,000
MAX_DEPTH = 1000

_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_MARK = object()


class PickleRefused(ValueError):
    """The pickle holds something that is not plain data. The message names it."""


class PickleDamaged(ValueError):
    """The pickle ends too early or contradicts itself."""


class Named:
    """What a name of a file stands for: call for `name(*args)`, new for `name.__new__(name, *args)`; None refuses."""

    __slots__ = ("call", "name", "new")

    def __init__(
        self, name: str, call: Callable[..., Any] | None = None, new: Callable[..., Any] | None = None
    ) -> None:
        self.name, self.call, self.new = name, call, new


_KEYS = (str, int, float, bool, bytes, type(None), Named)


class Items(dict):
    """Stands in for OrderedDict and other dictionaries with attributes; the attributes are dropped."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        """State beside the items, such as the version numbers of a torch state dict, has no meaning here."""


class Inert:
    """Stands in for an object that is only looked at. Takes any state and any items and keeps none."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        pass


class Budget:
    """What may still be done for a file, so that one stored array cannot be asked for a million times."""

    def __init__(self, size: int, what: str = "bytes of copies") -> None:
        self.size = self.left = size
        self.what = what

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise PickleRefused(f"the same data again and again: more than {self.size} {self.what}")


class PickleMachine:
    """Reads pickles out of `data` (bytes or mmap).

    find        (module, name) -> Named; raises PickleRefused for a name that may not stand in a file
    persistent  the object that a persistent id stands for, or None: such ids are refused
    """

    def __init__(
        self,
        data: Any,
        find: Callable[[str, str], Named],
        persistent: Callable[[Any], Any] | None = None,
        max_opcodes: int = MAX_OPCODES,
    ) -> None:
        self.data, self.size = data, len(data)
        self.find, self.persistent = find, persistent
        self.max_opcodes = max_opcodes

    def read(self, start: int = 0) -> tuple[Any, int]:
        """The object of the pickle that begins at byte `start`, and where the pickle ends.

        Raises PickleRefused or PickleDamaged.
        """
        self.at, self.stack, self.marks, self.memo = start, [], 0, {}
        for _ in range(self.max_opcodes):
            where = self.at
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                return self._pop(), self.at
            action = _ACTIONS.get(code)
            if action is None:
                what = f"the opcode {_NAMES[code]}" if code in _NAMES else f"the byte {code:#04x}, which is no opcode"
                raise PickleRefused(f"{what} at byte {where}, which is not read here")
            try:
                action(self)
            except (PickleRefused, PickleDamaged):
                raise
            except MemoryError as error:
                raise PickleRefused(f"more at byte {where} than fits in memory") from error
            except Exception as error:
                # What a file made wrong on purpose can cause in a stand-in: wrong types, lengths, missing entries.
                raise PickleDamaged(f"{_NAMES[code]} at byte {where}: {type(error).__name__}: {error}") from error
        raise PickleRefused(f"more than {self.max_opcodes} opcodes")

    # -- bytes and stack ---------------------------------------------

    def _take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > self.size:
            raise PickleDamaged(
                f"truncated: {count} bytes are declared at byte {self.at}, {self.size - self.at} follow"
            )
        taken = bytes(self.data[self.at : end])
        self.at = end
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _sized(self, form: str) -> bytes:
        return self._take(self._number(form))

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at, min(self.at + 1024, self.size))
        if end < 0:
            raise PickleDamaged(f"a name without end at byte {self.at}")
        line = self._take(end - self.at)
        self.at += 1
        return line.decode("utf-8")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleDamaged(f"nothing on the stack at byte {self.at}")
        return self.stack.pop()

    def _peek(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleDamaged(f"nothing on the stack at byte {self.at}")
        return self.stack[-1]

    def _mark(self) -> None:
        self.marks += 1
        if self.marks > MAX_DEPTH:
            raise PickleRefused(f"data nested deeper than {MAX_DEPTH}")
        self.stack.append(_MARK)

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise PickleDamaged(f"no mark on the stack at byte {self.at}")
        first = len(self.stack) - 1
        while self.stack[first] is not _MARK:
            first -= 1
        items = self.stack[first + 1 :]
        del self.stack[first:]
        self.marks -= 1
        return items

    # -- containers --------------------------------------------------

    def _tuple(self, count: int) -> None:
        self._push(tuple(reversed([self._pop() for _ in range(count)])))

    def _append(self, items: list[Any]) -> None:
        target = self._peek()
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert):
            raise PickleRefused(f"items for a {type(target).__name__}, expected a list")

    def _add(self) -> None:
        items, target = self._since_mark(), self._peek()
        if type(target) is not set:
            raise PickleRefused(f"items for a {type(target).__name__}, expected a set")
        target.update(map(checked_key, items))

    def _set_items(self, items: list[Any]) -> None:
        target = self._peek()
        if len(items) % 2:
            raise PickleDamaged(f"a name without a value at byte {self.at}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            checked_key(key)
            if type(target) in (dict, Items):
                target[key] = value
            elif not isinstance(target, Inert):
                raise PickleRefused(f"named items for a {type(target).__name__}, expected a dict")

    # -- memo --------------------------------------------------------

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleDamaged(f"a reference at byte {self.at} to object {index}, which was never stored")
        self._push(self.memo[index])

    def _put(self, index: int) -> None:
        self.memo[index] = self._peek()

    # -- names and what is made of them ------------------------------

    def _global(self) -> None:
        self._push(self._found(self._line(), self._line()))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._push(self._found(module, name))

    def _found(self, module: Any, name: Any) -> Named:
        if type(module) is not str or type(name) is not str:
            raise PickleRefused(f"a name made of {type(module).__name__} and {type(name).__name__}, expected texts")
        return self.find(module, name)

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        self._push(self._made(function, args, "call"))

    def _new(self) -> None:
        args, cls = self._pop(), self._pop()
        self._push(self._made(cls, args, "new"))

    def _made(self, named: Any, args: Any, how: str) -> Any:
        if type(named) is not Named:
            raise PickleRefused(f"a call of a {type(named).__name__} at byte {self.at}")
        if type(args) is not tuple:
            raise PickleRefused(f"a call of {named.name} with a {type(args).__name__}, expected a tuple")
        function = getattr(named, how)
        if function is None:
            raise PickleRefused(f"a call of {named.name}, which may only be named")
        return function(*args)

    def _build(self) -> None:
        state, target = self._pop(), self._peek()
        set_state = getattr(type(target), "set_state", None)
        if set_state is None:
            what = target.name if type(target) is Named else f"a {type(target).__name__}"
            raise PickleRefused(f"a state (BUILD) for {what}, which has none")
        set_state(target, state)

    def _persistent(self) -> None:
        pid = self._pop()
        if self.persistent is None:
            raise PickleRefused(f"a persistent id at byte {self.at}, which only torch's own files have")
        self._push(self.persistent(pid))


def checked_key(key: Any) -> Any:
    """A key whose hash takes no time and is shared by few others.

    Nested tuples that share their parts would take for ever to hash. The hashes of texts are secret, but those of
    numbers are not: thousands of large integers, or of tuples of numbers, can be made that all have the same one.
    """
    flat = key if type(key) is tuple else (key,)
    if len(flat) > 100 or not all(type(part) in _KEYS or isinstance(part, Inert) for part in flat):
        raise PickleRefused(f"a {type(key).__name__} as a name in a dict or set, expected a text or a number")
    if type(key) is tuple and any(type(part) in (int, float) for part in key):
        raise PickleRefused("a tuple of numbers as a name in a dict or set, expected a text or a number")
    if type(key) is int and not -(1 << 63) <= key < 1 << 63:
        raise PickleRefused("a number of more than 64 bits as a name in a dict or set")
    return key


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _text(form: str) -> Callable[[PickleMachine], None]:
    return lambda m: m._push(_utf8(m._sized(form)))


def _bytes(form: str, kind: Callable[[bytes], Any] = bytes) -> Callable[[PickleMachine], None]:
    return lambda m: m._push(kind(m._sized(form)))


def _constant(make: Callable[[], Any]) -> Callable[[PickleMachine], None]:
    return lambda m: m._push(make())


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _latin1(data: bytes) -> str:
    return data.decode("latin-1")


_BY_NAME: dict[str, Callable[[PickleMachine], Any]] = {
    "PROTO": lambda m: m._take(1),
    "FRAME": lambda m: m._take(8),
    "MARK": PickleMachine._mark,
    "POP": PickleMachine._pop,
    "POP_MARK": PickleMachine._since_mark,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "BININT": lambda m: m._push(m._number("<i")),
    "BININT1": lambda m: m._push(m._number("<B")),
    "BININT2": lambda m: m._push(m._number("<H")),
    "LONG1": lambda m: m._push(_integer(m._sized("<B"))),
    "LONG4": lambda m: m._push(_integer(m._sized("<i"))),
    "BINFLOAT": lambda m: m._push(m._number(">d")),
    "BINUNICODE": _text("<I"),
    "SHORT_BINUNICODE": _text("<B"),
    "BINUNICODE8": _text("<Q"),
    "BINBYTES": _bytes("<I"),
    "SHORT_BINBYTES": _bytes("<B"),
    "BINBYTES8": _bytes("<Q"),
    "BYTEARRAY8": _bytes("<Q"),
    "BINSTRING": _bytes("<i", _latin1),  # text of Python 2, where arrays too are stored as text
    "SHORT_BINSTRING": _bytes("<B", _latin1),
    "EMPTY_LIST": _constant(list),
    "APPEND": lambda m: m._append([m._pop()]),
    "APPENDS": lambda m: m._append(m._since_mark()),
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE": lambda m: m._push(tuple(m._since_mark())),
    "TUPLE1": lambda m: m._tuple(1),
    "TUPLE2": lambda m: m._tuple(2),
    "TUPLE3": lambda m: m._tuple(3),
    "EMPTY_DICT": _constant(dict),
    "SETITEM": lambda m: m._set_items([m._pop(), m._pop()][::-1]),
    "SETITEMS": lambda m: m._set_items(m._since_mark()),
    "EMPTY_SET": _constant(set),
    "ADDITEMS": PickleMachine._add,
    "FROZENSET": lambda m: m._push(frozenset(map(checked_key, m._since_mark()))),
    "BINGET": lambda m: m._get(m._number("<B")),
    "LONG_BINGET": lambda m: m._get(m._number("<I")),
    "BINPUT": lambda m: m._put(m._number("<B")),
    "LONG_BINPUT": lambda m: m._put(m._number("<I")),
    "MEMOIZE": lambda m: m._put(len(m.memo)),
    "GLOBAL": PickleMachine._global,
    "STACK_GLOBAL": PickleMachine._stack_global,
    "REDUCE": PickleMachine._reduce,
    "NEWOBJ": PickleMachine._new,
    "BUILD": PickleMachine._build,
    "BINPERSID": PickleMachine._persistent,
}
_ACTIONS = {ord(op.code): _BY_NAME[op.name] for op in pickletools.opcodes if op.name in _BY_NAME}
