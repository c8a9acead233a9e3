"""One layer's second moment, collected by the processes of a torch.distributed group, in shards that survive a crash.

The images are cut into shards of SHARD images. Every process computes its share of them and keeps each on disk as it
is done, so that a run that was killed goes on from there, also with another number of processes. A shard is computed
in the same batches by whoever does it: the result differs from one process's by the order of float64 additions only.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pyrewrite._files import write_atomically
from pyrewrite.generators.base import Generator
from pyrewrite.statistics.cache import StatisticsCache
from pyrewrite.statistics.collect import (
    LayerStatistics,
    Progress,
    batch_size_by_memory,
    check_count,
    key_pixels,
    report,
    scan_keys,
)
from pyrewrite.statistics.second_moment import DAMAGED_FILE, SecondMoment, open_npz, read_member

SHARD = 64  # images


def collect_shared(
    generator: Generator,
    layer: str,
    *,
    samples: int = 1000,
    seed: int = 1,
    cache_dir: str | PathLike | bool | None = None,
    precision: str = "fp32",
    progress: Progress | bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> LayerStatistics:
    """`collect` by all processes of a group together; every one returns the whole. Without quantiles.

    group: an initialised torch.distributed group (default: the world). cache_dir: as for `collect`; a folder that the
    processes share lets any of them take over another's finished shards. progress: shown by the first process.

    RuntimeError, naming the images, when a shard is missing or was counted twice. Other errors as `collect`.
    """
    check_count("samples", samples)
    start = time.perf_counter()
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    info = generator.layers[layer]
    pixels = key_pixels(info)
    cache = None if cache_dir is False else StatisticsCache(None if cache_dir is True else cache_dir)
    key = StatisticsCache.key(generator, layer, samples=samples, seed=seed, precision=precision)
    found = None
    if cache is not None:
        found = cache.read(key, d=info.in_channels, count=samples * pixels, device=generator.device, quantiles=False)
    if all(_gathered(found is not None, group)):  # together, or a process without the file would wait for ever
        return LayerStatistics(found[0], None, samples, seed, True, time.perf_counter() - start, None)

    shards = [(first, min(first + SHARD, samples)) for first in range(0, samples, SHARD)]
    own = shards[rank::world]
    folder = None if cache is None else cache.path(key).with_suffix(".shards")
    size = min(SHARD, batch_size_by_memory(generator, layer))
    moment = SecondMoment(info.in_channels, device=generator.device, precision=precision)
    counted = []
    with report(progress if rank == 0 else None, len(own), f"shards of {layer}") as advance:
        for number, (first, last) in enumerate(own):
            shard = None if folder is None else _read(folder, key, first, last, info.in_channels, pixels)
            if shard is None:
                shard, _ = scan_keys(
                    generator,
                    layer,
                    lambda: SecondMoment(info.in_channels, device=generator.device, precision=precision),
                    lambda state, _, keys: state.add(keys),
                    first=first,
                    samples=last,
                    seed=seed,
                    batch_size=size,
                )
                if folder is not None:
                    _write(folder, key, first, last, shard)
            moment.merge(shard)
            counted.append((first, last, shard.count))
            advance(number + 1)
    _require_each_once(shards, [c for part in _gathered(counted, group) for c in part], pixels)
    moment.all_reduce(group)
    if moment.count != samples * pixels:
        raise RuntimeError(f"{layer}: the processes counted {moment.count} keys, expected {samples * pixels}")
    if cache is not None and rank == 0:
        cache.write(key, moment, None)
        shutil.rmtree(folder, ignore_errors=True)
    _gathered(None, group)  # nobody looks for the file before it is there
    return LayerStatistics(moment, None, samples, seed, False, time.perf_counter() - start, size)


def _gathered(value: object, group: dist.ProcessGroup | None) -> list:
    """Every process's value, in the order of the ranks."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _require_each_once(shards: list[tuple[int, int]], counted: list[tuple[int, int, int]], pixels: int) -> None:
    found: dict[tuple[int, int], int] = {}
    for first, last, count in counted:
        if count != (last - first) * pixels:
            raise RuntimeError(
                f"images {first} to {last - 1}: {count} keys were counted, expected {(last - first) * pixels}"
            )
        found[first, last] = found.get((first, last), 0) + 1
    for first, last in shards:
        if found.get((first, last), 0) != 1:
            times = found.get((first, last), 0)
            raise RuntimeError(f"images {first} to {last - 1} were counted {times} times, expected once")


def _shard_key(key: str, first: int, last: int) -> str:
    return json.dumps({**json.loads(key), "first": first, "last": last}, sort_keys=True)


def _read(folder: Path, key: str, first: int, last: int, d: int, pixels: int) -> SecondMoment | None:
    """A finished shard; None where there is none, or with a RuntimeWarning one that cannot be trusted."""
    path = folder / f"{first}-{last}.npz"
    if not path.exists():
        return None
    try:
        with open_npz(path) as file:
            found = str(read_member(file, "key", str(path)))
            if found != _shard_key(key, first, last):
                raise ValueError(f"{path}: belongs to {found:.300}")
            shard = SecondMoment.from_arrays(file, str(path), d=d, precision=json.loads(key)["precision"])
        if shard.count != (last - first) * pixels:
            raise ValueError(f"{path}: {shard.count} keys, expected {(last - first) * pixels}")
        return shard
    except DAMAGED_FILE as error:
        warnings.warn(f"shard not used, computing it again: {error}", RuntimeWarning, stacklevel=3)
        return None


def _write(folder: Path, key: str, first: int, last: int, shard: SecondMoment) -> None:
    """Keep a shard; a folder that cannot be written is a RuntimeWarning, as for the cache."""
    arrays = {"key": np.array(_shard_key(key, first, last)), **shard.arrays()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{first}-{last}.npz", lambda file: np.savez(file, **arrays))
    except OSError as error:
        warnings.warn(f"the shard could not be kept: {error}", RuntimeWarning, stacklevel=3)


def join_group(device: str) -> str:
    """Join the processes that torchrun started and return this one's device: "cuda" becomes the local rank's GPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(local)
        dist.init_process_group("nccl")
        return f"cuda:{local}"
    dist.init_process_group("gloo")
    return device
