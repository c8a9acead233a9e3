"""One pass over a generator's samples: the statistics of a layer's keys, computed once and then read from a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrewrite._memory import free_memory, is_out_of_memory, lowered
from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics.cache import StatisticsCache
from pyrewrite.statistics.quantiles import UnitQuantiles
from pyrewrite.statistics.second_moment import SecondMoment

if TYPE_CHECKING:
    from pyrewrite.generators.base import EditableLayer, Generator

LATENTS = 8192  # drawn at once
Progress = Callable[[int, int], object]  # (images done, images in all)
Keep = Callable[[int, Tensor], object]  # (number of the first image, keys B x I x h x w)


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer's keys look like over many samples.

    moment: their second moment. quantiles: those of every channel, None unless asked for. samples, seed: whose keys.
    from_cache: read, not computed. seconds: what it took here and now. batch_size: None when read.
    """

    moment: SecondMoment
    quantiles: UnitQuantiles | None
    samples: int
    seed: int
    from_cache: bool
    seconds: float
    batch_size: int | None


def collect(
    generator: Generator,
    layer: str,
    *,
    samples: int = 1000,
    seed: int = 1,
    batch_size: int | None = None,
    cache_dir: str | PathLike | bool | None = None,
    quantiles: bool = False,
    precision: str = "fp32",
    progress: Progress | bool | None = None,
    keep: Keep | None = None,
) -> LayerStatistics:
    """The statistics of all key pixels of images 0 to samples - 1 of a seed, at one layer.

    batch_size: images at a time; by default what fits in memory. It changes the result by rounding only, and is halved
    with a RuntimeWarning where memory runs out. cache_dir: None for the default folder (`cache.default_folder`), False
    for no cache. quantiles: also those of every channel. precision: "fp32" or "tf32", of the products.
    progress: True for a bar on standard error, or a function of (images done, images in all). keep: gets (number of
    the first image, keys) of every batch, unless the statistics come from the cache.

    The cache file belongs to exactly these weights, layer, truncation, samples, seed and precision. One that is damaged
    or says that it belongs to something else is computed again, with a RuntimeWarning.

    NonFiniteError names the layer and the images where an activation is NaN or infinite; nothing is written then.
    UnknownLayerError for a layer that is not there, ValueError for samples or a batch size below 1.
    """
    start = time.perf_counter()
    info = generator.layers[layer]
    check_count("samples", samples)
    cache = None if cache_dir is False else StatisticsCache(None if cache_dir is True else cache_dir)
    if cache is not None:
        key = cache.key(generator, layer, samples=samples, seed=seed, precision=precision)
        pixels = key_pixels(info)
        found = cache.read(
            key, d=info.in_channels, count=samples * pixels, device=generator.device, quantiles=quantiles
        )
        if found is not None:
            moment, sketch = found
            return LayerStatistics(moment, sketch, samples, seed, True, time.perf_counter() - start, None)

    def begin() -> tuple[SecondMoment, UnitQuantiles | None]:
        moment = SecondMoment(info.in_channels, device=generator.device, precision=precision)
        return moment, UnitQuantiles(info.in_channels, device=generator.device) if quantiles else None

    def add(state: tuple[SecondMoment, UnitQuantiles | None], first: int, keys: Tensor) -> None:
        moment, sketch = state
        moment.add(keys)
        if sketch is not None:
            sketch.add(keys)
        if keep is not None:
            keep(first, keys)

    (moment, sketch), used = scan_keys(
        generator, layer, begin, add, samples=samples, seed=seed, batch_size=batch_size, progress=progress
    )
    if cache is not None:
        cache.write(key, moment, sketch)
    return LayerStatistics(moment, sketch, samples, seed, False, time.perf_counter() - start, used)


