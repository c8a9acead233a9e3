"""W, W+, style mixing, truncation of some layers, noise modes and class labels, against definitions from outside."""

import generators_reference
import nvidia_reference as reference
import pytest
import torch
from support import mask_url

from pyrewrite import Edit, Rewriter, Selection
from pyrewrite.errors import EditError
from pyrewrite.generators import load_generator
from pyrewrite.statistics.cache import StatisticsCache


@pytest.fixture
def state():
    return reference.random_state()


@pytest.fixture
def generator(state, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    return load_generator(tmp_path / "x.pt")


@pytest.fixture
def z():
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(2))


def double(state):
    return {name: tensor.double() for name, tensor in state.items()}


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted.double().clamp(-1, 1), rtol=0, atol=1e-5)


def images_of(state, ws):
    """The published definition for a style of its own at each place: ws is B x num_ws x w_dim."""
    x, rgb, resolution, n = state["synthesis.b4.const"].expand(len(ws), -1, -1, -1), None, 4, 0
    while f"synthesis.b{resolution}.conv1.weight" in state:
        block = f"synthesis.b{resolution}"
        for conv, up in (("conv0", True), ("conv1", False)):
            if f"{block}.{conv}.weight" in state:
                x = reference.layer(state, f"{block}.{conv}", x, ws[:, n], up, True)
                n += 1
        weight = state[f"{block}.torgb.weight"]
        style = reference.dense(state, f"{block}.torgb.affine", ws[:, n]) / weight.shape[1] ** 0.5
        new = reference.modulated(weight, x, style, False) + state[f"{block}.torgb.bias"][:, None, None]
        if rgb is not None:
            new = new + generators_reference.upfirdn(rgb, 4 * state[f"{block}.resample_filter"], 2, 2, 1)
        rgb, resolution = new, 2 * resolution
    return rgb


def test_w_and_w_plus(generator, state, z):
    w = generator.mapped(z)
    assert torch.equal(generator.synthesis(w), generator(z))
    assert torch.equal(generator.synthesis(w[:, None].expand(-1, generator.num_ws, -1)), generator(z))
    ws = torch.randn(2, generator.num_ws, 5)
    close(generator.synthesis(ws), images_of(double(state), ws.double()))
    for batch in (1, 2):  # image by image as well as together
        torch.testing.assert_close(generator.synthesis(ws[:batch]), generator.synthesis(ws)[:batch], rtol=0, atol=1e-6)
    generator.truncation = 0.5
    assert torch.equal(generator.synthesis(ws), generator.synthesis(ws.double()))  # as it is: not truncated
    close(generator.synthesis(ws), images_of(double(state), ws.double()))


def test_edits_on_w(generator, z):
    ws = torch.randn(2, generator.num_ws, 5)
    images = generator.synthesis(ws)
    for name in generator.layers:
        captured = generator.capture_w(name, ws)
        torch.testing.assert_close(generator.finish(name, captured), images, rtol=0, atol=1e-6)
        same = generator.capture_w(name, generator.mapped(z))
        assert torch.equal(same.value, generator.capture(name, z).value)
    layer = list(generator.layers)[2]
    style = generator.capture_w(layer, ws).style
    assert torch.equal(style, generator.layers[layer].conv.modulation(ws[:, 2].double()).float())


@pytest.mark.parametrize("shape", [(2, 4), (2, 7, 5), (5,), (2, 1, 5), (2, 6, 5, 1)])
def test_w_of_another_shape(generator, shape):
    with pytest.raises(ValueError, match=r"w is B x 5 \(W\) or B x 6 x 5 \(W\+\)"):
        generator.synthesis(torch.zeros(shape))


def test_w_of_another_kind(generator):
    with pytest.raises(TypeError, match="got list"):
        generator.synthesis([0.0])
    with pytest.raises(ValueError, match="int64"):
        generator.capture_w("layer2", torch.zeros(2, 5, dtype=torch.int64))


