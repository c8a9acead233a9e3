"""The edit record: what a user chose, as JSON that the official tool reads and writes too.

The record is the official one (`object`, `paste`, `key`, `query`; masks are PNG data URLs) with one more key,
`pyrewrite`, that says which generator, layer and settings it belongs to. Unknown keys are kept as they are.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ._files import write_atomically
from ._finite import all_finite
from .errors import EditError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
METHODS = ("low_rank", "projected", "least_squares")
TARGETS = ("paste", "context")
KEY_METHODS = ("zca", "mean", "svd", "gandissect")
WEIGHTINGS = ("box", "alpha")
CROPS = ("surroundings", "alone")


class Selection(NamedTuple):
    """A painted region of one numbered image: `mask` is a PNG data URL, white where painted."""

    image: int
    mask: str


@dataclass(frozen=True)
class Place:
    """How the object lands in one picture: dy, dx in picture pixels from the centre of that picture's mask; on=False:
    not at all, the picture is context only.
    """

    dy: int = 0
    dx: int = 0
    on: bool = True


@dataclass(frozen=True)
class Settings:
    """How an edit is solved. Every field can stand in the record's `pyrewrite.settings`.

    method: "low_rank" (Adam on Lambda), "projected" (Adam on the weights, projected every `project_every` steps;
        the official default) or "least_squares" (closed form).
    rank: number of directions r.
    key_method: how the context becomes directions: "zca", "mean", "svd" or "gandissect".
    targets: "paste" (the object is pasted into one image) or "context" (into the paste and every context image).
    preserve: weight mu of the penalty on the expected change over all keys.
    shrinkage: a in C + a mean(eigenvalue) I before whitening.
    weighting: "box" weighs all pixels of the pasted box alike, "alpha" weighs them by the object's mask.
    margin: pixels of the value map around the pasted box that belong to the goal too, as the picture has them: the
        edit learns where to stop. They weigh as much as the object.
    crop: "surroundings" convolves the crop with the keys around it, "alone" with zeros around it (as published).
    protect_rank: dimensions of the protected keys, whitened, that the edit may not touch (masks in `Edit.protect`).
    warm_start: begin the loop at the closed form instead of zero ("low_rank" only).
    steps, lr, project_every: the optimisation loop.
    samples, seed, truncation: the statistics, and the images that the numbers of the record mean.
    """

    method: str = "low_rank"
    rank: int = 10
    key_method: str = "zca"
    targets: str = "context"
    preserve: float = 0.1
    shrinkage: float = 0.3
    weighting: str = "box"
    margin: int = 2
    crop: str = "surroundings"
    protect_rank: int = 20
    warm_start: bool = True
    steps: int = 301
    lr: float = 0.05
    project_every: int = 10
    samples: int = 1000
    seed: int = 1
    truncation: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise EditError(
                    f"setting {name!r} is {getattr(self, name)!r:.60}; expected one of {', '.join(allowed)}"
                )
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EditError(f"setting {name!r} is {value!r:.60}; expected a whole number of at least {least}")
        for name, least in _NUMBERS.items():
            value = getattr(self, name)
            finite = (
                isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
            )
            if not finite or (value < least if least is not None else value <= 0):
                bound = "above 0" if least is None else f"of at least {least}"
                raise EditError(f"setting {name!r} is {value!r:.60}; expected a finite number {bound}")
        if not isinstance(self.warm_start, bool):
            raise EditError(f"setting 'warm_start' is {self.warm_start!r}; expected true or false")

    def replace(self, **changes: Any) -> Settings:
        """A copy with some settings changed; an unknown name is an EditError."""
        unknown = sorted(set(changes) - set(SETTING_NAMES))
        if unknown:
            raise EditError(f"unknown setting {unknown[0]!r:.60}; expected one of {', '.join(SETTING_NAMES)}")
        return dataclasses.replace(self, **changes)


_CHOICES = {"method": METHODS, "key_method": KEY_METHODS, "targets": TARGETS, "weighting": WEIGHTINGS, "crop": CROPS}
_INTEGERS = {"rank": 1, "steps": 1, "project_every": 1, "samples": 1, "seed": 0, "margin": 0, "protect_rank": 1}
_NUMBERS = {"preserve": 0, "shrinkage": 0, "lr": None, "truncation": 0}  # None: must be above zero
SETTING_NAMES = tuple(f.name for f in dataclasses.fields(Settings))

# The published behaviour: the defaults of the official notebook (Bau et al. 2020 and its code).
OFFICIAL = {
    "method": "projected",
    "rank": 1,
    "key_method": "zca",
    "targets": "paste",
    "preserve": 0.0,
    "shrinkage": 0.0,
    "weighting": "box",
    "margin": 0,
    "crop": "alone",
    "warm_start": False,
    "steps": 2001,
    "lr": 0.05,
    "project_every": 10,
}
PRESETS = {"official": OFFICIAL}


@dataclass
class Edit:
    """One edit: copy `object`, paste it at `paste`, in the context of `context`.

    object, paste, query: a Selection or None. context: the record's `key`, a list of Selections (empty: the paste is
    the context). layer: name such as "layer8" or None. settings: only what the record says, as a dict.
    protect: Selections of what must not change. places: picture number -> Place, for pictures where the object does not
    land at the centre of the mask or not at all. latents: picture number -> w (w_dim, or num_ws x w_dim, float32), for
    pictures that are not among the generator's numbered ones.
    images: what else than seed and truncation decides the numbered pictures, where it is not the default, as
    `Generator.settings()` says it: {"label": 3, "noise": "none", "truncation_layers": 8}. None: the record does not
    say.
    """

    object: Selection | None = None
    paste: Selection | None = None
    context: list[Selection] = field(default_factory=list)
    query: Selection | None = None
    name: str | None = None
    layer: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, str] | None = None
    protect: list[Selection] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)
    images: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read a record written by this package or by the official tool.

        Raises FileNotFoundError, or EditError naming the file and the field at fault.
        """
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, a number or a nesting beyond all use
            raise EditError(f"{path}: not an edit record: expected JSON ({error})") from error
        edit = cls.from_dict(record, source=str(path))
        if edit.name is None:
            edit.name = path.stem
        return edit

    @classmethod
    def from_dict(cls, record: Any, source: str = "edit record") -> Edit:
        """Build from the parsed JSON; `source` names it in errors."""
        if not isinstance(record, dict):
            raise EditError(f"{source}: expected a JSON object with 'object', 'paste', 'key', got {_kind(record)}")
        known = {"object", "paste", "key", "query", "pyrewrite"}
        if not known & set(record):
            raise EditError(f"{source}: none of 'object', 'paste', 'key', 'query' is there: not an edit record")
        own = record.get("pyrewrite") or {}
        if not isinstance(own, dict):
            raise EditError(f"{source}: field 'pyrewrite' is {_kind(own)}; expected an object")
        version = own.get("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise EditError(
                f"{source}: field 'pyrewrite.version' is {version!r:.60}; this release reads {FORMAT_VERSION}"
            )
        settings = own.get("settings") or {}
        if not isinstance(settings, dict):
            raise EditError(f"{source}: field 'pyrewrite.settings' is {_kind(settings)}; expected an object")
        try:
            Settings().replace(**settings)
        except (EditError, TypeError) as error:
            raise EditError(f"{source}: field 'pyrewrite.settings': {error}") from error
        for name in ("name", "layer"):
            if own.get(name) is not None and not isinstance(own[name], str):
                raise EditError(f"{source}: field 'pyrewrite.{name}' is {_kind(own[name])}; expected a string")
        generator = own.get("generator")
        if generator is not None and not (
            isinstance(generator, dict) and all(isinstance(value, str) for value in generator.values())
        ):
            raise EditError(
                f"{source}: field 'pyrewrite.generator' is {generator!r:.60}; expected its family and its hash"
            )
        return cls(
            object=_selection(record.get("object"), source, "object"),
            paste=_selection(record.get("paste"), source, "paste"),
            context=_selections(record.get("key"), source, "key"),
            query=_selection(record.get("query"), source, "query"),
            name=own.get("name"),
            layer=own.get("layer"),
            settings=dict(settings),
            generator=generator,
            protect=_selections(own.get("protect"), source, "pyrewrite.protect"),
            places=_places(own.get("places"), source),
            latents=_latents(own.get("latents"), source),
            images=_images(own, source),
            extra={k: v for k, v in record.items() if k not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready data; the official tool reads it."""
        record: dict[str, Any] = dict(self.extra)
        for name in ("object", "paste", "query"):
            if (selection := getattr(self, name)) is not None:
                record[name] = list(selection)
        if self.context:
            record["key"] = [list(s) for s in self.context]
        own = {
            "version": FORMAT_VERSION,
            "name": self.name,
            "generator": self.generator,
            "layer": self.layer,
            "settings": self.settings or None,
            "protect": [list(s) for s in self.protect] or None,
            "places": {str(n): dataclasses.asdict(p) for n, p in self.places.items()} or None,
            "images": self.images or None,
            "latents": {str(n): _latent_url(w) for n, w in self.latents.items()} or None,
        }
        record["pyrewrite"] = {k: v for k, v in own.items() if v is not None}
        return record

    def save(self, path: str | Path) -> None:
        """Write the record; the file is whole or as it was."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1).encode())

    def resolve(self, preset: str | None = None, **overrides: Any) -> Settings:
        """The settings to solve with: defaults, then the record's, then the preset's, then `overrides`."""
        if preset is not None and preset not in PRESETS:
            raise EditError(f"unknown preset {preset!r}; expected {', '.join(map(repr, PRESETS))} or None")
        chosen = {**self.settings, **(PRESETS[preset] if preset else {})}
        return Settings().replace(**{**chosen, **{k: v for k, v in overrides.items() if v is not None}})


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _selection(value: Any, source: str, field_name: str) -> Selection | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise EditError(f"{source}: field {field_name!r}: expected [image number, mask data URL], got {_kind(value)}")
    image, mask = value
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < 1 << 31:
        raise EditError(f"{source}: field {field_name!r}: image number {image!r:.60}; expected a whole number from 0")
    if not isinstance(mask, str):
        raise EditError(f"{source}: field {field_name!r}: the mask is {_kind(mask)}; expected a PNG data URL")
    return Selection(image, mask)


def _selections(value: Any, source: str, field_name: str) -> list[Selection]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise EditError(f"{source}: field {field_name!r} is {_kind(value)}; expected a list of selections")
    chosen = (_selection(v, source, f"{field_name}[{i}]") for i, v in enumerate(value))
    return [s for s in chosen if s is not None]


def _numbered(value: Any, source: str, field_name: str) -> dict[int, Any]:
    """A JSON object whose names are image numbers."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EditError(f"{source}: field {field_name!r} is {_kind(value)}; expected an object")
    for name in value:
        if not (isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) < 10):
            raise EditError(f"{source}: field {field_name!r}: {name!r} is not an image number")
    return {int(name): item for name, item in value.items()}


def _places(value: Any, source: str) -> dict[int, Place]:
    places = {}
    for number, item in _numbered(value, source, "pyrewrite.places").items():
        what = f"{source}: field 'pyrewrite.places.{number}'"
        if not isinstance(item, dict) or set(item) - {"dy", "dx", "on"}:
            raise EditError(f"{what}: expected an object of dy, dx and on, got {item!r:.60}")
        for name in ("dy", "dx"):
            shift = item.get(name, 0)
            if isinstance(shift, bool) or not isinstance(shift, int) or abs(shift) > 1 << 16:
                raise EditError(f"{what}: {name} is {shift!r:.60}; expected a whole number of pixels")
        if not isinstance(item.get("on", True), bool):
            raise EditError(f"{what}: on is {item['on']!r:.60}; expected true or false")
        places[number] = Place(**item)
    return places


_IMAGES = {
    "label": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "noise": (lambda value: value in ("fixed", "none"), "fixed or none: edits need the same pictures each time"),
    "truncation_layers": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
}


def _images(own: dict[str, Any], source: str) -> dict[str, Any] | None:
    """What decides the numbered pictures. A record that says its truncation and not these means the defaults; others,
    such as the official ones, say nothing.
    """
    value = own.get("images")
    if value is None:
        return {} if "truncation" in (own.get("settings") or {}) else None
    if not isinstance(value, dict):
        raise EditError(f"{source}: field 'pyrewrite.images' is {_kind(value)}; expected an object")
    for name, given in value.items():
        if name not in _IMAGES:
            raise EditError(f"{source}: field 'pyrewrite.images': unknown {name!r}; expected {', '.join(_IMAGES)}")
        fits, expected = _IMAGES[name]
        if not fits(given):
            raise EditError(f"{source}: field 'pyrewrite.images.{name}' is {given!r:.60}; expected {expected}")
    return dict(value)


_LATENT_URL = "data:application/octet-stream;base64,"  # of an .npy file


def _latents(value: Any, source: str) -> dict[int, Tensor]:
    latents = {}
    for number, url in _numbered(value, source, "pyrewrite.latents").items():
        what = f"{source}: field 'pyrewrite.latents.{number}'"
        if not isinstance(url, str) or not url.startswith(_LATENT_URL):
            raise EditError(f"{what}: expected a data URL of an .npy file, got {url!r:.60}")
        try:
            data = base64.b64decode(url[len(_LATENT_URL) :], validate=True)
        except binascii.Error as error:
            raise EditError(f"{what}: the data URL is damaged ({error})") from error
        latents[number] = read_latent(data, what)
    return latents


def read_latent(data: bytes, what: str = "latent") -> Tensor:
    """The bytes of an .npy file -> its float32 tensor. EditError for anything but finite floating-point numbers."""
    import numpy as np
    import torch

    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError, OSError) as error:
        raise EditError(f"{what}: expected an .npy file ({error})") from error
    if dtype.kind != "f" or (fortran and len(shape) > 1):
        raise EditError(f"{what}: the .npy file holds {dtype}; expected floating-point numbers in C order")
    count = 1
    for length in shape:
        count *= length
    body = data[file.tell() :]
    if count * dtype.itemsize != len(body):  # before anything is allocated: the header may claim any size
        raise EditError(f"{what}: the .npy file holds {len(body)} bytes; its header says {count} x {dtype.itemsize}")
    values = torch.from_numpy(np.frombuffer(body, dtype).astype(np.float32).reshape(shape))
    if not all_finite(values):
        raise EditError(f"{what}: the numbers are not finite")
    return values


def _latent_url(latent: Tensor) -> str:
    import numpy as np

    file = io.BytesIO()
    np.save(file, latent.detach().cpu().float().numpy())
    return _LATENT_URL + base64.b64encode(file.getvalue()).decode("ascii")
