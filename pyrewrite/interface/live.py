"""The edit before it is executed: solved in closed form, shown on the pictures it concerns, and gone again.

Nothing here stays in the weights. What comes before the layer is kept for every picture, so that a stroke costs the
directions, one least squares fit, and the layers from the edited one on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..edit import Edit, Settings
from ..errors import EditError, NonFiniteError
from ..rewriting import LayerUpdate, Rewriter
from ..rewriting.targets import Captured
from .document import Document, StackedEdit
from .model import Model
from .pictures import sheet
from .regions import key_pixels

ROW = 8  # pictures outside the context
THUMBNAIL = 192  # pixels of a previewed picture, at most
Message = tuple[dict[str, Any], list[bytes]]


class Live:
    """The preview of a document. `request` says what is to be shown; each `step` then gives some of the pictures."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.error: str | None = None
        self.note: str | None = None
        self.key: str | None = None  # names what the pictures show; None while there are none
        self.solved = False  # whether the edit is on the stack already: the pictures themselves show it
        self._document: Document | None = None
        self._wanted: Any = None  # what the preview depends on
        self._stages: list[str] = []
        self._update: LayerUpdate | None = None
        self._direction: tuple[Any, Tensor] | None = None  # what it depends on, the context's directions
        self._since = 0.0
        self._told: Any = (None, None)

    @property
    def pending(self) -> bool:
        return bool(self._stages)

    @property
    def urgent(self) -> bool:
        """Whether the next step is the one that a stroke waits for."""
        return self._stages[:1] == ["paste"]

    def changed(self) -> bool:
        """Whether error or note differ from the last time this was asked."""
        told, self._told = self._told, (self.error, self.note)
        return told != self._told

    def row(self, document: Document) -> list[int]:
        """Pictures that the edit has not seen: of the strip first."""
        used = {r.image for r in (document.object, document.paste, *document.context) if r is not None}
        numbers = dict.fromkeys((*document.numbers, *range(min(self.model.samples, 4 * ROW + len(used)))))
        return [n for n in numbers if n not in used and n not in document.latents][:ROW]

    def request(self, document: Document) -> None:
        """Show the preview of this document; what was being shown of another one is dropped.

        There is none of an edit that is applied as it is: it would be shown twice over.
        """
        self.solved = any(e.active and _is_record_of(document, e.record) for e in document.edits)
        ready = (
            not self.solved
            and document.object is not None
            and (document.paste is not None or document.context)
            and self.model.has_statistics(document.layer)
        )
        wanted = self.depends_on(document) if ready else None
        if wanted == self._wanted:
            return
        self._wanted, self._document, self._update = wanted, document, None
        self.key = hashlib.sha256(repr(wanted).encode()).hexdigest()[:16] if ready else None
        self._since = time.perf_counter()
        self._stages = []
        if ready:
            self._stages = [s for s in ("paste", "context", "row") if self._numbers(s)]
        else:
            self.error = self.note = None

    def depends_on(self, d: Document, edits: Sequence[StackedEdit] | None = None) -> Any:
        """All that an edit of this document and its previews come from; hashable. edits: that are active then, None:
        those that are.
        """
        regions = tuple((r.image, r.mask.hash) if r else None for r in (d.object, d.paste))
        lists = tuple(tuple((r.image, r.mask.hash) for r in rs) for rs in (d.context, d.protect))
        return (
            regions, lists, tuple(sorted((n, p.dy, p.dx, p.on) for n, p in d.places.items())), d.layer, d.settings,
            d.strength, tuple(self.row(d)), self.model.weights(edits),
        )  # fmt: skip

    def _numbers(self, stage: str) -> list[int]:
        d = self._document
        if stage == "paste":
            return [d.paste.image] if d.paste else []
        if stage == "context":
            return [r.image for r in d.context if d.paste is None or r.image != d.paste.image]
        return self.row(d)

    def step(self) -> list[Message]:
        """Some of the pictures that are wanted, as messages."""
        stage = self._stages.pop(0)
        try:
            if self._update is None:
                self._update = self._solve()
            self.error = None
            numbers = self._numbers(stage)
            rows = self.model.activations(self._document.layer, numbers, self._document.latents)
            pictures = self.model.rendered_with(self._update, rows)
        except (EditError, NonFiniteError) as error:
            self.error, self._stages = str(error), []
            return []
        size = min(THUMBNAIL, self.model.generator.image_size)
        data, columns, media = sheet(pictures, size, brief=True)
        message = {"kind": stage, "key": self.key, "numbers": numbers, "size": size, "columns": columns, "media": media}
        return [({**message, "ms": round(1e3 * (time.perf_counter() - self._since), 1)}, [data])]

    def _solve(self) -> LayerUpdate:
        d = self._document
        record = d.record()
        rewriter = self.model.rewriter(d.layer)
        settings = self._settings(record)
        captured = self.model.captured(d.layer, rewriter.images_of(record, settings), d.latents)
        direction = self._directions(rewriter, record, settings, captured)
        (update,) = rewriter.closed_form(record, captured, settings, direction).updates
        return LayerUpdate(update.layer, update.direction, update.lambda_ * d.strength)

    def _directions(self, rewriter: Rewriter, record: Edit, settings: Settings, captured: Captured) -> Tensor:
        """r x I; those of the last stroke where only the object or where it lands has changed."""
        d = self._document
        marks = tuple(tuple((r.image, r.mask.hash) for r in rs) for rs in (d.context or (d.paste,), d.protect))
        key = (marks, d.layer, settings, self.model.weights(below=d.layer))
        if self._direction is None or self._direction[0] != key:
            self._direction = key, rewriter.directions(record, settings, captured)
        return self._direction[1]

    def _settings(self, record: Edit) -> Settings:
        """The record's; with a lower rank, and a note that says so, where fewer key pixels are painted."""
        d, settings = self._document, record.resolve()
        most = key_pixels(self.model, d.layer, d.context or (d.paste,))
        self.note = None
        if settings.rank <= most:
            return settings
        self.note = (
            f"shown with rank {most}: the context's masks cover no more key pixels of {d.layer}; "
            f"for rank {settings.rank} paint larger ones, or add context"
        )
        return settings.replace(rank=most)


def _is_record_of(document: Document, record: Mapping[str, Any] | None) -> bool:
    """Whether the record has the document's selections and settings, as it has after Execute."""
    return record is not None and _what_is_solved(record) == _what_is_solved(document.record().to_dict())


def _what_is_solved(record: Mapping[str, Any]) -> Any:
    own = {k: v for k, v in record.get("pyrewrite", {}).items() if k not in ("name", "generator", "images")}
    return selections_of(record), own


def selections_of(record: Mapping[str, Any]) -> Any:
    """What a record copies, and where to; comparable."""
    return record.get("object"), record.get("paste"), record.get("key")
