"""What loads, what is refused, and what the refusal says."""

import argparse
import contextlib
import io
import os
import pickle
import zipfile

import generators_reference as reference
import numpy as np
import pytest
import torch
from PIL import Image

from pyrewrite.errors import (
    CheckpointError,
    CheckpointMismatchError,
    DamagedCheckpointError,
    NonFiniteError,
    NonFiniteWeightsError,
    NotACheckpointError,
)
from pyrewrite.generators import load_generator
from pyrewrite.generators.loading import BUNDLED


@pytest.fixture
def state():
    return reference.stylegan2_state(channels=(6, 5), z=4, mapping=(5, 7))


@pytest.fixture
def save(tmp_path):
    def saved(content, name="generator.pt", **options):
        path = tmp_path / name
        torch.save(content, path, **options)
        return path

    return saved


def same_weights(generator, state):
    loaded = generator.state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded.pop(name), tensor.float()), name
    assert set(loaded) <= {"latent_avg"}


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_weights_are_those_of_the_file(name):
    generator = load_generator(name)
    content = torch.load(generator.path, weights_only=True)
    same_weights(generator, content["g_ema"] if "g_ema" in content else content["state_dict"])
    if "latent_avg" in content:
        assert torch.equal(generator.latent_avg, content["latent_avg"].float())
    assert {p.dtype for p in generator.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in generator.parameters())
    assert any("float16" in note for note in generator.notes)
    assert generator.patches is None


def test_layouts_of_stylegan2_hold_the_same_generator(save, state):
    mean = torch.randn(7)
    z = torch.randn(2, 4)
    files = {
        "rosinality": {"g_ema": state, "latent_avg": mean},
        "training": {"g": {k: v + 1 for k, v in state.items()}, "g_ema": state, "latent_avg": mean, "d": {}, "step": 3},
        "sequential": {**reference.sequential(state), "latents.latent_avg": mean},
        "dconv": {"state_dict": {**reference.sequential(state, dconv=True), "latents.latent_avg": mean}},
        "mean beside": {"g_ema": reference.sequential(state), "latent_avg": mean[None]},
        "renamed mean": {"g_ema": state, "mean_latent": mean.expand(4, 7)},
        "data parallel": {"g_ema": {f"module.{k}": v for k, v in state.items()}, "latent_avg": mean},
        "compiled": {"g_ema": {f"module._orig_mod.{k}": v for k, v in state.items()}, "latent_avg": mean},
        "compiled parts": {
            "g_ema": {k.replace("convs.0.", "convs.0._orig_mod."): v for k, v in state.items()},
            "w_avg": mean,
        },
        "ordered": {"g_ema": dict(reversed(state.items())), "latent_avg": mean},
        "parameters": {"g_ema": {k: torch.nn.Parameter(v) for k, v in state.items()}, "latent_avg": mean},
    }
    first, hashes = None, set()
    for name, content in files.items():
        generator = load_generator(save(content), truncation=0.6)
        sequential = name in ("sequential", "dconv", "mean beside")
        assert (generator.family, generator.layout) == ("stylegan2", "official" if sequential else "rosinality")
        same_weights(generator, state)
        assert torch.equal(generator.latent_avg, mean), name
        image = generator(z)
        first = image if first is None else first
        assert torch.equal(image, first), name
        hashes.add(generator.weights_hash())
    assert len(hashes) == 1
    assert "g_ema" in load_generator(save(files["training"])).notes[0]


def test_layouts_of_progan_hold_the_same_generator(save):
    state = reference.progan_state()
    z = torch.randn(2, 5)
    old = {}
    for name, tensor in state.items():
        layer, rest = name.split(".", 1)
        old["output." + rest if layer.startswith("output") else f"features.{int(layer[5:]) - 1}.{rest}"] = tensor
    with_scales = dict(old)
    for n in range(4):
        weight = state[f"layer{n + 1}.conv.weight"]
        with_scales[f"features.{n}.wscale.scale"] = torch.tensor([2**0.5 / (weight.shape[1] ** 0.5 * weight.shape[-1])])
    first = load_generator(save(state))(z)
    for content in (
        {"state_dict": state},
        old,
        {"state_dict": old},
        with_scales,
        {f"module.{k}": v for k, v in state.items()},
    ):
        generator = load_generator(save(content, "renamed.png"), family="progan")
        same_weights(generator, state)
        assert torch.equal(generator(z), first)
    with_scales["features.2.wscale.scale"] += 0.1
    with pytest.raises(CheckpointMismatchError, match=r"layer3.wscale.scale is"):
        load_generator(save(with_scales))


