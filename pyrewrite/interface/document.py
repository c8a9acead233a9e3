"""What the user has made: one immutable document. Undo and redo are lists of documents, and nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..edit import SETTING_NAMES, Edit, Place, Selection, Settings
from ..errors import EditError
from ..generators.base import MAX_NUMBER
from ..rewriting import LowRankPatch, decode_mask, encode_mask
from ..rewriting.selection import islands


@dataclass(frozen=True)
class Mask:
    """A painted region at the picture's own size: `bits` is numpy.packbits of size x size pixels, row by row.

    given: the data URL of a record, where it says more than the bits (soft edges, another size). It is what is solved
    with and saved; the bits are what is shown.
    """

    size: int
    bits: bytes
    given: str | None = None

    def __post_init__(self) -> None:
        expected = -(-self.size * self.size // 8)
        if len(self.bits) != expected:
            raise EditError(
                f"mask: {len(self.bits)} bytes; expected {expected}, a bit for each of {self.size} x {self.size} pixels"
            )
        spare = expected * 8 - self.size * self.size  # bits behind the last pixel: two equal masks have equal bytes
        if spare and self.bits[-1] & ((1 << spare) - 1):
            object.__setattr__(self, "bits", self.bits[:-1] + bytes([self.bits[-1] >> spare << spare]))

    @classmethod
    def of(cls, area: np.ndarray | Tensor) -> Mask:
        """From size x size values, painted where they are not zero."""
        area = np.asarray(area) != 0
        return cls(area.shape[0], np.packbits(area).tobytes())

    @classmethod
    def from_url(cls, url: str, size: int, what: str = "mask") -> Mask:
        """From the data URL of an edit record, whatever size it was painted at, which is kept as it is.

        Shown are pixels that are half covered, or where there are none, all that are covered at all.
        """
        image = decode_mask(url, what)
        if image.width != image.height:
            raise EditError(f"{what}: the mask is {image.width} x {image.height} pixels; expected a square one")
        values = np.asarray(image.resize((size, size), resample=Image.Resampling.BILINEAR))
        area = values >= 128
        hard = image.width == size and np.isin(values, (0, 255)).all()
        mask = cls.of(area if area.any() else values > 0)
        return mask if hard else cls(size, mask.bits, url)

    @functools.cached_property
    def area(self) -> np.ndarray:
        """size x size bool, read-only."""
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.size * self.size)
        area = flat.reshape(self.size, self.size).astype(bool)
        area.flags.writeable = False
        return area

    @functools.cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.bits + (self.given or "").encode()).hexdigest()[:16]

    @functools.cached_property
    def url(self) -> str:
        return self.given or encode_mask(self.area)

    @functools.cached_property
    def pixels(self) -> int:
        return int(self.area.sum())

    @functools.cached_property
    def islands(self) -> tuple[int, ...]:
        """The sizes of the separate regions, largest first."""
        return tuple(islands(torch.from_numpy(self.area.astype(np.uint8))))

    @functools.cached_property
    def box(self) -> tuple[int, int, int, int] | None:
        """Top, left, bottom, right (half-open) of what is painted; None for an empty mask."""
        rows, columns = np.flatnonzero(self.area.any(1)), np.flatnonzero(self.area.any(0))
        if len(rows) == 0:
            return None
        return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def described(mask: Mask) -> dict[str, Any]:
    """What a reply says of a mask. hash: None for an empty one, which is kept nowhere."""
    return {"hash": mask.hash if mask.pixels else None, "pixels": mask.pixels, "islands": list(mask.islands)}


@dataclass(frozen=True)
class Region:
    """A mask on a numbered picture."""

    image: int
    mask: Mask

    def selection(self) -> Selection:
        return Selection(self.image, self.mask.url)


@dataclass(frozen=True)
class StackedEdit:
    """One change on the stack: a patch, how strong it is, whether it is on. report: JSON-ready, or None."""

    id: int
    name: str
    patch: LowRankPatch
    on: bool = True
    strength: float = 1.0
    report: Mapping[str, Any] | None = None
    record: Mapping[str, Any] | None = None

    @functools.cached_property
    def digest(self) -> str:
        return self.patch.digest

    @property
    def active(self) -> bool:
        return self.on and self.strength != 0

    @functools.cached_property
    def effective(self) -> LowRankPatch:
        return self.patch if self.strength == 1 else self.patch.scaled(self.strength)


@dataclass(frozen=True)
class Brought:
    """A picture that was brought as w, w_dim or num_ws x w_dim; `digest` says which."""

    name: str
    digest: str
    w: Tensor = field(compare=False, repr=False)

    @classmethod
    def of(cls, name: str, w: Tensor) -> Brought:
        w = w.detach().float().cpu().contiguous()
        return cls(name, hashlib.sha256(repr(tuple(w.shape)).encode() + w.numpy().tobytes()).hexdigest(), w)

    @property
    def number(self) -> int:
        """Its image number, beyond those of the generator's own and made of what it is: it never changes."""
        return MAX_NUMBER + 1 + int(self.digest[:7], 16)


