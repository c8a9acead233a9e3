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
from pathlib import Path
from typing import Any

import torch

from pyrewrite.errors import CheckpointError, DamagedCheckpointError
from pyrewrite.generators.loading._pickle_machine import Inert, Named, PickleDamaged, PickleMachine, PickleRefused
from pyrewrite.generators.loading._plain_arrays import DType, PlainArray, empty_array, plain_scalar

LOCK = threading.Lock()  # torch keeps its list of safe names, and Python its filters of warnings, for the whole process


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
            if info.compress_type != zipfile.ZIP_STORED:
                _machine(archive.read(info), size).read()
                return
        # Not by the archive's reader: torch can be told to leave out checksums, and then this one's is wrong.
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
            _machine(file.read(info.file_size), size).read()
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        machine, at = _machine(data, size), 0
        for _ in range(5):  # a number, a version, the system, the content, keys
            _, at = machine.read(at)


def _machine(data: Any, size: int) -> PickleMachine:
    def find(module: str, name: str) -> Named:
        return Named(f"{module}.{name}", lambda *_: Inert(), lambda *_: Inert())

    def persistent(pid: Any) -> Inert:
        # ('storage', type, key, place, number of elements, ...): none has less than a byte an element.
        count = pid[4] if type(pid) is tuple and len(pid) > 4 else 0
        if type(count) is int and not 0 <= count <= size:
            raise PickleDamaged(f"truncated: a storage of {count} elements is declared, the file has {size} bytes")
        return Inert()

    return PickleMachine(data, find, persistent)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
