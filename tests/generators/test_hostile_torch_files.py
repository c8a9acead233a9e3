"""Torch files made to do harm: what torch's own reader would take minutes, gigabytes or foreign memory for."""

import io
import struct

import pytest
import torch
from pickle_pieces import call, claim, legacy, long, name, number, text, torch_archive

from pyrewrite import load_generator
from pyrewrite.errors import LONGEST_MESSAGE, CheckpointError

pytestmark = pytest.mark.usefixtures("bounds")

# All have the same hash: 0.
COLLIDING = b"".join(long(n * (2**61 - 1)) for n in range(1, 20_000))
SHARED = b")q\x00" + b"".join(b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))


def holding(body):
    return b"}" + text("x") + body + b"s"


def both(body):
    """The two kinds of torch files with this content."""
    return torch_archive(body), legacy(body, b"]", b"")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"}(" + COLLIDING.replace(b"\x8a\x0b", b"N\x8a\x0b")[1:] + b"Nu", "more than 64 bits"),
        (holding(call(name("builtins", "set"), b"](" + COLLIDING + b"e")), "more than 64 bits"),
        (holding(call(name("collections", "Counter"), b"](" + COLLIDING + b"e")), "more than 64 bits"),
        (holding(call(name("collections", "OrderedDict"), b"]" + long(2**70) + b"N\x86a")), "more than 64 bits"),
        (holding(call(name("builtins", "set"), b"]" + SHARED + b"a")), "tuple as a name"),
        (holding(call(name("builtins", "set"), b"]" + text("a") + SHARED + b"\x86a")), "tuple as a name"),
        (holding(call(name("collections", "OrderedDict"), b"]" + SHARED + b"N\x86a")), "tuple as a name"),
        (b"}" + number(1) + number(2) + b"\x86Ns", "tuple of numbers as a name"),
        (holding(call(name("collections", "OrderedDict"), b"]" + number(1) + b"a")), "other things than torch writes"),
        (holding(call(name("builtins", "set"), number(1))), "other things than torch writes"),
    ],
)
def test_names_that_take_for_ever(refused, body, what):
    for data in both(body):
        refused(data, what, "generator.pt")


@pytest.mark.parametrize("builtins", ["builtins", "__builtin__"])
def test_memory_on_demand(refused, builtins):
    for body, what in (
        (call(name(builtins, "bytearray"), number(2**31 - 1)), "bytearray with other things"),
        (call(name("torch", "FloatTensor"), number(64)), r"an object of torch\.FloatTensor"),
        (call(name("torch", "Tensor"), number(2**30)), r"an object of torch\.Tensor"),
        (call(name("torch.storage", "UntypedStorage"), number(64)), "UntypedStorage"),
        (name("torch.storage", "UntypedStorage") + b"(" + number(64) + b"t\x81", "UntypedStorage"),
        (call(name("torch._tensor", "_rebuild_from_type_v2"), name("torch", "FloatTensor"), b"N)}"), "_from_type_v2"),
        (call(name("torch._utils", "_rebuild_nested_tensor"), b"NNNN"), "_rebuild_nested_tensor"),
        (call(name("torch._utils", "_rebuild_qtensor"), b"NNNNNNN"), "_rebuild_qtensor"),
    ):
        for data in both(holding(body)):
            refused(data, what, "generator.pt")


def test_one_text_again_and_again(refused):
    long_text = b"}" + text("t") + text("a" * 1_000_000) + b"q\x01s" + text("x")
    encoded = name("_codecs", "encode") + b"h\x01" + text("latin1") + b"\x86R"
    for data in both(long_text + b"](" + encoded * 3000 + b"es"):
        refused(data, "the same data again and again", "generator.pt")
    array = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\x00\x85", text("b"))
    dtype = call(name("numpy", "dtype"), text("u1"), b"K\x00", b"K\x01") + b"q\x02"
    state = b"(K\x01" + number(1_000_000) + b"\x85h\x02\x89" + encoded + b"tb"
    body = b"}" + text("d") + dtype + b"s" + text("t") + text("a" * 1_000_000) + b"q\x01s" + text("x")
    refused(torch_archive(body + b"](" + (array + state) * 100 + b"es"), "again and again", "generator.pt")


