"""Rewrite the rules of a pretrained image generator by low-rank changes of one layer's weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .edit import Edit, Selection, Settings
    from .generators import Generator, as_editable, load_generator, register_family, save_generator
    from .rewriting import EditWarning, LowRankPatch, Report, Rewriter, overlap, stack
    from .statistics import SecondMoment, collect

# Public names and where they live. They are imported when first used, so that `import pyrewrite` and the command line's
# --help do not wait for torch.
_EXPORTS = {
    "Edit": "edit",
    "Selection": "edit",
    "Settings": "edit",
    "Generator": "generators",
    "as_editable": "generators",
    "load_generator": "generators",
    "register_family": "generators",
    "save_generator": "generators",
    "EditWarning": "rewriting",
    "LowRankPatch": "rewriting",
    "Report": "rewriting",
    "Rewriter": "rewriting",
    "overlap": "rewriting",
    "stack": "rewriting",
    "SecondMoment": "statistics",
    "collect": "statistics",
}

__all__ = [
    "Edit",
    "EditWarning",
    "Generator",
    "LowRankPatch",
    "Report",
    "Rewriter",
    "SecondMoment",
    "Selection",
    "Settings",
    "__version__",
    "as_editable",
    "collect",
    "load_generator",
    "overlap",
    "register_family",
    "save_generator",
    "stack",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pyrewrite' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
