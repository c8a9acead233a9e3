"""Images, keys and values against the published architectures in float64, at every layer."""

import copy
import threading

import generators_reference as reference
import numpy as np
import pytest
import torch

from pyrewrite.errors import UnknownLayerError
from pyrewrite.generators import load_generator
from pyrewrite.generators.base import side_by_side
from pyrewrite.generators.loading import BUNDLED


@pytest.fixture(scope="module", params=sorted(BUNDLED))
def bundled(request):
    return load_generator(request.param)


@pytest.fixture(scope="module", params=["stylegan2", "progan"])
def small(request, tmp_path_factory):
    """Odd channel counts; large maps beside small weights and the other way round."""
    path = tmp_path_factory.mktemp("small") / "generator.bin"
    if request.param == "progan":
        torch.save(reference.progan_state(z=6, channels=(33, 9, 5)), path)
    else:
        state = reference.stylegan2_state(channels=(33, 9, 5), z=6, mapping=(8, 7))
        torch.save({"g_ema": state, "latent_avg": torch.randn(7)}, path)
    return load_generator(path)


def truth(generator, z, truncation=1.0):
    state = reference.double(generator.state_dict())
    if generator.family == "progan":
        return reference.progan(state, z.double())
    return reference.stylegan2(state, z.double(), truncation)


def test_bundled_images_keys_and_values(bundled):
    """One pass of the reference in float64: against float32, and against the same generator in float64."""
    z = bundled.latents([3, 17])
    images, keys, values = truth(bundled, z)
    wide = copy.deepcopy(bundled).double()
    with torch.no_grad():
        torch.testing.assert_close(wide(z), images, rtol=0, atol=1e-11)
        torch.testing.assert_close(bundled(z).double(), images, rtol=0, atol=5e-5)  # hard edges amplify rounding
        assert (bundled(z) - images).abs().mean() < 1e-6
        assert list(bundled.layers) == list(keys)
        for name in bundled.layers:
            captured = bundled.capture(name, z)
            for found, true in ((captured.key, keys[name]), (captured.value, values[name])):
                torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-5 * float(true.abs().max()))