def test_old_torch_files_and_any_extension_load(save, state):
    for name in ("generator.jpg", "generator", "generator.pkl"):
        same_weights(load_generator(save({"g_ema": state}, name)), state)
    same_weights(load_generator(save({"g_ema": state}, _use_new_zipfile_serialization=False)), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(save, state, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    generator = load_generator(save({"g_ema": stored}))
    same_weights(generator, stored)
    assert generator(torch.randn(1, 4)).dtype == torch.float32
    assert any(str(dtype)[6:] in note for note in generator.notes)


def test_strided_weights_and_views_load(save, state):
    state["conv1.conv.weight"] = state["conv1.conv.weight"].transpose(3, 4).contiguous().transpose(3, 4)
    state["style.1.weight"] = torch.cat([state["style.1.weight"]] * 2)[:5]
    same_weights(load_generator(save({"g_ema": state})), state)


def test_missing_noise_is_made_from_a_seed(save, state):
    del state["noises.noise_0"]
    generator = load_generator(save({"g_ema": state}))
    assert any("no noise for 1 of 3" in note for note in generator.notes)
    assert torch.equal(generator.noises.noise_0, load_generator(save({"g_ema": state})).noises.noise_0)
    assert not torch.equal(generator.noises.noise_0, load_generator(save({"g_ema": state}), seed=2).noises.noise_0)
    assert torch.equal(generator.noises.noise_1, state["noises.noise_1"])
    drawn = np.random.RandomState(1).standard_normal((1, 1, 4, 4)).astype(np.float32)
    assert np.array_equal(generator.noises.noise_0.numpy(), drawn)


@pytest.mark.parametrize("mean", [None, torch.tensor(0.0)], ids=["absent", "the scalar of the official tool"])
def test_missing_mean_latent_is_estimated(save, state, mean):
    content = {"g_ema": state} if mean is None else {**reference.sequential(state), "latents.latent_avg": mean}
    generator = load_generator(save(content), truncation=0.5)
    assert any("no mean latent" in note for note in generator.notes)
    z = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0))
    expected = reference.mapping(state, z).mean(0)
    assert (generator.latent_avg - expected).norm() < 0.1 * reference.mapping(state, z).std(0).norm()
    assert torch.equal(generator.latent_avg, load_generator(save(content)).latent_avg)


def test_training_options_and_numpy_beside_the_weights(save, state):
    content = {
        "g_ema": {**state, "style.1.bias": state["style.1.bias"].numpy(), "n": np.float32(3)},
        "args": argparse.Namespace(size=8, mixing=0.9, path="x"),
        "latent_avg": torch.zeros(7),
        "scores": np.arange(6.0).reshape(2, 3),
        "step": np.int64(4),
    }
    path = save(content)
    same_weights(load_generator(path), state)
    with zipfile.ZipFile(path) as archive:  # the same under the other major version's module name
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    renamed = records[pickled].replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert renamed != records[pickled]
    records[pickled] = renamed
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    same_weights(load_generator(path), state)
    with pytest.raises(CheckpointError, match="plain numbers"):
        load_generator(save({**content, "scores": np.array([{}, []], dtype=object)}))


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_nothing_in_a_file_is_run(save, state, tmp_path):
    allowed = set(torch.serialization.get_safe_globals())
    with pytest.raises(CheckpointError, match="not opened"):
        load_generator(save({"g_ema": state, "x": Payload()}))
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules.*state_dict"):
        load_generator(save(torch.nn.Linear(2, 2)))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(NotACheckpointError, match="Python pickle"):
        load_generator(tmp_path / "x.pkl")
    assert not Payload.ran
    assert set(torch.serialization.get_safe_globals()) == allowed


