"""One layer's second moment, collected by the processes of a torch.distributed group, in shards that survive a crash.

The images are cut into shards of SHARD images. Every process computes its share of them and keeps each on disk as it
is done, so that a run that was killed goes on from there, also with another number of processes. On one kind of device
the result differs from one process's by the order of float64 additions only.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from datetime import timedelta
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pyrewrite._files import write_atomically
from pyrewrite.generators.base import Generator
from pyrewrite.statistics.cache import StatisticsCache
from pyrewrite.statistics.collect import (
    LATENTS,
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
_PATIENCE = timedelta(days=7)  # a process that is done waits for the slowest


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

    group: an initialised torch.distributed group (default: the world). Its timeout must be longer than the slowest
    process's share takes. cache_dir: as for `collect`; in a folder that the processes share any of them takes over
    another's finished shards. progress: of the first process's share.

    RuntimeError, naming the images, when a shard is missing or was counted twice, and in every process when another
    one failed. Other errors as `collect`.
    """
    check_count("samples", samples)
    start = time.perf_counter()
    rank = dist.get_rank(group)
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
    folder = None if cache is None else cache.path(key).with_suffix(".shards")
    own = _shares(_gathered(_finished(folder, shards), group), shards)[rank]
    size = min(_gathered(min(SHARD, batch_size_by_memory(generator, layer)), group))
    moment = SecondMoment(info.in_channels, device=generator.device, precision=precision)
    counted: list[tuple[int, int, int]] = []
    failed: Exception | None = None
    try:
        at, images = 0, sum(last - first for first, last in own)
        with report(progress if rank == 0 else None, images, f"keys of {layer}, this process") as advance:
            for number, (first, last) in enumerate(own):
                if number % (LATENTS // SHARD) == 0:  # drawn together, or every shard would draw from image 0 on
                    part, place = own[number : number + LATENTS // SHARD], 0
                    latents = generator.latents([n for shard in part for n in range(*shard)], seed=seed)  # images x z
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
                        latents=latents[place : place + last - first],
                    )
                    if folder is not None:
                        _write(folder, key, first, last, shard)
                moment.merge(shard)
                counted.append((first, last, shard.count))
                at, place = at + last - first, place + last - first
                advance(at)
    except Exception as error:
        failed = error  # raised below: the others wait for this process's answer
    answers = _gathered((counted, failed and f"{type(failed).__name__}: {failed}"), group)
    if failed is not None:
        raise failed
    for other, (_, text) in enumerate(answers):
        if text is not None:
            raise RuntimeError(f"process {other} failed: {text}")
    _require_each_once(shards, [c for part, _ in answers for c in part], pixels)
    moment.all_reduce(group)
    if moment.count != samples * pixels:
        raise RuntimeError(f"{layer}: the processes counted {moment.count} keys, expected {samples * pixels}")
    if cache is not None and rank == 0:
        cache.write(key, moment, None)
    _gathered(None, group)
    if cache is not None:
        if not cache.path(key).exists():  # a folder that the first process does not share
            cache.write(key, moment, None)
        shutil.rmtree(folder, ignore_errors=True)
    _gathered(None, group)  # nobody looks for the file before it is there
    return LayerStatistics(moment, None, samples, seed, False, time.perf_counter() - start, size)


def _finished(folder: Path | None, shards: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """The shards that lie in this process's folder."""
    return set() if folder is None else {shard for shard in shards if _path(folder, *shard).exists()}


def _shares(finished: list[set[tuple[int, int]]], shards: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Every process's shards: those that it or another has finished go to one that has them, the rest round robin."""
    world = len(finished)
    owners = {shard: [rank for rank in range(world) if shard in finished[rank]] for shard in shards}
    missing = [shard for shard in shards if not owners[shard]]
    owner = {shard: number % world for number, shard in enumerate(missing)}
    owner |= {shard: ranks[number % len(ranks)] for number, (shard, ranks) in enumerate(owners.items()) if ranks}
    return [[shard for shard in shards if owner[shard] == rank] for rank in range(world)]


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


def _path(folder: Path, first: int, last: int) -> Path:
    return folder / f"{first}-{last}.npz"


def _shard_key(key: str, first: int, last: int) -> str:
    return json.dumps({**json.loads(key), "first": first, "last": last}, sort_keys=True)


def _read(folder: Path, key: str, first: int, last: int, d: int, pixels: int) -> SecondMoment | None:
    """A finished shard; None where there is none, or with a RuntimeWarning one that cannot be trusted."""
    path = _path(folder, first, last)
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
        write_atomically(_path(folder, first, last), lambda file: np.savez(file, **arrays))
    except OSError as error:
        warnings.warn(f"the shard could not be kept: {error}", RuntimeWarning, stacklevel=3)


def join_group(device: str) -> str:
    """Join the processes that torchrun started and return this one's device: "cuda" becomes the local rank's GPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", timeout=_PATIENCE)
        return f"cuda:{local}"
    dist.init_process_group("gloo", timeout=_PATIENCE)
    return device