NO_PLACES: Mapping[int, Place] = MappingProxyType({})
NOTHING_BROUGHT: Mapping[int, Brought] = MappingProxyType({})


@dataclass(frozen=True)
class Document:
    """All that undo and redo cover.

    strip: the text of the picture strip, numbers: what it means. painted: the mask that is being painted. query: for
    matches instead of the context. places: picture number -> how the object lands there. brought: pictures that were
    brought as w, by number. units, quantile: of erase and of matches.
    """

    layer: str
    settings: Settings
    strip: str = ""
    numbers: tuple[int, ...] = ()
    painted: Region | None = None
    object: Region | None = None
    paste: Region | None = None
    context: tuple[Region, ...] = ()
    protect: tuple[Region, ...] = ()
    query: Region | None = None
    places: Mapping[int, Place] = field(default_factory=lambda: NO_PLACES)
    brought: Mapping[int, Brought] = field(default_factory=lambda: NOTHING_BROUGHT)
    edits: tuple[StackedEdit, ...] = ()
    strength: float = 1.0
    units: int = 30
    quantile: float = 0.999
    matches: bool = False

    def replace(self, **changes: Any) -> Document:
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def latents(self) -> dict[int, Tensor]:
        """Image number -> w of the brought pictures."""
        return {n: b.w for n, b in self.brought.items()}

    def with_context(self, region: Region) -> Document:
        """The region among the context; a second one of the same picture replaces the first, in its place."""
        return self.replace(context=_with(self.context, region))

    def with_protect(self, region: Region) -> Document:
        return self.replace(protect=_with(self.protect, region))

    def with_place(self, image: int, **changes: Any) -> Document:
        place = dataclasses.replace(self.places.get(image, Place()), **changes)
        places = {**self.places, image: place}
        if place == Place():
            del places[image]
        return self.replace(places=MappingProxyType(places))

    def with_edit(self, id: int, **changes: Any) -> Document:
        """One edit of the stack changed."""
        return self.replace(edits=tuple(dataclasses.replace(e, **changes) if e.id == id else e for e in self.edits))

    def tidied(self) -> Document:
        """Without places of pictures that are no longer pasted into."""
        used = {r.image for r in self.context} | ({self.paste.image} if self.paste else set())
        if self.places.keys() <= used:
            return self
        return self.replace(places=MappingProxyType({n: p for n, p in self.places.items() if n in used}))

    @property
    def active(self) -> tuple[StackedEdit, ...]:
        return tuple(e for e in self.edits if e.active)

    def record(
        self,
        name: str | None = None,
        generator: dict[str, str] | None = None,
        images: dict[str, Any] | None = None,
    ) -> Edit:
        """The edit record of the current selections: what is solved is what is saved. images: see Edit."""
        used = {r.image for r in (self.object, self.paste, self.query, *self.context, *self.protect) if r is not None}
        return Edit(
            object=self.object.selection() if self.object else None,
            paste=self.paste.selection() if self.paste else None,
            context=[r.selection() for r in self.context],
            query=self.query.selection() if self.query else None,
            name=name,
            layer=self.layer,
            settings={n: getattr(self.settings, n) for n in SETTING_NAMES},
            generator=generator,
            protect=[r.selection() for r in self.protect],
            places=dict(self.places),
            latents={n: w for n, w in self.latents.items() if n in used},
            images=images,
        )

    def from_record(self, edit: Edit, size: int) -> Document:
        """This document with the selections and settings of a record; the stack, the strip and the strength stay."""

        brought = {n: Brought.of(f"w {n}", w) for n, w in edit.latents.items()}
        renumbered = {n: b.number for n, b in brought.items()}

        def region(selection: Selection | None, what: str) -> Region | None:
            if selection is None:
                return None
            mask = Mask.from_url(selection.mask, size, what)
            if mask.box is None:
                raise EditError(f"{what} is empty: expected painted pixels")
            return Region(renumbered.get(selection.image, selection.image), mask)

        settings = Settings().replace(**edit.settings)
        loaded = self.replace(
            layer=edit.layer or self.layer,
            settings=settings.replace(**{n: getattr(self.settings, n) for n in ("samples", "seed", "truncation")}),
            painted=None,
            object=region(edit.object, "object mask"),
            paste=region(edit.paste, "paste mask"),
            context=(),
            protect=tuple(region(s, f"protect mask {i}") for i, s in enumerate(edit.protect)),
            query=region(edit.query, "query mask"),
            places=MappingProxyType({renumbered.get(n, n): p for n, p in edit.places.items()}),
            brought=MappingProxyType({**{b.number: b for b in brought.values()}, **self.brought}),
        )
        for i, selection in enumerate(edit.context):
            loaded = loaded.with_context(region(selection, f"context mask {i}"))
        return loaded.tidied()