SHAPES = [
    {"channels": (6, 5, 4), "z": 7, "mapping": (7, 5)},
    {"channels": (3,), "z": 3, "mapping": (3,)},
    {"channels": (1, 1), "z": 1, "mapping": (1, 1)},
    {"channels": (17, 33, 2, 9), "z": 11, "mapping": (11, 13, 8), "taps": (1, 2, 1)},
    {"channels": (5, 3), "z": 4, "mapping": (4, 4), "image_channels": 1, "taps": (1, 4, 6, 4, 2)},
    {"channels": (5, 3), "z": 4, "mapping": (4, 4), "taps": (2, 1)},
    {"channels": (5, 3), "z": 4, "mapping": (4, 4), "taps": (1, 2, 3, 4, 5, 6)},
    {"channels": (4, 3), "z": 4, "mapping": (4, 4), "base": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stylegan2_of_any_size(tmp_path, shape):
    state = reference.stylegan2_state(**shape)
    state["latent_avg"] = torch.randn(shape["mapping"][-1])
    torch.save(
        {"g_ema": {k: v for k, v in state.items() if k != "latent_avg"}, "latent_avg": state["latent_avg"]},
        tmp_path / "g.pt",
    )
    generator = load_generator(tmp_path / "g.pt", truncation=0.7)
    base, levels = shape.get("base", 4), len(shape["channels"])
    assert generator.image_size == base * 2 ** (levels - 1)
    assert generator.z_dim == shape["z"]
    assert len(generator.layers) == 2 * levels - 1
    z = torch.randn(3, shape["z"])
    images, keys, values = reference.stylegan2(reference.double(state), z.double(), 0.7)
    wide = copy.deepcopy(generator).double()
    with torch.no_grad():
        torch.testing.assert_close(generator(z), images.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(wide(z), images, rtol=0, atol=1e-10)
        for name, layer in generator.layers.items():
            captured = wide.capture(name, z)
            torch.testing.assert_close(captured.key, keys[name], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(captured.value, values[name], rtol=1e-10, atol=1e-10)
            assert captured.key.shape[1:] == (layer.in_channels, layer.key_resolution, layer.key_resolution)
            assert captured.value.shape[1:] == (layer.out_channels, layer.resolution, layer.resolution)
            assert layer.upsample == (layer.resolution == 2 * layer.key_resolution)


@pytest.mark.parametrize(
    "shape",
    [{"z": 5, "channels": (6, 4)}, {"z": 1, "channels": (1,)}, {"z": 9, "channels": (7, 3, 5), "image_channels": 1}],
    ids=str,
)
def test_progan_of_any_size(tmp_path, shape):
    state = reference.progan_state(**shape)
    torch.save(state, tmp_path / "g.pth")
    generator = load_generator(tmp_path / "g.pth")
    z = torch.randn(3, shape["z"])
    images, keys, values = reference.progan(reference.double(state), z.double())
    wide = copy.deepcopy(generator).double()
    with torch.no_grad():
        torch.testing.assert_close(wide(z), images, rtol=0, atol=1e-10)
        torch.testing.assert_close(generator(z), images.float(), rtol=1e-4, atol=1e-4)  # float32 rounding, any weights
        for name in generator.layers:
            captured = wide.capture(name, z[:, :, None, None])
            torch.testing.assert_close(captured.key, keys[name], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(captured.value, values[name], rtol=1e-10, atol=1e-10)
            assert captured.style is None
            assert captured.noise is None


def test_finish_goes_on_from_capture(small):
    z = small.latents(range(3))
    with torch.no_grad():
        images = small(z)
        for name in small.layers:
            captured = small.capture(name, z)
            kept = captured.value.clone()
            torch.testing.assert_close(small.finish(name, captured), images, rtol=0, atol=1e-5)
            torch.testing.assert_close(small.finish(name, captured, captured.value.clone()), images, rtol=0, atol=1e-5)
            assert torch.equal(captured.value, kept)  # nothing is computed in the caller's tensors
            assert torch.equal(small.keys(name, z), captured.key)
            assert not torch.allclose(small.finish(name, captured, kept + 1), images)
        with pytest.raises(ValueError, match="got"):
            small.finish(name, captured, captured.value[:, :1])


def test_keys_run_only_the_layers_before(small):
    z = small.latents([0])
    names = list(small.layers)
    ran = []
    step = small._step

    def counted(index, x, carry):
        ran.append(names[index])
        return step(index, x, carry)

    small._step = counted
    try:
        with torch.no_grad():
            for i, name in enumerate(names):
                ran.clear()
                small.keys(name, z)
                assert ran == names[:i]
    finally:
        del small._step


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_an_image_does_not_depend_on_its_batch(small, batch):
    numbers = range(7)
    whole = small.images(numbers, batch_size=7)
    torch.testing.assert_close(small.images(numbers, batch_size=batch), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(small.images([6, 2], batch_size=2), whole[[6, 2]], rtol=0, atol=1e-5)


def test_edited_weights_are_seen_at_once(small):
    generator = copy.deepcopy(small)
    z = generator.latents([1])
    for name in generator.layers:
        weight = generator.layers[name].weight
        assert (
            weight
            is dict(generator.named_parameters())[next(n for n, p in generator.named_parameters() if p is weight)]
        )
        kept = weight.clone()
        with torch.inference_mode():
            before, key = generator(z), generator.capture(name, z)
        with torch.no_grad():
            weight.mul_(torch.linspace(0.2, 2, weight.shape[-3]).view(-1, 1, 1))
        with torch.inference_mode():
            after = generator(z)
            assert not torch.allclose(after, before)
            assert not torch.allclose(generator.capture(name, z).value, key.value)
            assert not torch.equal(generator.conv_layer(name).weight, kept.squeeze(0))
        torch.testing.assert_close(after, truth(generator, z)[0].float(), rtol=1e-4, atol=1e-4)
        weight.data.copy_(kept)  # through .data, which moves no version counter
        with torch.inference_mode():
            assert torch.equal(generator(z), before)


def test_gradients_reach_the_weights_and_the_latents(tmp_path):
    state = reference.stylegan2_state(channels=(3, 2), z=3, mapping=(3, 3))
    torch.save({"g_ema": state, "latent_avg": torch.zeros(3)}, tmp_path / "g.pt")
    generator = load_generator(tmp_path / "g.pt").double()
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(generator, z, fast_mode=True)
    weight = generator.layers["layer4"].weight.requires_grad_(True)
    generator(z).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_bad_arguments(small):
    with pytest.raises(UnknownLayerError, match=r"no layer 'layer99'.*layer2, layer3"), torch.no_grad():
        small.keys("layer99", small.latents([0]))
    with pytest.raises(KeyError):
        small.layers["layer99"]
    for z in (torch.zeros(2, small.z_dim + 1), torch.zeros(small.z_dim), torch.zeros(2, small.z_dim).long()):
        with pytest.raises(ValueError, match="latents"):
            small(z)
    with pytest.raises(TypeError, match="latents"):
        small([1.0])
    with pytest.raises(ValueError, match="batch_size"):
        small.images([0], batch_size=0)
    assert small(torch.zeros(0, small.z_dim)).shape == (0, 3, small.image_size, small.image_size)
    assert small.images([]).shape == (0, 3, small.image_size, small.image_size)


def test_latents_are_the_rows_of_the_official_stream(bundled):
    d = bundled.z_dim
    rows = np.random.RandomState(1).standard_normal((9000, d)).astype(np.float32)
    assert np.array_equal(bundled.latents(range(9)).numpy(), rows[:9])
    assert np.array_equal(bundled.latents([8191, 3, 3, 0, 4096, 4095]).numpy(), rows[[8191, 3, 3, 0, 4096, 4095]])
    assert np.array_equal(bundled.latents(torch.tensor([5])).numpy(), rows[5:6])
    assert np.array_equal(bundled.latents(np.int64(5)).numpy(), rows[5:6])
    assert not np.array_equal(bundled.latents([0], seed=2).numpy(), rows[:1])
    assert bundled.latents([]).shape == (0, d)
    assert bundled.latents([0]).dtype == torch.float32
    for bad in (-1, 10**9):
        with pytest.raises(ValueError, match="out of range"):
            bundled.latents([0, bad])
    for bad in (1.5, True, "3"):
        with pytest.raises(TypeError, match="integers"):
            bundled.latents([bad])


def test_images_are_clamped(small):
    name = list(small.layers)[-1]
    with torch.no_grad():
        captured = small.capture(name, small.latents([0]))
        images = small.finish(name, captured, captured.value * 100)
    assert images.min() == -1
    assert images.max() == 1


def test_strided_and_16_bit_latents(small):
    z = torch.randn(small.z_dim, 2).t()  # columns of a transposed tensor
    with torch.no_grad():
        assert torch.equal(small(z), small(z.contiguous()))
        assert torch.equal(small(torch.cat([z, z], 1)[:, :: 2 if small.z_dim == 0 else 1][:, : small.z_dim]), small(z))
        assert torch.equal(small(z.half()), small(z.half().float()))


def test_truncation(small):
    generator = copy.deepcopy(small)
    if generator.family == "progan":
        with pytest.raises(ValueError, match="truncation"):
            generator.truncation = 0.5
        assert generator.mean_style("layer6") is None
        return
    z = generator.latents([0, 1])
    generator.truncation = 0.5
    with torch.no_grad():
        torch.testing.assert_close(generator(z), truth(generator, z, 0.5)[0].float(), rtol=1e-4, atol=1e-4)
        generator.truncation = 0
        torch.testing.assert_close(*generator(z).unbind())
        style = generator.capture("layer6", z).style
        torch.testing.assert_close(style, generator.mean_style("layer6").expand(2, -1))
        generator.truncation = 1
        assert torch.equal(generator(z), small(z))
    with pytest.raises(ValueError, match="truncation"):
        generator.truncation = float("nan")


def test_noise_is_that_of_the_layer():
    generator = load_generator("peeps")
    captured = generator.capture("layer8", generator.latents([0]))
    expected = generator.noises.noise_6[0, 0] * generator.convs[5].noise.weight
    assert torch.equal(captured.noise, expected)
    assert captured.noise.shape == captured.value.shape[2:]


def test_weights_hash_follows_the_weights(small):
    generator = copy.deepcopy(small)
    first = generator.weights_hash()
    assert first == small.weights_hash()
    assert len(first) == 64
    weight = next(iter(generator.layers.values())).weight
    kept = weight.clone()
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
        changed = generator.weights_hash()
        assert changed != first
        weight.copy_(kept)
    assert generator.weights_hash() == first
    weight.data.view(-1)[0] += 1e-3  # through .data
    assert generator.weights_hash() == changed


def test_conv_layer_computes_what_the_layer_does(small):
    import torch.nn.functional as F

    insertion = pytest.importorskip("pyrewrite.ops.insertion")
    z = small.latents([0, 4])
    for name, layer in small.layers.items():
        view = small.conv_layer(name)
        assert isinstance(view, insertion.ConvLayer)
        assert view.weight.data_ptr() == layer.weight.data_ptr()
        assert view.weight.shape == (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)
        captured = small.capture(name, z)
        if layer.upsample:
            y = F.conv_transpose2d(captured.key, view.weight.transpose(0, 1), stride=2)
            kernel = view.blur.flip(0, 1).expand(layer.out_channels, 1, -1, -1)
            y = F.conv2d(y, kernel, padding=1, groups=layer.out_channels)
        else:
            y = F.conv2d(captured.key, view.weight, padding=view.padding)
        y = y * view.scale
        if view.demodulate:
            filters = view.weight * captured.style[:, None, :, None, None] * view.scale
            y = y / (filters.square().sum((2, 3, 4)) + 1e-8).sqrt()[:, :, None, None]
        if captured.noise is not None:
            y = y + captured.noise
        if view.bias is not None:
            y = y + view.bias[:, None, None]
        y = F.leaky_relu(y, view.negative_slope) * view.gain
        torch.testing.assert_close(y, captured.value, rtol=1e-4, atol=float(1e-5 * captured.value.abs().max()))


def test_pictures_of_nonsense_are_reported(bundled):
    assert bundled.unusual_picture() is None
    generator = copy.deepcopy(bundled)
    output = generator.to_rgbs[-1].conv if generator.family == "stylegan2" else generator.output_64x64.conv
    with torch.no_grad():
        kept = output.weight.clone()
        output.weight.mul_(1000)
        assert "outside" in generator.unusual_picture()
        output.weight.copy_(kept).view(-1)[0] = float("nan")
        assert "not finite" in generator.unusual_picture()
        output.weight.zero_()
        if generator.family == "progan":
            assert "flat" in generator.unusual_picture()


def test_images_side_by_side(small):
    """In order, in the caller's grad mode, on the caller's number of threads afterwards, also after an error."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            assert side_by_side(lambda n: (n, torch.is_grad_enabled(), torch.get_num_threads()), 5) == [
                (n, False, 1) for n in range(5)
            ]
        assert side_by_side(lambda n: torch.is_grad_enabled(), 2) == [True, True]
        assert side_by_side(lambda n: torch.get_num_threads(), 1) == [3]
        assert side_by_side(lambda n: n, 0) == []
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda n: 1 // n, 4)
        assert torch.get_num_threads() == 3
        # a thread that comes to torch later has torch's default, not the workers' one thread
        seen = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [3]
        with torch.autocast("cpu"):
            assert side_by_side(lambda n: torch.is_autocast_enabled("cpu"), 3) == [True] * 3
        several = small.images(range(5))
        torch.set_num_threads(1)
        torch.testing.assert_close(small.images(range(5)), several, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(threads)
