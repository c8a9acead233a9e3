"""All layers' activations in one run are those that `capture` gives one by one."""

import pytest
import stylegan3_reference
import torch

from pyrewrite import load_generator


def stylegan3(folder):
    state, settings = stylegan3_reference.random_state()
    torch.save({"G_ema": state, **settings}, folder / "x.pt")
    return load_generator(folder / "x.pt")


@pytest.mark.parametrize("name", ["peeps", "peeps-progan", "stylegan3"])
@pytest.mark.parametrize("count", [1, 3])
def test_bits_are_those_of_capture(tmp_path, name, count):
    g = stylegan3(tmp_path) if name == "stylegan3" else load_generator(name)
    z = g.latents(range(count))
    layers = []
    for layer, found in zip(g.layers, g.captures(z), strict=True):
        expected = g.capture(layer, z)
        assert torch.equal(found.key, expected.key)
        assert torch.equal(found.value, expected.value)
        assert (found.margin, found.key_margin) == (expected.margin, expected.key_margin)
        assert torch.equal(g.finish(layer, found), g.finish(layer, expected))
        layers.append(layer)
    assert layers == list(g.layers)


def test_w_and_what_is_refused():
    g = load_generator("peeps")
    w = g.mapped(g.latents([5]))
    for layer, found in zip(g.layers, g.captures_w(w), strict=True):
        assert torch.equal(found.value, g.capture_w(layer, w).value)
    assert [len(a.key) for a in g.captures(g.latents([]))] == [0] * len(g.layers)
    with pytest.raises(ValueError, match="latents are B x"):
        g.captures(torch.zeros(1, 3))
    g.noise_mode = "random"
    with pytest.raises(ValueError, match="same noise each time"):
        g.captures(g.latents([0]))
