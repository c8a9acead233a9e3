"""What takes seconds: solving, erasing, searching, the layer hint. A job replies when it is done."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..edit import Edit
from ..rewriting import LowRankPatch, context_directions
from ..rewriting.targets import CAPTURE_BATCH, context_examples
from ..statistics.search import DirectionScan, match
from .document import Document, Mask, StackedEdit, described
from .fields import checked_number
from .hints import edits_before, layer_hints
from .pictures import above
from .regions import region_by_click

if TYPE_CHECKING:
    from .actions import Request
    from .session import Job, Session

KEPT_SCANS = 4
KEPT_HINTS = 16


def start(r: Request, kind: str, label: str, run: Any) -> None:
    from .session import Job

    r.session.start(Job(kind, label, run, r.client, r.id))


# -- edits -------------------------------------------------------------------------------------------------------------


def execute(r: Request) -> None:
    """Solve what is selected and put it on the stack."""
    r.plain()
    session, document = r.session, r.document
    if document.object is None:
        raise ValueError("there is no object: copy one first")
    record = document.record(None, session.identity, session.images)

    def run(job: Job) -> dict[str, Any]:
        session.ensure_statistics(document.layer, job, quantiles=document.settings.key_method == "gandissect")
        job.step, job.steps = 0, document.settings.steps
        patch = solved_patch(session, document.layer, record, job)
        return _finish(session, document, record, patch, "execute", job)

    start(r, "execute", "Execute", run)


def solved_patch(session: Session, layer: str, record: Edit, job: Job) -> LowRankPatch:
    """The record's patch, from activations that are kept where they are; breathing."""
    rewriter, latents = session.model.rewriter(layer), record.latents
    numbers = rewriter.images_of(record)
    for first in range(0, len(numbers), CAPTURE_BATCH):  # a long context is not one long step
        session.model.activations(layer, numbers[first : first + CAPTURE_BATCH], latents)
        session.breathe(job)
    captured = session.model.captured(layer, numbers, latents)
    return rewriter.solve(record, progress=progress_of(session, job), captured=captured)


def erase(r: Request) -> None:
    """Remove what the context shows. method: "units" silences the most typical ones, "zero" is the closed form."""
    method = r.fields.choice("method", ("units", "zero"), "units")
    r.plain()
    session, document = r.session, r.document
    if not document.context and document.paste is None:
        raise ValueError("there is no context: add one first")
    record = document.record(None, session.identity, session.images)

    def run(job: Job) -> dict[str, Any]:
        session.ensure_statistics(document.layer, job)
        rewriter = session.model.rewriter(document.layer)
        job.step, job.steps = 0, document.settings.steps
        progress = progress_of(session, job)
        if method == "zero":
            patch = rewriter.zero(record, progress=progress)
        else:
            patch = rewriter.erase(record, document.units, progress=progress)
        return _finish(session, document, record, patch, "erase", job)

    start(r, "erase", "Erase", run)


def progress_of(session: Session, job: Job) -> Any:
    def progress(done: int, loss: float) -> None:
        job.step = done
        if math.isfinite(loss):  # while images are captured and measured there is none
            job.loss = float(loss)
        session.breathe(job)

    return progress


def is_report(report: Any) -> bool:
    """Whether a report that came with a file has what the front end shows."""
    return (
        isinstance(report, dict)
        and isinstance(report.get("seconds"), dict)
        and all(isinstance(v, (int, float)) for v in report["seconds"].values())
        and isinstance(report.get("warnings"), list)
        and all(isinstance(w, str) for w in report["warnings"])
    )


def _finish(
    session: Session, solved: Document, record: Edit, patch: LowRankPatch, label: str, job: Job
) -> dict[str, Any]:
    """The patch on the stack of the document as it is by now, with its report."""
    name = f"{'edit' if label == 'execute' else label} {session.next_edit}"
    patch.name = name
    report = patch.report.to_dict()
    edit = StackedEdit(session.next_edit, name, patch, strength=solved.strength, record=record.to_dict())
    report["change_elsewhere"] = _change_elsewhere(session, solved, edit, job)
    if not all(math.isfinite(v) for v in (report["loss_before"], report["loss_after"], report["relative_size"])):
        raise ValueError("the solve left the finite numbers: a smaller learning rate may help")
    edit = StackedEdit(edit.id, name, patch, strength=edit.strength, report=report, record=edit.record)
    session.change(label, session.document.replace(edits=(*session.document.edits, edit)))
    session.next_edit += 1
    session.shown = "edited"
    for text in report["warnings"]:
        session.notice("warning", text)
    return {"edit": edit.id, "report": report}


def _change_elsewhere(session: Session, solved: Document, edit: StackedEdit, job: Job) -> float:
    """Mean |change| of the pixels as a part of their range, over pictures that the edit has not seen."""
    model = session.model
    numbers = session.live.row(solved)
    before = model.pictures(numbers, {})
    session.breathe(job)
    (update,) = edit.effective.updates
    rows = model.activations(update.layer, numbers, {})
    session.breathe(job)
    after = model.rendered_with(update, rows)
    changes = [float(abs(a.astype(float) - b.astype(float)).mean()) for a, b in zip(after, before, strict=True)]
    return sum(changes) / len(changes) / 255 if changes else 0.0