def _with(regions: tuple[Region, ...], region: Region) -> tuple[Region, ...]:
    if any(r.image == region.image for r in regions):
        return tuple(region if r.image == region.image else r for r in regions)
    return (*regions, region)


class History:
    """The document now, and those before and after it; each step has a label for the user."""

    LIMIT = 300

    def __init__(self, document: Document) -> None:
        self.document = document
        self._past: list[tuple[str, Document]] = []  # label of the step, the document before it
        self._future: list[tuple[str, Document]] = []  # label of the step, the document after it
        self._merging: Any = None

    def push(self, label: str, document: Document, merge: Any = None) -> None:
        """Make `document` the present. Steps in a row with the same `merge` (not None) are one step, as of a slider."""
        if merge is None or merge != self._merging or not self._past:
            self._past.append((label, self.document))
            del self._past[: -self.LIMIT]
        self._merging = merge
        self._future.clear()
        self.document = document

    def settle(self) -> None:
        """End a row of merged steps."""
        self._merging = None

    @property
    def undo_label(self) -> str | None:
        return self._past[-1][0] if self._past else None

    @property
    def redo_label(self) -> str | None:
        return self._future[-1][0] if self._future else None

    def undone(self) -> Document:
        """What undo would make the present. EditError when there is nothing to undo."""
        if not self._past:
            raise EditError("there is nothing to undo")
        return self._past[-1][1]

    def redone(self) -> Document:
        if not self._future:
            raise EditError("there is nothing to redo")
        return self._future[-1][1]

    def undo(self) -> None:
        before = self.undone()
        label, _ = self._past.pop()
        self._future.append((label, self.document))
        self.document, self._merging = before, None

    def redo(self) -> None:
        after = self.redone()
        label, _ = self._future.pop()
        self._past.append((label, self.document))
        self.document, self._merging = after, None
