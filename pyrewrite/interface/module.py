"""The front end as both hosts need it: one ES module and one style sheet, joined from the parts in `front`.

A notebook's widget can hold only one module. So the parts import from one another by name, on one line each and
only from parts that come before, and are joined as they are, without those lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

FRONT = resources.files("pyrewrite.interface") / "front"
PARTS = (
    "elements.js",  # what all others use comes first
    "masks.js",
    "connections.js",
    "client.js",
    "surface.js",
    "words.js",
    "build.js",
    "settings.js",
    "pictures.js",
    "edits.js",
    "hands.js",
    "dialogs.js",
    "keys.js",
    "app.js",  # which puts them together
)
STYLES = ("frame.css", "controls.css", "pictures.css")

_IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./([\w.]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?:async function|function|class|const) (\w+)", re.MULTILINE)


def read(name: str) -> str:
    return (FRONT / name).read_text(encoding="utf-8")


def join(parts: Sequence[tuple[str, str]]) -> str:
    """(name, text) of modules, in order -> the text of one module.

    ValueError for an import that no earlier part exports, for one that is written in another way, and for two
    exports of one name.
    """
    exported: dict[str, str] = {}
    joined = []
    for part, text in parts:
        for names, source in _IMPORT.findall(text):
            for name in names.split(", "):
                if exported.get(name) != source:
                    raise ValueError(f"{part} imports {name} from {source}, which does not export it before")
        body = _IMPORT.sub("", text)
        if re.search(r"^\s*import\b", body, re.MULTILINE):
            raise ValueError(f'{part}: expected imports such as `import {{ h }} from "./elements.js";` on one line')
        for name in _EXPORT.findall(body):
            if name in exported:
                raise ValueError(f"{part} and {exported[name]} both export {name}")
            exported[name] = part
        joined.append(f"// {part}\n{body}")
    return "\n".join(joined)


def module() -> str:
    """The ES module of both hosts: `render({ model, el })` of its default export for a widget; on the page it mounts
    itself."""
    return join([(name, read(name)) for name in PARTS])


def style() -> str:
    """The style sheet of both hosts."""
    return "\n".join(read(name) for name in STYLES)
