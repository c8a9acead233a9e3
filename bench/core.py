"""What is measured and how: ways of computing the same thing, checked first and then timed in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHORTEST = 2e-3  # seconds that one measurement takes at least; shorter work is repeated


@dataclass
class Way:
    """One implementation. `error` judges its result against float64; `scale` is the whole work over that of `run`."""

    name: str
    run: Callable[[], Tensor]
    error: Callable[[Tensor], float]
    scale: float = 1.0


@dataclass
class Case:
    """Several ways at one size, this package's first. `bytes` and `flop` are the least that must be moved and done."""

    kernel: str
    size: str
    device: str
    bytes: float
    flop: float
    rate: str  # the unit that the operations would best run on: a key of Machine.flop_rates
    bound: float  # the error that this package's way may have
    ways: list[Way] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # ways that cannot run here, and why


@dataclass
class Machine:
    """Measured: bytes read and written a second by a copy, and operations a second of large matrix products."""

    name: str
    device: str
    copy_rate: float
    flop_rates: dict[str, float]

    def floor(self, case: Case) -> float:
        return max(case.bytes / self.copy_rate, case.flop / self.flop_rates[case.rate])


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    difference = result.double() - truth.to(result.device, torch.float64)
    return (difference.norm() / truth.double().norm().to(result.device)).item()


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile at the first call: importing its parts takes seconds, which only those who call it should pay."""
    made: list[Callable[..., Tensor]] = []

    def call(*arguments, **settings) -> Tensor:
        if not made:
            made.append(torch.compile(function))
        return made[0](*arguments, **settings)

    return call


def time_once(run: Callable[[], object], device: str, repeats: int = 1, flush: Tensor | None = None) -> float:
    """Seconds of one call. On a GPU `flush`, larger than its L2 cache, is written before each call: cold."""
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) / repeats
    total = 0.0
    for _ in range(repeats if flush is not None else 1):
        if flush is not None:
            flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(1 if flush is not None else repeats):
            run()
        end.record()
        end.synchronize()
        total += begin.elapsed_time(end) / 1e3
    return total / repeats


def interleaved(ways: Sequence[Way], device: str, rounds: int = 5, cold: bool = False) -> dict[str, float]:
    """Median seconds of each way's whole work; the ways take turns, so that a drifting clock meets them all."""
    flush = None
    if cold:
        flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=device)
    repeats = {}
    for way in ways:
        way.run()
        first = time_once(way.run, device)
        repeats[way.name] = max(1, min(1000, round(SHORTEST / max(first, 1e-7))))
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way.name].append(time_once(way.run, device, repeats[way.name], flush) * way.scale)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_machine(device: str) -> Machine:
    """Rates of a copy and of matrix products, with stock torch."""
    gpu = device == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"processor, {torch.get_num_threads()} threads"
    source = torch.ones(1 << (28 if gpu else 24), device=device)
    target = torch.empty_like(source)
    copy = min(time_once(lambda: target.copy_(source), device, 3) for _ in range(5))
    size = 8192 if gpu else 1024

    def product_rate(dtype: torch.dtype, precision: str) -> float:
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
            torch.mm(a, b)
            return 2 * size**3 / min(time_once(lambda: torch.mm(a, b), device, 2) for _ in range(3))
        finally:
            torch.set_float32_matmul_precision(kept)

    rates = {"fp32": product_rate(torch.float32, "highest")}
    if gpu:
        rates["tf32"] = product_rate(torch.float32, "high")
        rates["bf16"] = product_rate(torch.bfloat16, "highest")
        # Three products of split factors are as exact as float32.
        rates["fp32 grade"] = max(rates["fp32"], rates["tf32"] / 3)
    else:
        rates["tf32"] = rates["bf16"] = rates["fp32 grade"] = rates["fp32"]
    return Machine(name, device, 2 * source.nbytes / copy, rates)


def measure(case: Case, machine: Machine, rounds: int = 5) -> list[dict]:
    """A row for each way: its error, and only where this package's is within its bound, times and rates."""
    errors = {}
    for way in list(case.ways):
        try:
            errors[way.name] = way.error(way.run())
        except Exception as problem:  # whatever a peer raises, the others are still measured
            if way is case.ways[0]:
                raise
            case.missing[way.name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
            case.ways.remove(way)
    ours = case.ways[0].name
    rows = []
    right = errors[ours] <= case.bound
    states = ["cold", "warm"] if machine.device == "cuda" else ["as it is"]
    for state in states if right else ["wrong result"]:
        times = interleaved(case.ways, machine.device, rounds, state == "cold") if right else {}
        for way in case.ways:
            row = {"kernel": case.kernel, "size": case.size, "device": machine.name, "way": way.name, "cache": state}
            row["error"] = errors[way.name]
            if seconds := times.get(way.name):
                row |= {
                    "seconds": seconds,
                    "ratio": seconds / times[ours],
                    "gb_per_s": case.bytes / seconds / 1e9,
                    "tflop_per_s": case.flop / seconds / 1e12,
                    "percent_of_floor": 100 * machine.floor(case) / seconds,
                    "intensity": case.flop / case.bytes,
                }
            rows.append(row)
    rows += [
        {"kernel": case.kernel, "size": case.size, "device": machine.name, "way": name, "missing": why}
        for name, why in case.missing.items()
    ]
    return rows
