"""Pickles as NVIDIA's repositories write them: the same images as the published definition, and nothing is run."""

import collections
import contextlib
import pickle
import re

import numpy as np
import nvidia_reference as reference
import pytest
import torch

from pyrewrite.errors import CheckpointError, CheckpointMismatchError, DamagedCheckpointError, NonFiniteWeightsError
from pyrewrite.generators import load_generator, save_generator
from pyrewrite.ops import InsertionTarget, crop_key, layer_values


@pytest.fixture
def source(sentinel):
    """The text of the module that is stored beside the weights; it must never run."""
    return f"open({str(sentinel)!r}, 'w').write('ran')\n" * 3 + "# " + "x" * 500


@pytest.fixture
def save(tmp_path, source):
    def saved(content, name="network.pkl", protocol=4):
        path = tmp_path / name
        path.write_bytes(reference.dumps(content, protocol))
        return path

    return saved


def snapshot(state, source, settings=None, **others):
    """What a training run leaves."""
    worse = {name: tensor + 0.5 for name, tensor in state.items()}
    return {
        "training_set_kwargs": reference.EasyDict(class_name="training.dataset.ImageFolderDataset", resolution=16),
        "G": reference.network(worse, source),
        "D": reference.network({"b16.conv0.weight": torch.randn(3, 3)}, source),
        "G_ema": reference.network(state, source, settings),
        "augment_pipe": None,
        **others,
    }


def largest_difference(generator, state, z, **options):
    double = {name: tensor.double() for name, tensor in state.items()}
    truth = reference.images(double, z.double(), **options).clamp(-1, 1)
    with torch.no_grad():
        return float((generator(z).double() - truth).abs().max())