def test_storages_without_data(refused):
    """Torch would take what the memory held before for weights."""
    tensor = name("torch._utils", "_rebuild_tensor_v2")
    shape = b"(K\x01K\x01K\x02K\x02t(K\x04K\x04K\x02K\x01t\x89" + call(name("collections", "OrderedDict"))
    body = b"}" + text("main.0.weight") + call(tensor, claim(4), b"K\x00", shape) + b"s"
    refused(legacy(body, b"]", b""), "not those that it holds", "generator.pt")
    refused(legacy(body, b"](" + text("1") + text("2") + b"e", b""), "not those that it holds", "generator.pt")
    refused(legacy(body, b"N", b""), "not those that it holds", "generator.pt")
    refused(legacy(body, data=struct.pack("<q", 4)), "storages of 16 bytes are declared", "generator.pt")
    many = b"".join(text(f"n{i}") + claim(1 << 20).replace(text("1"), text(str(i))) for i in range(100))
    refused(torch_archive(b"}(" + many + b"u", [("pad", bytes(2 << 20))]), "storages of .* declared", "generator.pt")
    refused(torch_archive(holding(b"Nq\x00(Nt" + b"Q")), "persistent id that is not", "generator.pt")


@pytest.mark.parametrize("kind", ["sparse", "meta", "complex", "float8", "uint16"])
def test_tensors_of_other_kinds(tmp_path, kind):
    weight = torch.zeros(4, 3, 4, 4)
    made = {
        "sparse": lambda: torch.eye(4).to_sparse(),
        "meta": lambda: weight.to("meta"),
        "complex": lambda: weight.to(torch.complex64),
        "float8": lambda: weight.to(torch.float8_e4m3fn),
        "uint16": lambda: weight.to(torch.uint16),
    }[kind]()
    torch.save({"main.0.weight": made}, tmp_path / "g.pt")
    with pytest.raises(CheckpointError, match=r"g\.pt.*(which is not opened|expected floating point numbers)"):
        load_generator(tmp_path / "g.pt")


def test_names_that_flood_or_steer_a_terminal(tmp_path):
    for bad in ("x" * 3_000_000, "\x1b[2J\n\ud800", "\u202eevil"):
        for content in ({bad: 1}, {"main.0.weight": torch.zeros(2, 3, 4, 4), bad: torch.zeros(1)}):
            torch.save(content, tmp_path / "g.pt")
            with pytest.raises(CheckpointError, match=r"g\.pt") as caught:
                load_generator(tmp_path / "g.pt")
            assert len(str(caught.value)) < LONGEST_MESSAGE + 20
            assert str(caught.value).isprintable()


def test_another_pickle_protocol_is_said(tmp_path):
    torch.save({"main.0.weight": torch.zeros(2, 3, 4, 4)}, tmp_path / "g.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"another pickle protocol .*safetensors"):
        load_generator(tmp_path / "g.pt")


def test_what_honest_files_hold_beside_the_weights(tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(2, 3, 4, 4))
    parameter.note = "attributes are kept"
    beside = {"set": {1, "a"}, "size": torch.Size([1]), "type": torch.float16, "bytes": b"x", "more": bytearray(b"abc")}
    beside |= {"device": torch.device("cpu"), "complex": 1 + 2j, 5: "a number as a name", ("a", None): "a tuple"}
    beside |= {"none": None, "view": parameter.detach().view(-1), "half": torch.zeros(3, dtype=torch.float16)}
    for zipped in (True, False):
        content = {"netG": {"main.0.weight": parameter}, **beside}
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        (tmp_path / "g.pt").write_bytes(file.getvalue())
        assert load_generator(tmp_path / "g.pt").family == "dcgan"
