"""The demo on few images: every bundled edit is well-formed, and one runs from end to end."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from support import bits, same_bits

from pyrewrite import Edit, LowRankPatch, load_generator
from pyrewrite.demo import POOL, _Stage, demo_edits, run_demo
from pyrewrite.evaluation import AttributeClassifier, peeps_attributes
from pyrewrite.rewriting.selection import bounding_box, mask_on_map

EDITS = demo_edits()


def test_what_is_bundled():
    names = [e.name for e in EDITS]
    assert len(set(names)) == len(names)
    assert sum(e.generator == "peeps" for e in EDITS) >= 5
    assert sum(e.generator == "peeps-progan" for e in EDITS) >= 2


@pytest.mark.parametrize("demo", EDITS, ids=lambda e: e.name)
def test_bundled_records_belong_to_their_generator(demo):
    generator, record = load_generator(demo.generator), demo.record()
    assert record.generator == {"family": generator.family, "hash": generator.weights_hash()}
    assert record.layer in generator.layers
    size = (generator.image_size, generator.image_size)
    for selection in (record.object, record.paste, *record.context):
        bounding_box(mask_on_map(selection.mask, size, size))
    # the rule applies to every image that the edit uses as a target
    numbers = [record.paste.image, *(s.image for s in record.context)]
    truth = peeps_attributes(generator.latents(numbers), generator.family)
    for name, value in demo.applies.items():
        assert (truth[name] == value).all()
    # and enough images are left to judge it on
    stage = _Stage(generator, peeps_attributes(generator.latents(range(POOL)), generator.family), AttributeClassifier())
    assert len(stage.numbers(demo, {record.object.image, *numbers}, 100)) == 100


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_one_edit_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYREWRITE_CACHE", str(tmp_path / "cache"))
    demo = next(e for e in EDITS if e.generator == "peeps-progan")
    lines = []
    result = run_demo(tmp_path / "out", only=[demo.name], count=12, official=False, log=lines.append)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {
        "results.json",
        "results.txt",
        f"{demo.name}.json",
        f"{demo.name}.png",
        f"{demo.name}.safetensors",
    }
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data == json.loads(json.dumps(result.to_dict()))
    (entry,) = data["edits"]
    assert entry["images"] == 12
    assert entry["success"] >= 0.75
    assert entry["region"]["ratio"] < 0.8
    assert entry["change"]["inside"]["l1"] > entry["change"]["outside"]["l1"]
    assert demo.title in result.table()
    assert len(lines) == 1
    assert Edit.load(tmp_path / "out" / f"{demo.name}.json") == demo.record()
    with Image.open(tmp_path / "out" / f"{demo.name}.png") as sheet:
        assert sheet.width > 12 * 64
    generator = load_generator(demo.generator)
    kept = bits(generator)
    patch = LowRankPatch.load(tmp_path / "out" / f"{demo.name}.safetensors").apply_(generator)
    with torch.no_grad():
        assert torch.isfinite(generator(generator.latents([0]))).all()
    patch.remove_(generator)
    assert same_bits(generator, kept)


def test_an_edit_that_is_not_bundled(tmp_path):
    with pytest.raises(ValueError, match="no bundled edit 'wings'"):
        run_demo(tmp_path, only=["wings"])
    with pytest.raises(ValueError, match="images is 0"):
        run_demo(tmp_path, count=0)
