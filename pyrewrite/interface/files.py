"""Files of a session: named edit records in its folder, uploads and downloads, the gallery of bundled edits.

A client sends names and bytes, never a path.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..demo import DemoEdit, demo_edits
from ..edit import Edit, read_latent
from ..errors import EditError, PatchError
from ..evaluation.sheets import contact_sheet
from ..generators import save_generator
from ..rewriting import LowRankPatch, stack
from . import jobs
from .document import Brought, Document, StackedEdit
from .fields import one_buffer
from .model import PICTURES_AT_ONCE

if TYPE_CHECKING:
    from .actions import Request
    from .session import Job, Session

MAX_UPLOAD = 64 << 20
MAX_EDIT = 8 << 20
MAX_SELECTIONS = 1000  # masks of a record that is opened
MAX_BROUGHT = 64  # pictures that a session takes
MAX_IMAGE_NUMBER = 100_000  # of a record: numbers are drawn from a stream, in order
PATCH_MEDIA = "application/octet-stream"

HELP = {
    "keys": [
        ["[ and ]", "brush smaller, larger"],
        ["Ctrl or right button", "erase while painting"],
        ["Esc", "take back the stroke"],
        ["Ctrl Z, Ctrl Shift Z", "undo, redo"],
    ],
    "pictures": (
        "The pictures come from the generator: number n is always the same picture. A picture of your own has to "
        "become a latent w of this generator first (by projection, with another tool); its .npy file of w_dim or "
        "num_ws x w_dim numbers can then be uploaded and joins the strip."
    ),
}


# -- records in the session's folder -----------------------------------------------------------------------------------


def saved_names(folder: Path) -> list[str]:
    """The names of the records in a folder, sorted."""
    from .fields import NAME

    if not folder.is_dir():
        return []
    return sorted(p.stem for p in folder.glob("*.json") if p.is_file() and NAME.fullmatch(p.stem))


def save(r: Request) -> dict[str, Any]:
    name = r.fields.name("name")
    r.plain()
    d = r.document
    if not (d.object or d.paste or d.context or d.query):
        raise ValueError("there is nothing to save yet: copy, paste or add a context first")
    folder = r.session.folder
    folder.mkdir(parents=True, exist_ok=True)
    d.record(name, r.session.identity, r.session.images).save(folder / f"{name}.json")
    return {"names": saved_names(folder)}


def load(r: Request) -> dict[str, Any]:
    name = r.fields.name("name")
    r.plain()
    path = r.session.folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"there is no saved edit {name!r}; there are {', '.join(saved_names(path.parent)) or 'none'}")
    if path.stat().st_size > MAX_EDIT:
        raise ValueError(f"{name}: {path.stat().st_size} bytes; expected at most {MAX_EDIT}")
    _take(r, Edit.load(path), f"load {name}")
    return {"name": name}


def names(r: Request) -> dict[str, Any]:
    r.plain()
    return {"names": saved_names(r.session.folder)}


def _take(r: Request, record: Edit, label: str) -> None:
    """Make a record the selections of the document."""
    session, generator = r.session, r.session.model.generator
    selections = [s for s in (record.object, record.paste, record.query) if s is not None]
    selections += [*record.context, *record.protect]
    if len(selections) > MAX_SELECTIONS:
        raise EditError(f"{len(selections)} masks; expected at most {MAX_SELECTIONS}")
    for s in selections:
        if s.image not in record.latents and s.image > MAX_IMAGE_NUMBER:
            raise EditError(f"image number {s.image}: expected at most {MAX_IMAGE_NUMBER}")
    for w in record.latents.values():
        _check_latent(session, w)
    if record.layer is not None:
        generator.find_layer(record.layer)
    for name in ("seed", "truncation"):
        wanted, here = record.settings.get(name), getattr(r.document.settings, name)
        if wanted is not None and wanted != here:
            raise EditError(f"the record's {name} is {wanted}, the session's is {here}: its numbers are other pictures")
    if record.images is not None and not generator.has_settings(record.images):
        raise EditError(
            f"the record's pictures were made with {record.images or 'defaults'}, the session's with "
            f"{session.images or 'defaults'}: its numbers are other pictures"
        )
    document = r.document.from_record(record, generator.image_size)
    r.change(label, document)
    made_for = (record.generator or {}).get("hash")
    if made_for is not None and made_for != session.model.hash:
        session.notice("warning", "the record was made on another generator: its numbers are other pictures there")


# -- uploads -----------------------------------------------------------------------------------------------------------


def upload(r: Request) -> dict[str, Any]:
    kind = r.fields.choice("kind", ("edit", "patch", "latent"))
    # The file's own name is for people only, and nothing is opened by it.
    name = "".join(c for c in r.fields.text("name") if c.isprintable())[:64] if "name" in r.fields else ""
    name = name or "uploaded"
    r.fields.end()
    data = one_buffer(r.buffers, kind, MAX_EDIT if kind == "edit" else MAX_UPLOAD)
    return {"edit": _upload_edit, "patch": _upload_patch, "latent": _upload_latents}[kind](r, name, data)


def _upload_edit(r: Request, name: str, data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise EditError(f"{name}: not an edit record: expected JSON ({error})") from error
    _take(r, Edit.from_dict(record, source=name), f"load {name}")
    return {"name": name}


def _upload_patch(r: Request, name: str, data: bytes) -> dict[str, Any]:
    patch = LowRankPatch.from_bytes(data, name)
    report = patch.report if jobs.is_report(patch.report) else None
    return {"edit": _add(r.session, patch, patch.name or name, report, f"add {name}")}


def _add(session: Session, patch: LowRankPatch, name: str, report: dict[str, Any] | None, label: str) -> int:
    """A patch that is ready on the stack."""
    made_for = (patch.generator or {}).get("hash")
    if made_for is not None and made_for != session.model.hash:
        raise PatchError(
            f"{name} was made for a generator with weights {made_for[:12]}..., "
            f"this one has {session.model.hash[:12]}..."
        )
    digest = patch.digest
    if any(e.digest == digest for e in session.document.edits):
        raise PatchError(f"{name} is on the stack already")
    edit = StackedEdit(session.next_edit, name[:64], patch, report=report)
    session.change(label, session.document.replace(edits=(*session.document.edits, edit)))
    session.next_edit += 1
    return edit.id


def _check_latent(session: Session, w: Tensor) -> None:
    g = session.model.generator
    if not hasattr(g, "synthesis"):
        raise EditError(f"pictures from w need a StyleGAN2 or StyleGAN3; this is a {g.family}")
    if tuple(w.shape) not in ((g.w_dim,), (g.num_ws, g.w_dim)):
        raise EditError(f"w is {tuple(w.shape)}; expected {g.w_dim} numbers (W) or {g.num_ws} x {g.w_dim} (W+)")


def _upload_latents(r: Request, name: str, data: bytes) -> dict[str, Any]:
    w = read_latent(data, name)
    g = r.session.model.generator
    # One picture, or a batch of them; num_ws x w_dim is one picture in W+.
    single = not hasattr(g, "w_dim") or tuple(w.shape) in ((g.w_dim,), (g.num_ws, g.w_dim)) or w.ndim < 2
    several = [w] if single else list(w)
    if len(several) == 0:
        raise EditError(f"{name}: no latents in it")
    for one in several:
        _check_latent(r.session, one)
    named = [name if len(several) == 1 else f"{name} {i + 1}" for i in range(len(several))]
    brought = {b.number: b for b in map(Brought.of, named, several)}
    document: Document = r.document
    everything = {**document.brought, **brought}
    if len(everything) > MAX_BROUGHT:
        raise EditError(f"{len(everything)} brought pictures; expected at most {MAX_BROUGHT}")
    numbers = tuple(dict.fromkeys((*brought, *document.numbers)))
    strip = ",".join(map(str, brought)) + ("," + document.strip if document.strip else "")
    r.change(
        "bring pictures",
        document.replace(brought=MappingProxyType(everything), numbers=numbers, strip=strip),
    )
    return {"numbers": list(brought)}


# -- downloads ---------------------------------------------------------------------------------------------------------


def snapshot(r: Request) -> None:
    """The strip's pictures before and after the active edits, as a PNG sheet."""
    r.plain()
    session, document = r.session, r.document

    def run(job: Job) -> tuple[dict[str, Any], list[bytes]]:
        return _file("before-after.png", "image/png", before_after(session, document, job))

    jobs.start(r, "snapshot", "Snapshot", run)


