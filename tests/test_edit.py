"""The edit record: official files load unchanged, ours go both ways, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyrewrite import Edit, Selection, Settings
from pyrewrite.edit import OFFICIAL
from pyrewrite.errors import EditError

OFFICIAL_FILES = sorted((Path(__file__).parent / "data" / "official-edits").glob("*.json"))


@pytest.mark.parametrize("path", OFFICIAL_FILES, ids=lambda p: p.stem)
def test_official_records_load_unchanged(path, tmp_path):
    record = json.loads(path.read_text())
    edit = Edit.load(path)
    assert edit.name == path.stem
    assert (edit.settings, edit.layer) == ({}, None)
    edit.save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    again.pop("pyrewrite")
    assert again == {k: v for k, v in record.items() if v}  # the official tool reads the same record back


def test_there_are_official_records():
    assert len(OFFICIAL_FILES) == 8


def test_own_record_round_trip(tmp_path):
    edit = Edit(
        object=Selection(3, "data:image/png;base64,AA=="),
        paste=Selection(4, "data:image/png;base64,AB=="),
        context=[Selection(5, "data:image/png;base64,AC==")],
        name="hat",
        layer="layer6",
        settings={"rank": 12, "shrinkage": 0.3},
        generator={"family": "stylegan2", "hash": "ab"},
        protect=[Selection(6, "data:image/png;base64,AD==")],
        extra={"comment": "kept"},
    )
    edit.save(tmp_path / "hat.json")
    assert Edit.load(tmp_path / "hat.json") == edit


def test_a_record_that_says_nothing_new_has_the_defaults():
    edit = Edit.from_dict({"object": [0, "data:x"], "paste": [1, "data:x"]})
    assert edit.resolve() == Settings()
    assert (edit.context, edit.query) == ([], None)


def test_precedence_of_settings():
    edit = Edit(settings={"rank": 12, "steps": 50})
    assert edit.resolve().rank == 12
    assert edit.resolve(rank=3).rank == 3
    assert edit.resolve("official").rank == OFFICIAL["rank"] == 1
    assert edit.resolve("official", rank=2) == Settings(**{**OFFICIAL, "rank": 2})
    assert edit.resolve(rank=None).rank == 12  # an option that was not given


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("not json", "expected JSON"),
        ("", "expected JSON"),
        ("[1, 2]", "JSON object"),
        ("{}", "not an edit record"),
        ('{"object": [1]}', "'object'"),
        ('{"object": ["1", "data:"]}', "image number '1'"),
        ('{"object": [true, "data:"]}', "image number True"),
        ('{"paste": [-1, "data:"]}', "image number -1"),
        ('{"paste": [1.5, "data:"]}', "image number 1.5"),
        ('{"key": {"a": 1}}', "'key' is dict"),
        ('{"key": [[1, 2]]}', "key[0]"),
        ('{"key": [], "pyrewrite": [1]}', "'pyrewrite' is list"),
        ('{"key": [], "pyrewrite": {"version": 2}}', "pyrewrite.version"),
        ('{"key": [], "pyrewrite": {"settings": {"rnak": 3}}}', "'rnak'"),
        ('{"key": [], "pyrewrite": {"settings": {"rank": 0}}}', "'rank' is 0"),
        ('{"key": [], "pyrewrite": {"settings": {"rank": true}}}', "'rank' is True"),
        ('{"key": [], "pyrewrite": {"settings": {"lr": 0}}}', "'lr' is 0"),
        ('{"key": [], "pyrewrite": {"settings": {"lr": NaN}}}', "'lr' is nan"),
        ('{"key": [], "pyrewrite": {"settings": {"preserve": -1}}}', "'preserve' is -1"),
        ('{"key": [], "pyrewrite": {"settings": {"shrinkage": Infinity}}}', "'shrinkage' is inf"),
        ('{"key": [], "pyrewrite": {"settings": {"method": "magic"}}}', "low_rank, projected"),
        ('{"key": [], "pyrewrite": {"settings": {"lr": 1' + "0" * 400 + "}}}", "'lr' is 100"),
        ('{"key": [], "pyrewrite": {"settings": {"method": "' + "m" * 10000 + '"}}}', "low_rank, projected"),
        ('{"key": [], "pyrewrite": {"layer": 8}}', "pyrewrite.layer"),
        ('{"key": [], "pyrewrite": {"generator": "peeps"}}', "pyrewrite.generator"),
        ('{"key": [], "pyrewrite": {"generator": {"hash": 3}}}', "pyrewrite.generator"),
        ('{"paste": [2147483648, "data:"]}', "image number 2147483648"),
        ('{"paste": [' + "9" * 5000 + ', "data:"]}', "expected JSON"),
        ("[" * 100_000, "expected JSON"),
    ],
)
def test_bad_records_name_file_and_field(text, named, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(EditError) as error:
        Edit.load(path)
    assert named in str(error.value)
    assert "bad.json" in str(error.value)
    assert len(str(error.value)) < 500


def test_a_record_with_a_byte_order_mark_as_some_editors_save_it(tmp_path):
    path = tmp_path / "marked.json"
    path.write_text('{"object": [1, "data:"]}', encoding="utf-8-sig")
    assert Edit.load(path).object == Selection(1, "data:")


def test_binary_file_is_not_a_record(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(EditError, match=r"mask\.png: not an edit record"):
        Edit.load(path)


def test_unknown_preset_and_setting():
    with pytest.raises(EditError, match="preset 'offical'"):
        Edit().resolve("offical")
    with pytest.raises(EditError, match="unknown setting 'ranks'"):
        Edit().resolve(ranks=3)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "none.json")


def test_what_decides_the_pictures_is_kept_where_it_is_not_the_default(tmp_path):
    images = {"label": 3, "noise": "none", "truncation_layers": 8}
    Edit(images=images, context=[Selection(1, "x")]).save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["pyrewrite"]["images"] == images
    assert Edit.load(tmp_path / "x.json").images == images
    assert "images" not in Edit(images={}, context=[Selection(1, "x")]).to_dict()["pyrewrite"]
    assert Edit.from_dict({"key": []}).images is None  # an official record does not say
    assert Edit.from_dict({"key": [], "pyrewrite": {"settings": {"rank": 3}}}).images is None
    assert Edit.from_dict({"key": [], "pyrewrite": {"settings": {"truncation": 0.5}}}).images == {}  # the defaults


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([1], "'pyrewrite.images' is list"),
        ({"labels": 1}, "unknown 'labels'; expected label, noise, truncation_layers"),
        ({"label": -1}, "'pyrewrite.images.label' is -1"),
        ({"label": True}, "images.label' is True"),
        ({"label": 1.0}, "images.label' is 1.0"),
        ({"noise": "random"}, "edits need the same pictures each time"),
        ({"noise": []}, "images.noise' is []"),
        ({"truncation_layers": "8"}, "truncation_layers' is '8'"),
    ],
)
def test_what_decides_the_pictures_is_checked(images, named):
    with pytest.raises(EditError) as error:
        Edit.from_dict({"key": [], "pyrewrite": {"images": images}}, source="x.json")
    assert named in str(error.value)
    assert "x.json" in str(error.value)
