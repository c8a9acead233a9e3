"""The widget in JupyterLab: painted, solved, saved, and found again after a reload, in a real browser."""

from __future__ import annotations

import json
import os

import nbformat
import pytest

pytest.importorskip("anywidget", reason="the widget needs anywidget: pip install 'pyrewrite[ui]'")
pytest.importorskip("jupyterlab", reason="the story needs JupyterLab: pip install 'pyrewrite[test]'")

import notebook_support
from interface_support import Screen, until

pytestmark = pytest.mark.browser

CELLS = [
    "from pyrewrite.interface import RewriteApp\n"
    "app = RewriteApp('peeps', samples=60, strip='0-11', folder='edits')\n"
    "app",
    "print('edits:', len(app.session.document.edits), 'clients:', len(app.session._clients))",
]
HAT, BALD = 0, 10  # pictures of the bundled generator: one with a hat, one without hair
RUN = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
RUN_LAST = "window.jupyterapp.commands.execute('notebook:run-cell')"  # the one that is selected after RUN
SAVE = "window.jupyterapp.commands.execute('docmanager:save')"
DARK = "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
KERNEL = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


@pytest.fixture
def lab(tmp_path):
    """(address of a notebook in a JupyterLab of its own, the notebook's path)."""
    path = tmp_path / "notebooks" / "rewrite.ipynb"
    path.parent.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata.kernelspec = {"name": notebook_support.KERNEL, "display_name": "tests", "language": "python"}
    nbformat.write(notebook, path)
    environment = notebook_support.environment(tmp_path)
    with notebook_support.jupyterlab(path.parent, environment) as (address, token):
        yield f"{address}lab/tree/{path.name}?token={token}", path


@pytest.fixture
def screen(browser):
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    opened = Screen(context.new_page())
    opened.page.set_default_timeout(90_000)
    yield opened
    context.close()


def drawn(screen, number):
    """Some bytes of a picture as it is drawn."""
    return screen.tile(number).locator("canvas.picture").evaluate("el => el.toDataURL()")


def outputs(path):
    cells = json.loads(path.read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_the_story_in_jupyterlab(lab, screen):
    address, path = lab
    page = screen.page
    page.goto(address)
    page.wait_for_function(KERNEL)
    page.evaluate(RUN)
    screen.ready()
    original = drawn(screen, BALD)

    # Copy a hat, paste it, one more place: with keys that JupyterLab uses otherwise (b, a: insert a cell; x: cut it;
    # c, v: copy and paste cells).
    screen.tile(HAT).focus()
    for _ in range(7):
        page.keyboard.press("]")  # a wide brush
    screen.cap(screen.tile(HAT))
    page.wait_for_selector(f'.pyrewrite .tile.painted[data-number="{HAT}"]')
    for key in "bxc":
        page.keyboard.press(key)
    page.wait_for_selector(".pyrewrite .object.has")
    screen.cap(screen.tile(BALD))
    page.wait_for_selector(f'.pyrewrite .tile.painted[data-number="{BALD}"]')
    page.keyboard.press("v")
    page.wait_for_selector(".pyrewrite .paste.has")
    screen.cap(screen.tile(4))
    page.wait_for_selector('.pyrewrite .tile.painted[data-number="4"]')
    page.keyboard.press("a")
    page.wait_for_selector(".pyrewrite .contexts .thumb")
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == len(CELLS)
    page.wait_for_selector('.pyrewrite .paste .surface[data-live="now"]')
    page.wait_for_selector('.pyrewrite .row .surface[data-live="now"]')
    screen.shot("jupyterlab")

    # Execute with few steps; original and edited.
    page.locator(".pyrewrite .more > summary").click()
    steps = page.locator(".pyrewrite input[name=steps-number]")
    steps.fill("21")
    steps.press("Enter")
    screen.press("execute")
    page.wait_for_selector(".pyrewrite .edits > li")
    page.wait_for_selector('.pyrewrite[data-job=""]')
    until(lambda: drawn(screen, BALD) != original)
    edited = drawn(screen, BALD)
    screen.tile(BALD).focus()
    page.keyboard.press("t")
    page.wait_for_selector('.pyrewrite .switch button[aria-pressed="true"]:text("Original")')
    until(lambda: drawn(screen, BALD) == original)
    page.keyboard.press("t")
    until(lambda: drawn(screen, BALD) == edited)

    # The cells run again: a new widget shows the document, and what nobody sees any more is not sent either.
    page.evaluate(RUN)
    page.wait_for_selector(".pyrewrite .edits > li")
    screen.ready()

    def said():
        page.evaluate(RUN_LAST)
        return page.locator(".jp-OutputArea-output pre").last.inner_text()

    until(lambda: "edits: 1 clients: 1" in said(), 30)

    # The theme is the host's.
    assert page.locator(".pyrewrite").get_attribute("data-theme") == "light"
    page.evaluate(DARK)
    page.wait_for_selector('.pyrewrite[data-theme="dark"]')
    screen.shot("jupyterlab-dark")

    # Saved: small, and without pictures.
    page.evaluate(SAVE)
    until(lambda: any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs(path)))
    text = path.read_text()
    assert len(text) < 60_000
    assert "image/" not in text
    assert max(len(line) for line in text.splitlines()) < 4_000  # nothing encoded
    assert set(outputs(path)[0]["data"]) == {"application/vnd.jupyter.widget-view+json", "text/plain"}

    # A reload of the browser's page: the kernel still has it all.
    page.reload()
    page.wait_for_function(KERNEL)
    page.wait_for_selector(".pyrewrite .edits > li")
    page.wait_for_selector(".pyrewrite .object.has")
    screen.ready()
    assert drawn(screen, BALD) == edited

    problems = [p for p in screen.problems if "blob:" in p or "widget" in p.lower() or "pyrewrite" in p]
    assert problems == []
    written = {name for name in os.listdir(path.parent) if name != ".ipynb_checkpoints"}  # JupyterLab's
    assert written == {path.name}
