"""Chromium for the browser tests, and the generator that all of them show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """Debian's Chromium, or what CHROMIUM names."""
    named = os.environ.get("CHROMIUM")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    return named or next((path for path in found if path), None)


def browser_skip_reason() -> str:
    """Why tests marked browser cannot run here; empty where they can."""
    if chromium() is None:
        return "there is no Chromium: apt-get install chromium, or CHROMIUM=/path"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError as error:
        return f"no playwright: {error}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "browser" in item.keywords]
    reason = browser_skip_reason() if marked else ""
    for item in marked:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """One Chromium a module: playwright's loop must be gone before another test runs asyncio."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def peeps():
    from pyrewrite import load_generator

    return load_generator("peeps")
