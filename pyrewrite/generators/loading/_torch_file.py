"""Reading torch checkpoints without running anything that they hold.

Only `torch.load(weights_only=True)`, with three harmless additions: the options of a training script
(argparse.Namespace, read into an inert object), NumPy scalars and NumPy arrays of plain numbers (read into our own
types; arrays of objects are refused).
"""

from __future__ import annotations

import argparse
import pickle
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyrewrite.errors import CheckpointError, DamagedCheckpointError
from pyrewrite.generators.loading._content import require_checkpoint

_LOCK = threading.Lock()  # torch keeps its list of safe names for the whole process


class _DType:
    """Stands in for numpy.dtype while unpickling: booleans, integers, floating point and complex numbers only."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"a NumPy array of {code!r}: only plain numbers are read")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">", "="):
            self.dtype = self.dtype.newbyteorder(state[1])


class PlainArray:
    """Stands in for numpy.ndarray while unpickling; `array` is the content."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("a NumPy array whose content is not plain numbers")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        self.array = array.astype(dtype.dtype.newbyteorder("="))  # owned, writable, in this machine's byte order


def _reconstruct(*_: Any) -> PlainArray:
    return PlainArray()


def _scalar(dtype: _DType, data: bytes) -> Any:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a NumPy scalar that is not a plain number")
    return np.frombuffer(data, dtype.dtype)[0].item()


class Options(argparse.Namespace):
    """Stands in for argparse.Namespace."""


_HARMLESS = [
    (Options, "argparse.Namespace"),
    (PlainArray, "numpy.ndarray"),
    (_DType, "numpy.dtype"),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((_reconstruct, "_reconstruct"), (_scalar, "scalar"))
    ),
    # The names under which torch looks the classes up again while building them.
    PlainArray,
    _DType,
    Options,
]


def read_torch_file(path: Path) -> Any:
    """The content of a torch checkpoint: dicts, lists, numbers, text and tensors on the CPU.

    Raises FileNotFoundError, IsADirectoryError, or a CheckpointError that says what the file is, or that it is damaged.
    """
    require_checkpoint(path)
    size = path.stat().st_size
    try:
        # torch warns about protocols, TorchScript and storages here; what matters of it becomes an error or nothing.
        with _LOCK, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
