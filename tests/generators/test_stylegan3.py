"""StyleGAN3 against its published definition: images, keys and values, files, edits, and files that are not whole."""

import copy
import json

import nvidia_reference
import pytest
import stylegan3_reference as reference
import torch
from safetensors.torch import load_file, save_file
from support import bits, mask_url, same_bits

from pyrewrite import Edit, LowRankPatch, Rewriter
from pyrewrite.edit import Selection
from pyrewrite.errors import CheckpointError, CheckpointMismatchError, NonFiniteWeightsError
from pyrewrite.generators import load_generator, save_generator
from pyrewrite.generators.filters import filtered_lrelu
from pyrewrite.ops import InsertionTarget, crop_key, layer_values
from pyrewrite.rewriting import mask_on_map

SHAPES = {
    "T": {},
    "R": {"kernel": 1, "radial": True, "channels": (8, 8, 6, 5, 4)},
    "two layers": {"rates": (16, 16), "channels": (4, 3), "margin": 3, "layers": 1, "z": 3, "w": 6},
    "grey, four times": {"rates": (8, 32, 32), "channels": (3, 2, 2), "margin": 2, "image_channels": 1, "taps": 5},
    "5 x 5 filters": {"rates": (16, 16, 8, 8), "channels": (2, 3, 2, 3), "margin": 1, "kernel": 5},
}


def double(state):
    return {name: tensor.double() for name, tensor in state.items()}


@pytest.fixture
def save(tmp_path):
    def saved(state, settings=None, name="x.pt"):
        torch.save({"G_ema": state, **(settings or {})}, tmp_path / name)
        return tmp_path / name

    return saved


@pytest.fixture
def z():
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=["T", "R"])
def generator(request, tmp_path_factory):
    state, settings = reference.random_state(**SHAPES[request.param] | {"channels": (16, 16, 12, 8, 4)})
    path = tmp_path_factory.mktemp("stylegan3") / "x.pt"
    torch.save({"G_ema": state, **settings}, path)
    return load_generator(path)


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_images_keys_and_values_are_those_of_the_published_definition(save, shape):
    state, settings = reference.random_state(**shape)
    generator = load_generator(save(state, settings), truncation=0.7)
    z = torch.randn(3, shape.get("z", 7), generator=torch.Generator().manual_seed(2))
    images, keys, values = reference.images(double(state), settings, z.double(), truncation=0.7)
    assert generator.family == "stylegan3"
    assert list(generator.layers) == list(keys)
    with torch.no_grad():
        torch.testing.assert_close(generator(z).double(), images.clamp(-1, 1), rtol=0, atol=1e-5)
        wide = copy.deepcopy(generator).double()
        torch.testing.assert_close(wide(z), images.clamp(-1, 1), rtol=0, atol=1e-7)  # the sines are float32's
        for name, layer in generator.layers.items():
            captured = generator.capture(name, z)
            for found, true in ((captured.key, keys[name]), (captured.value, values[name])):
                torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-5 * float(true.abs().max()))
            assert captured.key.shape[1:] == (layer.in_channels, layer.key_resolution, layer.key_resolution)
            assert captured.value.shape[1:] == (layer.out_channels, layer.resolution, layer.resolution)
            assert captured.margin - captured.key_margin == layer.kernel_size // 2


def test_settings_of_the_file_are_obeyed(save, z):
    state, settings = reference.random_state()
    clamped = settings | {name: 0.5 for name in settings if name.endswith("conv_clamp")}
    free = {name: value for name, value in settings.items() if not name.endswith("conv_clamp")}
    for changed in (clamped, free, settings | {"synthesis.output_scale": 0.1}):
        found = load_generator(save(state, changed))(z)
        wanted = reference.images(double(state), changed, z.double())[0].clamp(-1, 1)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    assert not torch.equal(load_generator(save(state, clamped))(z), load_generator(save(state, free))(z))


def test_a_transform_of_the_users(save, z):
    state, settings = reference.random_state()
    state["synthesis.input.transform"] = torch.tensor([[1.2, -0.5, 0.1], [0.5, 1.1, -0.2], [0, 0, 1]])
    wanted = reference.images(double(state), settings, z.double())[0].clamp(-1, 1)
    torch.testing.assert_close(load_generator(save(state, settings))(z).double(), wanted, rtol=0, atol=1e-5)


def test_class_labels(save, z):
    state, settings = reference.random_state(classes=3)
    generator = load_generator(save(state, settings))
    assert (generator.classes, generator.label, generator.z_dim) == (3, 0, 7)
    generator.label = 2
    wanted = reference.images(double(state), settings, z.double(), label=2)[0].clamp(-1, 1)
    torch.testing.assert_close(generator(z).double(), wanted, rtol=0, atol=1e-5)


