"""The Rewriter: one layer of a generator as an associative memory, with its statistics, searches and solvers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..edit import Edit, Selection, Settings
from ..errors import EditError
from ..generators import Activation, Generator
from ..ops import demodulation, insert_low_rank, insert_projected, solve_low_rank
from ..statistics import LayerStatistics, SecondMoment, collect, top_images
from .keys import context_directions, joined_directions, protected_subspace, unusual_units
from .patch import LayerUpdate, LowRankPatch
from .report import CHANGED, Clock, Report
from .selection import Box, bounding_box, edit_islands, mask_on_map
from .targets import (
    Captured,
    Placed,
    activations,
    capture,
    capture_batch,
    captured_from,
    context_examples,
    cut_object,
    make_target,
    paste_target,
    paste_values,
    share_clamped,
    value_of,
)

Progress = Callable[[int, float], None]


class Rewriter:
    """Solves edits of one layer of a generator (paper, section 3).

    generator: its weights as they are now are what an edit starts from; patches that are active stay active.
    layer: a name out of `generator.layers`. samples, seed: images 0 to samples - 1 of that seed make the statistics;
    the seed also says which image a number in a record means. cache_dir: folder of the statistics cache (None: the
    user's cache folder, False: none). progress: of the statistics, True for a bar on stderr, False for none, or a
    function of (images done, images in all). statistics: ready ones instead of collecting them. follow: collect anew
    when the keys change with the weights; False keeps what is there. warn: reports warn (EditWarning) beside saying so.

    Raises UnknownLayerError for a layer that is not there.
    """

    def __init__(
        self,
        generator: Generator,
        layer: str,
        *,
        samples: int = 1000,
        seed: int = 1,
        cache_dir: str | Path | bool | None = None,
        progress: Callable[[int, int], None] | bool = True,
        statistics: LayerStatistics | None = None,
        follow: bool = True,
        warn: bool = True,
    ) -> None:
        self.generator = generator
        self.layer = generator.find_layer(layer).name
        self.samples = samples
        self.seed = seed
        self.cache_dir = cache_dir
        self.warn = warn
        self._progress = progress
        self._follow = follow
        self._statistics = statistics or self._collect()
        self._keys_hash = self._hash_of_keys() if follow else None

    # -- statistics --------------------------------------------------------------------------------------------------

    def _collect(self, quantiles: bool = False) -> LayerStatistics:
        return collect(
            self.generator,
            self.layer,
            samples=self.samples,
            seed=self.seed,
            cache_dir=self.cache_dir,
            quantiles=quantiles,
            progress=self._progress,
        )

    def _hash_of_keys(self) -> tuple[str, float, dict]:
        """What the keys depend on. Patches of this layer and of later ones do not reach its keys."""
        order = list(self.generator.layers)
        patches = self.generator.patches
        active = patches.active if patches else []
        if all(order.index(u.layer) >= order.index(self.layer) for p in active for u in p.updates):
            weights = patches.original_hash if patches else self.generator.weights_hash()
        else:
            weights = self.generator.weights_hash()
        return weights, self.generator.truncation, self.generator.settings()

    @property
    def statistics(self) -> LayerStatistics:
        """The layer's statistics for the generator as it is now; collected again when its keys have changed."""
        if not self._follow:
            return self._statistics
        now = self._hash_of_keys()
        if now != self._keys_hash:
            self._statistics = self._collect()
            self._keys_hash = now
        return self._statistics

    @property
    def moment(self) -> SecondMoment:
        """Second moment C of the keys: .count, .matrix (float64 I x I), .whitener(shrinkage=...)."""
        return self.statistics.moment

    def _quantiles(self):
        if self.statistics.quantiles is None:
            self._statistics = self._collect(quantiles=True)
        return self._statistics.quantiles

    # -- edits -------------------------------------------------------------------------------------------------------

    def directions(self, edit: Edit, settings: Settings | None = None, captured: Captured | None = None) -> Tensor:
        """The edit's context as directions D, r x I float32. captured: its images, where they are at hand."""
        settings = settings or edit.resolve()
        context = self._context(edit)
        captured = captured or self.capture([s.image for s in [*context, *edit.protect]], edit.latents)
        return self._directions(captured, context, settings, edit.protect)

    def solve(
        self,
        edit: Edit | Sequence[Edit],
        preset: str | None = None,
        *,
        progress: Progress | None = None,
        impl: str | None = None,
        captured: Captured | None = None,
        **overrides,
    ) -> LowRankPatch:
        """Solve an edit, or several together, and return it as a patch; the generator is left as it was.

        preset: "official" for the published behaviour. overrides: settings such as rank=30 or method="least_squares"
        (see Settings). Several edits share one solution: their directions are joined and every target counts.
        progress: called with (steps done, loss), and with (0, nan) and (all steps, nan) between batches of images while
        they are captured and measured; whatever it raises ends the solve. impl: of the insertion op.
        captured: the images that `images_of` names, where they are at hand.

        The patch's `.report` says what the edit leaves in the generator; EditWarning where it did not take.
        Raises EditError for a record that cannot be solved, NonFiniteError for NaN or infinity in the activations.
        """
        edits = [edit] if isinstance(edit, Edit) else list(edit)
        if not edits:
            raise EditError("no edit to solve: expected an Edit or a list of them")
        settings = self._settings(edits[0], preset, overrides)
        clock = Clock()
        wanted = [n for e in edits for n in _numbers(e, settings)]
        latents = {n: w for e in edits for n, w in e.latents.items()}
        captured = captured or self._capture(wanted, latents, progress)
        clock.lap("capture")
        direction = joined_directions(
            [self._directions(captured, self._context(e), settings, e.protect) for e in edits]
        )  # r x I
        clock.lap("directions")
        targets = [target for e in edits for target in self._targets(captured, e, settings)]
        patch = self._insert(targets, captured, direction, settings, clock, progress, impl, edits)
        patch.name = " + ".join(e.name or "edit" for e in edits)
        for e in edits:
            patch.report.islands.update(edit_islands(e))
        return self._judged(patch, edits)

    def erase(
        self,
        edit: Edit,
        units: int = 30,
        preset: str | None = None,
        *,
        progress: Progress | None = None,
        impl: str | None = None,
        **overrides,
    ) -> LowRankPatch:
        """Solve a removal: the goal is what the layer gives with the context's most typical `units` silenced.

        Units are chosen by k^2 / E[k^2] over the context's masks. preset="official" takes the whole image of the
        record's paste as key and goal; otherwise every context image is a target, inside the box of its mask, and a
        record without a paste is enough. See `zero` for the closed form.
        Raises EditError when none of the chosen units is more active under the masks than elsewhere.
        """
        settings = self._settings(edit, preset, overrides)
        if units < 1:
            raise EditError(f"units is {units}; expected a whole number of at least 1")
        clock = Clock()
        context = self._context(edit)
        whole = settings.crop == "alone"
        if settings.targets == "paste" and edit.paste is None:
            raise EditError("field 'paste' is missing: with targets='paste' an erase needs the image it names")
        chosen = [edit.paste] if settings.targets == "paste" else context
        captured = self._capture([s.image for s in [*context, *chosen, *edit.protect]], edit.latents, progress)
        examples = context_examples(captured, context, self._image_size)
        silenced, scores = unusual_units(self.moment, examples, units)
        if float(scores.max()) <= 1:
            raise EditError(
                "no unit is more active under the masks than it is on average: there is nothing to erase there"
            )
        clock.lap("capture")
        direction = self._directions(captured, context, settings, edit.protect)
        conv = self.generator.conv_layer(self.layer)
        targets = []
        for selection in chosen:
            row = captured.index[selection.image]
            key = captured.key[row].clone()  # I x h x w
            key[silenced] = 0  # units silenced everywhere, as published
            goal = value_of(conv, captured, row, key)  # O x H x W
            size = captured.value_size
            box = Box(0, 0, *size)
            if not whole:
                what = "context mask"
                area = mask_on_map(selection.mask, size, self._image_size, what, captured.margin)
                box = bounding_box(area, what)
            targets.append(make_target(conv, captured, selection.image, goal, box))
        patch = self._insert(targets, captured, direction, settings, clock, progress, impl, [edit])
        patch.name = edit.name
        patch.settings["units"] = units
        return self._judged(patch, [edit])

    def zero(self, edit: Edit, *, progress: Progress | None = None, **overrides) -> LowRankPatch:
        """The closed form of a removal: Delta W = -P_D W, the layer no longer answers to the context's directions.

        progress: as in `solve`.
        """
        settings = self._settings(edit, None, overrides)
        clock = Clock()
        context = self._context(edit)
        captured = self._capture([s.image for s in [*context, *edit.protect]], edit.latents, progress)
        direction = self._directions(captured, context, settings, edit.protect)  # r x I
        weight = self.generator.conv_layer(self.layer).weight.detach()  # O x I x kh x kw
        lambda_ = -torch.einsum("oiyx,di->odyx", weight.double(), direction.double())  # O x r x kh x kw
        relative = float(lambda_.norm() / weight.norm())
        patch = self._patch(direction, lambda_.float(), settings)
        patch.name = edit.name
        patch.report = Report(
            layer=self.layer, method="zero", rank=len(direction), steps=0, loss_before=0.0, loss_after=0.0,
            loss_shown=None, context_changed=1.0, relative_size=relative, targets=[], seconds=clock.seconds,
        )  # fmt: skip
        return self._judged(patch, [edit])

    def search(self, edit: Edit, k: int = 12, samples: int | None = None) -> list[tuple[int, float]]:
        """The k images whose keys answer most to the edit's context: (image number, score), best first.

        Score: the largest d . k over the image's pixels, with d the rank-1 direction of the context.
        """
        direction = self.directions(edit, edit.resolve(rank=1, key_method="zca"))[0]  # I
        return top_images(self.generator, self.layer, direction, samples=samples or self.samples, seed=self.seed, k=k)

    def activations(self, numbers: Iterable[int], latents: Mapping[int, Tensor] | None = None) -> list[Activation]:
        """Keys and values of numbered images at the layer, in batches, for `pasted` and `rendered`: what comes before
        the layer runs once for all of them. latents: see `Edit.latents`.
        """
        return activations(self.generator, self.layer, numbers, self.seed, latents)

    def capture(self, numbers: Iterable[int], latents: Mapping[int, Tensor] | None = None) -> Captured:
        """Keys and values of numbered images at the layer, each image once, as `closed_form` takes them."""
        return capture(self.generator, self.layer, numbers, self.seed, latents)

    def closed_form(
        self, edit: Edit, captured: Captured, settings: Settings | None = None, direction: Tensor | None = None
    ) -> LowRankPatch:
        """The edit solved by least squares from images that are at hand: a patch without a report, in milliseconds.

        captured: of all the images that `images_of` names. direction: what `directions` gives, where it is at hand.
        The generator is not touched. Raises EditError as `solve` does.
        """
        settings = settings or self._settings(edit, None, {})
        if direction is None:
            direction = self.directions(edit, settings, captured)  # r x I
        targets = [p.target for p in self._targets(captured, edit, settings)]
        penalty = self._penalty(direction, settings.preserve)
        conv = self.generator.conv_layer(self.layer)
        lambda_ = solve_low_rank(conv, direction, targets, penalty=penalty)
        return LowRankPatch([LayerUpdate(self.layer, direction.cpu(), lambda_.float().cpu())], name=edit.name)

    def images_of(self, edit: Edit, settings: Settings | None = None) -> list[int]:
        """The numbers of the images that solving the edit looks at, each once."""
        return list(dict.fromkeys(_numbers(edit, settings or edit.resolve())))

    @torch.no_grad()
    def rendered(self, activations: Iterable[Activation], patch: LowRankPatch) -> Tensor:
        """The images of `activations` as a patch of this layer makes them, B x 3 x H x W; the generator is left as it
        was. ValueError for a patch that changes another layer.
        """
        if {update.layer for update in patch.updates} != {self.layer}:
            names = ", ".join(sorted({update.layer for update in patch.updates}))
            raise ValueError(f"the patch changes {names}; expected one of {self.layer}")
        g = self.generator
        with patch.applied(g):
            images = [g.finish(self.layer, a, g.value(self.layer, a)) for a in activations]
        return torch.cat(images) if images else self._no_images()

    @torch.no_grad()
    def pasted(
        self, edit: Edit, numbers: Iterable[int] | Sequence[Activation], mask: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """The numbered images with the object pasted into their values, before any rule is changed.

        numbers: image numbers, or their `activations`. mask: where, a data URL (default: the paste's mask, or the
        first context mask). Returns images B x 3 x H x W and the object's alpha on the image, H x W in [0, 1].
        """
        where = mask or (edit.paste or self._context(edit)[0]).mask
        given = list(numbers)
        batches = given if given and isinstance(given[0], Activation) else self.activations(given, edit.latents)
        source = self.capture([_required(edit.object, "object").image], edit.latents)
        thing = cut_object(source, edit.object, self._image_size)
        images = []
        alpha = torch.zeros(source.value_size)  # H x W of the value map
        for activation in batches:
            value = activation.value.clone()  # B x O x H x W
            for i in range(len(value)):
                value[i], box = paste_values(value[i], thing, Selection(0, where), self._image_size, "paste mask")
            images.append(self.generator.finish(self.layer, activation, value))
        if images:
            alpha[box.slices()] = thing.alpha.cpu()
        rows, columns = (slice(thing.margin, n - thing.margin) for n in source.value_size)  # what the picture shows
        shown = torch.nn.functional.interpolate(
            alpha[None, None, rows, columns], self._image_size, mode="bilinear", align_corners=False
        )
        return torch.cat(images) if images else self._no_images(), shown[0, 0]

    # -- parts -------------------------------------------------------------------------------------------------------

    def _capture(
        self,
        numbers: Iterable[int],
        latents: Mapping[int, Tensor],
        progress: Progress | None,
        done: int = 0,
        patch: LowRankPatch | None = None,
    ) -> Captured:
        """`capture` with a call of progress(done, nan) after each batch, when the generator is as it was.

        patch: in the weights while a batch runs, and off again before that call.
        """
        distinct = list(dict.fromkeys(numbers))
        parts, at_once = [], capture_batch(self.generator)
        for first in range(0, len(distinct), at_once):
            with patch.applied(self.generator) if patch else contextlib.nullcontext():
                parts += self.activations(distinct[first : first + at_once], latents)
            if progress:
                progress(done, math.nan)
        return captured_from(self.layer, distinct, parts)

    def _no_images(self) -> Tensor:
        g = self.generator
        return torch.empty(0, g.image_channels, *self._image_size, dtype=g.dtype, device=g.device)

    @property
    def _image_size(self) -> tuple[int, int]:
        return self.generator.image_size, self.generator.image_size

    def _settings(self, edit: Edit, preset: str | None, overrides: dict) -> Settings:
        for name in ("samples", "seed", "truncation"):
            if name in overrides:
                raise EditError(f"{name} belongs to the Rewriter and its generator, not to one solve")
        truncation = edit.settings.get("truncation")
        if truncation is not None and truncation != self.generator.truncation:
            raise EditError(
                f"setting 'truncation': the record's masks were painted at {truncation}, the generator is at "
                f"{self.generator.truncation}: load it with the record's truncation"
            )
        seed = edit.settings.get("seed")
        if seed is not None and seed != self.seed:
            raise EditError(
                f"setting 'seed': the record's image numbers belong to seed {seed}, the Rewriter's is {self.seed}"
            )
        if edit.images is not None and not self.generator.has_settings(edit.images):
            here = self.generator.settings()
            said, is_ = (", ".join(f"{n} {v}" for n, v in what.items()) or "defaults" for what in (edit.images, here))
            raise EditError(
                f"field 'images': the record's pictures were made with {said}, the generator is set to {is_}: "
                "generator.apply_settings(edit.images) follows the record"
            )
        settings = edit.resolve(preset, **overrides)
        if settings.method == "projected" and settings.preserve > 0:
            given = overrides.get("preserve") or (edit.settings.get("preserve") if preset is None else None)
            if given:
                raise EditError("setting 'preserve' works with low_rank and least_squares, not with projected")
            settings = settings.replace(preserve=0.0)
        return settings.replace(samples=self.samples, seed=self.seed, truncation=self.generator.truncation)

    def _context(self, edit: Edit) -> list[Selection]:
        context = edit.context or ([edit.paste] if edit.paste else [])
        if not context:
            raise EditError("fields 'key' and 'paste' are both missing: expected a context")
        return context

    def _directions(
        self, captured: Captured, context: list[Selection], settings: Settings, protect: Sequence[Selection] = ()
    ) -> Tensor:
        return context_directions(
            self.moment,
            context_examples(captured, context, self._image_size),
            rank=settings.rank,
            method=settings.key_method,
            shrinkage=settings.shrinkage,
            quantiles=self._quantiles() if settings.key_method == "gandissect" else None,
            protect=self._protected(captured, protect, settings)[0] if protect else None,
        )

    def _protected(self, captured: Captured, protect: Sequence[Selection], settings: Settings) -> tuple[Tensor, float]:
        """The protected subspace, m x I, and the part of the protected keys that it leaves out."""
        examples = context_examples(captured, protect, self._image_size, "protect mask")
        return protected_subspace(self.moment, examples, rank=settings.protect_rank, shrinkage=settings.shrinkage)

    def _targets(self, captured: Captured, edit: Edit, settings: Settings) -> list[Placed]:
        conv = self.generator.conv_layer(self.layer)
        thing = cut_object(captured, _required(edit.object, "object"), self._image_size)
        return [
            paste_target(
                conv,
                captured,
                selection,
                thing,
                self._image_size,
                weighting=settings.weighting,
                margin=settings.margin,
                surroundings=settings.crop == "surroundings",
                what=what,
                shift=edit.places.get(selection.image),
            )
            for what, selection in _places(edit, settings)
        ]

    def _penalty(self, direction: Tensor, preserve: float) -> tuple[Tensor, Tensor] | None:
        """(q: O, P: r x r): q_o <Lambda_o, P Lambda_o> is mu times the expected squared change over all keys."""
        if preserve == 0:
            return None
        conv = self.generator.conv_layer(self.layer)
        matrix = self.moment.matrix.to(direction.device)  # I x I float64
        p = direction.double() @ matrix @ direction.double().t()  # r x r
        q = torch.full((conv.weight.shape[0],), conv.scale**2, dtype=torch.float64, device=direction.device)  # O
        if conv.demodulate:
            style = self.generator.mean_style(self.layer).double()  # I
            q = q * demodulation(conv, conv.weight.detach().double(), style).square()
        return (preserve * q).float(), p.float()

    def _loop_penalty(self, penalty: tuple[Tensor, Tensor] | None, captured: Captured) -> tuple[Tensor, Tensor] | None:
        """The penalty of the loop, whose loss is linear in the values while the penalty is quadratic in them.

        Demodulation makes values of about 1; elsewhere the change is measured in units of the values' root mean square,
        so that one `preserve` means the same for every layer and family.
        """
        if penalty is None or self.generator.conv_layer(self.layer).demodulate:
            return penalty
        unit = captured.value.square().mean().sqrt()
        return penalty[0] / unit, penalty[1]

    def _insert(
        self,
        placed: list[Placed],
        captured: Captured,
        direction: Tensor,
        settings: Settings,
        clock: Clock,
        progress: Progress | None,
        impl: str | None,
        edits: Sequence[Edit],
    ) -> LowRankPatch:
        conv = self.generator.conv_layer(self.layer)
        targets = [p.target for p in placed]
        penalty = self._penalty(direction, settings.preserve)
        loop = {"steps": settings.steps, "lr": settings.lr, "callback": progress}
        shown = None
        with torch.no_grad():
            if settings.method == "least_squares":
                lambda_ = solve_low_rank(conv, direction, targets, penalty=penalty)
            elif settings.method == "low_rank":
                init = solve_low_rank(conv, direction, targets, penalty=penalty) if settings.warm_start else None
                clock.lap("closed form")
                penalty = self._loop_penalty(penalty, captured)
                result = insert_low_rank(conv, direction, targets, penalty=penalty, init=init, impl=impl, **loop)
                lambda_, shown = result.lambda_, float(result.losses[-1])
            else:
                result = insert_projected(conv, direction, targets, project_every=settings.project_every, **loop)
                lambda_, shown = result.lambda_, float(result.losses[-1])
        clock.lap("solve")
        patch = self._patch(direction, lambda_, settings)
        patch.report = self._measure(patch, placed, captured, settings, shown, edits, progress)
        clock.lap("report")
        patch.report.seconds = clock.seconds
        return patch

    def _patch(self, direction: Tensor, lambda_: Tensor, settings: Settings) -> LowRankPatch:
        patches = self.generator.patches
        return LowRankPatch(
            [LayerUpdate(self.layer, direction.cpu(), lambda_.detach().float().cpu())],
            generator={
                "family": self.generator.family,
                "hash": patches.original_hash if patches else self.generator.weights_hash(),
            },
            settings={name: getattr(settings, name) for name in settings.__dataclass_fields__}
            | self.generator.settings(),
        )

    def _judged(self, patch: LowRankPatch, edits: Sequence[Edit]) -> LowRankPatch:
        """The report's warnings, with one where the record's image numbers mean pictures of another generator."""
        here = patch.generator["hash"]
        for e in edits:
            if (made_for := (e.generator or {}).get("hash", here)) != here:
                patch.report.warnings.append(
                    f"{e.name or 'the record'} was made on another generator ({made_for[:12]}..., not {here[:12]}...): "
                    "its numbers are other pictures here"
                )
        patch.report.judge(warn=self.warn)
        return patch

    def _measure(
        self,
        patch: LowRankPatch,
        placed: list[Placed],
        captured: Captured,
        settings: Settings,
        shown: float | None,
        edits: Sequence[Edit],
        progress: Progress | None,
    ) -> Report:
        """Apply the patch, run the target images through the generator again, compare with the goals, take it off."""
        latents = {n: w for e in edits for n, w in e.latents.items()}
        after = self._capture(captured.index, latents, progress, settings.steps, patch)
        losses = []
        for target in placed:
            row = captured.index[target.image]
            before, now = (target.loss(c.value[row]) for c in (captured, after))
            losses.append({"image": target.image, "before": before, "after": now})
        mean = lambda name: sum(t[name] for t in losses) / len(losses)  # noqa: E731
        weight = self.generator.conv_layer(self.layer).weight
        return Report(
            layer=self.layer,
            method=settings.method,
            rank=patch.updates[0].rank,
            steps=0 if settings.method == "least_squares" else settings.steps,
            loss_before=mean("before"),
            loss_after=mean("after"),
            loss_shown=shown,
            context_changed=sum(t["after"] <= (1 - CHANGED) * t["before"] for t in losses) / len(losses),
            relative_size=float(patch.updates[0].delta().norm() / weight.detach().double().norm()),
            targets=losses,
            protected=self._protection(edits, captured, after, settings),
            clamped=share_clamped(placed, after, self.generator.value_bound(self.layer)),
        )

    def _protection(
        self, edits: Sequence[Edit], before: Captured, after: Captured, settings: Settings
    ) -> dict[str, float] | None:
        """What became of the protected pixels; None where nothing is protected."""
        regions = [s for e in edits for s in e.protect]
        if not regions:
            return None
        parts = [self._protected(before, e.protect, settings) for e in edits if e.protect]
        change = size = 0.0
        for selection in regions:
            what = "protect mask"
            area = mask_on_map(selection.mask, before.value_size, self._image_size, what, before.margin)  # H x W
            row, area = before.index[selection.image], area.to(before.value.device)
            change += float(((after.value[row] - before.value[row]).abs().mean(0) * area).sum())
            size += float((before.value[row].abs().mean(0) * area).sum())
        return {
            "dimensions": sum(len(u) for u, _ in parts),
            "left_out": max(left_out for _, left_out in parts),
            "change": change / size if size > 0 else 0.0,
        }


def _required(selection: Selection | None, field: str) -> Selection:
    if selection is None:
        raise EditError(f"field {field!r} is missing: this record can be erased or zeroed, not inserted")
    return selection


def _places(edit: Edit, settings: Settings) -> list[tuple[str, Selection]]:
    """Where the object goes: the paste, and with targets='context' every other context image too."""
    places = [("paste mask", edit.paste)] if edit.paste else []
    if settings.targets == "paste":
        _required(edit.paste, "paste")
        return places
    seen = {edit.paste.image} if edit.paste else set()
    places += [(f"context mask {i}", s) for i, s in enumerate(edit.context) if s.image not in seen]
    left_out = {n for n, place in edit.places.items() if not place.on}
    if places and all(s.image in left_out for _, s in places):
        raise EditError("every place is switched off: expected at least one picture to paste the object into")
    places = [(what, s) for what, s in places if s.image not in left_out]
    if not places:
        raise EditError("fields 'paste' and 'key' are both missing: expected where to paste the object")
    return places


def _numbers(edit: Edit, settings: Settings) -> list[int]:
    _required(edit.object, "object")
    selections = [edit.object, *(s for _, s in _places(edit, settings)), *edit.context]
    return [s.image for s in [*selections, *edit.protect]]
