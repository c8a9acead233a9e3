"""Small files that ask for much: refused in no time, by an error that names the file."""

from __future__ import annotations

import pickle
import time
import zipfile

import pytest
import safetensors.torch
import torch

from pyrewrite import load_generator
from pyrewrite.errors import CheckpointError, CheckpointMismatchError
from pyrewrite.generators.loading._network_pickle import MAX_NAMES, NetworkState, _device, _size, flat
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


def test_weights_without_dimensions(tmp_path):
    torch.save({f"layer{n}.conv.weight": torch.zeros(()) for n in range(1, 5)}, tmp_path / "g.pt")
    with pytest.raises(CheckpointError, match=r"g\.pt"):
        load_generator(tmp_path / "g.pt")