def test_w_plus_and_style_mixing(save, z):
    state, settings = reference.random_state()
    generator = load_generator(save(state, settings))
    assert generator.num_ws == 7  # the Fourier features, five layers, the colours
    ws = torch.randn(2, 7, 5)
    wanted = reference.images(double(state), settings, None, ws=ws.double())[0].clamp(-1, 1)
    torch.testing.assert_close(generator.synthesis(ws).double(), wanted, rtol=0, atol=1e-5)
    w = generator.mapped(z)
    assert torch.equal(generator.synthesis(w), generator(z))
    mixed = generator.mixed(z, z.flip(0), 3)
    assert torch.equal(mixed[:, :3], w[:, None].expand(-1, 3, -1))
    assert torch.equal(generator.capture_w("layer4", mixed).style, generator.capture("layer4", z.flip(0)).style)
    generator.truncation, generator.truncation_layers = 0.5, 0
    assert torch.equal(generator(z), generator.synthesis(w))
    with pytest.raises(ValueError, match=r"B x 7 x 5 \(W\+\)"):
        generator.synthesis(torch.randn(2, 6, 5))


def test_finish_goes_on_from_capture_and_pictures_do_not_depend_on_their_batch(generator, z):
    images = generator(z)
    assert torch.equal(generator(z[1:2]), images[1:2])
    for name in generator.layers:
        captured = generator.capture(name, z)
        assert torch.equal(generator.finish(name, captured), images)
        assert torch.equal(generator.keys(name, z), captured.key)
        torch.testing.assert_close(generator.value(name, captured), captured.value, rtol=0, atol=1e-5)
    assert generator(z[:0]).shape == (0, 3, 16, 16)
    assert generator.images([4, 2]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 4)])
@pytest.mark.parametrize(
    ("up", "down", "taps", "padding"),
    [(1, 1, (None, None), (0, 0)), (2, 2, (12, 12), (11, 12)), (4, 2, (7, 3), (9, 2)), (2, 3, (3, (3, 3)), (4, -1)),
     (3, 1, (2, None), (5, 0)), (2, 2, ((5, 5), 2), (-1, 9))],
)  # fmt: skip
def test_filtered_lrelu_of_any_size(size, up, down, taps, padding):
    filters = [None if t is None else torch.randn(t, dtype=torch.float64) for t in taps]
    x = 9 * torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = reference.filtered_lrelu(x, *filters, up, down, *padding, 4.0)
    options = {"up": up, "down": down, "padding": padding, "slope": 0.2, "gain": 2**0.5, "clamp": 4.0}
    torch.testing.assert_close(filtered_lrelu(x, *filters, **options), wanted, rtol=0, atol=1e-12)
    assert filtered_lrelu(x[:0], *filters, **options).shape == (0, *wanted.shape[1:])
    torch.testing.assert_close(
        filtered_lrelu(x.float(), *filters, **options).double(),
        wanted,
        rtol=0,
        atol=1e-4 * (1 + float(wanted.abs().max())),
    )


def test_filtered_lrelu_passes_nan_on():
    x = torch.zeros(1, 2, 4, 4)
    x[0, 1, 2, 2] = float("nan")
    found = filtered_lrelu(
        x, torch.ones(12), torch.ones(12), up=2, down=2, padding=(11, 11), slope=0.2, gain=1, clamp=9
    )
    assert found[0, 1].isnan().any()
    assert not found[0, 0].isnan().any()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPES["T"], SHAPES["R"], {"classes": 2}], ids=["T", "R", "classes"])
def test_every_kind_of_file_holds_the_same_bits(tmp_path, sentinel, shape):
    state, settings = reference.random_state(**shape)
    settings["synthesis.output_scale"] = 0.3
    source = f"open({str(sentinel)!r}, 'w').write('ran')\n" * 3
    own = {n.rpartition(".")[0] for n in state if not n.rpartition(".")[0].endswith("affine")}
    assert {"synthesis.input", "mapping"} < own
    pickled = nvidia_reference.dumps({"G": None, "G_ema": nvidia_reference.network(state, source, settings)})
    (tmp_path / "x.pkl").write_bytes(pickled)
    first = load_generator(tmp_path / "x.pkl")
    assert first.layout == "NVIDIA"
    stored = first.file_state()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
    for name in ("x.safetensors", "x.pt"):
        again = load_generator(save_generator(first, tmp_path / name))
        assert again.weights_hash() == first.weights_hash()
        assert again.file_settings() == first.file_settings()
        assert first.file_settings() == settings
        assert torch.equal(again.images([3]), first.images([3]))
        assert not [note for note in again.notes if "class" not in note]


