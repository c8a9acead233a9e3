"""The command line on the bundled generators, with few samples; results on stdout, errors in one line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import generators_reference as generators
import numpy as np
import nvidia_reference as nvidia
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support import mask_url

from pyrewrite import Edit, LowRankPatch, Selection, load_generator
from pyrewrite.cli import main, parse_numbers


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYREWRITE_CACHE", str(tmp_path / "cache"))

    def invoke(*args, fails=False):
        result = CliRunner().invoke(main, [str(a) for a in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert (result.exit_code != 0) is fails, result.output
        return result.stderr if fails else result.stdout

    return invoke


@pytest.fixture
def record(tmp_path):
    url = mask_url(64, 12, 12, 44, 50)
    edit = Edit(
        object=Selection(0, url),
        paste=Selection(1, url),
        context=[Selection(2, url)],
        layer="layer4",
        settings={"samples": 8, "rank": 3, "steps": 11},
    )
    path = tmp_path / "edit.json"
    edit.save(path)
    return path


def test_help_is_fast_and_does_not_import_torch():
    code = "import sys; from pyrewrite.cli import main; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-m", "pyrewrite.cli", "--help"], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    for command in ("demo", "info", "convert", "stats", "solve", "apply", "sample", "evaluate", "ui"):
        assert command in out.stdout
    assert seconds < 3  # 0.3 s on an idle machine; this bound only catches an import of torch


def test_info(run):
    data = json.loads(run("info", "peeps-progan", "--json"))
    assert data["family"] == "progan"
    assert [layer["name"] for layer in data["layers"]] == [f"layer{i}" for i in range(1, 11)]
    assert data["hash"] == load_generator("peeps-progan").weights_hash()
    assert data["unusual"] is None
    text = run("info", "peeps-progan")
    assert data["hash"] in text
    assert "renders with sane values" in text


def test_info_names_the_generator_that_was_taken(run, tmp_path):
    state = nvidia.random_state()
    networks = {"G": nvidia.network(state, ""), "G_ema": nvidia.network(state, "")}
    (tmp_path / "network.pkl").write_bytes(nvidia.dumps(networks))
    text = run("info", tmp_path / "network.pkl")
    assert "note: generator taken from 'G_ema'; the file also holds 'G'" in text
    assert "layout of the weights: NVIDIA" in text


def test_info_says_layout_architecture_and_clamp(run, tmp_path):
    state = generators.sequential(generators.stylegan2_state())
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    assert "layout of the weights: official, architecture skip" in run("info", tmp_path / "official.pth")
    assert "architecture" not in run("info", "peeps-progan")
    assert "clamp" not in run("info", "peeps")

    settings = {f"synthesis.b{r}.{part}.conv_clamp": 256 for r in (4, 8) for part in ("conv1", "torgb")}
    network = nvidia.network(nvidia.random_state(), "", settings)
    (tmp_path / "network.pkl").write_bytes(nvidia.dumps({"G_ema": network}))
    assert "clamp: 4 convolutions keep what they put out within 256 of 0" in run("info", tmp_path / "network.pkl")
    data = json.loads(run("info", tmp_path / "network.pkl", "--json"))
    assert data["architecture"] == "skip"
    assert set(data["clamps"].values()) == {256}


def test_class_labels(run, tmp_path):
    state = nvidia.random_state(classes=3)
    (tmp_path / "network.pkl").write_bytes(nvidia.dumps({"G_ema": nvidia.network(state, "")}))
    assert json.loads(run("info", tmp_path / "network.pkl", "--json"))["classes"] == 3
    sheets = []
    for label in (0, 2):
        run("sample", tmp_path / "network.pkl", "--images", "0-2", "--label", label, "--out", tmp_path / "s.png")
        sheets.append((tmp_path / "s.png").read_bytes())
    assert sheets[0] != sheets[1]
    for name, label in (("network.pkl", 3), ("network.pkl", -1)):
        text = run("stats", tmp_path / name, "layer4", "--samples", 2, "--label", label, fails=True)
        assert "label is a class number from 0 to 2" in text
    assert "no class labels" in run("stats", "peeps-progan", "layer4", "--label", 1, fails=True)


def test_solve_follows_the_records_pictures(run, tmp_path):
    state = nvidia.random_state(classes=3, channels=(8, 8, 8))
    (tmp_path / "network.pkl").write_bytes(nvidia.dumps({"G_ema": nvidia.network(state, "")}))
    url = mask_url(16, 2, 2, 12, 12)
    images = {"label": 2, "noise": "none"}
    edit = Edit(Selection(0, url), Selection(1, url), [Selection(2, url)], layer="layer4", images=images)
    edit.save(tmp_path / "edit.json")
    command = ("solve", tmp_path / "network.pkl", tmp_path / "edit.json", "--out", tmp_path / "x.safetensors", "--json")
    options = ("--samples", 6, "--rank", 1, "--steps", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing in a random network is an object
        settings = json.loads(run(*command, *options))["settings"]
    assert (settings["label"], settings["noise"]) == (2, "none")
    assert "made with label 2, noise none" in run(*command, *options, "--label", 1, fails=True)


def test_convert(run, tmp_path):
    (tmp_path / "network.pkl").write_bytes(nvidia.dumps({"G_ema": nvidia.network(nvidia.random_state(), "")}))
    expected = load_generator(tmp_path / "network.pkl").weights_hash()
    for name in ("x.safetensors", "x.pt", "x.PTH"):
        data = json.loads(run("convert", tmp_path / "network.pkl", "--out", tmp_path / name, "--json"))
        assert data["hash"] == expected
        assert load_generator(tmp_path / name).weights_hash() == expected
    assert expected in run("convert", tmp_path / "x.pt", "--out", tmp_path / "y.safetensors")
    assert "does not end in .safetensors" in run("convert", tmp_path / "x.pt", "--out", tmp_path / "y.png", fails=True)
    assert not (tmp_path / "y.png").exists()
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x04cos\nsystem\n.")
    text = run("convert", tmp_path / "bad.pkl", "--out", tmp_path / "z.pt", fails=True)
    assert "holds os.system" in text
    assert text.count("\n") == 1
    assert not (tmp_path / "z.pt").exists()


def test_stats(run, tmp_path):
    data = json.loads(run("stats", "peeps-progan", "layer4", "--samples", 4, "--out", tmp_path / "c.npz", "--json"))
    assert data["count"] == 4 * 8 * 8
    assert data["from_cache"] is False
    assert np.load(tmp_path / "c.npz")["count"] == data["count"]
    again = json.loads(run("stats", "peeps-progan", "layer4", "--samples", 4, "--json"))
    assert again["from_cache"] is True
    text = run("stats", "peeps-progan", "layer4", "--samples", 4)
    assert text.startswith("layer layer4, count 256, channels 192, mean square ")
    assert "from cache yes" in text


def test_solve_sample_evaluate_apply(run, record, tmp_path):
    patch = tmp_path / "p.safetensors"
    data = json.loads(run("solve", "peeps-progan", record, "--out", patch, "--json"))
    assert data["report"]["loss_after"] < data["report"]["loss_before"]
    assert data["settings"]["rank"] == 3
    assert data["settings"]["samples"] == 8
    assert LowRankPatch.load(patch).settings == data["settings"]

    run("sample", "peeps-progan", "--images", "0-3,9", "--patch", patch, "--out", tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 5 * 64

    found = json.loads(
        run("evaluate", "peeps-progan", patch, "--images", "10-13", "--edit", record, "--attributes", "--json")
    )
    assert found["images"] == 4
    text = run("evaluate", "peeps-progan", patch, "--images", "10-13", "--edit", record)
    assert f"change inside: l1 {found['change']['inside']['l1']:.4g}, psnr " in text
    assert found["change"]["inside"]["l1"] > found["change"]["outside"]["l1"]
    text = run("evaluate", "peeps-progan", patch, "--images", "10-13")
    assert "\nchange everywhere: l1 " in text
    assert set(found["attributes"]) == {"hat", "glasses", "beard", "mood"}

    assert "holds a patch, not a generator" in run("info", patch, fails=True)

    run("apply", "peeps-progan", patch, "--out", tmp_path / "edited.pth")
    merged, original = load_generator(tmp_path / "edited.pth"), load_generator("peeps-progan")
    LowRankPatch.load(patch).apply_(original)
    z = original.latents([0, 1])
    with torch.no_grad():
        assert torch.equal(merged(z), original(z))
    assert merged.weights_hash() == original.weights_hash()


def test_strength_zero_is_the_original(run, record, tmp_path):
    patch = tmp_path / "p.safetensors"
    run("solve", "peeps-progan", record, "--out", patch, "--method", "least_squares")
    run("apply", "peeps-progan", patch, "--strength", 0, "--out", tmp_path / "same.pth")
    assert load_generator(tmp_path / "same.pth").weights_hash() == load_generator("peeps-progan").weights_hash()
    data = json.loads(run("evaluate", "peeps-progan", patch, "--images", "0-1", "--strength", 0, "--json"))
    assert data["largest_change"] == 0


def test_removal(run, record, tmp_path):
    edit = Edit.load(record)
    edit.object = edit.paste = None
    edit.save(record)
    run("solve", "peeps-progan", record, "--out", tmp_path / "e.safetensors", "--erase", 4)
    text = run("solve", "peeps-progan", record, "--out", tmp_path / "z.safetensors", "--zero")
    assert "loss" not in text  # it has no targets
    with_both = ("--erase", 4, "--zero")
    assert "two ways to remove" in run(
        "solve", "peeps-progan", record, "--out", tmp_path / "x.safetensors", *with_both, fails=True
    )
    assert LowRankPatch.load(tmp_path / "e.safetensors").settings["units"] == 4
    text = run("solve", "peeps-progan", record, "--out", tmp_path / "x.safetensors", fails=True)
    assert "Error: field 'object' is missing: this record can be erased or zeroed, not inserted" in text
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("info", "nothing.pt"), "nothing.pt"),
        (("stats", "peeps-progan", "layer99"), "layer99"),
        (("stats", "peeps-progan", "layer4", "--samples", 0), "samples"),
        (("sample", "peeps-progan", "--images", "5-2", "--out", "s.png"), "ends before it begins"),
        (("sample", "peeps-progan", "--images", "a", "--out", "s.png"), "'a' is not a number"),
        (("sample", "peeps-progan", "--images", "0", "--seed", -1, "--out", "s.png"), "seed is -1; expected 0 to"),
        (("info", "peeps-progan", "--device", "gpu"), "device 'gpu' cannot be used: "),
        (("info", "peeps-progan", "--device", "cuda:77"), "device 'cuda:77' cannot be used: "),
        (("demo", "--edit", "fez"), "no bundled edit 'fez'; there are beanie, "),
        (("ui", "peeps-progan", "--port", 99999), "port 99999 of 127.0.0.1 cannot be taken"),
        (("ui", "peeps-progan", "--allow-origin", "hub"), "hub"),
    ],
)
def test_errors_are_one_line(run, args, named):
    text = run(*args, fails=True)
    assert named in text
    assert text.startswith("Error: ")
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("convert", "peeps-progan", "--out", "x.onnx"), "does not end in .safetensors or .pt or .pth"),
        (("convert", "peeps-progan", "--out", "nowhere/x.pt"), "the folder 'nowhere' does not exist"),
        (("stats", "peeps-progan", "layer4", "--out", "x.npy"), "does not end in .npz"),
        (("sample", "peeps-progan", "--out", "x.gif"), "does not end in .png"),
        (("evaluate", "peeps-progan", "PATCH", "--out", "nowhere/x.png"), "the folder 'nowhere' does not exist"),
        (("apply", "peeps-progan", "PATCH", "--out", "x.png"), "does not end in .safetensors or .pt or .pth"),
        (("solve", "peeps-progan", "PATCH", "--out", "x.pt"), "does not end in .safetensors"),
    ],
)
def test_where_nothing_can_be_written_no_work_begins(run, args, named, tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("the generator was loaded first")

    monkeypatch.setattr("pyrewrite.cli._load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PATCH").touch()
    text = run(*args, fails=True)
    assert "Invalid value for '--out'" in text
    assert named in text


def test_settings_that_cannot_be_are_said_before_any_work(run, record, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrewrite.cli._load", lambda *_: pytest.fail("the generator was loaded first"))
    text = run("solve", "peeps-progan", record, "--out", tmp_path / "p.safetensors", "--rank", 0, fails=True)
    assert text == "Error: setting 'rank' is 0; expected a whole number of at least 1\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pyrewrite.cli", "info", "peeps-progan", "--json"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: [Errno 28] No space left on device\n"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m pyrewrite.cli info peeps-progan --json | true"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True).stderr == ""


def test_a_patch_for_another_generator_needs_force(run, record, tmp_path):
    patch = tmp_path / "p.safetensors"
    run("solve", "peeps-progan", record, "--out", patch, "--method", "least_squares")
    run("apply", "peeps-progan", patch, "--out", tmp_path / "edited.pth")
    assert "--force" in run("apply", tmp_path / "edited.pth", patch, "--out", tmp_path / "twice.pth", fails=True)
    assert not (tmp_path / "twice.pth").exists()
    run("apply", tmp_path / "edited.pth", patch, "--force", "--out", tmp_path / "twice.pth")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-3", [0, 1, 2, 3]), ("7", [7]), ("0-1, 12,200-201", [0, 1, 12, 200, 201]), ("3,3,2-3", [3, 2])],
)
def test_parse_numbers(text, numbers):
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "1-", "-1", "1--2", "1.5", "0-999999999", "²"])
def test_parse_numbers_refuses(text):
    with pytest.raises(ValueError, match="image numbers"):
        parse_numbers(text)


# ------------------------------------------------------------------------------------------------- the interface


def test_the_interface_without_its_packages_says_what_to_install(run, monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("pyrewrite.interface.page", "pyrewrite.interface.widget"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("tornado", "tornado.httpserver", "anywidget"):
        monkeypatch.setitem(sys.modules, name, None)
    said = run("ui", "peeps", fails=True)
    assert "pip install 'pyrewrite[ui]'" in said
    assert "Traceback" not in said
    import pyrewrite.interface

    with pytest.raises(ModuleNotFoundError, match=r"RewriteApp needs anywidget: pip install 'pyrewrite\[ui\]'"):
        pyrewrite.interface.RewriteApp  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Page'"):
        pyrewrite.interface.Page  # noqa: B018
