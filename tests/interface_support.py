"""What the tests of the interface share: the hand that paints, and waiting."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"


class Screen:
    """One open page with what a person does on it. `problems` are errors that only a console shows."""

    def __init__(self, page, address: str = "") -> None:
        self.page, self.address = page, address
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(f"{error}\n{error.stack}"))
        page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        page.set_default_timeout(30_000)

    def open(self) -> Screen:
        self.page.goto(self.address)
        self.ready()
        return self

    def ready(self) -> None:
        """Every picture of the strip is drawn, with the weights that the state names."""
        self.page.wait_for_selector(".pyrewrite[data-ready]")
        self.page.wait_for_function("""() => {
          const weights = document.querySelector(".pyrewrite").dataset.weights;
          const drawn = [...document.querySelectorAll(".pyrewrite figure .surface")].map((box) => box.dataset.drawn);
          return drawn.length > 0 && drawn.every((of) => of === weights);
        }""")

    def tile(self, number: int):
        return self.page.locator(f'.pyrewrite .tile[data-number="{number}"] .surface')

    def button(self, action: str):
        return self.page.locator(f'.pyrewrite [data-action="{action}"]')

    def press(self, action: str) -> None:
        button = self.button(action)
        self.page.wait_for_function("el => el.getAttribute('aria-disabled') !== 'true'", arg=button.element_handle())
        button.click()

    def menu(self, action: str) -> None:
        self.page.locator(".pyrewrite .menu > summary").click()
        self.press(action)

    def stroke(self, surface, points, modifier: str | None = None, release: bool = True) -> None:
        """Paint (or drag) through points (y, x) in shares of the picture."""
        surface.scroll_into_view_if_needed()
        box = surface.bounding_box()
        at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for y, x in points]
        mouse = self.page.mouse
        mouse.move(*at[0])
        if modifier:
            self.page.keyboard.down(modifier)
        mouse.down()
        for where in at[1:]:
            mouse.move(*where, steps=2)
        if release:
            mouse.up()
        if modifier:
            self.page.keyboard.up(modifier)

    def cap(self, surface) -> None:
        """What covers the top of a head, hat included, in one stroke of a wide brush."""
        self.stroke(surface, [(0.3, 0.38), (0.3, 0.62)])

    def shot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SCREENSHOTS / f"{name}.png"))

    def notices(self) -> list[str]:
        return self.page.locator(".pyrewrite .notice > span").all_inner_texts()


def mask_of(session) -> np.ndarray | None:
    """The painted mask as the session has it: H x W bool."""
    painted = session.document.painted
    return None if painted is None else np.asarray(painted.mask.area, bool)


def until(condition, seconds: float = 20.0):
    """The first true value of `condition()`; AssertionError where there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if isinstance(value, np.ndarray) or value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {condition}")
