"""The front end in Chromium: strokes land under the cursor at every zoom; keys, themes, reasons, errors, the line."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("tornado", reason="the page needs tornado: pip install 'pyrewrite[ui]'")

from interface_support import Screen, mask_of, until

from pyrewrite.interface import Session
from pyrewrite.interface.page import serve

pytestmark = pytest.mark.browser

SIZE = 128  # of the bundled generator
DOT = (0.25, 0.75)  # y, x in shares of the picture


@pytest.fixture(scope="module")
def session(peeps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("front")
    running = Session(peeps, samples=40, folder=folder / "edits", cache_dir=folder / "cache", strip="0-11")
    yield running
    running.close()


@pytest.fixture(scope="module")
def page(session):
    running = serve(session, port=0)
    yield running
    running.close()


@pytest.fixture(scope="module")
def tabs(browser):
    """One tab for each size and kind of screen: opening one takes longer than most tests."""
    opened = {}
    yield opened
    for screen in opened.values():
        screen.page.context.close()


@pytest.fixture
def screen(browser, page, request, session, tabs):
    """A page as another person would open it, on a new document."""
    options = {"viewport": {"width": 1280, "height": 800}, **getattr(request, "param", {})}
    kind = json.dumps(options)
    if kind not in tabs:
        tabs[kind] = Screen(browser.new_context(**options).new_page(), page.address)
    opened = tabs[kind]
    opened.page.emulate_media(color_scheme="light")
    opened.open()
    opened.page.evaluate(RESET)
    until(lambda: session.document.painted is None and session.document.object is None)
    yield opened
    opened.page.evaluate("localStorage.clear()")
    problems = opened.problems[:]
    opened.problems.clear()
    assert problems == []


# Other tests' leavings: a new edit on the same session, through a line of its own.
RESET = """async () => {
  const { frame, unframe } = await import("./pyrewrite.js");
  const socket = new WebSocket(new URL("socket", location.href.replace(/^http/, "ws")));
  socket.binaryType = "arraybuffer";
  await new Promise((go) => (socket.onopen = go));
  const todo = [{ action: "new" }, { action: "strip", text: "0-11" }, { action: "toggle", shown: "edited" }];
  await new Promise((go) => {
    let left = todo.length;
    socket.onmessage = ({ data }) => ["done", "error"].includes(unframe(data)[0].type) && --left === 0 && go();
    for (const fields of todo) socket.send(frame({ type: "do", id: fields.action, ...fields }));
  });
  socket.close();
}"""


def test_masks_in_the_module(screen):
    """The same arithmetic as numpy's: packing, and discs of pixels whose centres lie within the radius."""
    found = screen.page.evaluate(
        """async () => {
          const { Mask, frame, unframe } = await import("./pyrewrite.js");
          const one = new Mask(13); // 169 bits: the last byte is not full
          one.segment(6.5, 6.5, 6.5, 6.5, 3, true);
          const line = one.copy();
          line.segment(0, 0, 13, 13, 1.2, true);
          line.segment(6.5, 6.5, 6.5, 6.5, 1, false);
          const outside = new Mask(13);
          outside.segment(-50, -50, 50, 50, 0, true); // far out and back, and no width
          const back = Mask.unpack(13, line.pack());
          const [message, buffers] = unframe(frame({ a: "é" }, [line.pack(), new Uint8Array(0)]).buffer);
          return { one: [...one.pack()], line: [...line.pack()], pixels: one.pixels, outside: outside.pixels,
                   same: back.bits.every((b, i) => b === line.bits[i]), message, sizes: buffers.map((b) => b.length) };
        }"""
    )
    y, x = np.mgrid[:13, :13] + 0.5
    disc = (y - 6.5) ** 2 + (x - 6.5) ** 2 <= 9
    line = (disc | (np.abs(y - x) / np.sqrt(2) <= 1.2)) & ((y - 6.5) ** 2 + (x - 6.5) ** 2 > 1)
    assert found["pixels"] == disc.sum()
    assert found["one"] == np.packbits(disc).tolist()
    assert found["line"] == np.packbits(line).tolist()
    assert found["outside"] == 13
    assert found["same"]
    assert found["message"] == {"a": "é", "buffers": [22, 0]}
    assert found["sizes"] == [22, 0]