def test_style_mixing(generator, state, z):
    other = torch.randn(3, 7)
    a, b = reference.mapped(double(state), z.double()), reference.mapped(double(state), other.double())
    for count in (0, 1, 4, 6):
        ws = torch.stack([a if n < count else b for n in range(6)], 1)
        mixed = generator.mixed(z, other, count)
        torch.testing.assert_close(mixed.double(), ws, rtol=0, atol=1e-5)
        close(generator.synthesis(mixed), images_of(double(state), ws))
    assert torch.equal(generator.synthesis(generator.mixed(z, other, 6)), generator(z))
    assert torch.equal(generator.synthesis(generator.mixed(z, other, 0)), generator(other))
    assert generator.mixed(z, other[:1], 2).shape == (3, 6, 5)
    generator.truncation = 0.5
    torch.testing.assert_close(generator.synthesis(generator.mixed(z, other, 6)), generator(z))
    for bad in (-1, 7, 1.5, True, None):
        with pytest.raises(ValueError, match="layers is a number of styles from 0 to 6"):
            generator.mixed(z, other, bad)


def test_truncation_of_some_layers(generator, state, z):
    state = double(state)
    w, mean = reference.mapped(state, z.double()), state["mapping.w_avg"]
    generator.truncation = 0.3
    for count in (0, 2, 5, 6, None):
        generator.truncation_layers = count
        ws = torch.stack([mean + 0.3 * (w - mean) if n < (6 if count is None else count) else w for n in range(6)], 1)
        close(generator(z), images_of(state, ws))
    generator.truncation_layers = 3
    assert generator.settings() == {"truncation_layers": 3}
    generator.truncation = 1
    assert generator.settings() == {}
    for bad in (-1, 7, 1.5, True, "2"):
        with pytest.raises(ValueError, match="truncation_layers is a number"):
            generator.truncation_layers = bad


def test_noise_modes(generator, state, z):
    fixed = generator(z)
    generator.noise_mode = "none"
    close(generator(z), reference.images(double(state), z.double(), noise=False))
    close(generator(z[:1]), reference.images(double(state), z[:1].double(), noise=False))
    assert not generator.capture("layer4", z).noise.any()
    generator.noise_mode = "random"
    torch.manual_seed(0)
    first, again = generator(z), generator(z)
    assert not torch.equal(first, again)
    torch.manual_seed(0)
    assert torch.equal(generator(z), first)
    same = generator(z[:1].expand(3, -1))
    assert not torch.equal(same[0], same[1])  # each image has its own
    for call in (generator.keys, generator.capture):
        with pytest.raises(ValueError, match="noise_mode is 'random'"):
            call("layer4", z)
    with pytest.raises(ValueError, match="noise_mode is 'random'"):
        generator.capture_w("layer4", generator.mapped(z))
    generator.noise_mode = "fixed"
    assert torch.equal(generator(z), fixed)
    with pytest.raises(ValueError, match="fixed, random, none, got 'const'"):
        generator.noise_mode = "const"


def test_statistics_belong_to_the_settings(generator, tmp_path):
    """Keys of another noise, label or truncation are other keys."""
    cache = tmp_path / "cache"
    rewriter = Rewriter(generator, "layer5", samples=6, cache_dir=cache)
    first = rewriter.moment.matrix.clone()
    generator.noise_mode = "none"
    assert not torch.equal(rewriter.moment.matrix, first)
    assert len(list(cache.iterdir())) == 2
    generator.noise_mode = "fixed"
    assert torch.equal(rewriter.moment.matrix, first)
    key = StatisticsCache.key(generator, "layer5", samples=6, seed=1, precision="fp32")
    generator.truncation_layers = 2
    assert StatisticsCache.key(generator, "layer5", samples=6, seed=1, precision="fp32") == key
    generator.truncation = 0.5
    assert "truncation_layers" in StatisticsCache.key(generator, "layer5", samples=6, seed=1, precision="fp32")