# -- searching ---------------------------------------------------------------------------------------------------------


def scan_key(session: Session) -> Any:
    """What the search direction of the document depends on; None without a context or query."""
    d = session.document
    regions = [d.query] if d.query else [*(d.context or ((d.paste,) if d.paste else ()))]
    if not regions:
        return None
    masks = tuple((g.image, g.mask.hash) for g in regions)
    return masks, d.query is not None, d.layer, d.settings.shrinkage, session.model.weights(below=d.layer)


def search_direction(session: Session, document: Document) -> Tensor:
    """I: C^-1 times the mean key of the query, else the first direction of the context."""
    rewriter = session.model.rewriter(document.layer)
    regions = [document.query] if document.query else [*(document.context or (document.paste,))]
    captured = session.model.captured(document.layer, [g.image for g in regions], document.latents)
    size = session.model.generator.image_size
    examples = context_examples(captured, [g.selection() for g in regions], (size, size))
    return context_directions(
        rewriter.moment, examples, rank=1, method="mean" if document.query else "zca",
        shrinkage=document.settings.shrinkage,
    )[0]  # fmt: skip


def _scan(session: Session, document: Document, key: Any, job: Job) -> DirectionScan:
    if key not in session.scans:
        session.ensure_statistics(document.layer, job)
        direction = search_direction(session, document)

        def progress(done: int, of: int) -> None:
            job.step, job.steps = done, of
            session.breathe(job)

        scan = session.model.scan(document.layer, direction, progress)
        while len(session.scans) >= KEPT_SCANS:
            del session.scans[next(iter(session.scans))]
        session.scans[key] = scan, direction
    return session.scans[key][0]


def search(r: Request) -> None:
    """The strip becomes the pictures that answer most to the query or the context."""
    k = r.fields.integer("k", 1, 128, 32)
    r.plain()
    session, document, key = r.session, r.document, scan_key(r.session)
    if key is None:
        raise ValueError("there is no context and no query: add one first")

    def run(job: Job) -> dict[str, Any]:
        found = _scan(session, document, key, job).top(k)
        numbers = [n for n, _ in found]
        text = ",".join(map(str, numbers))
        session.change("search", session.document.replace(strip=text, numbers=tuple(numbers)))
        return {"numbers": numbers, "scores": [s for _, s in found]}

    start(r, "search", "Search", run)


def matches(r: Request) -> None:
    """Make ready what `outline` needs."""
    session, document, key = r.session, r.document, scan_key(r.session)
    if key is None:
        raise ValueError("there is no context and no query: add one first")

    def run(job: Job) -> dict[str, Any]:
        _scan(session, document, key, job)
        return {}

    start(r, "matches", "Matches", run)


def outlines(session: Session, numbers: list[int], quantile: float) -> list[Mask]:
    """For each picture the pixels whose match lies above the quantile of all pictures' pixels."""
    key, document = scan_key(session), session.document
    if key is None or key not in session.scans:
        raise ValueError("the matches of this context are not known yet: turn matches on first")
    scan, direction = session.scans[key]
    threshold = scan.threshold(checked_number("quantile", quantile, 0.0, 1.0))
    size = session.model.generator.image_size
    rows = session.model.activations(document.layer, numbers, document.latents)
    with torch.no_grad():
        maps = [match(row.key[0], direction)[row.shown()] for row in rows]
        return [Mask.of(above(m, threshold, size)) for m in maps]


# -- small things that need statistics --------------------------------------------------------------------------------


def click(r: Request, image: int, y: int, x: int, alike: float, add: bool) -> dict[str, Any] | None:
    """Select by a click: at once where the statistics are there, as a job where they have to be collected first."""
    from .document import Region

    session, layer = r.session, r.document.layer

    def select() -> dict[str, Any]:
        document = session.document
        mask = region_by_click(session.model, document, image, y, x, alike)
        painted = document.painted
        if add and painted is not None and painted.image == image:
            mask = Mask.of(mask.area | painted.mask.area)
        session.change("select", document.replace(painted=Region(image, mask)), ("click", image, y, x, add))
        return described(mask)

    if session.model.has_statistics(layer):
        return select()

    def run(job: Job) -> dict[str, Any]:
        session.ensure_statistics(layer, job)
        return select()

    start(r, "click", "Select", run)
    return None


def hint(r: Request) -> dict[str, Any] | None:
    """Which layer fits what is selected; at once where that has been asked before."""
    r.plain()
    session, document = r.session, r.document
    if document.object is None or not (document.paste or document.context):
        raise ValueError("copy an object and paste it somewhere first")
    # Neither the layer that is chosen nor the strip has a part in it, nor what these selections have already done.
    unchosen = document.replace(layer="", numbers=(), strength=1.0)
    key = session.live.depends_on(unchosen, edits_before(document))
    if key in session.hints:
        return {"layers": session.hints[key]}

    def run(job: Job) -> dict[str, Any]:
        def progress(done: int, of: int) -> None:
            job.step, job.steps = done, of
            session.breathe(job)

        found = layer_hints(session.model, document, progress)
        while len(session.hints) >= KEPT_HINTS:
            del session.hints[next(iter(session.hints))]
        session.hints[key] = found
        return {"layers": found}

    start(r, "hint", "Layer hint", run)
    return None