@pytest.mark.parametrize(
    "screen",
    [
        {},
        {"viewport": {"width": 1600, "height": 1000}, "device_scale_factor": 0.8},  # a browser's zoom of 80 %
        {"viewport": {"width": 853, "height": 533}, "device_scale_factor": 1.5},  # 150 %
        {"device_scale_factor": 2},
        {"viewport": {"width": 640, "height": 400}, "device_scale_factor": 2},  # 200 %
    ],
    ids=["100%", "80%", "150%", "dense", "200%"],
    indirect=True,
)
def test_strokes_land_under_the_cursor(screen, session):
    screen.page.locator("input[name=brush]").fill("0.03")
    radius = 0.03 * SIZE
    for tile in (72, 136, 296):  # pixels of a picture on the screen
        screen.page.locator("input[name=tile]").fill(str(tile))
        screen.ready()
        for number in (0, 11):  # the last one is scrolled into view
            screen.stroke(screen.tile(number), [DOT])
            mask = until(lambda number=number: mask_of(session) if painted_in(session) == number else None)
            y, x = np.nonzero(mask)
            pixel = SIZE / screen.tile(number).bounding_box()["width"]  # of the picture in one of the screen's
            assert abs(y.mean() + 0.5 - DOT[0] * SIZE) <= 0.6 + pixel
            assert abs(x.mean() + 0.5 - DOT[1] * SIZE) <= 0.6 + pixel
            # The brush is in the picture's pixels too.
            assert abs(mask.sum() - np.pi * radius**2) < 0.25 * np.pi * radius**2
        screen.press("clear")
        until(lambda: mask_of(session) is None)


def painted_in(session):
    return session.document.painted.image if session.document.painted else None


@pytest.mark.parametrize("zoom", ["0.8", "1.5"])
def test_strokes_land_under_the_cursor_in_a_zoomed_host(screen, session, zoom):
    screen.page.evaluate(f"document.body.style.zoom = '{zoom}'")
    screen.stroke(screen.tile(1), [DOT])
    mask = until(lambda: mask_of(session))
    y, x = np.nonzero(mask)
    assert abs(y.mean() + 0.5 - DOT[0] * SIZE) <= 1.6
    assert abs(x.mean() + 0.5 - DOT[1] * SIZE) <= 1.6


