"""The whole story on the bundled generator, in Chromium, and how long its steps take."""

from __future__ import annotations

import json
import math
import os
import statistics
import time

import numpy as np
import pytest
import torch
from support import bits, same_bits

pytest.importorskip("tornado", reason="the page needs tornado: pip install 'pyrewrite[ui]'")

from interface_support import Screen, mask_of, until

from pyrewrite import Edit, LowRankPatch
from pyrewrite.edit import Place
from pyrewrite.interface import Session
from pyrewrite.interface.page import serve

pytestmark = pytest.mark.browser

HAT = 41  # wears a beanie
BALD = [10, 52, 101, 83, 106, 173, 133, 24]  # the first gets the paste, the others are the context
STRIP = ",".join(map(str, [HAT, *BALD])) + ",0-23"
FEWER = ",".join(map(str, [HAT, *BALD])) + ",0-2"


@pytest.fixture(scope="module")
def measured(request):
    """Times in ms by name; printed at the end, so that a run with -s or -rA reports them."""
    times: dict[str, list[float]] = {}
    yield times
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    load = os.getloadavg()[0]
    for name, values in times.items():
        line = f"{name}: median {statistics.median(values or [math.nan]):.0f} ms of {len(values)} (load {load:.1f})"
        if reporter:
            reporter.write_line(line)


@pytest.fixture(scope="module")
def story(peeps, browser, tmp_path_factory, measured):
    """One session and one tab that the steps below go through in order."""
    folder = tmp_path_factory.mktemp("story")
    kept = bits(peeps)
    session = Session(
        peeps,
        samples=180,
        folder=folder / "edits",
        cache_dir=folder / "cache",
        name="peeps",
        strip=STRIP,
        layer="layer6",
    )
    page = serve(session, port=0)
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    screen = Screen(context.new_page(), page.address)
    screen.session, screen.folder, screen.kept, screen.generator = session, folder, kept, peeps
    yield screen
    context.close()
    page.close()
    session.close()
    assert same_bits(peeps, kept)
    assert screen.problems == []


TAKE_PAINT_MS = """() => {
  const { dataset } = document.querySelector(".pyrewrite");
  const ms = dataset.paintMs;
  delete dataset.paintMs;
  return ms;
}"""


def text_of(screen, selector):
    return screen.page.locator(f".pyrewrite {selector}").first.inner_text()


def pixels(screen, selector):
    """H x W x 4 of a drawn picture."""
    data = screen.page.evaluate(
        """(selector) => {
          const c = document.querySelector(`.pyrewrite ${selector} canvas.picture`);
          return [c.width, ...c.getContext("2d").getImageData(0, 0, c.width, c.width).data];
        }""",
        selector,
    )
    return np.array(data[1:], dtype=np.uint8).reshape(data[0], data[0], 4)


def live(screen, kind, selector):
    """Wait until the picture at `selector` is a live one of the present state."""
    screen.page.wait_for_function(
        "(selector) => document.querySelector(`.pyrewrite ${selector} .surface`)?.dataset.live === 'now'", arg=selector
    )


def test_1_it_opens_and_32_pictures_are_painted(story, measured):
    start = time.perf_counter()
    story.open()
    measured["32 pictures after opening"] = [1e3 * (time.perf_counter() - start)]
    assert story.page.locator(".pyrewrite figure").count() == len(story.session.document.numbers) == 32
    assert pixels(story, '.tile[data-number="41"]').std() > 20
    assert measured["32 pictures after opening"][0] < 20_000  # the target is 2 s; CI machines are slow
    assert not story.page.locator(".pyrewrite .job").is_visible()  # nothing is done before something is painted
    story.shot("story-1-open")
    numbers = story.page.locator("input[name=numbers]")
    numbers.fill(FEWER)
    numbers.press("Enter")
    until(lambda: story.page.locator(".pyrewrite figure").count() == 12)
    assert story.session.document.numbers == (HAT, *BALD, 0, 1, 2)


def test_2_a_hat_is_copied(story, measured):
    times = measured["paint to mask on the server and back"] = []
    for _ in range(5):
        story.stroke(story.tile(HAT), [(0.3, 0.3), (0.3, 0.5)])
        times.append(float(until(lambda: story.page.evaluate(TAKE_PAINT_MS))))
    for _ in range(6):
        story.page.keyboard.press("]")
    story.cap(story.tile(HAT))
    until(lambda: mask_of(story.session).sum() > 1500)
    story.shot("story-2-painted")
    story.press("copy")
    story.page.wait_for_selector(".pyrewrite .object.has")
    assert statistics.median(times) < 500  # the target is 50 ms


