from __future__ import annotations

import pytest
from support import mask_url

from pyrewrite import Edit, Rewriter, Selection, load_generator


@pytest.fixture(scope="session")
def peeps():
    return load_generator("peeps")


@pytest.fixture(scope="session")
def progan():
    return load_generator("peeps-progan")


@pytest.fixture(scope="session")
def rewriters(peeps, progan):
    """(name, layer) -> a Rewriter with statistics of a few images; made once."""
    generators = {"peeps": peeps, "peeps-progan": progan}
    made = {}

    def get(name: str, layer: str) -> Rewriter:
        if (name, layer) not in made:
            made[name, layer] = Rewriter(generators[name], layer, samples=24, cache_dir=False, progress=False)
        return made[name, layer]

    return get


@pytest.fixture
def edit():
    """A function of the picture size: a box of image 0 pasted into images 1, 2 and 3."""

    def make(size: int, **kwargs) -> Edit:
        url = mask_url(size, size // 4, size // 4, 3 * size // 4, 3 * size // 4)
        return Edit(
            object=Selection(0, url),
            paste=Selection(1, url),
            context=[Selection(2, url), Selection(3, url)],
            name="test",
            **kwargs,
        )

    return make
