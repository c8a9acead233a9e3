"""Archives and safetensors files made to do harm: refused with an error that names what was found, in bounds."""

import io
import json
import pickle
import struct
import zipfile

import pytest

pytestmark = pytest.mark.usefixtures("bounds")


# -- archives ----------------------------------------------------------------------------------------------------------


def archive(records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as new:
        for record, data in records:
            new.writestr(record, data)
    return file.getvalue()


EMPTY = pickle.dumps({}, 2)


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([("x/data.pkl", EMPTY), ("../../etc/passwd", b"x")], "lies outside of it"),
        ([("/etc/data.pkl", EMPTY)], "lies outside of it"),
        ([("x/data.pkl", EMPTY), ("x\\..\\..\\y", b"x")], "lies outside of it"),
        ([("C:/x/data.pkl", EMPTY)], "lies outside of it"),
        ([("x/data.pkl", EMPTY), ("y/data.pkl", EMPTY)], "several contents: x/data.pkl, y/data.pkl"),
        ([("x/data.pkl", EMPTY), ("x/code/run.py", b"x")], "TorchScript"),
        ([("x/data.pkl", EMPTY), ("x/constants.pkl", EMPTY)], "TorchScript"),
        ([("x/data.pkl", b"")], "truncated"),
        ([("x/data.pkl", b"garbage")], "opcode|no opcode"),
    ],
)
def test_archives_with_tricks(refused, records, what):
    refused(archive(records), what, "generator.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_the_same_name_twice(refused):
    refused(archive([("x/data.pkl", EMPTY), ("x/data.pkl", EMPTY)]), "two records 'x/data.pkl'", "generator.pt")


def test_archives_that_swell(refused):
    data = archive([("x/data.pkl", EMPTY), ("x/data/0", bytes(300 << 20))], zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 20
    refused(data, "no checkpoint swells so", "generator.pt")


# -- safetensors -------------------------------------------------------------------------------------------------------


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (safetensors({"a": entry()}, bytes(8), length=2**64 - 1), "negative length, -1"),
        (
            safetensors({"a": entry()}, bytes(8), length=2**40),
            r"declares 1099511627776 bytes, at most 4194304 are read",
        ),
        (safetensors({"a": entry()}, bytes(8), length=99999), "truncated: its header declares 99999 bytes"),
        (safetensors({"a": entry()}, bytes(7)), "truncated or damaged"),
        (safetensors({"a": entry()}, bytes(9)), "truncated or damaged"),
        (safetensors({"a": entry((2**61,), (0, 2**63))}, bytes(8)), "truncated or damaged"),
        (safetensors({"a": entry((3,))}, bytes(8)), "damaged safetensors"),
        (safetensors({"a": entry((-2,))}, bytes(8)), "damaged safetensors"),
        (safetensors({"a": entry((2,), (8, 0))}, bytes(8)), "damaged safetensors"),
        (safetensors({"a": entry((2,), (-8, 0))}, b""), "no place in the file"),
        (safetensors({"a": entry(dtype="O")}, bytes(8)), "damaged safetensors"),
        (safetensors({"a": {}}, b""), "no place in the file"),
        (safetensors({"a": [1]}, b""), "no place in the file"),
        (safetensors(b"{" + b"x" * 50), "not a JSON text"),
        (safetensors(b'{"a":' + b"[" * 100_000), "not a JSON text"),
        (safetensors(b'{"a":' * 5000), "not a JSON text"),
        (safetensors({"a": entry(), "b": entry()}, bytes(8)), "damaged safetensors"),
        (safetensors({"a": entry()}, bytes(8)), "not those of a generator known here"),
        (safetensors({f"n{i}": entry((0,), (0, 0)) for i in range(20_001)}), "20001 names, at most 20000"),
        (safetensors(b'{"a": 1, "b": 2, "a": 3}'), "its header holds 'a' twice"),
        (safetensors(b'{"a": {"shape": [2], "shape": [3]}}'), "its header holds 'shape' twice"),
        (safetensors({"a": entry((2,), (0, 8)), "b": entry((2,), (4, 12))}, bytes(12)), "damaged safetensors"),
        (safetensors({"x" * 300: entry()}, bytes(8)), "a name of 300 characters"),
        (safetensors({"main.0.weight": entry((1, 1, 4, 4), (0, 64), "I32")}, bytes(64)), "floating point"),
        (safetensors({"main.0.weight": entry((1, 1, 4, 4), (0, 16), "F8_E4M3")}, bytes(16)), "floating point"),
        (safetensors({"__metadata__": {"x": 1}, "a": entry()}, bytes(8)), "damaged safetensors"),
    ],
    ids=lambda part: str(part)[:60],
)
def test_safetensors(refused, data, what):
    refused(data, what, "generator.safetensors")