def scan_keys(
    generator: Generator,
    layer: str,
    begin: Callable[[], object],
    add: Callable[[object, int, Tensor], None],
    *,
    first: int = 0,
    samples: int,
    seed: int,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
    latents: Tensor | None = None,
) -> tuple[object, int]:
    """Run images `first` to samples - 1 up to a layer: ``state = begin()``, then ``add(state, number, keys)`` a batch.

    latents: theirs, where they are at hand: drawing them takes as long as all before them.

    keys: B x I x h x w, finite. Returns the state and the batch size. Where memory runs out, everything starts again
    from `begin()` with half the batch size: an accumulator that failed half-way through a batch is not to be trusted.
    """
    check_count("samples", samples)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    total = samples - first if latents is None else len(latents)
    size = min(total, batch_size or batch_size_by_memory(generator, layer))
    while True:
        try:
            state, finite = begin(), FiniteKeys(layer)
            with report(progress, total, f"keys of {layer}") as advance, torch.no_grad():
                for at, z in _in_batches(generator, first, total, seed, size, latents):
                    keys = generator.keys(layer, z)  # B x I x h x w
                    finite.look(keys, first + at)
                    add(state, first + at, keys)
                    advance(min(total, at + size))
                finite.finish()
            return state, size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        state = keys = finite = None
        size = lowered(size, generator.device, layer)


def _in_batches(
    generator: Generator, first: int, total: int, seed: int, size: int, latents: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Where a batch begins, from 0, and its latents. Those of many images are drawn part by part: drawing begins at
    image 0 each time, but what is in memory does not grow with their number.
    """
    part = size * max(1, LATENTS // size)
    for begin in range(0, total, part):
        end = min(total, begin + part)
        drawn = (
            generator.latents(range(first + begin, first + end), seed=seed) if latents is None else latents[begin:end]
        )
        for at in range(0, end - begin, size):
            yield begin + at, drawn[at : at + size]


def batch_size_by_memory(generator: Generator, layer: str) -> int:
    """How many images to run at a time: what a part of the free GPU memory holds, or of the caches on a CPU."""
    info = generator.layers[layer]
    # The widest maps on the way, in and out, several of them alive at once, float32.
    per_image = 32 * (info.in_channels * key_pixels(info) + info.out_channels * info.resolution**2)
    if generator.device.type == "cuda":
        return max(1, min(256, free_memory(generator.device) // 4 // per_image))
    return max(1, min(32, (1 << 26) // per_image))


def key_pixels(layer: EditableLayer) -> int:
    """How many keys one image gives at a layer; key_size is for maps that are not square."""
    size = getattr(layer, "key_size", None)
    return layer.key_resolution**2 if size is None else size[0] * size[1]


class FiniteKeys:
    """Looks for NaN and infinity in batch after batch of a layer's keys; NonFiniteError names the layer and the images.

    On a GPU a batch's answer is asked for when the next one has been queued: the host never waits for all that it has
    queued, and the GPU does not run out of work between batches. `finish` asks for the last one's.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self._asked: tuple[torch.cuda.Event, Tensor, Tensor, int] | None = None

    def look(self, keys: Tensor, first: int) -> None:
        """keys: B x I x h x w, of image number `first` on."""
        # A sum reads the keys once; where it overflows or meets NaN, every number is looked at.
        sums = keys.sum((1, 2, 3), dtype=torch.promote_types(keys.dtype, torch.float32))  # B
        if keys.device.type != "cuda":
            self._judge(sums, keys, first)
            return
        answer = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
        event = torch.cuda.current_stream(keys.device).record_event()
        self.finish()
        self._asked = event, answer, keys, first

    def finish(self) -> None:
        if self._asked is not None:
            event, answer, keys, first = self._asked
            self._asked = None
            event.synchronize()
            self._judge(answer, keys, first)

    def _judge(self, sums: Tensor, keys: Tensor, first: int) -> None:
        if sums.isfinite().all():
            return
        finite = torch.isfinite(keys).flatten(1).all(1)  # B
        numbers = [first + i for i in (~finite).nonzero()[:, 0].tolist()]
        if numbers:
            listed = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
            raise NonFiniteError(
                f"the activations at {self.layer} are NaN or infinite in image{'s' * (len(numbers) > 1)} {listed}: "
                "the generator's weights are damaged, or too large for their number type"
            )


def check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


@contextmanager
def report(progress: Progress | bool | None, total: int, title: str) -> Iterator[Callable[[int], None]]:
    """Turn `progress` into one function of the images done. True shows a bar on standard error while in the context."""
    if progress is True:
        from tqdm import tqdm

        with tqdm(total=total, desc=title, unit="image", leave=False) as bar:
            yield lambda done: bar.update(done - bar.n)
    elif callable(progress):
        yield lambda done: progress(done, total)
    elif progress is None or progress is False:
        yield lambda done: None
    else:
        raise TypeError(f"progress must be True, None or a function of (done, total), got {progress!r}")