SHAPES = [
    {},
    {"channels": (9, 4), "layers": 1, "z": 3, "w": 6},
    {"channels": (4,), "w": 3},
    {"channels": (5, 3), "image_channels": 1, "taps": (1, 4, 6, 4, 2)},
    {"channels": (5, 3, 2), "taps": (1, 2, 3, 5, 8, 13, 21, 34)},
    {"channels": (5, 3), "noise": False},
    {"channels": (4, 3, 2), "base": 8},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_are_those_of_the_published_definition(save, source, shape):
    state = reference.random_state(**shape)
    settings = {}
    if shape.get("noise") is False:
        blocks = {n.rpartition(".")[0] for n in state if n.endswith((".conv0.weight", ".conv1.weight"))}
        settings = {f"{name}.use_noise": False for name in blocks}
    generator = load_generator(save(snapshot(state, source, settings)))
    z = torch.randn(3, shape.get("z", 7), generator=torch.Generator().manual_seed(5))
    assert generator.family == "stylegan2"
    assert generator.layout == "NVIDIA"
    assert largest_difference(generator, state, z) < 1e-5
    generator.truncation = 0.6
    assert largest_difference(generator, state, z, truncation=0.6) < 1e-5
    assert "taken from 'G_ema'; the file also holds 'G'" in generator.notes[0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_and_numpy_beside_the_weights(save, source, protocol):
    state = reference.random_state()
    settings = {
        "c_dim": 0,
        "mapping.num_ws": np.int64(4),
        "synthesis.b8.conv0.weight_gain": np.float64(0.125),
        "synthesis.b8.conv0.act_gain": np.sqrt(2),
        "synthesis.b8.conv0.activation": "lrelu",
        "synthesis.b8.torgb.affine.activation": "linear",
        "synthesis.b8.architecture": "skip",
        "mapping.fc0.bias_gain": 0.01,
        "synthesis.stats": np.arange(6.0).reshape(2, 3),
        "synthesis.dtype": torch.float32,
    }
    path = save(snapshot(state, source, settings), protocol=protocol)
    generator = load_generator(path)
    assert torch.equal(generator.convs[0].conv.weight[0], state["synthesis.b8.conv0.weight"])  # bit for bit
    assert torch.equal(generator.latent_avg, state["mapping.w_avg"])
    first = generator.weights_hash()
    renamed = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if protocol < 4:  # names end with a line, so that they may be shorter; later ones have their length before them
        path.write_bytes(renamed)
        assert load_generator(path).weights_hash() == first


def test_the_generator_alone_a_state_dict_and_any_extension(save, source, tmp_path):
    state = reference.random_state()
    first = load_generator(save(snapshot(state, source))).weights_hash()
    assert load_generator(save(reference.network(state, source), "network.jpg")).weights_hash() == first
    assert load_generator(save({"G_ema": collections.OrderedDict(state)})).weights_hash() == first
    torch.save({"g_ema": state}, tmp_path / "x.pt")
    assert load_generator(tmp_path / "x.pt").weights_hash() == first
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "x.pt")
    assert load_generator(tmp_path / "x.pt").weights_hash() == first


def test_shared_and_strided_tensors(save, source):
    state = reference.random_state()
    state["synthesis.b8.conv0.weight"] = state["synthesis.b8.conv0.weight"].to(memory_format=torch.channels_last)
    whole = torch.randn(20, 7)
    state["mapping.fc0.weight"] = whole[3:8]
    generator = load_generator(save(snapshot(state, source)))
    assert torch.equal(generator.style[1].weight, whole[3:8])
    assert largest_difference(generator, state, torch.randn(2, 7)) < 1e-4


def test_half_precision_is_computed_in_float32(save, source):
    state = {name: tensor.half() for name, tensor in reference.random_state().items()}
    generator = load_generator(save(snapshot(state, source)))
    assert generator.dtype == torch.float32
    assert any("float16" in note for note in generator.notes)
    assert torch.equal(generator.conv1.conv.weight[0], state["synthesis.b4.conv1.weight"].float())


def test_class_labels(save, source):
    state = reference.random_state(classes=4)
    generator = load_generator(save(snapshot(state, source, {"c_dim": 4})))
    z = torch.randn(2, 7)
    assert generator.z_dim == 7
    assert generator.classes == 4
    assert any("4 class labels" in note for note in generator.notes)
    for label in (0, 3):
        generator.label = label
        assert largest_difference(generator, state, z, label=label) < 1e-5
    for bad in (4, -1, None, 1.5, True):
        with pytest.raises(ValueError, match="label is a class number from 0 to 3"):
            generator.label = bad
    plain = load_generator(save(snapshot(reference.random_state(), source)))
    assert plain.label is None
    with pytest.raises(ValueError, match="no class labels"):
        plain.label = 1


def test_missing_noise_and_mean_latent(save, source):
    state = reference.random_state()
    del state["synthesis.b4.conv1.noise_const"], state["mapping.w_avg"]
    generator = load_generator(save(snapshot(state, source)))
    assert any("no noise for 1 of 5" in note for note in generator.notes)
    assert any("no mean latent" in note for note in generator.notes)


@pytest.mark.parametrize("batch", [1, 3])
def test_clamped_layers(save, source, tmp_path, batch):
    state = reference.random_state()
    parts = {n.rpartition(".")[0] for n in state if re.fullmatch(r"synthesis\.b\d+\.(conv\d|torgb)\.weight", n)}
    settings = {f"{part}.conv_clamp": 0.5 for part in parts} | {"synthesis.b8.use_fp16": True}
    settings["synthesis.b8.conv1.conv_clamp"] = 1
    clamps = {name.removesuffix(".conv_clamp"): value for name, value in settings.items() if "clamp" in name}
    generator = load_generator(save(snapshot(state, source, settings)))
    z = torch.randn(batch, 7, generator=torch.Generator().manual_seed(5))
    assert largest_difference(generator, state, z, clamps=clamps) < 1e-5
    assert largest_difference(generator, state, z) > 0.1
    for name in generator.layers:
        captured = generator.capture(name, z)
        assert float(captured.value.abs().max()) == (1 if name == "layer4" else 0.5)
        torch.testing.assert_close(generator.finish(name, captured), generator(z), rtol=0, atol=1e-6)
    for name in ("x.pt", "x.safetensors"):
        again = load_generator(save_generator(generator, tmp_path / name))
        assert again.file_settings() == generator.file_settings()
        assert torch.equal(again(z), generator(z))
    for bad in (0, -1, float("nan"), "256"):
        with pytest.raises(CheckpointMismatchError, match=r"convs\.0\.conv_clamp is .*above 0"):
            load_generator(save(snapshot(state, source, {"synthesis.b8.conv0.conv_clamp": bad})))


@pytest.mark.parametrize(
    ("settings", "names", "what"),
    [
        ({"synthesis.b8.architecture": "resnet"}, {}, r"missing .*synthesis\.b8\.skip\.weight"),
        ({}, {"synthesis.b8.skip.weight": (5, 6, 1, 1)}, r"missing .*synthesis\.b16\.skip\.weight"),
        ({"synthesis.b8.architecture": "orig"}, {}, r"extra .*synthesis\.b4\.torgb"),
        ({"synthesis.b8.architecture": "dense"}, {}, "architecture 'dense'; known are skip, orig and resnet"),
        ({"mapping.fc0.activation": "relu"}, {}, r"mapping\.fc0\.activation is 'relu'"),
        ({"mapping.fc0.bias_gain": 0.1}, {}, r"mapping learns at 0\.1"),
        ({}, {"synthesis.L0_36_16.weight": (2, 2)}, r"extra \(1\): synthesis\.L0_36_16\.weight"),
        ({}, {"synthesis.b8.conv2.weight": (2, 2)}, r"extra \(1\): synthesis\.b8\.conv2\.weight"),
        ({}, {"synthesis.b64.conv1.weight": (2, 2)}, "expected each twice the one before"),
    ],
)
def test_other_architectures_are_refused_by_name(save, source, settings, names, what):
    state = reference.random_state() | {name: torch.randn(shape) for name, shape in names.items()}
    with pytest.raises(CheckpointMismatchError, match=what):
        load_generator(save(snapshot(state, source, settings)))


@pytest.mark.parametrize("architecture", ["orig", "resnet"])
@pytest.mark.parametrize(
    "shape", [{}, {"channels": (16, 32, 16)}, {"channels": (4,)}, {"taps": (1, 2, 3, 5, 8, 13, 21, 34)}], ids=str
)
def test_other_architectures(save, source, tmp_path, architecture, shape):
    """Colours of the last block alone, and residual connections: images, edits, files."""
    state = reference.random_state(architecture=architecture, **shape)
    blocks = {name.rsplit(".", 2)[0] for name in state if name.endswith("conv1.weight")}
    settings = {f"{block}.architecture": architecture for block in blocks}
    settings |= {f"{block}.skip.activation": "linear" for block in blocks if f"{block}.skip.weight" in state}
    generator = load_generator(save(snapshot(state, source, settings)))
    z = torch.randn(3, 7, generator=torch.Generator().manual_seed(5))
    assert largest_difference(generator, state, z) < 1e-5
    assert largest_difference(generator, state, z[:1]) < 1e-5
    without = load_generator(save({"G_ema": state}))  # no settings: the names tell
    assert without.weights_hash() == generator.weights_hash()
    for name in generator.layers:
        captured = generator.capture(name, z)
        torch.testing.assert_close(generator.finish(name, captured), generator(z), rtol=0, atol=1e-5)
        conv, whole = generator.conv_layer(name), (0, 0, *captured.value.shape[2:])
        target = InsertionTarget(
            crop_key(conv, captured.key[0], whole), captured.value[0], captured.style[0], captured.noise
        )
        torch.testing.assert_close(layer_values(conv, target), captured.value[0], rtol=0, atol=1e-5)
    again = load_generator(save_generator(generator, tmp_path / "x.safetensors"))
    assert again.weights_hash() == generator.weights_hash()
    assert torch.equal(again(z), generator(z))
    if len(generator.layers) > 1:
        assert again.architecture == architecture
        with pytest.raises(ValueError, match=f"architecture '{architecture}' has no place"):
            save_generator(generator, tmp_path / "x.pt")
    exact = generator(z)
    generator.precision = "fp16"
    assert 0 < (generator(z) - exact).abs().mean() < 2e-3


@pytest.mark.parametrize(
    "name",
    ["mapping.fc1.bias", "synthesis.b4.const", "synthesis.b8.conv0.affine.weight", "synthesis.b16.torgb.weight"],
)
def test_every_missing_name_is_listed_as_in_the_file(save, source, name):
    state = reference.random_state()
    del state[name]
    with pytest.raises(CheckpointMismatchError, match=rf"missing \(1\): {name}; expected"):
        load_generator(save(snapshot(state, source)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("synthesis.b8.conv0.weight", (5, 6, 3)),
        ("synthesis.b8.conv0.weight", (5, 7, 3, 3)),
        ("synthesis.b4.const", (6, 4, 5)),
        ("synthesis.b8.conv1.noise_const", (4, 4)),
        ("synthesis.b8.torgb.bias", (7,)),
        ("synthesis.b8.torgb.weight", (2, 5, 1, 1)),
        ("mapping.fc1.weight", (5, 9)),
    ],
)
def test_wrong_shapes_are_refused(save, source, name, shape):
    state = reference.random_state()
    state[name] = torch.zeros(shape)
    with pytest.raises(CheckpointMismatchError, match=r"is \(\d.*expected|channels; 1 \(grey\)") as caught:
        load_generator(save(snapshot(state, source)))
    assert name in str(caught.value) or "channels" in str(caught.value)


def test_values_that_are_not_finite(save, source):
    state = reference.random_state()
    state["synthesis.b8.conv0.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match="NaN"):
        load_generator(save(snapshot(state, source)))


def test_truncated_and_damaged_files(save, source):
    path = save(snapshot(reference.random_state(channels=(3, 2), z=2, w=2), source))
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, len(whole) // 5, 40, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpointError, match=rf"truncated.*{size} bytes"):
            load_generator(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(DamagedCheckpointError, match="4 bytes follow"):
        load_generator(path)
    random = np.random.RandomState(0)
    for _ in range(80):  # anything may happen to a file, but it ends in a CheckpointError or in a generator
        hurt = bytearray(whole)
        for at in random.randint(0, len(whole), 3):
            hurt[at] = random.randint(256)
        path.write_bytes(hurt)
        with contextlib.suppress(CheckpointError):
            load_generator(path)


def test_pickles_of_other_things(save, source, tmp_path):
    for content, what in (
        ([1, 2], "Python pickle of a list"),
        (reference.module("Discriminator", source, {"b16.fromrgb.weight": torch.zeros(2)}), "discriminator"),
        ({"G_ema": reference.module("Generator", source)}, "no tensors"),
        ({"G_ema": None, "step": 3}, "no tensors"),
    ):
        with pytest.raises(CheckpointError, match=what):
            load_generator(save(content))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(collections.Counter("ab")))
    with pytest.raises(CheckpointError, match=r"collections\.Counter"):
        load_generator(tmp_path / "x.pkl")
