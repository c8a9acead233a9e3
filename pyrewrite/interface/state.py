"""The state message: all that a front end shows and no picture."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ..edit import KEY_METHODS, METHODS, SETTING_NAMES, TARGETS, WEIGHTINGS, Place, Selection
from ..errors import EditError
from ..generators import Generator
from ..rewriting import overlap, shared_directions
from ..rewriting.selection import bounding_box, mask_on_map
from ..rewriting.targets import landing
from .document import Document, Mask, Region

if TYPE_CHECKING:
    from .session import Session

# name: (least, most, step, whether a slider is logarithmic); most are the settings of an edit record, see Settings
RANGES: dict[str, tuple[float, float, float, bool]] = {
    "rank": (1, 128, 1, True),
    "steps": (1, 5001, 1, True),
    "lr": (0.001, 1.0, 0.001, True),
    "preserve": (0.0, 30.0, 0.01, True),
    "shrinkage": (0.0, 10.0, 0.01, True),
    "margin": (0, 16, 1, False),
    "protect_rank": (1, 128, 1, True),
    "project_every": (1, 1000, 1, True),
    "strength": (-2.0, 3.0, 0.01, False),
    "units": (1, 512, 1, True),
    "quantile": (0.9, 0.9999, 0.0001, False),
}
CHOICES = {"method": METHODS, "key_method": KEY_METHODS, "targets": TARGETS, "weighting": WEIGHTINGS}


def usual_layer(generator: Generator) -> str:
    """The layer that a session starts with, where object parts are in all generators at hand: the last one at an eighth
    of the picture (16 pixels at least, 32 at most, a quarter in the smallest) that does not double the resolution.
    """
    wanted = min(32, max(16, generator.image_size // 8), generator.image_size // 4)
    layers = list(generator.layers.values())
    fitting = [g for g in layers if g.resolution - 2 * g.margin == wanted and not g.upsample]
    return (fitting or layers[: len(layers) // 2 + 1])[-1].name


def of(session: Session) -> dict[str, Any]:
    """The state of a session, but for its type and revision."""
    d, model = session.document, session.model
    g = model.generator
    return {
        "generator": {
            "name": session.name,
            "family": g.family,
            "image_size": g.image_size,
            "hash": model.hash,
            "truncation": g.truncation,
            "samples": model.samples,
            "brings": hasattr(g, "capture_w"),
            "layers": [
                {
                    "name": layer.name,
                    "resolution": layer.resolution,
                    "in": layer.in_channels,
                    "out": layer.out_channels,
                    "kernel": layer.kernel_size,
                    "upsample": layer.upsample,
                }
                for layer in g.layers.values()
            ],
        },
        "strip": {"text": d.strip, "numbers": list(d.numbers)},
        "brought": [{"number": n, "name": b.name} for n, b in d.brought.items()],
        "painted": None if d.painted is None else region(d.painted),
        "object": None if d.object is None else {**region(d.object), "box": list(d.object.mask.box)},
        "paste": None if d.paste is None else placed(g, d, d.paste),
        "context": [placed(g, d, r) for r in d.context],
        "protect": [region(r) for r in d.protect],
        "query": None if d.query is None else region(d.query),
        "settings": {
            "layer": d.layer,
            **{name: getattr(d.settings, name) for name in SETTING_NAMES},
            "strength": d.strength,
            "units": d.units,
            "quantile": d.quantile,
        },
        "ranges": {name: list(values) for name, values in RANGES.items()},
        "choices": {name: list(values) for name, values in CHOICES.items()},
        "edits": [
            {
                "id": e.id,
                "name": e.name,
                "layer": ", ".join(u.layer for u in e.patch.updates),
                "rank": max(u.rank for u in e.patch.updates),
                "on": e.on,
                "strength": e.strength,
                "seconds": sum(e.report["seconds"].values()) if e.report else 0.0,
                "report": dict(e.report) if e.report else None,
                "warning": " ".join(e.report["warnings"]) or None if e.report else None,
            }
            for e in d.edits
        ],
        "overlap": overlaps(d),
        "job": session.job.progress() if session.job else None,
        "shown": session.shown,
        "weights": {"edited": model.weights(d.active), "original": model.weights([])},
        "matches": {"on": d.matches, "ready": d.matches and session.scan_ready()},
        "live": {
            "row": session.live.row(d),
            "key": session.live.key,
            "solved": session.live.solved,
            "error": session.live.error,
            "note": session.live.note,
        },
        "can": can(session),
        "undo": session.history.undo_label,
        "redo": session.history.redo_label,
        "statistics": statistics(session),
        "seed": model.seed,
    }


def region(r: Region) -> dict[str, Any]:
    return {"image": r.image, "hash": r.mask.hash, "pixels": r.mask.pixels, "islands": list(r.mask.islands)}


def placed(g: Generator, d: Document, r: Region) -> dict[str, Any]:
    """A region that the object is pasted into. box: where it lands, in picture pixels; None without an object."""
    place = d.places.get(r.image, Place())
    box = None
    if d.object is not None:
        layer = g.layers[d.layer]
        box = _landing(d.object.mask, r.mask, place, layer.resolution, layer.margin, g.image_size)
    return {**region(r), "dy": place.dy, "dx": place.dx, "on": place.on, "box": None if box is None else list(box)}


@functools.lru_cache(maxsize=4096)
def _landing(
    thing: Mask, where: Mask, place: Place, resolution: int, margin: int, size: int
) -> tuple[int, int, int, int] | None:
    maps, picture = (resolution, resolution), (size, size)
    try:
        cut = bounding_box(mask_on_map(thing.url, maps, picture, margin=margin))
        box = landing((cut.height, cut.width), maps, Selection(0, where.url), picture, "mask", place, margin)
    except EditError:  # nothing of a mask is left on a coarse map
        return None
    shown = resolution - 2 * margin  # of the map: what is around it is in no picture
    return tuple(min(size, max(0, round((edge - margin) * size / shown))) for edge in box)


def overlaps(d: Document) -> list[list[float]] | None:
    """For each pair of edits the larger of |cosine| and the share of common directions; None for fewer than two."""
    if len(d.edits) < 2:
        return None
    return [[1.0 if a is b else _overlap(a.patch, b.patch) for b in d.edits] for a in d.edits]


@functools.lru_cache(maxsize=256)
def _overlap(a: Any, b: Any) -> float:
    return round(max(abs(overlap(a, b)), shared_directions(a, b)), 4)


def statistics(session: Session) -> dict[str, Any]:
    layer = session.document.layer
    now = session.collecting
    return {
        "layer": now.layer if now else layer,
        "ready": session.model.has_statistics(layer),
        "done": now.done if now else 0,
        "of": now.of if now else 0,
    }


def can(session: Session) -> dict[str, bool | str]:
    """Action -> True, or why it cannot be done now."""
    d = session.document
    busy = f"{session.job.label} is running" if session.job else None
    painted = None if d.painted else "paint a region first"
    target = None if d.paste or d.context else "paste the object somewhere, or add a context first"
    thing = None if d.object else "copy an object first"
    context = None if d.context or d.paste else "add a context first"
    query = None if d.context or d.paste or d.query else "add a context first, or match a selection"
    reasons = {
        "copy": painted,
        "paste": painted or thing,
        "add_context": painted,
        "protect": painted,
        "match_selection": painted,
        "search": busy or query,
        "matches": None if d.matches else query or (None if session.scan_ready() else busy),
        "execute": busy or thing or target,
        "erase": busy or context,
        "hint": busy or thing or target,
        "cancel": None if session.job or session.collecting else "nothing is running",
        "stack": busy or (None if d.edits else "there are no edits"),
        "revert": busy or (None if d.edits else "there are no edits"),
        "undo": busy or (None if session.history.undo_label else "there is nothing to undo"),
        "redo": busy or (None if session.history.redo_label else "there is nothing to redo"),
        "new": busy,
        "load": busy,
        "upload": busy,
        "gallery": busy,
        "save": None if d.object or d.paste or d.context or d.query else "there is nothing to save yet",
        "download": None if d.edits else "execute an edit first",
        "snapshot": busy,
    }
    return {name: reason or True for name, reason in reasons.items()}