@pytest.mark.parametrize("shape", list(SHAPES.values())[:-1], ids=list(SHAPES)[:-1])
def test_weights_alone_tell_the_rates(save, shape):
    state, settings = reference.random_state(**shape)
    generator = load_generator(save(state))
    assert any("rates are taken from the sizes" in note for note in generator.notes)
    assert generator.file_settings() == settings


def test_rates_that_sizes_do_not_tell(save):
    state, _ = reference.random_state()
    odd = {name.replace("_24_", "_25_"): tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointMismatchError, match=r"sizes of \[16, 16, 25, 25, 16, 16\] pixels do not tell them"):
        load_generator(save(odd))


def test_missing_mean_latent_and_half_precision(save):
    state, settings = reference.random_state()
    del state["mapping.w_avg"]
    generator = load_generator(save({name: tensor.half() for name, tensor in state.items()}, settings))
    assert any("no mean latent" in note for note in generator.notes)
    assert any("float16" in note for note in generator.notes)
    assert generator.dtype == torch.float32


def test_every_missing_name_is_listed_as_in_the_file(save):
    state, settings = reference.random_state()
    for name in state:
        if name == "mapping.w_avg":
            continue
        less = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(CheckpointMismatchError, match=rf"{name}|its layers are"):
            load_generator(save(less, settings))
    with pytest.raises(CheckpointMismatchError, match=r"extra \(1\): synthesis\.L0_16_6\.noise"):
        load_generator(save(state | {"synthesis.L0_16_6.noise": torch.zeros(1)}, settings))
    with pytest.raises(CheckpointMismatchError, match="its layers are L1_16_6, L2_24_5"):
        load_generator(save({n: t for n, t in state.items() if "L0_" not in n}, settings))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("synthesis.L1_16_6.weight", (6, 5, 3, 3)),
        ("synthesis.L1_16_6.weight", (7, 6, 3, 3)),
        ("synthesis.L1_16_6.weight", (6, 6, 3, 1)),
        ("synthesis.L1_16_6.weight", ()),
        ("synthesis.L1_16_6.magnitude_ema", (6,)),
        ("synthesis.L1_16_6.up_filter", (12, 6)),
        ("synthesis.L1_16_6.up_filter", ()),
        ("synthesis.L5_16_3.weight", (3, 3, 3, 3)),
        ("synthesis.input.freqs", (6, 3)),
        ("synthesis.input.transform", (2, 3)),
        ("mapping.fc0.weight", (5, 8, 1)),
    ],
)
def test_wrong_shapes_are_refused(save, name, shape):
    state, settings = reference.random_state()
    with pytest.raises(CheckpointMismatchError, match=name.split(".")[1]):
        load_generator(save(state | {name: torch.ones(shape)}, settings))


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("synthesis.L1_16_6.up_factor", 10**9, "from 1 to 16"),
        ("synthesis.L1_16_6.up_factor", 1.5, "expected a whole number"),
        ("synthesis.L1_16_6.up_factor", float("nan"), "from 1 to 16"),
        ("synthesis.L1_16_6.down_factor", 0, "from 1 to 16"),
        ("synthesis.L1_16_6.down_factor", True, "from 1 to 16"),
        ("synthesis.L1_16_6.down_factor", "2", "from 1 to 16"),
        ("synthesis.L1_16_6.down_factor", 3, "brings a rate of 8 to"),
        ("synthesis.L5_16_3.up_factor", 2, r"missing \(1\): synthesis\.L5_16_3\.up_filter"),
        ("synthesis.L1_16_6.conv_clamp", -1, "above 0"),
        ("synthesis.L1_16_6.conv_clamp", "256", "above 0"),
        ("synthesis.output_scale", float("inf"), "above 0"),
        ("synthesis.input.bandwidth", 9.0, "need a sampling rate above 18, this is 8"),
        ("synthesis.input.sampling_rate", -16, "from 1 to"),
        ("mapping.fc0.activation", "relu", r"StyleGAN3 whose mapping\.fc0\.activation is 'relu'"),
        ("mapping.fc0.bias_gain", 1.0, r"StyleGAN3 whose mapping learns at 1\.0"),
    ],
)
def test_settings_without_sense_are_refused(save, name, value, what):
    state, settings = reference.random_state()
    with pytest.raises(CheckpointMismatchError, match=what):
        load_generator(save(state, settings | {name: value}))