def picture(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, kind)
    return buffer.getvalue()


def numpy_archive():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def zip_archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"\n", "text file"),
        (b"some words about a generator\n" * 500, "text file"),
        (b'{"object": [1, 2]}', "JSON"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\xef\xbb\xbf\n<!-- x --><html><body>404", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML text, perhaps a server's error"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (picture("PNG"), "PNG picture"),
        (picture("JPEG"), "JPEG picture"),
        (picture("GIF"), "GIF picture"),
        (picture("WEBP"), "WebP picture"),
        (picture("BMP"), "BMP picture"),
        (b"\x00" * 9999, "zero bytes"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (b"\xf3\x07\xd1\xfe" * 99, "unknown kind"),
        (numpy_archive(), "NumPy archive"),
        (zip_archive(), "zip archive"),
        (pickle.dumps([1]), "Python pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_called_what_they_are(tmp_path, content, what):
    path = tmp_path / "generator.pt"
    path.write_bytes(content)
    with pytest.raises(NotACheckpointError, match=what) as caught:
        load_generator(path)
    assert str(path) in str(caught.value)


def test_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(NotACheckpointError, match="is a device or a pipe"):
            load_generator(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt.*peeps"):
        load_generator(tmp_path / "nothing.pt")
    with pytest.raises(IsADirectoryError, match="folder"):
        load_generator(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_called_truncated(save, state, zipped):
    path = save({"g_ema": state}, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 30, len(whole) // 2, len(whole) // 5, 40, 13):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpointError, match=rf"truncated.*{size} bytes"):
            load_generator(path)


def test_damaged_archives_are_called_damaged(save, state):
    path = save({"g_ema": state})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    middle = largest.header_offset + len(largest.filename) + 200  # within the data of a weight
    path.write_bytes(whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 8]) + whole[middle + 8 :])
    with pytest.raises(DamagedCheckpointError, match=r"damaged.*checksum"):
        load_generator(path)
    generator = np.random.RandomState(0)
    for _ in range(60):  # anything may happen to a file, but it ends in a CheckpointError or in the whole generator
        hurt = bytearray(whole)
        for at in generator.randint(0, len(whole), 3):
            hurt[at] = generator.randint(256)
        path.write_bytes(hurt)
        with contextlib.suppress(CheckpointError):
            same_weights(load_generator(path), state)


def test_a_file_without_checksums_loads(save, state):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"g_ema": state})
    finally:
        torch.serialization.set_crc32_options(True)
    same_weights(load_generator(path), state)


NAMES = [
    "conv1.conv.weight",
    "convs.1.activate.bias",
    "style.1.bias",
    "style.2.weight",
    "to_rgbs.0.bias",
    "input.input",
    "convs.0.conv.blur.kernel",
    "to_rgbs.0.upsample.kernel",
    "to_rgb1.conv.weight",
]
LARGER = ["convs.7.conv.weight", "style.9.weight", "noises.noise_5", "layer9.sconv.activate.bias", "to_rgbs.3.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_name_is_listed(save, state, name):
    del state[name]
    with pytest.raises(CheckpointMismatchError, match=rf"missing \(1\): {name}; expected"):
        load_generator(save({"g_ema": state}))


@pytest.mark.parametrize("name", LARGER)
def test_names_of_a_larger_network_are_not_ignored(save, state, name):
    state[name] = torch.zeros(1)
    with pytest.raises(CheckpointMismatchError, match="missing"):
        load_generator(save({"g_ema": state}))


def test_extra_names_are_listed(save, state):
    state["conv1.conv.extra"] = torch.zeros(1)
    state["something"] = torch.zeros(1)
    with pytest.raises(CheckpointMismatchError, match=r"extra \(2\): conv1.conv.extra, something"):
        load_generator(save({"g_ema": state}))
    progan = reference.progan_state()
    progan["output_4x4.conv.weight"] = torch.zeros(3, 6, 1, 1)
    del progan["layer2.wscale.b"]
    with pytest.raises(CheckpointMismatchError, match=r"missing \(1\): layer2.wscale.b; extra \(1\): output_4x4"):
        load_generator(save(progan))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv1.conv.weight", (1, 6, 7, 3, 3)),
        ("conv1.conv.weight", (6, 6, 3, 3)),
        ("convs.0.conv.weight", (1, 5, 6, 2, 2)),
        ("convs.1.activate.bias", (6,)),
        ("style.2.weight", (7, 4)),
        ("style.1.weight", (5,)),
        ("noises.noise_1", (1, 1, 4, 4)),
        ("input.input", (1, 6, 4, 5)),
        ("to_rgb1.conv.weight", (1, 4, 6, 1, 1)),
        ("to_rgb1.conv.weight", (1, 0, 6, 1, 1)),
        ("convs.0.conv.blur.kernel", (4,)),
        ("to_rgbs.0.upsample.kernel", (4, 3)),
    ],
)
def test_wrong_shapes_are_named(save, state, name, shape):
    state[name] = torch.zeros(shape)
    with pytest.raises(
        CheckpointMismatchError, match=r"is \(\d.*(expected|only square)|channels; 1 \(grey\)"
    ) as caught:
        load_generator(save({"g_ema": state}))
    assert name in str(caught.value) or "channels" in str(caught.value)


def test_weights_that_are_not_finite_or_not_numbers(save, state):
    state["convs.0.conv.weight"][0, 0, 0, 0, 0] = float("nan")
    state["style.1.bias"][1] = float("inf")
    with pytest.raises(
        NonFiniteWeightsError, match=r"style.1.bias \(1 of 5\), .*convs.0.conv.weight \(1 of 270\)"
    ) as caught:
        load_generator(save({"g_ema": state}))
    assert isinstance(caught.value, NonFiniteError)
    state = reference.progan_state()
    state["layer1.wscale.b"] = torch.arange(6)
    with pytest.raises(CheckpointMismatchError, match=r"layer1.wscale.b is torch.int64"):
        load_generator(save(state))
    state["layer1.wscale.b"] = torch.full((6,), 1e300, dtype=torch.float64)
    with pytest.raises(NonFiniteWeightsError, match="range of float32"):
        load_generator(save(state))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "no tensors"),
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({"state_dict": {}}, "no tensors"),
        ({"iteration": 3}, "no tensors, only iteration"),
        ({"a.weight": torch.zeros(2)}, r"not those of a generator known here.*a\.weight"),
        ({"convs.0.0.weight": torch.zeros(2), "final_linear.0.weight": torch.zeros(2)}, "discriminator"),
        ({"synthesis.b4.conv1.weight": torch.zeros(2)}, "NVIDIA"),
    ],
)
def test_checkpoints_of_something_else(save, content, what):
    with pytest.raises(CheckpointMismatchError, match=what):
        load_generator(save(content))


