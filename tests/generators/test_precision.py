"""Rendering in 16 bits and in other memory layouts, against float32; what edits are made of stays float32."""

import families_reference
import generators_reference
import pytest
import stylegan3_reference
import torch
from support import bits, same_bits
from torch import nn

from pyrewrite.generators import Generator, load_generator, numbered_latents

# Of pixel values in [-1, 1]: bounds of the mean and of the root mean square of the difference to float32.
BOUNDS = {"fp16": (1e-3, 2e-3), "bf16": (1e-2, 2e-2)}


def written(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("precision") / "x.pt"
    if name == "stylegan3":
        state, settings = stylegan3_reference.random_state()
        torch.save({"G_ema": state, **settings}, path)
    elif name == "dcgan":
        torch.manual_seed(0)
        torch.save(families_reference.TutorialGenerator(widths=(16, 8, 4)).state_dict(), path)
    else:
        torch.save({"g_ema": generators_reference.stylegan2_state(), "latent_avg": torch.zeros(5)}, path)
    return path


@pytest.fixture(scope="module", params=["peeps", "peeps-progan", "stylegan2", "stylegan3", "dcgan"])
def path(request, tmp_path_factory):
    return request.param if request.param.startswith("peeps") else written(tmp_path_factory, request.param)


@pytest.mark.parametrize("precision", BOUNDS)
def test_sixteen_bits_are_within_the_stated_bounds(path, precision):
    exact, generator = load_generator(path), load_generator(path, precision=precision)
    assert generator.precision == precision
    z = exact.latents(range(3))
    with torch.no_grad():
        wanted, found = exact(z), generator(z)
        assert found.dtype == torch.float32
        difference = (found - wanted).abs()
        assert 0 < difference.mean() < BOUNDS[precision][0]
        assert difference.square().mean().sqrt() < BOUNDS[precision][1]
        assert (generator(z[:1]) - found[:1]).abs().mean() < BOUNDS[precision][0]  # whatever the batch
        assert torch.equal(generator.images(range(3)), found)
        # What edits are made of does not change, and neither do the weights.
        assert same_bits(generator, bits(exact))
        assert generator.weights_hash() == exact.weights_hash()
        assert generator.settings() == exact.settings()
        for name in list(exact.layers)[:: max(1, len(exact.layers) // 2)]:
            assert torch.equal(generator.keys(name, z), exact.keys(name, z))
            captured, true = generator.capture(name, z), exact.capture(name, z)
            assert torch.equal(captured.value, true.value)
            assert torch.equal(generator.finish(name, captured), exact.finish(name, true))
        generator.precision = "fp32"
        assert torch.equal(generator(z), wanted)


@pytest.mark.parametrize("precision", ["fp32", *BOUNDS])
def test_channels_last_weights(path, precision):
    plain, generator = (load_generator(path, precision=precision) for _ in range(2))
    for parameter in generator.parameters():
        if parameter.ndim >= 4:  # StyleGAN2's have one dimension more, of size 1
            flat = parameter.data.flatten(0, parameter.ndim - 4)
            parameter.data = flat.contiguous(memory_format=torch.channels_last).view_as(parameter)
    assert generator.weights_hash() == plain.weights_hash()
    with torch.no_grad():
        difference = (generator.images(range(2)) - plain.images(range(2))).abs()
    assert difference.max() < (1e-5 if precision == "fp32" else 0.1)
    assert difference.mean() < (1e-6 if precision == "fp32" else BOUNDS[precision][0])


def test_styles_from_w_and_random_noise(tmp_path_factory):
    generator = load_generator(written(tmp_path_factory, "stylegan2"))
    ws = torch.randn(2, generator.num_ws, generator.w_dim)
    exact = generator.synthesis(ws)
    generator.precision = "fp16"
    assert (generator.synthesis(ws) - exact).abs().mean() < BOUNDS["fp16"][0]
    generator.noise_mode = "random"
    assert generator.synthesis(ws).isfinite().all()


def test_numbers_beyond_sixteen_bits_do_not_overflow(tmp_path):
    """Styles and weights whose products no 16-bit number holds; demodulation takes them back."""
    state = generators_reference.stylegan2_state()
    for name in state:
        if name.endswith(("conv.weight", "modulation.weight", "modulation.bias")) and "rgb" not in name:
            state[name] *= 1e3
    torch.save({"g_ema": state, "latent_avg": torch.zeros(5)}, tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    exact = generator.images(range(2))
    generator.precision = "fp16"
    assert (generator.images(range(2)) - exact).abs().mean() < BOUNDS["fp16"][0]
    state = generators_reference.progan_state()
    for name in state:
        if name.endswith("conv.weight") and "output" not in name:
            state[name] *= 300  # the squares of PixelNorm
    torch.save(state, tmp_path / "x.pth")
    generator = load_generator(tmp_path / "x.pth")
    exact = generator.images(range(2))
    generator.precision = "fp16"
    assert (generator.images(range(2)) - exact).abs().mean() < BOUNDS["fp16"][0]


@pytest.mark.parametrize("bad", ["tf32", "float16", torch.float16, None, 16, ["fp16"]])
def test_other_precisions_are_refused(bad):
    with pytest.raises(ValueError, match="precision of a progan is one of fp32, bf16, fp16, got"):
        load_generator("peeps-progan", precision=bad)


def test_a_family_of_ones_own_has_float32_until_it_says_otherwise():
    class Flat(Generator):
        family, z_dim, image_channels, image_size = "flat", 2, 1, 4

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def _begin(self, z, render):
            return z[:, :1, None, None].expand(-1, 1, 4, 4), None

        def _image(self, x, carry):
            return x * self.scale

        _key = _value = _advance = conv_layer = mean_style = None

    generator = Flat()
    assert torch.equal(generator.images([0])[0, 0, 0, 0], numbered_latents([0], 2)[0, 0].clamp(-1, 1))
    with pytest.raises(ValueError, match="precision of a flat is one of fp32, got 'fp16'"):
        generator.precision = "fp16"