def test_statistics_belong_to_the_label(tmp_path):
    torch.save(reference.random_state(classes=3), tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    rewriter = Rewriter(generator, "layer5", samples=6, cache_dir=tmp_path / "cache")
    first = rewriter.moment.matrix.clone()
    generator.label = 2
    assert not torch.equal(rewriter.moment.matrix, first)


def test_rows_of_an_activation_and_back():
    """Each image's row is what it would be alone, shares no memory, and joins to the same pictures."""
    from pyrewrite import load_generator

    for name, layer in (("peeps", "layer5"), ("peeps-progan", "layer4")):
        g = load_generator(name)
        with torch.no_grad():
            batch = g.capture(layer, g.latents([3, 1, 4]))
            rows = g.rows_of(batch)
            assert [len(r.key) for r in rows] == [1, 1, 1]
            assert len({r.key.untyped_storage().data_ptr() for r in rows}) == 3
            torch.testing.assert_close(rows[1].value, g.capture(layer, g.latents([1])).value, atol=1e-3, rtol=1e-3)
            pictures = g.finish(layer, g.joined([rows[2], rows[0]]))
            torch.testing.assert_close(pictures, g.finish(layer, batch)[[2, 0]], atol=1e-4, rtol=1e-3)


def test_settings_are_applied_and_others_are_defaults(tmp_path, generator):
    torch.save(reference.random_state(classes=3), tmp_path / "x.pt")
    labelled = load_generator(tmp_path / "x.pt", truncation=0.5)
    labelled.label, labelled.noise_mode, labelled.truncation_layers = 2, "none", 4
    said = labelled.settings()
    assert said == {"label": 2, "noise": "none", "truncation_layers": 4}
    other = load_generator(tmp_path / "x.pt", truncation=0.5)
    other.apply_settings(said)
    assert other.settings() == said
    assert torch.equal(other.images([1]), labelled.images([1]))
    for bad in ({"label": 7, "noise": "fixed"}, {"noise": "loud"}, {"tiles": 3}, {"truncation_layers": 99}):
        with pytest.raises(ValueError, match=r"label|noise|tiles|truncation_layers"):
            other.apply_settings(bad)
        assert other.settings() == said
    other.apply_settings({})
    assert other.settings() == {"label": 0}
    with pytest.raises(ValueError, match="no class labels"):
        generator.apply_settings({"label": 1})
    with pytest.raises(ValueError, match="a progan has no setting 'noise' for its images, only label"):
        load_generator("peeps-progan").apply_settings({"noise": "none"})


def test_a_solve_refuses_pictures_of_other_settings(tmp_path):
    torch.save(reference.random_state(classes=3, channels=(8, 8, 8)), tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    box = mask_url(16, 2, 2, 12, 12)
    quick = {"rank": 1, "steps": 2, "method": "least_squares"}
    edit = Edit(Selection(0, box), Selection(1, box), [Selection(1, box)], images={"label": 2, "noise": "none"})
    rewriter = Rewriter(generator, "layer4", samples=6, cache_dir=False, progress=False)
    rewriter.warn = False
    with pytest.raises(
        EditError, match=r"made with label 2, noise none, the generator is set to label 0: generator\.ap"
    ):
        rewriter.solve(edit, **quick)
    generator.apply_settings(edit.images)
    patch = rewriter.solve(edit, **quick)
    assert (patch.settings["label"], patch.settings["noise"]) == (2, "none")
    edit.images = None  # an official record does not say
    rewriter.solve(edit, **quick)
    edit.images = {}
    with pytest.raises(EditError, match="made with defaults, the generator is set to label 2, noise none"):
        rewriter.solve(edit, **quick)
    generator.apply_settings({})
    assert "noise" not in rewriter.solve(edit, **quick).settings
    edit.images = {"label": 0, "noise": "fixed"}  # the defaults, said
    rewriter.solve(edit, **quick)
