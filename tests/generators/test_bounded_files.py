"""Small files that ask for much: refused in no time, by an error that names the file."""

from __future__ import annotations

import pickle
import time
import zipfile

import generators_reference
import nvidia_reference
import pytest
import safetensors.torch
import torch

from pyrewrite import load_generator
from pyrewrite.errors import CheckpointError, CheckpointMismatchError
from pyrewrite.generators.loading._network_pickle import (
    MAX_NAMES,
    NetworkState,
    _device,
    _flat_networks,
    _size,
    flat,
)
from pyrewrite.generators.loading._pickle_machine import PickleRefused


@pytest.fixture(autouse=True)
def soon():
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < 20  # each takes far less than a second where nothing else runs


def test_a_dict_that_holds_itself(tmp_path):
    content: dict = {}
    content["g_ema"] = content
    torch.save(content, tmp_path / "g.pt")
    (tmp_path / "g.pkl").write_bytes(pickle.dumps(content, protocol=4))
    for name in ("g.pt", "g.pkl"):
        with pytest.raises(CheckpointError, match=f"{name}.*generators inside of generators"):
            load_generator(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    [
        "main.3000000000.weight",
        "layer300000000.conv.weight",
        "convs.300000000.conv.weight",
        "mapping.fc300000000.weight",
        "synthesis.layer300000000.weight",
        "convs.99999.conv.weight",
    ],
)
def test_numbers_in_names(name, tmp_path):
    safetensors.torch.save_file({name: torch.zeros(2, 2)}, tmp_path / "g.safetensors")
    with pytest.raises(CheckpointMismatchError, match="no generator has so many layers"):
        load_generator(tmp_path / "g.safetensors")


def test_one_number_as_a_large_weight(tmp_path):
    torch.save({"main.0.weight": torch.zeros(1).expand(3000, 3000, 4, 4)}, tmp_path / "g.pt")
    with pytest.raises(CheckpointMismatchError, match=r"main\.0\.weight.*in 4 bytes"):
        load_generator(tmp_path / "g.pt")


def test_a_second_content_in_capitals(tmp_path):
    torch.save({"main.0.weight": torch.zeros(2, 2, 4, 4)}, tmp_path / "g.pt")
    with zipfile.ZipFile(tmp_path / "g.pt", "a") as archive:
        archive.writestr("a/DATA.PKL", b"another")
    with pytest.raises(CheckpointError, match="several contents"):
        load_generator(tmp_path / "g.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_many_records(tmp_path):
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as archive:
        for number in [*range(20_000), 7]:
            archive.writestr(f"a/{number}", b"")
    with pytest.raises(CheckpointError, match="two records 'a/7'"):
        load_generator(tmp_path / "g.pt")


@pytest.mark.parametrize("parts", [(("a",) * 3,), ("cuda", 0, 0), ("x" * 100,), (10**30,)])
def test_devices(parts):
    with pytest.raises(PickleRefused, match=r"torch\.device"):
        _device(*parts)
    assert _device("cuda", 1) == "cuda:1"


@pytest.mark.parametrize("numbers", [(1,) * 9, ("a",), 3, ((1, 2),)])
def test_sizes(numbers):
    with pytest.raises(PickleRefused, match=r"torch\.Size"):
        _size(numbers)
    assert _size((1, 2)) == (1, 2)


def test_one_part_that_is_there_often():
    part = NetworkState("Conv2d", {"_parameters": {f"p{i}": torch.zeros(1) for i in range(1000)}})
    whole = NetworkState("G", {"_modules": {f"m{i}": part for i in range(2 + MAX_NAMES // 1000)}})
    with pytest.raises(PickleRefused, match="more than"):
        flat(whole)


def test_parts_that_are_shared():
    """Networks and parts that are there once in the file, and many times in what they make."""
    part = NetworkState("Conv2d", {f"_{i}": None for i in range(10_000)})
    whole = NetworkState("G", {"_modules": {f"m{i}": part for i in range(1000)}})
    with pytest.raises(PickleRefused, match="again and again"):
        flat(whole)
    part = NetworkState("G", {"_modules": {f"m{i}": NetworkState("Conv2d") for i in range(1000)}})
    with pytest.raises(PickleRefused, match="again and again"):
        _flat_networks({f"network {i}": part for i in range(1000)})
    deep = NetworkState("Conv2d", {"weight": 1})
    for _ in range(30):
        deep = NetworkState("G", {"_modules": {"m" * 10: deep}})
    with pytest.raises(PickleRefused, match=r"names of .* characters"):
        flat(deep)


@pytest.mark.parametrize("levels", [12, 20, 400])
def test_small_weights_of_large_pictures(levels, tmp_path):
    """One channel at each of many resolutions: the noise alone would fill the memory."""
    state = generators_reference.stylegan2_state(channels=(1, 1), z=2, mapping=(2,))
    state = {name: tensor for name, tensor in state.items() if not name.startswith("noises.")}
    for level in range(2, levels):
        names = ("convs.0.", f"convs.{2 * level - 2}."), ("convs.1.", f"convs.{2 * level - 1}.")
        for first, new in (*names, ("to_rgbs.0.", f"to_rgbs.{level - 1}.")):
            state |= {n.replace(first, new): t.clone() for n, t in state.items() if n.startswith(first)}
    safetensors.torch.save_file(state, tmp_path / "g.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"pixels, by the number of its layers; up to 4096"):
        load_generator(tmp_path / "g.safetensors")
    progan = {f"layer{n}.weight": torch.zeros(1, 1, 3, 3) for n in range(1, 2 * levels)}
    progan |= {"layer0.weight": torch.zeros(1, 1, 4, 4), f"output{levels - 1}.weight": torch.zeros(3, 1, 1, 1)}
    progan |= {name.replace("weight", "bias"): torch.zeros(len(t)) for name, t in progan.items()}
    safetensors.torch.save_file(progan, tmp_path / "p.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"pixels, by the number of its layers"):
        load_generator(tmp_path / "p.safetensors")
    widths = {f"main.{3 * n}.weight": torch.zeros(1, 1 if n < levels - 1 else 3, 4, 4) for n in range(levels)}
    norms = [f"main.{3 * n + 1}" for n in range(levels - 1)]
    widths |= {
        f"{n}.{part}": torch.ones(1) for n in norms for part in ("weight", "bias", "running_mean", "running_var")
    }
    safetensors.torch.save_file(widths, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"pixels, by the number of its layers"):
        load_generator(tmp_path / "d.safetensors")


def test_settings_beyond_sense(tmp_path):
    state = nvidia_reference.random_state((3, 2), 2, 2)
    for name, value, what in (
        ("synthesis.b4.conv1.conv_clamp", 10**400, "beyond any float"),
        ("synthesis.b4.conv1.conv_clamp", float("nan"), "nan, expected a finite number"),
        ("synthesis.b4.conv1.conv_clamp", "x", "'x', expected a finite number"),
        ("mapping.fc0.bias_gain", "x", "'x', expected a finite number"),
        ("mapping.fc0.bias_gain", 10**400, "beyond any float"),
    ):
        network = nvidia_reference.network(state, "", {name: value})
        (tmp_path / "g.pkl").write_bytes(nvidia_reference.dumps({"G_ema": network}))
        with pytest.raises(CheckpointMismatchError, match=what):
            load_generator(tmp_path / "g.pkl")


def test_weights_without_dimensions(tmp_path):
    torch.save({f"layer{n}.conv.weight": torch.zeros(()) for n in range(1, 5)}, tmp_path / "g.pt")
    with pytest.raises(CheckpointError, match=r"g\.pt"):
        load_generator(tmp_path / "g.pt")
