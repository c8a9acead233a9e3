"""What stands in for NumPy's types while a file is read: plain numbers only, never arrays of objects."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np


class DType:
    """Stands in for numpy.dtype: booleans, integers, floating point and complex numbers only."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or len(code) > 8:
            shown = "long text" if isinstance(code, str) else type(code).__name__
            raise pickle.UnpicklingError(f"a NumPy type made of a {shown}: only plain numbers are read")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"a NumPy array of {code!r}: only plain numbers are read")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">", "="):
            self.dtype = self.dtype.newbyteorder(state[1])


class PlainArray:
    """Stands in for numpy.ndarray; `array` is the content."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = plain_array(data, dtype, shape, "F" if fortran else "C")


def plain_array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """An owned, writable array in this machine's byte order, of numbers that `data` holds in full."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("a NumPy array whose content is not plain numbers")
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder("="))


def empty_array(*_: Any) -> PlainArray:
    return PlainArray()


def plain_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, DType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a NumPy scalar that is not a plain number")
    return np.frombuffer(data, dtype.dtype)[0].item()
