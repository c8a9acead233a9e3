"""Reading torch checkpoints without running anything that they hold.

Only `torch.load(weights_only=True)`, with harmless additions: the options of a training script and mmengine's logs
(read into an inert object), NumPy scalars and NumPy arrays of plain numbers (read into our own types; arrays of objects
are refused).
"""

from __future__ import annotations

import argparse
import mmap
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyrewrite.errors import CheckpointError, DamagedCheckpointError
from pyrewrite.generators.loading._pickle_machine import (
    Budget,
    Inert,
    Named,
    PickleDamaged,
    PickleMachine,
    PickleRefused,
    checked_key,
)
from pyrewrite.generators.loading._plain_arrays import DType, PlainArray, empty_array, plain_scalar

LOCK = threading.Lock()  # torch keeps its list of safe names, and Python its filters of warnings, for the whole process

# Bytes an element; the names under which torch stores typed memory.
STORAGES = {
    **{f"{name}Storage": size for name, size in (("Double", 8), ("Float", 4), ("Half", 2), ("BFloat16", 2))},
    **{f"{name}Storage": size for name, size in (("Long", 8), ("Int", 4), ("Short", 2), ("Char", 1), ("Byte", 1))},
    "BoolStorage": 1,
}


class Options(argparse.Namespace):
    """Stands in for argparse.Namespace, and for the logs that mmengine keeps in its checkpoints."""


_HARMLESS = [
    (Options, "argparse.Namespace"),
    (Options, "mmengine.logging.history_buffer.HistoryBuffer"),
    (PlainArray, "numpy.ndarray"),
    (DType, "numpy.dtype"),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((empty_array, "_reconstruct"), (plain_scalar, "scalar"))
    ),
    # The names under which torch looks the classes up again while building them.
    PlainArray,
    DType,
    Options,
]


def read_torch_file(path: Path) -> Any:
    """The content of a torch checkpoint: dicts, lists, numbers, text and tensors on the CPU.

    Raises CheckpointError, which names what was found and refused, or DamagedCheckpointError.
    """
    size = path.stat().st_size
    try:
        _look_through(path, size)
        # torch warns about protocols, TorchScript and storages here; what matters of it becomes an error or nothing.
        with LOCK, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except PickleRefused as error:
        raise CheckpointError(f"{str(path)!r} holds {error}; nothing of it was read") from error
    except pickle.UnpicklingError as error:
        unsupported = re.search(r"GLOBAL (\S+)", str(error))
        if unsupported:
            raise CheckpointError(
                f"{str(path)!r} holds an object of {unsupported[1]}, which is not opened: "
                "only tensors, numbers, text and plain arrays are. Save the generator's state_dict() instead"
            ) from error
        if "NumPy" in str(error):
            raise CheckpointError(f"{str(path)!r} holds {error}") from error
        if operand := re.search(r"Unsupported operand (\d+)", str(error)):
            raise CheckpointError(
                f"{str(path)!r} was written with another pickle protocol than torch.save's own, 2: its reader does not "
                f"know the opcode {operand[1]}. Save it with the default pickle_protocol, or as safetensors"
            ) from error
        raise DamagedCheckpointError(
            f"{str(path)!r} is damaged ({size} bytes): its list of contents cannot be read: {_first_line(error)}"
        ) from error
    except Exception as error:
        # A damaged file can make torch's reader fail in almost any way (KeyError, struct.error, RuntimeError ...).
        raise DamagedCheckpointError(
            f"{str(path)!r} is truncated or damaged ({size} bytes): {_first_line(error)}"
        ) from error


