"""Statistics kept on disk, each file tied to exactly what it was computed from.

A file is an .npz with the members of `SecondMoment.save` (so that other tools can read it), the sketch of the quantiles
if it was asked for, and `key`: a JSON text with the hash of the weights, the layer and all settings. The file's name is
made of that text, and the text is compared again on reading, so that a renamed or copied file is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyrewrite._files import write_atomically
from pyrewrite.statistics.quantiles import UnitQuantiles
from pyrewrite.statistics.second_moment import DAMAGED_FILE, SecondMoment, open_npz, read_member

if TYPE_CHECKING:
    from pyrewrite.generators.base import Generator

FORMAT = 1  # raised whenever the meaning of a file changes


def default_folder() -> Path:
    """$PYREWRITE_CACHE if set, else $XDG_CACHE_HOME/pyrewrite, else ~/.cache/pyrewrite."""
    if own := os.environ.get("PYREWRITE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrewrite"


class StatisticsCache:
    """A folder of statistics. folder: None for the default; it is made when the first file is written."""

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)

    @staticmethod
    def key(generator: Generator, layer: str, *, samples: int, seed: int, precision: str) -> str:
        """What statistics depend on, as JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                "weights": generator.weights_hash(),
                "layer": layer,
                "truncation": float(getattr(generator, "truncation", 1.0)),
                **getattr(generator, "settings", dict)(),
                "samples": samples,
                "seed": seed,
                "precision": precision,
            },
            sort_keys=True,
        )

    def path(self, key: str) -> Path:
        """The file of a key: the layer, for people, and a hash of everything."""
        layer = re.sub(r"[^\w.-]", "_", json.loads(key)["layer"])[:40]
        return self.folder / f"{layer}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"

    def read(
        self, key: str, *, d: int, count: int, device: torch.device, quantiles: bool
    ) -> tuple[SecondMoment, UnitQuantiles | None] | None:
        """The statistics of a key, or None where there are none.

        d, count: what they must be about. A file that cannot be trusted is a RuntimeWarning and None; one that merely
        lacks the quantiles that are wanted is None.
        """
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with open_npz(path) as file:
                found = str(read_member(file, "key", str(path)))
                if found != key:
                    raise ValueError(f"{path}: belongs to {found:.300}, not to {key}")
                precision = json.loads(key)["precision"]
                moment = SecondMoment.from_arrays(file, str(path), d=d, device=device, precision=precision)
                if moment.count != count:
                    raise ValueError(f"{path}: {moment.count} keys, expected {count}")
                if not quantiles:
                    return moment, None
                if "quantile_count" not in file:
                    return None
                sketch = UnitQuantiles.from_arrays(file, device=device)
                if (sketch.d, sketch.count) != (d, count):
                    raise ValueError(f"{path}: quantiles of {sketch.d} units and {sketch.count} keys")
                return moment, sketch
        except DAMAGED_FILE as error:
            warnings.warn(f"cached statistics not used, computing them again: {error}", RuntimeWarning, stacklevel=3)
            return None

    def write(self, key: str, moment: SecondMoment, sketch: UnitQuantiles | None) -> None:
        """Keep statistics. A folder that cannot be written is only a RuntimeWarning: they are good without it."""
        arrays = {"key": np.array(key), **moment.arrays(), **(sketch.arrays() if sketch is not None else {})}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(key), lambda file: np.savez(file, **arrays))
        except OSError as error:
            warnings.warn(f"the statistics could not be kept: {error}", RuntimeWarning, stacklevel=3)
