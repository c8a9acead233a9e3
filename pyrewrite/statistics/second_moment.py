"""The uncentred second moment of a layer's keys, C = (1/n) sum k k^T, kept as a sum and a count.

Bau et al., "Rewriting a Deep Generative Model", ECCV 2020, section 3.1: C is the metric in which a context becomes a
direction. The sum is float64 whatever the keys are, so that a million 16-bit keys lose nothing.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pyrewrite._files import write_atomically
from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError
from pyrewrite.ops import second_moment_
from pyrewrite.statistics.whitening import matrix_power

# What reading a foreign, cut off or damaged .npz raises, across numpy's versions.
DAMAGED_FILE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


KEPT_POWERS = (
    4  # matrix powers, d x d each: a decomposition takes as long as all else that an edit does before its loop
)


class SecondMoment:
    """Streaming second moment of d-dimensional keys.

    d: length of a key. device: where the sum lives (default: CPU). precision: "fp32" or "tf32", as in
    `pyrewrite.ops.second_moment_`; it concerns the products, the sum is always float64.

    Attributes: `total` d x d float64, the sum of k k^T; `count`, the number of keys in it.
    """

    def __init__(self, d: int, *, device: torch.device | str | None = None, precision: str = "fp32") -> None:
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise ValueError(f"the length of a key must be an integer of at least 1, got {d!r}")
        if precision not in ("fp32", "tf32"):
            raise ValueError(f"precision must be 'fp32' or 'tf32', got {precision!r}")
        self.precision = precision
        self.count = 0
        self.total = torch.zeros(d, d, dtype=torch.float64, device=device)  # d x d
        self._powers: dict[tuple, Tensor] = {}  # the last few, of the sum as it is

    @property
    def d(self) -> int:
        """Length of a key."""
        return self.total.shape[0]

    @property
    def device(self) -> torch.device:
        return self.total.device

    @property
    def matrix(self) -> Tensor:
        """C, d x d float64: the sum over the count. ValueError when no key has been added."""
        self._require_keys()
        return self.total / self.count

    @property
    def mean_square(self) -> Tensor:
        """E[k^2] of each channel, d float64: the diagonal of C."""
        self._require_keys()
        return self.total.diagonal() / self.count

    def add(self, x: Tensor) -> SecondMoment:
        """Add keys: N x d rows or B x d x H x W maps (any strides), float16, bfloat16, float32 or float64."""
        if x.ndim not in (2, 4) or x.shape[1] != self.d:
            raise ValueError(f"expected N x {self.d} rows or B x {self.d} x H x W maps, got shape {tuple(x.shape)}")
        second_moment_(self.total, x.detach(), precision=self.precision)
        self.count += x.numel() // self.d
        return self

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add what another moment of the same d has counted; `other` stays as it is."""
        if other.d != self.d:
            raise ValueError(f"cannot merge a moment of {other.d}-dimensional keys into one of {self.d}")
        self.total += other.total.to(self.device)
        self.count += other.count
        return self

    def all_reduce(self, group=None) -> SecondMoment:
        """Sum over the processes of a torch.distributed group: afterwards every process holds the whole."""
        count = torch.tensor([self.count], dtype=torch.int64, device=self.device)  # 1
        torch.distributed.all_reduce(self.total, group=group)
        torch.distributed.all_reduce(count, group=group)
        self.count = int(count)
        return self

    def to_(self, device: torch.device | str) -> SecondMoment:
        """Move the sum to a device, in place."""
        self.total = self.total.to(device)
        return self

    def power(self, exponent: float, shrinkage: float = 0.0) -> Tensor:
        """(C + shrinkage * mean(eigenvalue) I) ^ exponent, d x d float64; see `whitening.matrix_power`."""
        state = (self.count, self.total.data_ptr(), self.total._version)
        key = (exponent, shrinkage, *state)
        if key not in self._powers:
            if len(self._powers) >= KEPT_POWERS or any(k[2:] != state for k in self._powers):
                self._powers.clear()
            self._powers[key] = matrix_power(self.matrix, exponent, shrinkage=shrinkage, name="the second moment")
        return self._powers[key].clone()

    def whitener(self, shrinkage: float = 0.0) -> Tensor:
        """Z = C^(-1/2), d x d float64 and symmetric: whitened keys Z k have the identity as second moment."""
        return self.power(-0.5, shrinkage)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count, dtype=torch.int64), "total": self.total.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> SecondMoment:
        """Take over a `state_dict` of the same d; checked as a file is."""
        missing = {"count", "total"} - set(state)
        if missing:
            raise ValueError(f"the state has no {' and no '.join(sorted(missing))}; it has {sorted(state)}")
        count = torch.as_tensor(state["count"]).cpu().numpy()
        count, total = _checked(count, torch.as_tensor(state["total"]).cpu(), "the state", self.d)
        self.count, self.total = count, total.to(self.device)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write `count` (int64) and `mom2` (the sum, float64) as .npz, the members the official tool's cache has."""
        write_atomically(path, lambda file: np.savez(file, **self.arrays()))

    @classmethod
    def load(cls, path: str | os.PathLike, *, d: int | None = None, device=None, precision="fp32") -> SecondMoment:
        """Read a file of `save`, or the official tool's r2m.npz (float32 sums; its pickled members are not opened).

        d: the length the keys must have. FileNotFoundError, or a ValueError that names the file and the member.
        """
        with open_npz(path) as file:
            return cls.from_arrays(file, str(path), d=d, device=device, precision=precision)

    def arrays(self) -> dict[str, np.ndarray]:
        """The members of the .npz file."""
        return {"count": np.int64(self.count), "mom2": self.total.cpu().numpy()}

    @classmethod
    def from_arrays(cls, file: Mapping[str, np.ndarray], name: str, *, d=None, device=None, precision="fp32"):
        """The inverse of `arrays`; `name` is what an error calls the source."""
        count, mom2 = read_member(file, "count", name), read_member(file, "mom2", name)
        if mom2.dtype.kind != "f":
            raise ValueError(f"{name}: mom2 must hold floating-point numbers, it holds {mom2.dtype}")
        count, total = _checked(count, torch.from_numpy(np.ascontiguousarray(mom2, dtype=np.float64)), name, d)
        moment = cls(total.shape[0], device=device, precision=precision)
        moment.count, moment.total = count, total.to(moment.device)
        return moment

    def _require_keys(self) -> None:
        if self.count == 0:
            raise ValueError("no keys have been added yet (count is 0)")

    def __repr__(self) -> str:
        return f"SecondMoment(d={self.d}, count={self.count}, device={self.device}, precision={self.precision!r})"


@contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an .npz lazily and without pickles. FileNotFoundError, or a ValueError that names the file."""
    with open(path, "rb") as raw:  # numpy would leave the file open when it turns out to be no archive
        try:
            file = np.load(raw, allow_pickle=False)
        except DAMAGED_FILE as error:
            raise ValueError(f"{path}: not an .npz file, or damaged ({error})") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: a single array, an .npz file with named arrays is expected")
        with file:
            yield file


def read_member(file: Mapping[str, np.ndarray], member: str, name: str) -> np.ndarray:
    """One array of an open .npz. ValueError that names file and member where it is missing, damaged or pickled."""
    if member not in file:
        raise ValueError(f"{name}: no member {member!r}; it has {sorted(file)}")
    try:
        return np.asarray(file[member])
    except DAMAGED_FILE as error:
        raise ValueError(f"{name}: member {member!r} cannot be read ({error})") from error


def _checked(count: np.ndarray, total: Tensor, name: str, d: int | None) -> tuple[int, Tensor]:
    """A count and a sum that can be trusted: the right shapes, finite, symmetric (exactly, on return)."""
    if count.size != 1 or count.dtype.kind not in "iu" or int(count.reshape(())) < 0:
        raise ValueError(f"{name}: count must be one integer of at least 0, it is {count!r:.80}")
    if total.ndim != 2 or total.shape[0] != total.shape[1] or total.shape[0] < 1:
        raise ValueError(f"{name}: the sum must be a square matrix, its shape is {tuple(total.shape)}")
    if d is not None and total.shape[0] != d:
        raise ValueError(f"{name}: keys of length {total.shape[0]}, expected {d}")
    if not all_finite(total):
        raise NonFiniteError(f"{name}: the sum holds NaN or infinite values")
    total = total.to(torch.float64)
    mirrored = 0.5 * (total + total.T)  # float32 sums of other tools differ across the diagonal by rounding
    if (total - mirrored).abs().max() > 1e-3 * total.abs().max() or (total.diagonal() < 0).any():
        raise ValueError(f"{name}: not a sum of k k^T (not symmetric, or negative squares)")
    return int(count.reshape(())), mirrored
