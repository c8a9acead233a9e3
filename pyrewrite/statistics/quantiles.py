"""Quantiles of every unit over all its samples, in one pass and bounded memory.

A compactor sketch (Munro and Paterson, "Selection and sorting with limited storage", 1980; the halving step as in the
KLL sketch, Karnin, Lang, Liberty, FOCS 2016, but with alternating instead of random offsets, so that the same samples
always give the same answer). Values are collected in level 0; every `resolution` of them are sorted, every second
one goes to level 1 with twice the weight, and so on. All units see the same number of samples, so that one set of
d x m arrays serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError


class UnitQuantiles:
    """Streaming quantiles of d units.

    d: number of units. resolution: samples sorted at a time, even. device: where the sketch lives (default: CPU).

    Exact while there are fewer than `resolution` samples. Beyond that a rank is off by at most `rank_error` of the
    count, about (log2(n / resolution) + 1) / (2 resolution), 0.05 % at a million samples. Memory is at most about
    4 d resolution (log2(n / resolution) + 1) bytes. Values are kept as float32.
    The samples of a unit are a stream: how they are cut into `add` calls makes no difference.
    """

    def __init__(self, d: int, *, resolution: int = 8192, device: torch.device | str | None = None) -> None:
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise ValueError(f"the number of units must be an integer of at least 1, got {d!r}")
        if not isinstance(resolution, int) or resolution < 2 or resolution % 2:
            raise ValueError(f"the resolution must be an even integer of at least 2, got {resolution!r}")
        self.d, self.resolution, self.count = d, resolution, 0
        self.device = torch.device(device if device is not None else "cpu")
        self._levels: list[Tensor] = []  # level l: d x m, m < resolution, each value stands for 2^l samples
        self._kept: list[list[int]] = []  # how often a level was halved keeping the lower, the upper values
        self._extremes: Tensor | None = None  # d x 2: smallest, largest
        self._sorted: tuple[Tensor, Tensor] | None = None  # d x m values, d x (m + 1) weights below; a cache

    @property
    def rank_error(self) -> float:
        """The largest error that any rank can have, as a part of the count: 0 while exact.

        Halving a level with weight w while keeping the lower value of each pair overstates a rank by w or by nothing,
        keeping the upper one understates it likewise, and the two take turns.
        """
        sides = [sum(kept[side] * 2**level for level, kept in enumerate(self._kept)) for side in (0, 1)]
        return max(sides) / max(self.count, 1)

    def add(self, x: Tensor) -> UnitQuantiles:
        """Add samples: N x d or B x d x H x W (or any B x d x ...). NonFiniteError on NaN or infinity."""
        if x.ndim < 2 or x.shape[1] != self.d or not x.is_floating_point():
            raise ValueError(f"expected floating-point samples B x {self.d} x ..., got {x.dtype} {tuple(x.shape)}")
        rows = x.detach().to(self.device, torch.float32).transpose(0, 1).reshape(self.d, -1)  # d x n
        if rows.shape[1] == 0:
            return self
        extremes = torch.stack(rows.aminmax(dim=1), 1)  # d x 2, NaN wherever a row has one
        if not all_finite(extremes):
            raise NonFiniteError("the samples hold NaN or infinite values (in float32)")
        self._widen(extremes)
        self.count += rows.shape[1]
        self._push(0, rows)
        return self

    def merge(self, other: UnitQuantiles) -> UnitQuantiles:
        """Take in the samples of another sketch of the same d and resolution; `other` stays as it is."""
        if (other.d, other.resolution) != (self.d, self.resolution):
            raise ValueError(
                f"cannot merge a sketch of {other.d} units, resolution {other.resolution}, "
                f"into one of {self.d} units, resolution {self.resolution}"
            )
        if other.count:
            levels, kept = list(other._levels), [list(pair) for pair in other._kept]  # `other` may be self
            self._widen(other._extremes.to(self.device))
            self.count += other.count
            for level, rows in enumerate(levels):
                self._push(level, rows.to(self.device))
                self._kept[level] = [a + b for a, b in zip(self._kept[level], kept[level], strict=True)]
        return self

    def rank(self, values: Tensor) -> Tensor:
        """Where values stand among their unit's samples: (rank + 0.5) / n, strictly between 0 and 1.

        values: B x d or B x d x ...; returns float64 of the same shape. Equal samples share the middle of their
        ranks; a value beyond all samples gets 0.5 / n or 1 - 0.5 / n, so that log(1 - u) is always finite.
        """
        if values.ndim < 2 or values.shape[1] != self.d:
            raise ValueError(f"expected values B x {self.d} x ..., got shape {tuple(values.shape)}")
        stored, below = self._merged()
        moved = values.detach().to(self.device, torch.float32).transpose(0, 1)  # d x B x ...
        rows = moved.reshape(self.d, -1)  # d x n
        if torch.isnan(rows).any():
            raise NonFiniteError("the values hold NaN")
        left = torch.searchsorted(stored, rows.contiguous(), right=False)  # d x n
        right = torch.searchsorted(stored, rows.contiguous(), right=True)
        ranks = (below.gather(1, left) + below.gather(1, right)).double() / (2 * self.count)
        ranks.clamp_(0.5 / self.count, 1 - 0.5 / self.count)
        return ranks.reshape(moved.shape).transpose(0, 1)

    def quantile(self, q: float | Tensor) -> Tensor:
        """The value at quantile q of each unit: d for a number, d x len(q) for a list or tensor; float64.

        The inverse of `rank`, linear between samples; 0 and 1 give the exact extremes. ValueError outside [0, 1].
        """
        points = torch.as_tensor(q, dtype=torch.float64, device=self.device)
        if points.ndim > 1 or not ((points >= 0) & (points <= 1)).all():
            raise ValueError(f"quantiles must be numbers between 0 and 1, got {q!r}")
        stored, below = self._merged()
        lowest, highest = self._extremes.double().split(1, 1)  # d x 1 each
        values = torch.cat([lowest, stored.double(), highest], 1)  # d x (m + 2)
        middles = 0.5 * (below[:, 1:] + below[:, :-1]).double()  # d x m: the middle of each value's own weight
        ends = middles.new_tensor([0.0, self.count]).expand(self.d, 2)
        positions = torch.cat([ends[:, :1], middles, ends[:, 1:]], 1)  # d x (m + 2), ascending
        wanted = (points.reshape(1, -1) * self.count).expand(self.d, -1).contiguous()  # d x q
        upper = torch.searchsorted(positions, wanted).clamp_(1, positions.shape[1] - 1)  # d x q
        p0, p1 = positions.gather(1, upper - 1), positions.gather(1, upper)
        v0, v1 = values.gather(1, upper - 1), values.gather(1, upper)
        result = torch.lerp(v0, v1, (wanted - p0) / (p1 - p0))
        return result[:, 0] if points.ndim == 0 else result

    def arrays(self) -> dict[str, np.ndarray]:
        """The sketch as plain arrays, for an .npz file."""
        self._merged()
        return {
            "quantile_count": np.int64(self.count),
            "quantile_resolution": np.int64(self.resolution),
            "quantile_compactions": np.array(self._kept, dtype=np.int64),
            "quantile_extremes": self._extremes.cpu().numpy(),
            "quantile_sizes": np.array([level.shape[1] for level in self._levels], dtype=np.int64),
            "quantile_values": torch.cat(self._levels, 1).cpu().numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], *, device=None) -> UnitQuantiles:
        """The inverse of `arrays`. ValueError where they contradict each other, KeyError where one is missing."""
        values = torch.from_numpy(np.ascontiguousarray(arrays["quantile_values"], dtype=np.float32))
        extremes = torch.from_numpy(np.ascontiguousarray(arrays["quantile_extremes"], dtype=np.float32))
        sizes = [int(size) for size in arrays["quantile_sizes"]]
        kept = np.asarray(arrays["quantile_compactions"], dtype=np.int64)
        count, resolution = int(arrays["quantile_count"]), int(arrays["quantile_resolution"])
        consistent = (
            values.ndim == 2
            and tuple(extremes.shape) == (values.shape[0], 2)
            and kept.shape == (len(sizes), 2)
            and all(0 <= size < resolution for size in sizes)
            and sum(sizes) == values.shape[1]
            and sum(size * 2**level for level, size in enumerate(sizes)) == count > 0
            and all_finite(values)
            and all_finite(extremes)
        )
        if not consistent:
            raise ValueError("the quantile arrays contradict each other")
        sketch = cls(values.shape[0], resolution=resolution, device=device)
        sketch.count, sketch._kept = count, kept.tolist()
        sketch._levels = list(values.to(sketch.device).split(sizes, 1))
        sketch._extremes = extremes.to(sketch.device)
        return sketch

    def _widen(self, extremes: Tensor) -> None:
        if self._extremes is not None:
            lowest = torch.minimum(self._extremes[:, 0], extremes[:, 0])
            highest = torch.maximum(self._extremes[:, 1], extremes[:, 1])
            extremes = torch.stack([lowest, highest], 1)
        self._extremes = extremes
        self._sorted = None

    def _push(self, level: int, rows: Tensor) -> None:
        """Append rows (d x n) to a level, and halve it as often as it is full."""
        if level == len(self._levels):
            self._levels.append(rows.new_empty(self.d, 0))
            self._kept.append([0, 0])
        rows = torch.cat([self._levels[level], rows], 1)  # d x m
        chunks = rows.shape[1] // self.resolution
        if chunks:
            full = rows[:, : chunks * self.resolution].reshape(self.d, chunks, self.resolution)
            pairs = _sort(full).reshape(self.d, chunks, -1, 2)  # d x chunks x resolution/2 x 2
            lower, upper = self._kept[level]
            start = 0 if lower > upper else 1  # the first chunk whose upper values are kept
            kept = pairs[..., 0].clone()  # d x chunks x resolution/2
            kept[:, start::2] = pairs[:, start::2, :, 1]
            uppers = len(range(start, chunks, 2))
            self._kept[level] = [lower + chunks - uppers, upper + uppers]
            self._push(level + 1, kept.reshape(self.d, -1))
            rows = rows[:, chunks * self.resolution :].clone()
        self._levels[level] = rows

    def _merged(self) -> tuple[Tensor, Tensor]:
        """All values sorted, d x m, and how many samples lie below each and below the end, d x (m + 1) int64."""
        if self.count == 0:
            raise ValueError("no samples have been added yet (count is 0)")
        if self._sorted is None:
            weights = torch.cat(
                [torch.full((level.shape[1],), 2**i, device=self.device) for i, level in enumerate(self._levels)]
            )
            values, order = torch.cat(self._levels, 1).sort(dim=1)  # d x m
            below = torch.nn.functional.pad(weights[order].cumsum(1), (1, 0))  # d x (m + 1)
            self._sorted = values, below
        return self._sorted

    def __repr__(self) -> str:
        return f"UnitQuantiles(d={self.d}, count={self.count}, rank_error={self.rank_error:.2g}, device={self.device})"


def _sort(values: Tensor) -> Tensor:
    """Sort the last dimension. numpy's sort needs no index beside the values and is several times faster on a CPU."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
