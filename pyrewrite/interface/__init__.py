"""The interface: `Session` holds one generator and one document and answers messages; a notebook shows it as the widget
`RewriteApp`, `serve` as a page. Those two need what `pip install 'pyrewrite[ui]'` brings, and are imported when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .session import Session

if TYPE_CHECKING:
    from .page import serve
    from .widget import RewriteApp

__all__ = ["RewriteApp", "Session", "serve"]

_HOSTS = {"RewriteApp": ("widget", "anywidget"), "serve": ("page", "tornado")}


def __getattr__(name: str) -> Any:
    if name not in _HOSTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, needed = _HOSTS[name]
    try:
        return getattr(importlib.import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("anywidget", "tornado"):
            raise
        message = f"{name} needs {needed}: pip install 'pyrewrite[ui]' ({error})"
        raise ModuleNotFoundError(message, name=error.name) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOSTS])
