"""The module as other hosts of anywidget use it: from a blob, in a shadow root with its style, behind a bare model.

Neither VS Code nor Colab nor marimo runs here. What they do with a widget's module does: `render` gets a model and an
element and returns what undoes it; binary comes as DataView; marimo puts the element into a shadow root.
"""

from __future__ import annotations

import base64
import json
import queue

import pytest
from interface_support import Screen, mask_of

from pyrewrite.interface import Session, module

pytestmark = pytest.mark.browser

HOST = """<!doctype html><html lang="en"><body><div id="cell" style="width: 1200px"></div></body></html>"""

# A host with one widget. `ask` and `take` are this test: a message into the session, and what it has said since.
RENDER = """async ({ module, style, shadow, kernel }) => {
  const listeners = new Set();
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const text = (buffer) => btoa(Array.from(new Uint8Array(buffer), (b) => String.fromCharCode(b)).join(""));
  const model = {
    get: () => undefined,
    on: (name, listener) => name === "msg:custom" && listeners.add(listener),
    off: (name, listener) => listeners.delete(listener),
    send(message, callbacks, buffers = []) {
      if (kernel === "disposed") throw new Error("Kernel is disposed");
      if (kernel) window.ask(JSON.stringify(message), buffers.map(text));
    },
  };
  const hear = async () => {
    for (const [message, buffers] of await window.take()) {
      const views = buffers.map(bytes).map((b) => new DataView(b.buffer, b.byteOffset, b.byteLength));
      for (const listener of [...listeners]) listener(JSON.parse(message), views);
    }
    if (!window.over) setTimeout(hear, 20);
  };
  if (kernel === true) hear();
  const cell = document.getElementById("cell");
  const root = shadow ? cell.attachShadow({ mode: "open" }) : cell;
  root.append(Object.assign(document.createElement("style"), { textContent: style }));
  const el = root.appendChild(document.createElement("div"));
  const address = URL.createObjectURL(new Blob([module], { type: "text/javascript" }));
  const widget = (await import(address)).default;
  window.undo = await widget.render({ model, el });
  window.listeners = listeners;
  window.el = el;
}"""


@pytest.fixture(scope="module")
def session(peeps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    running = Session(peeps, samples=24, folder=folder / "edits", cache_dir=False, strip="0-7", name="hosts")
    yield running
    running.close()


@pytest.fixture
def render(browser, session):
    """render(shadow=..., kernel=...) -> a Screen on a page of a host that shows the session."""
    opened = []

    def show(shadow=True, kernel=True):
        said: queue.SimpleQueue = queue.SimpleQueue()
        client = session.connect(lambda message, buffers: said.put((message, buffers)))
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        opened.append((context, client))

        def ask(message, buffers):
            session.receive(client, json.loads(message), [base64.b64decode(b) for b in buffers])

        def take():
            some = []
            while not said.empty():
                message, buffers = said.get()
                some.append((json.dumps(message), [base64.b64encode(b).decode() for b in buffers]))
            return some

        page.expose_function("ask", ask)
        page.expose_function("take", take)
        page.route("http://host.example/", lambda route: route.fulfill(body=HOST, content_type="text/html"))
        page.goto("http://host.example/")
        screen = Screen(page)
        texts = {"module": module.module(), "style": module.style()}
        page.evaluate(RENDER, {**texts, "shadow": shadow, "kernel": kernel})
        return screen

    yield show
    for context, client in opened:
        session.disconnect(client)
        context.close()


def ready(screen):
    screen.page.wait_for_selector(".pyrewrite[data-ready]")
    screen.page.wait_for_selector('.pyrewrite .tile[data-number="0"] .surface[data-drawn]')


def painted(screen, session):
    """The session's mask. The page must run meanwhile: it carries the messages."""
    for _ in range(100):
        if mask_of(session) is not None:
            return mask_of(session)
        screen.page.wait_for_timeout(50)
    raise AssertionError("nothing was painted")


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow root", "plain"])
def test_it_paints_copies_and_pastes(render, session, shadow):
    screen = render(shadow)
    ready(screen)
    assert screen.page.locator(".pyrewrite").get_attribute("data-host") == "widget"
    screen.stroke(screen.tile(2), [(0.3, 0.3), (0.3, 0.7)])
    mask = painted(screen, session)
    assert mask[int(0.3 * 128), int(0.3 * 128) : int(0.7 * 128)].all()
    screen.tile(2).press("c")
    screen.page.wait_for_selector(".pyrewrite .object.has")
    screen.tile(2).press("v")
    screen.page.wait_for_selector(".pyrewrite .paste.has")
    screen.page.wait_for_selector('.pyrewrite .paste .surface[data-live="now"]')
    screen.shot("host-shadow" if shadow else "host-plain")
    screen.menu("new")
    screen.page.wait_for_selector(".pyrewrite .object:not(.has)")
    assert screen.problems == []


def test_what_is_being_typed_stays(render, session):
    screen = render()
    ready(screen)
    numbers = screen.page.locator(".pyrewrite input[name=numbers]")
    numbers.fill("0-")
    revision = screen.page.locator(".pyrewrite").get_attribute("data-revision")
    session.receive(session.connect(lambda *_: None), {"type": "do", "id": 1, "action": "set", "rank": 7})
    screen.page.wait_for_selector(f'.pyrewrite:not([data-revision="{revision}"])')
    assert numbers.input_value() == "0-"
    numbers.press_sequentially("3")
    numbers.press("Enter")
    screen.page.wait_for_selector('.pyrewrite .tile[data-number="4"]', state="detached")
    session.receive(session.connect(lambda *_: None), {"type": "do", "id": 2, "action": "strip", "text": "0-7"})


def test_undoing_a_render_leaves_nothing(render, session):
    screen = render()
    ready(screen)
    assert screen.page.evaluate("window.listeners.size") == 1
    screen.page.evaluate("() => (window.undo(), window.el.remove())")
    assert screen.page.evaluate("window.listeners.size") == 0
    screen.page.evaluate("() => { document.body.className = 'dark'; document.body.click(); }")
    screen.page.wait_for_timeout(1200)  # more than one turn of its clock
    assert screen.problems == []


@pytest.mark.parametrize("kernel", ["disposed", None])
def test_a_saved_notebook_without_a_kernel_says_so(render, kernel):
    screen = render(kernel=kernel)
    screen.page.wait_for_selector(".pyrewrite .banner:visible")
    assert "kernel" in screen.page.locator(".pyrewrite .banner").inner_text()
    assert screen.problems == []


@pytest.mark.parametrize(
    ("host", "dark", "light"),
    [
        ("JupyterLab", "body.dataset.jpThemeLight = 'false'", "body.dataset.jpThemeLight = 'true'"),
        ("VS Code", "body.className = 'vscode-dark'", "body.className = 'vscode-light'"),
        ("Colab", "documentElement.setAttribute('theme', 'dark')", "documentElement.setAttribute('theme', 'light')"),
        ("marimo", "body.className = 'dark dark-theme'", "body.className = 'light light-theme'"),
    ],
)
def test_the_theme_is_the_hosts(render, host, dark, light):
    screen = render()
    ready(screen)
    for system in ("light", "dark"):  # the host's word is above the system's
        screen.page.emulate_media(color_scheme=system)
        for change, theme in ((dark, "dark"), (light, "light")):
            screen.page.evaluate(f"document.{change}")
            screen.page.wait_for_selector(f'.pyrewrite[data-theme="{theme}"]', timeout=5000)