def before_after(session: Session, d: Document, job: Job) -> bytes:
    model, numbers = session.model, list(d.numbers)
    if not numbers:
        raise ValueError("the strip is empty")
    job.steps = 2 * len(numbers)
    rows = []
    for original in (True, False):
        pictures = []
        for first in range(0, len(numbers), PICTURES_AT_ONCE):
            pictures += model.pictures(numbers[first : first + PICTURES_AT_ONCE], d.latents, original)
            job.step = len(rows) * len(numbers) + len(pictures)
            session.breathe(job)
        rows.append(_batch(pictures))
    labels = [d.brought[n].name if n in d.brought else str(n) for n in numbers]
    title = " + ".join(e.name for e in d.active)
    image = contact_sheet(rows, ["before", "after"], title=title, labels=labels, columns=min(12, len(numbers)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _batch(pictures: Sequence[Any]) -> Tensor:
    """H x W x 3 uint8 each -> B x 3 x H x W in [-1, 1]."""
    return torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) for p in pictures]).float() / 127.5 - 1


def _file(name: str, media: str, data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    return {"filename": name, "media": media}, [data]


def download(r: Request) -> tuple[dict[str, Any], list[bytes]] | None:
    kind = r.fields.choice("kind", ("patch", "edit", "checkpoint", "sheet"))
    chosen = r.fields.integer("edit", 1, 1 << 31) if "edit" in r.fields else None
    r.plain()
    session, d = r.session, r.document
    if kind == "sheet":
        return snapshot(r)
    if kind == "edit":
        record = d.record("edit", session.identity, session.images).to_dict()
        if chosen is not None:
            record = _edit(d, chosen).record
            if record is None:
                raise ValueError("this edit came as a patch: it has no record")
        return _file("edit.json", "application/json", json.dumps(record, indent=1).encode())
    if kind == "patch":
        return _file("patch.safetensors", PATCH_MEDIA, _patch(session, d, chosen).to_bytes())
    return _checkpoint(session)


def _edit(d: Document, chosen: int) -> StackedEdit:
    for edit in d.edits:
        if edit.id == chosen:
            return edit
    raise ValueError(f"edit is {chosen}; expected the id of one: {', '.join(str(e.id) for e in d.edits) or 'none'}")


def _patch(session: Session, d: Document, chosen: int | None) -> LowRankPatch:
    """One edit as it acts, or the sum of the active ones."""
    if chosen is not None:
        return _edit(d, chosen).effective
    if not d.active:
        raise ValueError("no edit is active: execute one first")
    patches = [e.effective for e in d.active]
    if len(patches) == 1:
        return patches[0]
    total = stack(patches, warn_above=float("inf"))  # how much they overlap is in the state
    total.generator = session.identity
    return total


def _checkpoint(session: Session) -> tuple[dict[str, Any], list[bytes]]:
    """The generator with the active edits merged, in its own format."""
    g = session.model.generator
    suffix = ".safetensors" if g.classes or (g.path and g.path.suffix == ".safetensors") else ".pt"
    handle, path = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    try:
        save_generator(g, path)
        return _file(f"edited{suffix}", PATCH_MEDIA, Path(path).read_bytes())
    finally:
        os.unlink(path)


# -- gallery and help --------------------------------------------------------------------------------------------------


def bundled(session: Session) -> list[tuple[DemoEdit, Edit]]:
    """The bundled edits that were made on this very generator."""
    found = []
    for demo in demo_edits():
        record = demo.record()
        if (record.generator or {}).get("hash") == session.model.hash:
            found.append((demo, record))
    return found


def read_gallery(r: Request) -> dict[str, Any]:
    r.plain()
    return {"gallery": [{"name": d.name, "title": d.title, "layer": e.layer} for d, e in bundled(r.session)]}


def gallery(r: Request) -> dict[str, Any] | None:
    """apply: solve a bundled edit, on the weights as they are, and put it on the stack. load: make it the document's
    selections. Neither: the list.
    """
    if "apply" not in r.fields and "load" not in r.fields:
        return read_gallery(r)
    field = "apply" if "apply" in r.fields else "load"
    found = {d.name: (d, e) for d, e in bundled(r.session)}
    if not found:
        raise ValueError("there are no bundled edits for this generator")
    demo, record = found[r.fields.choice(field, tuple(found))]
    r.plain()
    if field == "load":
        _take(r, record, f"load {demo.title}")
        return {"name": demo.name}
    session = r.session
    if any(e.name == demo.title for e in r.document.edits):
        raise ValueError(f"{demo.title} is on the stack already")

    def run(job: Job) -> dict[str, Any]:
        session.ensure_statistics(record.layer, job)
        job.step, job.steps = 0, record.resolve().steps
        patch = jobs.solved_patch(session, record.layer, record, job)
        report = {**patch.report.to_dict(), "change_elsewhere": None}
        return {"edit": _add(session, patch, demo.title, report, demo.title), "report": report}

    jobs.start(r, "gallery", demo.title, run)
    return None


def read_files(r: Request) -> dict[str, Any]:
    return names(r)


def read_help(r: Request) -> dict[str, Any]:
    r.plain()
    return dict(HELP)