def test_a_stroke_is_one_mask_and_erasing_and_undo(screen, session):
    before = screen.page.locator(".pyrewrite").get_attribute("data-revision")
    screen.stroke(screen.tile(2), [(0.3, 0.2), (0.3, 0.8)])
    whole = until(lambda: mask_of(session))
    assert whole[int(0.3 * SIZE), int(0.2 * SIZE) : int(0.8 * SIZE)].all()
    assert before is not None
    screen.page.keyboard.press("]")
    screen.stroke(screen.tile(2), [(0.3, 0.5)], modifier="Control")
    mask = until(lambda: mask_of(session) if not mask_of(session)[int(0.3 * SIZE), SIZE // 2] else None)
    assert mask.sum() < whole.sum()
    until(lambda: "2 separate regions" in screen.page.locator(".pyrewrite .islands").inner_text())
    screen.page.keyboard.press("Escape")
    until(lambda: np.array_equal(mask_of(session), whole))
    screen.page.keyboard.press("Control+z")
    until(lambda: mask_of(session) is None)
    screen.page.keyboard.press("Control+y")
    until(lambda: np.array_equal(mask_of(session), whole))
    screen.stroke(screen.tile(3), [(0.5, 0.5)])  # a stroke in another picture clears this one's
    until(lambda: painted_in(session) == 3)


def test_escape_gives_a_stroke_up(screen, session):
    document = session.document
    screen.stroke(screen.tile(4), [(0.3, 0.2), (0.3, 0.8)], release=False)
    screen.page.keyboard.press("Escape")
    screen.page.mouse.up()
    screen.page.evaluate("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")
    assert session.settle()
    assert session.document is document


def test_brush_keys_are_remembered(screen):
    def brush():
        return screen.page.evaluate("JSON.parse(localStorage.getItem('pyrewrite')).brush")

    first = brush()
    for _ in range(3):
        screen.page.keyboard.press("]")
    larger = brush()
    assert larger == pytest.approx(first * 1.25**3)
    screen.page.reload()
    screen.ready()
    assert brush() == larger
    assert float(screen.page.locator("input[name=brush]").input_value()) == pytest.approx(larger, abs=0.002)
    screen.page.keyboard.press("[")
    assert brush() < larger


@pytest.mark.parametrize("screen", [{"has_touch": True}], indirect=True)
def test_touch_and_pen_paint(screen, session):
    box = screen.tile(5).bounding_box()
    line = screen.page.context.new_cdp_session(screen.page)
    at = [{"x": box["x"] + x * box["width"], "y": box["y"] + 0.4 * box["height"]} for x in (0.2, 0.5, 0.8)]
    line.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": at[:1]})
    for point in at[1:]:
        line.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    line.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    mask = until(lambda: mask_of(session))
    assert mask[int(0.4 * SIZE), int(0.2 * SIZE) : int(0.8 * SIZE)].all()
    pen = {"pointerType": "pen", "button": "left", "clickCount": 1, "force": 0.2}
    for kind, x in [("mousePressed", 0.3), ("mouseMoved", 0.7), ("mouseReleased", 0.7)]:
        where = {"x": box["x"] + x * box["width"], "y": box["y"] + 0.8 * box["height"]}
        line.send("Input.dispatchMouseEvent", {"type": kind, "buttons": 1, **where, **pen})
    until(lambda: mask_of(session)[int(0.8 * SIZE), int(0.35 * SIZE) : int(0.65 * SIZE)].all())


def test_keyboard_alone_paints_copies_and_nudges(screen, session):
    screen.tile(6).focus()
    for key in ["ArrowUp"] * 6 + ["Space"]:
        screen.page.keyboard.press(key)
    mask = until(lambda: mask_of(session))
    assert mask[SIZE // 2 - 12, SIZE // 2]
    screen.page.keyboard.press("c")
    screen.page.wait_for_selector(".pyrewrite .object.has")
    screen.page.keyboard.press("v")
    until(lambda: session.document.paste is not None)
    screen.page.wait_for_selector(".pyrewrite .paste.has")
    screen.page.locator(".pyrewrite .paste .surface").focus()
    screen.page.keyboard.press("ArrowRight")
    screen.page.keyboard.press("Shift+ArrowDown")
    until(lambda: 6 in session.document.places and session.document.places[6].dy == 8)
    assert session.document.places[6].dx == 1
    focus = screen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focus == "solid"


def test_nudges_faster_than_states_add_up(screen, session):
    screen.page.keyboard.press("]")
    screen.stroke(screen.tile(6), [(0.5, 0.4), (0.5, 0.6)])
    for action in ("copy", "paste"):
        screen.press(action)
    until(lambda: session.document.paste is not None)
    surface = screen.page.locator(".pyrewrite .paste .surface")

    def focused():  # a box that has just come may be put in place once more
        surface.focus()
        screen.page.wait_for_timeout(200)
        return surface.evaluate("e => e === document.activeElement")

    until(focused)
    for _ in range(30):
        screen.page.keyboard.press("ArrowRight")
    until(lambda: 6 in session.document.places and session.document.places[6].dx == 30)
    for _ in range(20):
        screen.page.keyboard.press("ArrowLeft")
    until(lambda: session.document.places[6].dx == 10)
    assert session.document.places[6].dy == 0


def test_the_page_says_what_comes_next(screen, session):
    """Each step in turn, the button that does it marked; hidden when one knows it, and back from the help sheet."""

    def now():
        return screen.page.locator(".pyrewrite .guide [aria-current=step]").inner_text()

    def marked(name):
        return screen.page.locator(f'.pyrewrite button.next[data-action="{name}"]').count() == 1

    assert now() == "Copy"
    assert screen.page.locator(".pyrewrite button.next").count() == 0
    for number, action, then in [
        (0, "copy", "Paste"),
        (1, "paste", "Add to context"),
        (2, "add_context", "Add to context"),
        (3, "add_context", "Add to context"),
        (4, "add_context", "Execute"),
    ]:
        screen.stroke(screen.tile(number), [(0.3, 0.4), (0.3, 0.6)])
        until(lambda action=action: marked(action))
        screen.press(action)
        until(lambda then=then: now() == then and not marked("copy") and not marked("paste"))
    assert "below" in screen.page.locator(".pyrewrite .advice").inner_text()
    guide = screen.page.locator(".pyrewrite .guide")
    guide.locator("button").click()
    until(lambda: not guide.is_visible())
    screen.page.reload()
    screen.ready()
    assert not guide.is_visible()
    screen.page.keyboard.press("?")
    screen.page.get_by_text("Show the steps again").click()
    until(guide.is_visible)


def test_typing_goes_on_into_the_dialog_that_was_asked_for(screen, session):
    """Not into the pictures below it, where m and p mean something else, however busy the session is."""
    screen.stroke(screen.tile(9), [(0.5, 0.5)])
    screen.press("copy")
    screen.page.keyboard.press("Control+s")
    screen.page.keyboard.type("map of p")
    screen.page.keyboard.press("Enter")
    until(lambda: "Saved as map of p." in screen.notices())
    assert not session.document.matches
    assert session.document.protect == ()
    screen.menu("load")
    screen.page.locator("dialog button", has_text="map of p").click()
    until(lambda: screen.page.locator("dialog").count() == 0)
    screen.page.locator(".pyrewrite .menu > summary").press("ArrowDown")  # a menu goes by arrows, too
    screen.page.keyboard.press("ArrowUp")
    assert "Snapshot" in screen.page.evaluate("document.activeElement.textContent")
    screen.page.keyboard.press("Escape")
    assert screen.page.evaluate("document.activeElement.textContent") == "File"


def test_buttons_that_are_off_say_why(screen):
    for action in ("copy", "paste", "add_context", "execute", "revert", "cancel"):
        button = screen.button(action)
        assert button.get_attribute("aria-disabled") == "true", action
        assert " not now: " in button.get_attribute("title"), action
    screen.button("copy").click(force=True)
    until(lambda: any("paint" in text for text in screen.notices()))


def test_errors_reach_the_page(screen):
    numbers = screen.page.locator("input[name=numbers]")
    numbers.fill("0-3,horse")
    numbers.press("Enter")
    screen.page.wait_for_selector(".pyrewrite .notice.error")
    assert any("'horse'" in text for text in screen.notices())
    assert screen.page.locator(".pyrewrite .notice.error").get_attribute("role") == "alert"


def test_files_that_are_none_are_refused_in_the_page(screen, tmp_path):
    picture = tmp_path / "me.png"
    picture.write_bytes(b"\x89PNG")
    screen.page.locator("input[type=file]").set_input_files(picture)
    screen.page.wait_for_selector(".pyrewrite .notice.error")
    assert any("me.png" in text and ".json" in text for text in screen.notices())
    edit = tmp_path / "edit.json"
    edit.write_text("{")
    screen.page.locator("input[type=file]").set_input_files(edit)
    until(lambda: len(screen.notices()) == 2)


def test_help_names_the_keys_and_answers_the_question(screen):
    screen.page.keyboard.press("?")
    text = screen.page.locator("dialog").inner_text()
    for piece in ("smaller, larger brush", "Your own picture?", "Ctrl + Enter"):
        assert piece in text
    screen.shot("help")
    screen.page.keyboard.press("Escape")
    until(lambda: screen.page.locator("dialog").count() == 0)


def test_the_theme_follows_the_host(screen):
    def theme():
        return screen.page.locator(".pyrewrite").get_attribute("data-theme")

    screen.page.emulate_media(color_scheme="dark")
    until(lambda: theme() == "dark")
    screen.page.emulate_media(color_scheme="light")
    until(lambda: theme() == "light")
    for change, expected in [
        ("document.body.dataset.jpThemeLight = 'false'", "dark"),
        ("document.body.dataset.jpThemeLight = 'true'", "light"),
        ("delete document.body.dataset.jpThemeLight; document.body.className = 'vscode-dark'", "dark"),
        ("document.body.className = 'vscode-light'", "light"),
        ("document.body.className = 'vscode-high-contrast'", "dark"),
        ("document.body.className = 'vscode-high-contrast vscode-high-contrast-light'", "light"),
        ("document.body.className = ''; document.documentElement.className = 'dark'", "dark"),
    ]:
        screen.page.evaluate(change)
        until(lambda expected=expected: theme() == expected)


def test_contrast_of_both_themes(screen):
    """WCAG's 4.5 : 1 for text on what is behind it, from the colours the browser computes."""
    contrast = """(names) => names.map(([front, back]) => {
      const style = getComputedStyle(document.querySelector(".pyrewrite"));
      const light = (name) => {
        const hex = style.getPropertyValue(name).trim().slice(1);
        const [r, g, b] = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
          .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    })"""
    pairs = [("--text", "--ground"), ("--text", "--panel"), ("--quiet", "--panel"), ("--quiet", "--ground")]
    pairs += [
        ("--on-accent", "--accent"),
        ("--warn", "--warn-ground"),
        ("--bad", "--bad-ground"),
        ("--accent", "--press"),
    ]
    for scheme in ("light", "dark"):
        screen.page.emulate_media(color_scheme=scheme)
        until(lambda scheme=scheme: screen.page.locator(".pyrewrite").get_attribute("data-theme") == scheme)
        assert min(screen.page.evaluate(contrast, pairs)) >= 4.5


@pytest.mark.parametrize(
    "screen",
    [{}, {"viewport": {"width": 1600, "height": 1000}}, {"viewport": {"width": 640, "height": 400}}],
    ids=["100%", "80%", "200%"],
    indirect=True,
)
def test_everything_is_within_reach_and_named(screen):
    page = screen.page
    width = page.evaluate("document.documentElement.clientWidth")
    outside = page.evaluate(
        """(width) => [...document.querySelectorAll(".pyrewrite button, .pyrewrite input, .pyrewrite select")]
          .filter((el) => el.checkVisibility())
          .map((el) => [el.textContent || el.name, el.getBoundingClientRect()])
          .filter(([, r]) => r.left < -1 || r.right > width + 1).map(([name]) => name)""",
        width,
    )
    assert outside == []
    boxes = [el.bounding_box() for el in page.query_selector_all(".pyrewrite .tools button")]
    assert len({round(box["y"]) for box in boxes}) <= (2 if width < 1000 else 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.evaluate(
        """[...document.querySelectorAll(".pyrewrite :is(button, input, select, [role=img])")]
          .filter((el) => !(el.ariaLabel || el.textContent || el.closest("label") || el.title))
          .map((el) => el.outerHTML)"""
    )
    assert unnamed == []
    screen.button("execute").scroll_into_view_if_needed()
    assert page.locator("[aria-live=polite]").count() == 1
    box = screen.button("execute").bounding_box()
    assert box["y"] + box["height"] <= page.evaluate("innerHeight") + 1


def test_the_line_is_lost_and_comes_back(browser, session):
    """The server goes and comes back at the same address: everything is there again, the last stroke too."""
    running = serve(session, port=0)
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    screen = Screen(context.new_page(), running.address).open()
    try:
        screen.stroke(screen.tile(7), [(0.5, 0.3), (0.5, 0.7)])
        kept = until(lambda: mask_of(session) if painted_in(session) == 7 else None)
        running.close()
        screen.page.wait_for_selector(".pyrewrite .banner:visible")
        assert "lost" in screen.page.locator(".pyrewrite .banner").inner_text()
        assert "no connection" in screen.button("copy").get_attribute("title")
        screen.stroke(screen.tile(7), [(0.8, 0.5)])  # while there is no line
        running.token, token = "", running.token
        again = ServedAgain(session, running.port, token)
        try:
            screen.page.wait_for_selector(".pyrewrite .banner", state="hidden", timeout=15000)
            mask = until(lambda: mask_of(session) if mask_of(session)[int(0.8 * SIZE), SIZE // 2] else None)
            assert mask[kept].all()
            screen.press("copy")
            until(lambda: session.document.object is not None)
        finally:
            again.close()
    finally:
        context.close()


def ServedAgain(session, port, token):
    import secrets
    from unittest import mock

    with mock.patch.object(secrets, "token_urlsafe", return_value=token):
        return serve(session, port=port)


def test_two_tabs_show_the_same(screen, page, session):
    other = Screen(screen.page.context.new_page(), page.address).open()
    screen.stroke(screen.tile(8), [(0.5, 0.5)])
    other.page.wait_for_selector('.tile.painted[data-number="8"]')
    screen.press("copy")
    other.page.wait_for_selector(".pyrewrite .object.has")
    other.press("undo")
    until(lambda: session.document.object is None)
    screen.page.wait_for_selector(".pyrewrite .object:not(.has)")
    assert other.problems == []
    other.page.close()


def test_a_wrong_token_shows_no_interface(browser, page):
    context = browser.new_context()
    opened = context.new_page()
    answer = opened.goto(page.address.replace(page.token, "x" * 43))
    assert answer.status == 403
    assert "token" in opened.locator("body").inner_text()
    context.close()


def test_another_site_cannot_talk_to_the_page(browser, page, session):
    """A page of another origin in the same browser: no socket, no script, no frame, though it knows the token."""
    context = browser.new_context()
    opened = context.new_page()
    opened.route("http://evil.example/", lambda route: route.fulfill(body="<h1>evil</h1>", content_type="text/html"))
    opened.goto("http://evil.example/")
    before = session.revision
    said = opened.evaluate(
        """async (address) => {
          const socket = new WebSocket(address.replace("http", "ws") + "socket");
          const opened = await new Promise((go) => {
            socket.onopen = () => go("open");
            socket.onclose = () => go("closed");
          });
          const script = await import(address + "pyrewrite.js").then(() => "ran", () => "refused");
          const text = await fetch(address).then((r) => r.text(), () => "refused");
          const frame = document.createElement("iframe");
          frame.src = address;
          document.body.append(frame);
          await new Promise((go) => { frame.onload = go; setTimeout(go, 2000); });
          let inside = "refused";
          try { inside = frame.contentDocument?.body?.innerHTML ?? "refused"; } catch {}
          return { opened, script, text, inside };
        }""",
        page.address,
    )
    assert said == {"opened": "closed", "script": "refused", "text": "refused", "inside": "refused"}
    assert session.revision == before
    context.close()