def _look_through(path: Path, size: int) -> None:
    """Raise PickleRefused if the pickle in the file uses means that torch's files never use.

    torch's own reader, which decides what may be named, is not made to withstand all of them: keys that take for ever
    to hash, say, or memory as declared in a header.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch decides it, whatever else the file may be
    if zipped:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            info = archive.getinfo(pickled[0])
            contents = _Contents(sum(record.file_size for record in archive.infolist()))
            if info.compress_type != zipfile.ZIP_STORED:
                contents.machine(archive.read(info)).read()
                contents.require_data()
                return
        # Not by the archive's reader: torch can be told to leave out checksums, and then this one's is wrong.
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
            contents.machine(file.read(info.file_size)).read()
        contents.require_data()
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        contents, at, keys = _Contents(size), 0, None
        machine = contents.machine(data)
        for _ in range(5):  # a number, a version, the system, the content, keys
            keys, at = machine.read(at)
        # Storages without data would be whatever the memory held before.
        if type(keys) is not list or any(type(key) is not str for key in keys) or set(keys) != set(contents.storages):
            raise PickleDamaged("the storages that it declares are not those that it holds")
        contents.size = size - at
        contents.require_data()


class _Contents:
    """What the pickle of a torch file is looked through for, while a machine reads it.

    size: bytes that the file's numbers can have.
    storages: key of each storage -> its bytes.
    """

    def __init__(self, size: int) -> None:
        self.size, self.budget, self.storages = size, Budget(4 * size + (1 << 20)), dict[str, int]()

    def machine(self, data: Any) -> PickleMachine:
        return PickleMachine(data, self._find, self._persistent)

    def _find(self, module: str, name: str) -> Named:
        what = f"{module}.{name}"
        checked = _CALLS.get(what)

        def made(*args: Any) -> Inert:
            if checked is None:
                raise PickleRefused(
                    f"an object of {what}, which is not opened: only tensors, numbers, text and plain arrays are. "
                    "Save the generator's state_dict() instead"
                )
            if not checked(args):
                raise PickleRefused(f"a call of {what} with other things than torch writes")
            size = _size(args)
            self.budget.spend(size)
            return _Made(size, self.budget)

        return Named(what, made, made)

    def _persistent(self, pid: Any) -> Inert:
        # ('storage', type, key, place, number of elements, ...)
        if type(pid) is not tuple or len(pid) < 5 or type(pid[1]) is not Named or type(pid[2]) is not str:
            raise PickleRefused("a persistent id that is not that of a torch storage")
        kind, key, count = pid[1].name.rsplit(".", 1)[1], pid[2], pid[4]
        if type(count) is not int or not 0 <= count <= self.size:
            raise PickleDamaged(f"truncated: a storage of {count} elements is declared, the file has {self.size} bytes")
        self.storages[key] = max(self.storages.get(key, 0), count * STORAGES.get(kind, 1))
        return Inert()

    def require_data(self) -> None:
        if (total := sum(self.storages.values())) > self.size:
            raise PickleDamaged(f"truncated: storages of {total} bytes are declared, the file has {self.size}")


class _Made(Inert):
    """Stands in for the result of a call, of so many parts; what is built into it is copied too."""

    __slots__ = ("budget", "size")

    def __init__(self, size: int, budget: Budget) -> None:
        self.size, self.budget = size, budget

    def set_state(self, state: Any) -> None:
        self.budget.spend(_size(state))


def _size(value: Any, depth: int = 3) -> int:
    """How much of a value is copied where something is made of it: texts, bytes, lists, and those in them."""
    if isinstance(value, _Made):
        return value.size
    if type(value) in (str, bytes):
        return len(value)
    if type(value) not in (tuple, list, dict, set, frozenset):
        return 0
    inner = value.values() if type(value) is dict else value
    return len(value) + (sum(_size(part, depth - 1) for part in inner) if depth and len(value) < 10 else 0)


def _anything(args: tuple) -> bool:
    return True


def _no_sizes(args: tuple) -> bool:
    """Whether none of the arguments is a number: as a size, it would ask for that much memory."""
    return all(type(arg) is not int for arg in args)


def _plain_keys(args: tuple) -> bool:
    """Whether all that is to be hashed may be, by `checked_key`."""
    return not args or (len(args) == 1 and type(args[0]) in (list, tuple, dict) and all(map(_is_key, args[0])))


def _plain_pairs(args: tuple) -> bool:
    """The same for names and values."""
    if args and type(args[0]) is not dict:
        pairs = args[0] if type(args[0]) in (list, tuple) else [None]
        return all(type(pair) in (list, tuple) and len(pair) == 2 and _is_key(pair[0]) for pair in pairs)
    return len(args) < 2


def _is_key(value: Any) -> bool:
    checked_key(value)
    return True


def _of_a_tensor(args: tuple) -> bool:
    return bool(args) and type(args[0]) is Named and args[0].name.startswith("torch._utils._rebuild_tensor")


# What torch's writer calls, and which arguments may be. Its reader allows more: tensors of any size without content,
# say, which are whatever the memory held before.
_CALLS: dict[str, Callable[[tuple], bool]] = {
    **{f"torch._utils._rebuild_{name}": _anything for name in ("tensor", "tensor_v2", "tensor_v3")},
    **{f"torch._utils._rebuild_{name}": _anything for name in ("parameter", "parameter_with_state")},
    "torch._tensor._rebuild_from_type_v2": _of_a_tensor,
    **{f"torch.{name}": _anything for name in ("Size", "device")},
    "torch.serialization._get_layout": _anything,
    "torch.nn.parameter.Parameter": _anything,
    "collections.OrderedDict": _plain_pairs,
    "collections.Counter": _plain_keys,
    **{f"{module}.set": _plain_keys for module in ("builtins", "__builtin__")},
    **{f"{module}.complex": _anything for module in ("builtins", "__builtin__")},
    **{f"{module}.bytearray": _no_sizes for module in ("builtins", "__builtin__")},
    "_codecs.encode": _anything,
    "argparse.Namespace": _anything,
    "mmengine.logging.history_buffer.HistoryBuffer": _anything,
    "numpy.dtype": _anything,
    **{f"numpy.{core}.multiarray._reconstruct": _anything for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _anything for core in ("core", "_core")},
}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