def test_sizes_beyond_sense_and_damaged_settings(save, tmp_path):
    state, settings = reference.random_state()
    huge = {name.replace("_24_", "_9999_"): tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointMismatchError, match="no generator is larger"):
        load_generator(save(huge, settings))
    nan = state | {"synthesis.L2_24_5.weight": torch.full((5, 6, 3, 3), float("nan"))}
    with pytest.raises(NonFiniteWeightsError, match="L2_24_5"):
        load_generator(save(nan, settings))
    path = save_generator(load_generator(save(state, settings)), tmp_path / "x.safetensors")
    tensors = load_file(path)
    for text in ("{", "[1]", json.dumps({"synthesis.output_scale": "x"}), json.dumps({"synthesis.output_scale": None})):
        metadata = {"format": "pyrewrite-generator", "version": "1", "settings": text}
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"x\.safetensors.*settings"):
            load_generator(path)


# -- edits -------------------------------------------------------------------------------------------------------------


def record():
    box = mask_url(16, 4, 4, 10, 10)
    return Edit(Selection(0, box), Selection(1, box), [Selection(1, box), Selection(2, box)])


def test_the_solvers_layer_is_the_layer(generator, z):
    for name, layer in generator.layers.items():
        captured, conv = generator.capture(name, z), generator.conv_layer(name)
        size, box = layer.resolution, (2, 1, layer.resolution - 3, layer.resolution)
        for where in ((0, 0, size, size), box):
            top, left, bottom, right = where
            target = InsertionTarget(
                crop_key(conv, captured.key[0], where), captured.value[0, :, top:bottom, left:right], captured.style[0]
            )
            torch.testing.assert_close(layer_values(conv, target), target.goal, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore::pyrewrite.rewriting.report.EditWarning"
)  # nothing in a random network is an object
@pytest.mark.parametrize("method", ["low_rank", "least_squares", "projected"])
def test_solve_patch_and_revert(generator, method, tmp_path):
    kept, before = bits(generator), generator.images([1])
    rewriter = Rewriter(generator, "layer5", samples=64, cache_dir=False, progress=False)
    patch = rewriter.solve(record(), method=method, rank=4, steps=100, margin=0)
    assert patch.report.loss_after < 0.5 * patch.report.loss_before
    patch.save(tmp_path / "x.safetensors")
    patch = LowRankPatch.load(tmp_path / "x.safetensors")
    patch.apply_(generator)
    assert (generator.images([1]) - before).abs().max() > 1e-3
    captured, conv = generator.capture("layer5", generator.latents([1])), generator.conv_layer("layer5")
    whole = (0, 0, *captured.value.shape[2:])
    target = InsertionTarget(crop_key(conv, captured.key[0], whole), captured.value[0], captured.style[0])
    torch.testing.assert_close(layer_values(conv, target), captured.value[0], rtol=0, atol=1e-5)
    patch.remove_(generator)
    assert same_bits(generator, kept)
    assert torch.equal(generator.images([1]), before)


def test_erase_and_zero(generator):
    rewriter = Rewriter(generator, "layer3", samples=8, cache_dir=False, progress=False)
    kept = bits(generator)
    for patch in (rewriter.erase(record(), units=2, rank=2, steps=40), rewriter.zero(record(), rank=2)):
        with patch.applied(generator):
            assert not same_bits(generator, kept)
        assert same_bits(generator, kept)


def test_masks_lie_on_the_picture_and_not_on_the_margin(generator):
    layer = generator.layers["layer4"]  # 16 pixels of keys, of which 8 are the picture
    assert (layer.key_resolution, layer.key_margin) == (16, 4)
    area = mask_on_map(mask_url(16, 0, 0, 8, 16), (16, 16), (16, 16), margin=4)
    assert area.shape == (16, 16)
    assert area[4:8, 4:12].min() > 0.8
    assert area[:4].max() == area[9:].max() == area[:, :4].max() == area[:, 12:].max() == 0
    # What is changed under the mask shows in that part of the picture.
    captured = generator.capture("layer4", generator.latents([0]))
    changed = captured.value.clone()
    m = layer.margin
    changed[:, :, m : m + 4, m : m + 8] += 3
    difference = (
        (generator.finish("layer4", captured, changed) - generator.finish("layer4", captured)).abs().mean((0, 1))
    )
    assert difference[:6].mean() > 1.5 * difference[10:].mean()


def test_pasted_pictures_show_the_object_where_it_was_painted(generator):
    rewriter = Rewriter(generator, "layer4", samples=8, cache_dir=False, progress=False)
    images, alpha = rewriter.pasted(record(), [1])
    assert images.shape == (1, 3, 16, 16)
    rows = (alpha.amax(1) > 0.5).nonzero()[:, 0]
    assert abs(int(rows[0]) - 4) <= 2
    assert abs(int(rows[-1]) - 9) <= 2