def test_architectures_that_are_refused_by_name(save, state):
    labels = {**state, "embed.weight": torch.zeros(3, 4)}
    with pytest.raises(CheckpointMismatchError, match="class labels"):
        load_generator(save({"g_ema": labels}))


def test_colours_of_the_last_layer_alone(save, state):
    last = max(int(name.split(".")[1]) for name in state if name.startswith("to_rgbs."))
    others = ("to_rgb1.", *(f"to_rgbs.{n}." for n in range(last)))
    generator = load_generator(save({"g_ema": {k: v for k, v in state.items() if not k.startswith(others)}}))
    assert generator.architecture == "orig"
    assert generator.images([0]).isfinite().all()


def test_twice_the_same_name(save, state):
    with pytest.raises(CheckpointMismatchError, match="twice"):
        load_generator(save({**state, "module.input.input": state["input.input"]}))
    with pytest.raises(CheckpointMismatchError, match="twice"):
        load_generator(save({**state, **reference.sequential(state)}))


def test_arguments(save, state):
    path = save({"g_ema": state})
    with pytest.raises(CheckpointMismatchError, match="family='progan'"):
        load_generator(path, family="progan")
    with pytest.raises(ValueError, match="family is one of"):
        load_generator(path, family="stylegan9")
    with pytest.raises(ValueError, match="truncation"):
        load_generator(path, truncation=float("inf"))
