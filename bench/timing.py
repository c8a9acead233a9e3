"""What benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int = 7) -> tuple[float, float]:
    """Median seconds of two functions, called in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for function, kept in zip((first, second), times, strict=True):
            started = time.perf_counter()
            function()
            kept.append(time.perf_counter() - started)
    return tuple(statistics.median(kept[1:]) for kept in times)  # the first of each warms up
