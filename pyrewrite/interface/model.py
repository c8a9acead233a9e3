"""The generator as a session holds it: weights that follow a list of edits, statistics, kept activations and pictures.

Only the session's worker thread uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..generators import Activation, Generator
from ..rewriting import LayerUpdate, LowRankPatch, PatchSet, Rewriter, set_patches
from ..rewriting.targets import Captured, activations, capture_batch, captured_from
from ..statistics import LayerStatistics, SecondMoment, collect
from ..statistics.collect import batch_size_by_memory
from ..statistics.search import DirectionScan, KeptKeys, scan_direction
from .document import StackedEdit
from .pictures import BoundedCache, to_pixels

STATISTICS_BATCH = 4  # images between two chances to answer a message
JOB_BATCH = 16  # the same while somebody waits for the pass: it takes half the time
PICTURES_AT_ONCE = 8


class Model:
    """A generator, its active edits, and what is kept about it.

    samples, seed: of the statistics and of the numbered pictures. activation_bytes, picture_bytes, key_bytes: the most
    that is kept of each.
    """

    def __init__(
        self,
        generator: Generator,
        samples: int,
        seed: int,
        cache_dir: object,
        *,
        activation_bytes: int = 512 << 20,
        picture_bytes: int = 256 << 20,
        key_bytes: int = 512 << 20,
    ) -> None:
        self.generator = generator
        self.samples, self.seed = samples, seed
        self.hash = generator.weights_hash()
        self._cache_dir = cache_dir
        self._edits: tuple[StackedEdit, ...] = ()
        self._statistics: dict[tuple[str, str], LayerStatistics] = {}
        self._rewriters: dict[tuple[str, str], Rewriter] = {}
        self._quick: dict[tuple[str, str], Rewriter] = {}  # with rough statistics
        self._quick_sums: dict[str, SecondMoment] = {}  # of those that are being collected
        self._activations: BoundedCache[Activation] = BoundedCache(activation_bytes)
        self._captured: tuple[object, Captured] | None = None
        self._pictures: BoundedCache[np.ndarray] = BoundedCache(picture_bytes)
        self._key_bytes = key_bytes
        self._keys: tuple[tuple[str, str], KeptKeys] | None = None  # of one layer
        self._order = {name: i for i, name in enumerate(generator.layers)}

    # -- weights -----------------------------------------------------------------------------------------------------

    def set_edits(self, edits: Sequence[StackedEdit]) -> None:
        """Make these the active edits: W0 + their sum, in their order. On an error the weights are as they were."""
        edits = tuple(edits)
        if [self._mark(e) for e in edits] != [self._mark(e) for e in self._edits]:
            self._write([e.effective for e in edits])
            self._edits = edits

    def _write(self, patches: Sequence[LowRankPatch]) -> None:
        # The hash of the original is known: without it every change would hash all weights again.
        self.generator.patches = self.generator.patches or PatchSet(self.hash)
        set_patches(self.generator, patches)

    @contextlib.contextmanager
    def with_edits(self, edits: Sequence[StackedEdit]) -> Iterator[None]:
        """These are the active edits as long as the block lasts; nothing may be answered in it."""
        before = self._edits
        self.set_edits(edits)
        try:
            yield
        finally:
            self.set_edits(before)

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """The generator without any edit, as long as the block lasts."""
        if not self._edits:
            yield
            return
        self._write([])
        try:
            yield
        finally:
            self._write([e.effective for e in self._edits])

    @staticmethod
    def _mark(edit: StackedEdit) -> tuple[str, float]:
        return edit.digest, edit.strength

    def weights(self, edits: Sequence[StackedEdit] | None = None, below: str | None = None, reach: int = 0) -> str:
        """A name for the weights with these edits (None: the active ones): the same edits, the same name.

        below: count only edits of layers before this one; reach=1: and of this one too.
        """
        digest = hashlib.sha256(self.hash.encode())
        limit = len(self._order) if below is None else self._order[below] + reach
        for edit in self._edits if edits is None else edits:
            if any(self._order[u.layer] < limit for u in edit.patch.updates):
                digest.update(repr(self._mark(edit)).encode())
        return digest.hexdigest()[:16]

    # -- statistics --------------------------------------------------------------------------------------------------

    def _statistics_key(self, layer: str) -> tuple[str, str]:
        return layer, self.weights(below=layer)

    def has_statistics(self, layer: str) -> bool:
        return self._statistics_key(layer) in self._statistics

    def collect(
        self, layer: str, progress: Callable[[int, int], None], quantiles: bool = False, batch: int = STATISTICS_BATCH
    ) -> None:
        """Collect the layer's statistics, or read them from the cache. What `progress` raises ends it without trace."""
        key = self._statistics_key(layer)
        known = self._statistics.get(key)
        if known is not None and (known.quantiles is not None or not quantiles):
            return
        kept = self._keeper(layer)
        self._statistics[key] = collect(
            self.generator, layer, samples=self.samples, seed=self.seed, cache_dir=self._cache_dir,
            batch_size=self._batch(layer, batch), quantiles=quantiles, progress=progress, keep=kept and kept.add,
        )  # fmt: skip
        self._rewriters.pop(key, None)
        self._keep(layer, kept)

    def scan(self, layer: str, direction: Tensor, progress: Callable[[int, int], None]) -> DirectionScan:
        """How a direction (I) fires on all pictures: from the layer's keys where they are kept, else in a pass that
        keeps them.
        """
        if self._keys is not None and self._keys[0] == self._statistics_key(layer):
            return self._keys[1].scan(direction, progress)
        kept = self._keeper(layer)
        found = scan_direction(
            self.generator, layer, direction, samples=self.samples, seed=self.seed,
            batch_size=self._batch(layer, JOB_BATCH), progress=progress, keep=kept and kept.add,
        )  # fmt: skip
        self._keep(layer, kept)
        return found

    def _batch(self, layer: str, most: int) -> int:
        fits = batch_size_by_memory(self.generator, layer)
        return min(most, fits) if self.generator.device.type == "cpu" else fits

    def _keeper(self, layer: str) -> KeptKeys | None:
        """None where the keys would take too much, and on a GPU, where a pass is quick."""
        takes = KeptKeys.bytes_of(self.generator.layers[layer], self.samples)
        if takes > self._key_bytes or self.generator.device.type != "cpu":
            return None
        self._keys = None  # before the next ones are made
        return KeptKeys()

    def _keep(self, layer: str, kept: KeptKeys | None) -> None:
        if kept is not None and kept.images == self.samples:
            self._keys = self._statistics_key(layer), kept

    def rewriter(self, layer: str) -> Rewriter:
        """The layer's Rewriter; its statistics must be there."""
        key = self._statistics_key(layer)
        if key not in self._rewriters:
            self._rewriters[key] = self._rewriter_of(layer, self._statistics[key])
        return self._rewriters[key]

    def quick_batches(self, samples: int) -> int:
        """How often `collect_quickly` has to be called before every layer has a `quick_rewriter`."""
        return 0 if not self._lacking_quick() else -(-min(samples, self.samples) // self._quick_batch())

    def collect_quickly(self, samples: int, batch: int) -> None:
        """One batch of images for rough statistics of all layers at once; batch: from 0 to `quick_batches` - 1."""
        lacking, size = self._lacking_quick(), self._quick_batch()
        if batch == 0:
            self._quick_sums = {
                layer: SecondMoment(self.generator.layers[layer].in_channels, device=self.generator.device)
                for layer in lacking
            }
        last = min(samples, self.samples)
        numbers = range(batch * size, min(last, (batch + 1) * size))
        with torch.no_grad():
            parts = self.generator.captures(self.generator.latents(numbers, self.seed))
            for layer, part in zip(self.generator.layers, parts, strict=True):
                if layer in self._quick_sums:
                    self._quick_sums[layer].add(part.key)
        if numbers.stop == last:
            for layer, moment in self._quick_sums.items():
                statistics = LayerStatistics(moment, None, last, self.seed, False, 0.0, size)
                self._quick[self._statistics_key(layer)] = self._rewriter_of(layer, statistics)
            self._quick_sums = {}

    def quick_rewriter(self, layer: str) -> Rewriter:
        """The layer's Rewriter, or one with the rough statistics that must be there then."""
        return self.rewriter(layer) if self.has_statistics(layer) else self._quick[self._statistics_key(layer)]

    def _lacking_quick(self) -> list[str]:
        layers = self.generator.layers
        return [n for n in layers if not self.has_statistics(n) and self._statistics_key(n) not in self._quick]

    def _quick_batch(self) -> int:
        return capture_batch(self.generator)  # each batch has a price of its own: two at once take twice as long

    def _rewriter_of(self, layer: str, statistics: LayerStatistics) -> Rewriter:
        return Rewriter(
            self.generator, layer, samples=self.samples, seed=self.seed, cache_dir=False, statistics=statistics,
            follow=False, warn=False,
        )  # fmt: skip

    # -- activations -------------------------------------------------------------------------------------------------

    def activations(self, layer: str, numbers: Sequence[int], latents: Mapping[int, Tensor]) -> list[Activation]:
        """Each picture's activation at a layer, a batch of one, for the weights as they are; kept for the next time."""
        weights = self.weights(below=layer, reach=1)
        key = lambda n: (layer, n, weights)  # noqa: E731
        found = {n: self._activations.get(key(n)) for n in numbers}
        missing = [n for n, a in found.items() if a is None]
        at_once = capture_batch(self.generator)
        for first in range(0, len(missing), at_once):
            batch = missing[first : first + at_once]
            rows = [
                row
                for part in activations(self.generator, layer, batch, self.seed, latents)
                for row in self.generator.rows_of(part)
            ]
            for number, row in zip(batch, rows, strict=True):
                found[number] = row
                size = 4 * (row.key.numel() + row.value.numel())
                self._activations.put(key(number), row, size)
        return [found[n] for n in numbers]

    def captured(self, layer: str, numbers: Sequence[int], latents: Mapping[int, Tensor]) -> Captured:
        """The pictures' activations joined, as a solve takes them; the last ones are kept for the next stroke."""
        distinct = list(dict.fromkeys(numbers))
        key = (layer, tuple(distinct), self.weights(below=layer, reach=1))
        if self._captured is None or self._captured[0] != key:
            self._captured = None  # before the next ones are made: they may be large
            self._captured = key, captured_from(layer, distinct, self.activations(layer, distinct, latents))
        return self._captured[1]

    def every_layer(
        self, numbers: Sequence[int], latents: Mapping[int, Tensor]
    ) -> Iterator[tuple[str, dict[int, Activation]]]:
        """For each layer the activations of the pictures by number, each a batch of one. The pictures run once.

        What is edited while this waits has to be as before when it goes on.
        """
        g = self.generator
        numbered = [n for n in dict.fromkeys(numbers) if n not in latents]
        brought = [n for n in dict.fromkeys(numbers) if n in latents]
        runs = [g.captures(g.latents(numbered, self.seed))] if numbered else []
        runs += [g.captures_w(latents[n][None]) for n in brought]
        for layer in g.layers:
            with torch.no_grad():
                rows = [row for run in runs for row in g.rows_of(next(run))]
            yield layer, dict(zip([*numbered, *brought], rows, strict=True))

    # -- pictures ----------------------------------------------------------------------------------------------------

    def pictures(
        self, numbers: Sequence[int], latents: Mapping[int, Tensor], original: bool = False
    ) -> list[np.ndarray]:
        """H x W x 3 uint8 each, of the original weights or the active edits; kept for the next time."""
        weights = self.weights([] if original else None)
        missing = [n for n in dict.fromkeys(numbers) if (weights, n) not in self._pictures]
        found = {n: self._pictures.get((weights, n)) for n in numbers}
        if missing:
            with self.original() if original else contextlib.nullcontext():
                for first in range(0, len(missing), PICTURES_AT_ONCE):
                    batch = missing[first : first + PICTURES_AT_ONCE]
                    for number, pixels in zip(batch, self._rendered(batch, latents), strict=True):
                        found[number] = pixels
                        self._pictures.put((weights, number), pixels, pixels.nbytes)
        return [found[n] for n in numbers]

    def has_pictures(self, numbers: Sequence[int], original: bool = False) -> bool:
        weights = self.weights([] if original else None)
        return all((weights, n) in self._pictures for n in numbers)

    @torch.no_grad()
    def _rendered(self, numbers: Sequence[int], latents: Mapping[int, Tensor]) -> list[np.ndarray]:
        numbered = [n for n in numbers if n not in latents]
        pixels: dict[int, np.ndarray] = {}
        if numbered:
            pixels.update(zip(numbered, to_pixels(self.generator.images(numbered, self.seed)), strict=True))
        for number in numbers:
            if number in latents:
                pixels[number] = to_pixels(self.generator.synthesis(latents[number][None]))[0]
        return [pixels[n] for n in numbers]

    @torch.no_grad()
    def rendered_with(self, update: LayerUpdate, rows: Sequence[Activation]) -> list[np.ndarray]:
        """The pictures of activations of update's layer as they would be with that change on top of the active edits.

        The weights hold it only in here.
        """
        g = self.generator
        weight = g.layers[update.layer].weight
        kept = weight.detach().clone()
        activation = g.joined(rows)
        try:
            weight.copy_((kept.double() + update.delta().view(kept.shape).to(kept.device)).to(kept.dtype))
            value = g.value(update.layer, activation)
        finally:
            weight.copy_(kept)
        return to_pixels(g.finish(update.layer, activation, value))