def test_3_it_is_pasted_and_appears_at_once(story, measured):
    story.cap(story.tile(BALD[0]))
    story.press("paste")
    story.page.wait_for_selector(".pyrewrite .paste.has")
    live(story, "paste", ".paste")  # once the statistics are there
    before = pixels(story, f'.tile[data-number="{BALD[0]}"]')
    after = pixels(story, ".paste")
    head = after[10:50, 30:90, :3].astype(int) - before[10:50, 30:90, :3]
    assert np.abs(head).mean() > 20
    story.shot("story-3-pasted")


def test_4_context_is_added_and_every_picture_shows_the_hat(story, measured):
    for number in BALD[1:]:
        story.cap(story.tile(number))
        story.press("add_context")
        story.page.wait_for_selector(f'.pyrewrite .contexts .thumb[data-number="{number}"]')
    live(story, "context", f'.contexts .thumb[data-number="{BALD[-1]}"]')
    live(story, "row", ".row .thumb")
    assert story.page.locator(".pyrewrite .row .thumb").count() == 8
    story.shot("story-4-context")


def test_5_live_pictures_follow_the_hand(story, measured):
    """From the end of a stroke on the object to the live picture of the paste, and to the row of eight."""
    watch = """() => {
      const root = document.querySelector(".pyrewrite");
      window.seen = {};
      window.released = null;
      addEventListener("pointerup", () => ((window.released = performance.now()), (window.seen = {})), true);
      new MutationObserver((all) => all.forEach(({ attributeName: name }) => {
        if (window.released !== null) window.seen[name] = performance.now() - window.released;
      })).observe(root, { attributes: true, attributeFilter: ["data-livepaste", "data-liverow"] });
    }"""
    story.page.evaluate(watch)
    paste, row = measured["live paste after a stroke"], measured["live row of eight"] = [], []
    for i in range(4):  # a hole in the hat, and the hat whole again
        story.stroke(
            story.page.locator(".pyrewrite .object .surface"),
            [(0.3, 0.3 + 0.05 * (i // 2))],
            modifier=None if i % 2 else "Control",
        )
        seen = until(
            lambda: (
                (seen := story.page.evaluate("window.seen"))
                and {"data-livepaste", "data-liverow"} <= set(seen)
                and seen
            )
        )
        paste.append(seen["data-livepaste"])
        row.append(seen["data-liverow"])
    assert statistics.median(paste) < 2500  # the target is 150 ms
    assert statistics.median(row) < 8000  # 600 ms


def test_6_the_object_is_moved_and_left_out(story):
    session = story.session
    first = BALD[1]
    story.stroke(story.page.locator(".pyrewrite .paste .surface"), [(0.3, 0.5), (0.3 + 4 / 128, 0.5 - 6 / 128)])
    place = until(lambda: session.document.places.get(BALD[0]))
    until(lambda: abs(session.document.places[BALD[0]].dy - 4) <= 1)
    assert abs(session.document.places[BALD[0]].dx + 6) <= 1, place
    story.button("undo").click()
    until(lambda: session.document.places.get(BALD[0], Place()).dy == 0)
    thumb = story.page.locator(f'.pyrewrite .contexts .thumb[data-number="{first}"]')
    thumb.locator("input[type=checkbox]").uncheck()
    until(lambda: not session.document.places.get(first, Place()).on)
    thumb.locator("input[type=checkbox]").check()
    until(lambda: session.document.places.get(first, Place()).on)
    thumb.locator(".cross").click()
    until(lambda: first not in [r.image for r in session.document.context])
    story.button("undo").click()
    until(lambda: first in [r.image for r in session.document.context])
    story.page.reload()
    story.ready()
    live(story, "row", ".row .thumb")  # what was live before is there again


def test_7_execute_reports_and_changes_the_pictures(story, measured):
    before = pixels(story, '.tile[data-number="0"]')
    live(story, "row", ".row .thumb")
    story.page.evaluate("""() => {
      const root = document.querySelector(".pyrewrite");
      window.jobs = [];
      new MutationObserver(() => window.jobs.push([root.dataset.job, performance.now()]))
        .observe(root, { attributes: true, attributeFilter: ["data-job"] });
      window.steps = new Set();
      new MutationObserver(() => window.steps.add(root.querySelector(".job .hint").textContent))
        .observe(root.querySelector(".job"), { subtree: true, childList: true, characterData: true });
    }""")
    start = time.perf_counter()
    story.press("execute")
    story.page.wait_for_selector(".pyrewrite .edits li", timeout=60_000)
    measured["execute, rank 10, eight targets, 301 steps"] = [1e3 * (time.perf_counter() - start)]
    steps = [s for s in story.page.evaluate("[...window.steps]") if "step" in s and "of 301" in s]
    assert len(steps) >= 2  # progress was shown, with a loss
    assert any("loss" in s for s in steps)
    report = text_of(story, ".edits .report")
    assert "Loss" in report
    assert "of 8 context pictures" in report
    assert "other pictures change by" in report
    until(lambda: not np.array_equal(pixels(story, '.tile[data-number="0"]'), before))
    assert measured["execute, rank 10, eight targets, 301 steps"][0] < 30_000  # the target is 3 s
    story.shot("story-5-executed")


def test_8_toggle_stack_and_theme(story):
    story.ready()
    edited = pixels(story, f'.tile[data-number="{BALD[2]}"]')
    story.page.keyboard.press("t")
    until(lambda: not np.array_equal(pixels(story, f'.tile[data-number="{BALD[2]}"]'), edited))
    story.page.keyboard.press("t")
    until(lambda: np.array_equal(pixels(story, f'.tile[data-number="{BALD[2]}"]'), edited))
    switch = story.page.locator(".pyrewrite .edits input[type=checkbox]")
    switch.uncheck()
    until(lambda: same_bits(story.generator, story.kept))
    switch.check()
    until(lambda: not same_bits(story.generator, story.kept))
    story.page.emulate_media(color_scheme="dark")
    story.page.wait_for_selector('.pyrewrite[data-theme="dark"]')
    story.shot("story-6-dark")
    story.page.emulate_media(color_scheme="light")


def test_9_save_reload_load_and_downloads(story):
    session, folder = story.session, story.folder
    story.page.keyboard.press("Control+s")
    story.page.locator("dialog input[name=name]").fill("hat from the page")
    story.shot("story-7-save")
    story.page.keyboard.press("Enter")
    path = folder / "edits" / "hat from the page.json"
    until(path.exists)
    record = until(lambda: Edit.load(path))
    assert record.object.image == HAT
    assert [c.image for c in record.context] == BALD[1:]

    story.page.reload()
    story.ready()
    assert text_of(story, ".edits .report").startswith("Loss")
    assert story.page.locator(".pyrewrite .contexts .thumb").count() == len(BALD) - 1
    # The edit is on the stack: the pictures themselves show it, and no live ones show it on top of itself.
    assert story.page.locator('.pyrewrite .surface[data-live="now"]').count() == 0
    assert text_of(story, ".row .hint").startswith("What the edit does")

    with story.page.expect_download() as download:
        story.menu("patch")
    patch = folder / "hat.safetensors"
    download.value.save_as(patch)
    assert LowRankPatch.load(patch).updates[0].layer == "layer6"
    with story.page.expect_download() as download:
        story.menu("edit")
    edit = folder / "edit.json"
    download.value.save_as(edit)
    assert json.loads(edit.read_text())["object"][0] == HAT

    story.menu("new")
    until(lambda: session.document.object is None)
    story.menu("load")
    story.page.locator("dialog .list button", has_text="hat from the page").click()
    until(lambda: session.document.object is not None)
    story.page.wait_for_selector(".pyrewrite .object.has")
    assert story.page.locator(".pyrewrite .contexts .thumb").count() == len(BALD) - 1


def test_a_ready_edits_stack_and_revert(story):
    """A second edit from the gallery: its strength, its name, the order of the two, their overlap; then all off."""
    session = story.session
    story.menu("gallery")
    entries = story.page.locator("dialog .list button:not(.selections)")
    entries.first.wait_for()
    assert entries.count() >= 2
    story.shot("story-8-gallery")
    entries.first.click()
    until(lambda: len(session.document.edits) == 2, 60)
    first, second = [e.id for e in session.document.edits]
    line = story.page.locator(f'.pyrewrite .edits li[data-edit="{second}"]')
    both = weights_of(story)
    line.locator("input[type=range]").fill("0.5")
    until(lambda: session.document.edits[1].strength == 0.5)
    assert not np.array_equal(weights_of(story), both)
    line.locator("input.name").fill("second rule")
    line.locator("input.name").press("Enter")
    until(lambda: session.document.edits[1].name == "second rule")
    line.get_by_title("Earlier in the order").click()
    until(lambda: [e.id for e in session.document.edits] == [second, first])
    line.get_by_title("Take this edit off").click()
    until(lambda: [e.id for e in session.document.edits] == [first])

    story.press("revert")
    until(lambda: same_bits(story.generator, story.kept))
    story.page.wait_for_selector(".pyrewrite .stack", state="hidden")
    story.button("undo").click()
    until(lambda: not same_bits(story.generator, story.kept))
    story.button("redo").click()
    until(lambda: same_bits(story.generator, story.kept))


def weights_of(story):
    return np.concatenate([layer.weight.detach().numpy().ravel() for layer in story.generator.layers.values()])


def test_b_cancel_leaves_everything_as_it_was(story):
    session = story.session
    number = story.page.locator(".pyrewrite input[name=steps-number]")
    story.page.locator(".pyrewrite details.more > summary").click()
    number.fill("5000")
    number.press("Enter")
    until(lambda: session.document.settings.steps == 5000)
    story.press("execute")
    story.page.wait_for_selector('.pyrewrite[data-job="execute"]')
    story.page.reload()  # in the middle of a solve
    story.page.wait_for_selector('.pyrewrite[data-ready][data-job="execute"]')
    story.shot("story-9-progress")
    story.press("cancel")
    story.page.wait_for_selector('.pyrewrite[data-job=""]')
    assert session.document.edits == ()
    assert same_bits(story.generator, story.kept)


def test_c_pick_hint_search_and_matches(story):
    session = story.session
    story.page.keyboard.press("w")
    box = story.tile(0).bounding_box()
    story.page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.3 * box["height"])
    mask = until(lambda: mask_of(session))
    assert 20 < mask.sum() < 0.9 * mask.size
    story.shot("story-10-picked")
    story.press("hint")
    story.page.wait_for_selector(".pyrewrite .suggestion", timeout=60_000)
    assert story.page.locator(".pyrewrite .suggestion strong").first.inner_text().startswith("layer")
    story.press("matches")
    until(lambda: session.document.matches)
    story.page.wait_for_function(
        "() => [...document.querySelectorAll('figure canvas.overlay')].filter((c) => c.width > 1).length > 8",
        timeout=60_000,
    )
    story.shot("story-11-matches")
    story.press("matches")
    story.press("search")
    until(lambda: session.document.strip != FEWER, 60)
    story.ready()
    story.shot("story-12-found")


def test_d_protect_erase_and_other_files(story):
    session = story.session
    story.page.keyboard.press("b")
    story.stroke(story.tile(session.document.numbers[0]), [(0.8, 0.4), (0.8, 0.6)])
    story.press("protect")
    story.page.wait_for_selector(".pyrewrite .protects .thumb")
    story.page.locator(".pyrewrite .protects .cross").click()
    until(lambda: session.document.protect == ())
    story.page.locator(".pyrewrite details.more > summary").click()
    story.page.locator(".pyrewrite select[aria-label='Erase by']").select_option("zero")
    story.press("erase")
    story.page.wait_for_selector(".pyrewrite .edits li", timeout=60_000)
    assert not same_bits(story.generator, story.kept)
    for kind, start in [("checkpoint", b""), ("sheet", b"\x89PNG"), ("snapshot", b"\x89PNG")]:
        with story.page.expect_download() as download:
            story.menu(kind)
        path = story.folder / download.value.suggested_filename
        download.value.save_as(path)
        assert path.read_bytes().startswith(start)
        assert path.stat().st_size > 10_000
    with story.page.expect_download() as download:
        story.page.locator(".pyrewrite .edits li").get_by_title("Download this patch").click()
    patch = story.folder / "erase.safetensors"
    download.value.save_as(patch)
    story.page.locator(".pyrewrite .edits li").get_by_title("Take this edit off").click()
    until(lambda: same_bits(story.generator, story.kept))
    story.page.locator("input[type=file]").set_input_files(patch)
    until(lambda: len(session.document.edits) == 1)
    story.press("revert")
    until(lambda: same_bits(story.generator, story.kept))

    latent = story.folder / "from another tool.npy"
    np.save(latent, torch.zeros(story.generator.w_dim).numpy())
    story.page.locator("input[type=file]").set_input_files(latent)
    (number,) = until(lambda: list(session.document.brought))
    story.page.wait_for_selector(f'figure[data-number="{number}"] .surface[data-drawn]')
    assert story.page.locator(f'figure[data-number="{number}"] figcaption').inner_text() == latent.name
    story.cap(story.tile(number))  # it can be painted like any other
    until(lambda: session.document.painted.image == number)
