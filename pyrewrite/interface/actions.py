"""What clients can ask for. An action checks its fields, makes the next document, and hands it to the session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..edit import SETTING_NAMES
from . import files, jobs
from .document import Document, Mask, Region, described
from .fields import Fields, NotYet, checked_integer, checked_number, one_buffer
from .model import PICTURES_AT_ONCE
from .pictures import resized, sheet
from .state import RANGES

if TYPE_CHECKING:
    from .session import Client, Session

Reply = dict[str, Any] | tuple[dict[str, Any], list[bytes]] | None
Handler = Callable[["Request"], Reply]

STRIP_LENGTH = 400  # pictures in a strip
PICTURES = 128  # pictures in one sheet
MOVES_STACK = ("stack", "revert", "undo", "redo", "new", "load", "upload", "gallery")  # not while a job runs
FIXED = ("samples", "seed", "truncation")  # settings that belong to the session

_ACTIONS: dict[str, Handler] = {}
_READS: dict[str, Handler] = {}


class Request:
    """One message with the session that it came to."""

    def __init__(
        self, session: Session, client: Client, message: dict[str, Any], buffers: list[bytes], parts: dict[Any, Any]
    ) -> None:
        self.session, self.client, self.buffers = session, client, buffers
        self.parts = parts
        self.fields = Fields(message)
        self.id = message.get("id")

    @property
    def document(self) -> Document:
        return self.session.document

    def change(self, label: str, document: Document, merge: Any = None) -> None:
        self.session.change(label, document, merge)

    def image(self, name: str = "image") -> int:
        """A picture that the session knows."""
        value = self.fields.any(name)
        if type(value) is int and value in self.document.brought:
            return value
        return checked_integer(name, value, 0, max(self.session.model.samples - 1, *self.document.numbers, 0))

    def mask(self) -> Mask:
        return Mask(self.session.model.generator.image_size, one_buffer(self.buffers, "mask"))

    def painted(self) -> Region:
        if self.document.painted is None:
            raise ValueError("nothing is painted: paint a region first")
        return self.document.painted

    def plain(self) -> None:
        """No more fields and no buffers."""
        self.fields.end()
        if self.buffers:
            raise ValueError(f"{len(self.buffers)} buffers; expected none")


def _action(name: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _ACTIONS[name] = handler
        return handler

    return register


def _read(name: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _READS[name] = handler
        return handler

    return register


def answer(session: Session, client: Client, message: Any, buffers: list[bytes], parts: dict[Any, Any]) -> Reply:
    """Do what a message says. Returns the reply, None where a job replies later. ValueError says what is wrong.

    parts: kept with the message, for reads that raise NotYet.
    """
    if not isinstance(message, dict):
        raise ValueError(f"a message is {type(message).__name__}; expected an object")
    kind = message.get("type")
    if kind not in ("do", "get"):
        raise ValueError(f"type is {kind!r:.60}; expected 'do' or 'get'")
    if not isinstance(message.get("id"), (int, str)) or isinstance(message.get("id"), bool):
        raise ValueError(f"id is {message.get('id')!r:.60}; expected a number or a text")
    table, name = (_ACTIONS, message.get("action")) if kind == "do" else (_READS, message.get("what"))
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{'action' if kind == 'do' else 'what'} is {name!r:.60}; expected one of {', '.join(table)}")
    if name in MOVES_STACK and kind == "do" and session.job is not None:
        raise ValueError(f"{session.job.label} is running: wait for it, or cancel it")
    return table[name](Request(session, client, message, buffers, parts))


# -- pictures and masks ------------------------------------------------------------------------------------------------


def strip_numbers(text: str, samples: int, brought: Mapping[int, Any]) -> tuple[tuple[int, ...], int]:
    """ "0-8,12,200-212" -> the numbers in that order, each once, and how many were beyond the samples.

    ValueError names the part that is no number or range, or says that there are too many.
    """
    numbers: dict[int, None] = {}
    dropped = 0
    for part in (p.strip() for p in text.split(",")):
        if not part:
            continue
        first, dash, last = (p.strip() for p in part.partition("-"))
        if not _is_number(first) or (dash and not _is_number(last)):
            raise ValueError(f"strip: {part!r:.40} is not a number or a range; expected such as 0-8,12,200-212")
        begin, end = int(first), int(last or first)
        if end < begin:
            raise ValueError(f"strip: the range {part!r} ends before it begins")
        if begin in brought and not dash:
            numbers[begin] = None
            continue
        dropped += max(0, end - max(begin, samples) + 1)
        numbers.update(dict.fromkeys(range(begin, min(end + 1, samples))))
        if len(numbers) > STRIP_LENGTH:
            raise ValueError(f"strip: more than {STRIP_LENGTH} pictures; expected fewer")
    return tuple(numbers), dropped


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


@_action("strip")
def _strip(r: Request) -> Reply:
    text = r.fields.text("text")
    r.plain()
    samples = r.session.model.samples
    numbers, dropped = strip_numbers(text, samples, r.document.brought)
    if not numbers:
        raise ValueError(f"strip: no picture is left of {text!r:.40}; expected numbers from 0 to {samples - 1}")
    r.change("pictures", r.document.replace(strip=text, numbers=numbers))
    if dropped:
        r.session.notice("info", f"{dropped} numbers are beyond the {samples} samples and were left out")
    return {"numbers": list(numbers), "dropped": dropped}


@_action("paint")
def _paint(r: Request) -> Reply:
    image, mask = r.image(), r.mask()
    r.fields.end()
    painted = Region(image, mask) if mask.pixels else None
    r.change("paint" if painted else "clear the mask", r.document.replace(painted=painted))
    return described(mask)


@_action("click")
def _click(r: Request) -> Reply:
    image = r.image()
    size = r.session.model.generator.image_size
    y, x = r.fields.integer("y", 0, size - 1), r.fields.integer("x", 0, size - 1)
    alike, add = r.fields.number("alike", 0.0, 1.0, 0.5), r.fields.boolean("add", False)
    r.plain()
    return jobs.click(r, image, y, x, alike, add)


@_action("copy")
def _copy(r: Request) -> Reply:
    r.plain()
    r.change("copy", r.document.replace(object=r.painted()))
    return {}


@_action("paste")
def _paste(r: Request) -> Reply:
    r.plain()
    region = r.painted()
    if r.document.object is None:
        raise ValueError("there is no object to paste: copy one first")
    r.change("paste", r.document.replace(paste=region))
    return {}


@_action("add_context")
def _add_context(r: Request) -> Reply:
    r.plain()
    r.change("add to the context", r.document.with_context(r.painted()))
    return {}


@_action("protect")
def _protect(r: Request) -> Reply:
    r.plain()
    r.change("protect", r.document.with_protect(r.painted()))
    return {}


@_action("match_selection")
def _match_selection(r: Request) -> Reply:
    r.plain()
    r.change("match the selection", r.document.replace(query=r.painted()))
    return {}


@_action("object_mask")
def _object_mask(r: Request) -> Reply:
    mask = r.mask()
    r.fields.end()
    if r.document.object is None:
        raise ValueError("there is no object: copy one first")
    region = Region(r.document.object.image, mask) if mask.pixels else None
    r.change("the object's mask", r.document.replace(object=region))
    return described(mask)


def _target(r: Request, image: Any) -> int:
    if image is None:
        if r.document.paste is None:
            raise ValueError("the object is not pasted anywhere yet")
        return r.document.paste.image
    regions = [*r.document.context, *([r.document.paste] if r.document.paste else [])]
    if type(image) is not int or not any(g.image == image for g in regions):
        raise ValueError(f"image {image!r:.40} is neither the paste's nor in the context")
    return image


@_action("move")
def _move(r: Request) -> Reply:
    size = r.session.model.generator.image_size
    dy, dx = r.fields.integer("dy", -size, size), r.fields.integer("dx", -size, size)
    image = _target(r, r.fields.any("image") if "image" in r.fields else None)
    r.plain()
    r.change("move", r.document.with_place(image, dy=dy, dx=dx), merge=("move", image))
    return {}


@_action("place")
def _place(r: Request) -> Reply:
    image, on = _target(r, r.fields.any("image")), r.fields.boolean("on")
    r.plain()
    r.change("paste here" if on else "do not paste here", r.document.with_place(image, on=on))
    return {}


@_action("remove")
def _remove(r: Request) -> Reply:
    what = r.fields.choice("what", ("object", "paste", "context", "protect", "query"))
    image = r.fields.any("image") if "image" in r.fields else None
    r.plain()
    document = r.document
    held = getattr(document, what)
    if what in ("context", "protect"):
        left = tuple(region for region in held if region.image != image)
        if type(image) is not int or len(left) == len(held):
            raise ValueError(f"image {image!r:.40} is not in {what}")
        r.change(f"remove from {what}", document.replace(**{what: left}))
    else:
        if held is None:
            raise ValueError(f"there is no {what}")
        r.change(f"remove the {what}", document.replace(**{what: None}))
    return {}


# -- settings ----------------------------------------------------------------------------------------------------------


@_action("set")
def _set(r: Request) -> Reply:
    changes = r.fields.rest()
    r.plain()
    if not changes:
        raise ValueError(f"expected one of layer, strength, units, quantile, {', '.join(SETTING_NAMES)}")
    document, settings = r.document, {}
    for name, value in changes.items():
        if name in FIXED:
            raise ValueError(f"{name} belongs to the session: expected another setting")
        if name in RANGES:
            least, most, step, _ = RANGES[name]
            whole = isinstance(step, int)
            value = checked_integer(name, value, least, most) if whole else checked_number(name, value, least, most)
        if name == "layer":
            if not isinstance(value, str):
                raise ValueError(f"layer is {value!r:.60}; expected the name of one")
            document = document.replace(layer=r.session.model.generator.find_layer(value).name)
        elif name in ("strength", "units", "quantile"):
            document = document.replace(**{name: value})
        elif isinstance(value, (bool, int, float, str)):
            settings[name] = value
        else:
            raise ValueError(f"setting {name!r:.40} is {type(value).__name__}; expected a number, a text or a boolean")
    if settings:
        document = document.replace(settings=document.settings.replace(**settings))
    r.change(f"set {', '.join(changes)}", document, merge=("set", *sorted(changes)))
    return {}


@_action("toggle")
def _toggle(r: Request) -> Reply:
    r.session.shown = r.fields.choice("shown", ("edited", "original"))
    r.plain()
    r.session.touch()
    return {}


@_action("matches")
def _matches(r: Request) -> Reply:
    on = r.fields.boolean("on")
    quantile = r.fields.number("quantile", *RANGES["quantile"][:2], default=r.document.quantile)
    r.plain()
    scan = on and not r.session.scan_ready()
    if scan:
        jobs.matches(r)  # first: where it is refused, matches stay off
    r.change("matches", r.document.replace(matches=on, quantile=quantile), merge=("matches", on))
    return None if scan else {}


# -- the stack and time ------------------------------------------------------------------------------------------------


@_action("stack")
def _stack(r: Request) -> Reply:
    edits = {e.id: e for e in r.document.edits}
    if "order" in r.fields:
        order = r.fields.any("order")
        r.plain()
        if not isinstance(order, list) or sorted(map(repr, order)) != sorted(map(repr, edits)):
            raise ValueError(f"order is {order!r:.60}; expected the ids {', '.join(map(str, edits))}, each once")
        r.change("order of the edits", r.document.replace(edits=tuple(edits[i] for i in order)))
        return {}
    name = "remove" if "remove" in r.fields else "edit"
    chosen = r.fields.any(name)
    if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen not in edits:
        raise ValueError(
            f"{name} is {chosen!r:.40}; expected the id of an edit: {', '.join(map(str, edits)) or 'none'}"
        )
    edit = edits[chosen]
    if name == "remove":
        r.plain()
        left = tuple(e for e in r.document.edits if e.id != chosen)
        r.change(f"remove {edit.name}", r.document.replace(edits=left))
        return {}
    changes: dict[str, Any] = {}
    if "on" in r.fields:
        changes["on"] = r.fields.boolean("on")
    if "strength" in r.fields:
        changes["strength"] = r.fields.number("strength", *RANGES["strength"][:2])
    if "name" in r.fields:
        changes["name"] = r.fields.name("name")
    r.plain()
    if not changes:
        raise ValueError("expected on, strength or name")
    document = r.document.with_edit(chosen, **changes)
    merge = ("stack", chosen) if set(changes) == {"strength"} else None  # a slider, not a switch
    r.change(f"{', '.join(changes)} of {edit.name}", document, merge)
    return {}


@_action("revert")
def _revert(r: Request) -> Reply:
    r.plain()
    r.change("revert", r.document.replace(edits=()))
    return {}


@_action("undo")
def _undo(r: Request) -> Reply:
    r.plain()
    r.session.step_back()
    return {}


@_action("redo")
def _redo(r: Request) -> Reply:
    r.plain()
    r.session.step_forward()
    return {}


@_action("new")
def _new(r: Request) -> Reply:
    r.plain()
    d = r.document
    fresh = Document(d.layer, d.settings, strip=d.strip, numbers=d.numbers, edits=d.edits, brought=d.brought)
    r.change("new edit", fresh)
    return {}


# -- jobs --------------------------------------------------------------------------------------------------------------

for _name in ("execute", "erase", "search", "hint"):
    _ACTIONS[_name] = getattr(jobs, _name)


@_action("cancel")
def _cancel(r: Request) -> Reply:
    r.plain()
    r.session.cancel()
    return {}


# -- files -------------------------------------------------------------------------------------------------------------

for _name in ("save", "load", "names", "upload", "snapshot", "download", "gallery"):
    _ACTIONS[_name] = getattr(files, _name)


# -- reads -------------------------------------------------------------------------------------------------------------


@_read("pictures")
def _pictures(r: Request) -> Reply:
    session, generator = r.session, r.session.model.generator
    wanted = r.fields.any("numbers")
    if not isinstance(wanted, list) or len(wanted) > PICTURES:
        raise ValueError(f"numbers: expected a list of at most {PICTURES} picture numbers, got {wanted!r:.60}")
    numbers = [_known_picture(r, n) for n in wanted]
    size = min(r.fields.integer("size", 8, 4096), generator.image_size)
    weights = r.fields.text("weights") if "weights" in r.fields else "edited"
    r.plain()
    names = {"edited": session.model.weights(), "original": session.model.weights([])}
    names = {**names, **{v: v for v in names.values()}}
    if weights not in names:
        raise ValueError(f"weights {weights!r:.40} are gone: expected edited, original or the hash of one of them")
    original = names[weights] == names["original"]
    # Of what is not kept, a few at a time: what is more urgent comes between.
    drawn = r.parts.setdefault(names[weights], {})
    while missing := [n for n in dict.fromkeys(numbers) if n not in drawn][:PICTURES_AT_ONCE]:
        kept = session.model.has_pictures(missing, original)
        pictures = session.model.pictures(missing, r.document.latents, original)
        drawn.update((n, resized(p, size)) for n, p in zip(missing, pictures, strict=True))
        if not kept and not drawn.keys() >= set(numbers):
            raise NotYet
    data, columns, media = sheet([drawn[n] for n in numbers], size)
    reply = {"numbers": numbers, "size": size, "columns": columns, "weights": names[weights], "media": media}
    return reply, [data]


def _known_picture(r: Request, number: Any) -> int:
    if not isinstance(number, bool) and isinstance(number, int) and number in _used(r.document):
        return number
    return checked_integer("numbers", number, 0, r.session.model.samples - 1)


def _used(d: Document) -> set[int]:
    regions = (d.painted, d.object, d.paste, d.query, *d.context, *d.protect)
    return {*d.brought, *d.numbers, *(g.image for g in regions if g is not None)}


@_read("state")
def _state(r: Request) -> Reply:
    r.plain()
    r.session.send_state(r.client)
    return {}


@_read("mask")
def _mask(r: Request) -> Reply:
    wanted = r.fields.text("hash")
    r.plain()
    d = r.document
    for region in (d.painted, d.object, d.paste, d.query, *d.context, *d.protect):
        if region is not None and region.mask.hash == wanted:
            return {"hash": wanted, "image": region.image, "size": region.mask.size}, [region.mask.bits]
    raise ValueError(f"mask {wanted!r:.40} is gone: expected the hash of one in the state")


@_read("outline")
def _outline(r: Request) -> Reply:
    wanted = r.fields.any("numbers")
    if not isinstance(wanted, list) or len(wanted) > PICTURES:
        raise ValueError(f"numbers: expected a list of at most {PICTURES} picture numbers, got {wanted!r:.60}")
    numbers = [_known_picture(r, n) for n in wanted]
    quantile = r.fields.number("quantile", *RANGES["quantile"][:2], default=r.document.quantile)
    r.plain()
    masks = jobs.outlines(r.session, numbers, quantile)
    return {"numbers": numbers, "quantile": quantile}, [m.bits for m in masks]


for _name in ("files", "help"):
    _READS[_name] = getattr(files, f"read_{_name}")
_READS["gallery"] = files.read_gallery


def known(kind: str) -> Sequence[str]:
    """The actions ("do") or reads ("get") there are."""
    return tuple(_ACTIONS if kind == "do" else _READS)
