"""Files made to do harm: each is refused with an error that names what was found, and nothing of it runs.

A sentinel file would be there if anything had run. Memory and time stay within bounds.
"""

import io
import os
import pickle
import struct
import threading
import zipfile

import generators_reference
import numpy as np
import nvidia_reference as nvidia
import pytest
import torch
from pickle_pieces import call, claim, dotted, legacy, name, pickled, storage_bytes, stored, text

from pyrewrite.errors import CheckpointError
from pyrewrite.generators import load_generator
from pyrewrite.generators.loading._pickle_machine import Named, PickleMachine, PickleRefused

pytestmark = pytest.mark.usefixtures("bounds")


def generator_with(body):
    """A pickle of a dict with a whole generator and one more entry, made of `body`."""
    whole = nvidia.dumps({"G_ema": nvidia.network(nvidia.random_state((3, 2), 2, 2), "")}, 2)
    assert whole.endswith(b"s.")
    return whole[:-1] + text("more") + body + b"s."


def nested(payload):
    return call(name("torch.storage", "_load_from_bytes"), stored(payload))


class Runs:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return (self.function, self.args)


def touching(sentinel):
    return text(f"touch {sentinel}")


PLAIN = {"G_ema": {"a": 1}}


def test_the_pieces_make_a_generator_that_loads(tmp_path):
    path = tmp_path / "network.pkl"
    path.write_bytes(generator_with(b"N"))
    assert load_generator(path).family == "stylegan2"


# -- calls -------------------------------------------------------------------------------------------------------------

CALLS = [
    ("posix", "system"),
    ("os", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("__builtin__", "eval"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "open"),
    ("builtins", "object.__reduce__"),
    ("runpy", "_run_code"),
    ("importlib", "import_module"),
    ("pickle", "loads"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("torch.jit", "load"),
    ("torch.utils.model_zoo", "load_url"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.core.multiarray", "fromfile"),
    ("numpy.core.multiarray", "_reconstruct.__globals__"),
    ("torch_utils.persistence", "_src_to_module"),
    ("torch_utils.persistence", "exec"),
    ("torch_utils.persistence", "sys.modules"),
    ("torch.storage", "_load_from_bytes.__globals__"),
    ("torch.storage", "torch.load"),
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch._utils", "_rebuild_tensor_v2.__call__"),
    ("collections", "OrderedDict.__init__"),
    ("collections", "abc.sys"),
    ("dnnlib.util", "os"),
    ("dnnlib.util", "call_func_by_name"),
    ("dnnlib", "tflib.network.Network"),
    ("dnnlib.tflib.network", "exec"),
    ("_codecs", "lookup"),
    ("pyrewrite.generators.loading._network_pickle", "_storage"),
    ("functools", "partial"),
    ("operator", "methodcaller"),
    ("", ""),
    ("builtins", ""),
]


@pytest.mark.parametrize(("module", "attribute"), CALLS, ids=".".join)
def test_calls_are_refused_by_their_name(refused, sentinel, module, attribute):
    shown = f"{module}.{attribute}".replace(".", r"\.")
    for function in (name(module, attribute), dotted(module, attribute)):
        refused(generator_with(call(function, touching(sentinel))), f"holds {shown}")
        refused(pickled(call(function, touching(sentinel))), f"holds {shown}")
        refused(generator_with(function), f"holds {shown}")  # to be named is enough


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, torch.load, pickle.loads])
def test_calls_in_torch_files(refused, sentinel, zipped, function):
    file = io.BytesIO()
    state = generators_reference.stylegan2_state(channels=(3, 2))
    content = {"g_ema": state, "x": Runs(function, f"touch {sentinel}")}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    refused(file.getvalue(), function.__name__, "generator.pt")


def test_calls_behind_other_names_in_torch_files(refused, sentinel):
    """An archive whose list of contents was exchanged."""
    file = io.BytesIO()
    torch.save({"g_ema": generators_reference.stylegan2_state(channels=(3, 2))}, file)
    for body, what in (
        (call(name("posix", "system"), touching(sentinel)), "system"),
        (b"\x82\x01", "EXT1"),
        (b"\x83\x01\x00", "EXT2"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"(i" + b"posix\nsystem\n", "INST"),
        (b"(" + name("posix", "system") + touching(sentinel) + b"o", "OBJ"),
        (b"Pid\n", "PERSID"),
        (name("posix", "system") + touching(sentinel) + b"\x85\x81", "system"),
    ):
        changed = io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
            for record in old.namelist():
                new.writestr(record, b"\x80\x02" + body + b"." if record.endswith("data.pkl") else old.read(record))
        refused(changed.getvalue(), what, "generator.pt")


def test_nothing_of_a_class_is_run(refused, sentinel):
    source = f"open({str(sentinel)!r}, 'w')"
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": "Generator", "state": {}}
    refused(nvidia.dumps({"G_ema": nvidia.Persistent("Generator", {}, source)}), "no tensors")
    for bad in ({**meta, "type": "exec"}, {**meta, "class_name": 3}, [], {}):
        body = pickle.dumps(bad, 2)[2:-1]
        persistent = name("torch_utils.persistence", "_reconstruct_persistent_obj")
        refused(generator_with(call(persistent, body)), "persistent object without a class name")
    bad = pickle.dumps({**meta, "state": [1]}, 2)[2:-1]
    refused(generator_with(call(persistent, bad)), "a Generator with a list as its state")


# -- payloads within payloads ------------------------------------------------------------------------------------------


def test_nested_payloads(refused, sentinel):
    run = call(name("posix", "system"), touching(sentinel))
    archive = io.BytesIO()
    torch.save({"x": Runs(os.system, f"touch {sentinel}")}, archive)
    old = io.BytesIO()
    torch.save({"x": Runs(os.system, f"touch {sentinel}")}, old, _use_new_zipfile_serialization=False)
    for payload, what in (
        (pickled(run), r"posix\.system inside of torch\.storage\._load_from_bytes"),
        (pickle.dumps(Runs(os.system, f"touch {sentinel}")), r"system inside of torch\.storage"),
        (archive.getvalue(), "no opcode|which is not read"),
        (old.getvalue(), r"system inside of torch\.storage"),
        (legacy(run), r"posix\.system inside of"),
        (legacy(nested(pickled(run))), r"torch\.storage\._load_from_bytes inside of"),
        (legacy(claim(), keys=run), r"posix\.system inside of"),
        (legacy(b"N"), "a NoneType in torch.storage._load_from_bytes, expected one storage"),
        (legacy(claim(kind="Tensor")), r"torch\.Tensor inside of"),
        (legacy(claim(kind="UntypedStorage", module="torch.storage")), r"torch\.storage\.UntypedStorage inside of"),
        (legacy(claim(2**40)), "4398046511104 declared bytes, of which 16 are there"),
        (legacy(claim(-1)), "make no sense"),
        (legacy(claim(3)), "12 declared bytes, of which 16"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "truncated"),
        (pickle.dumps(5, 2), "torch never stored there"),
        (b"", "truncated"),
    ):
        refused(generator_with(nested(payload)), what)
    refused(generator_with(call(name("torch.storage", "_load_from_bytes"), text("x"))), "of a str, expected bytes")
    refused(generator_with(call(name("torch.storage", "_load_from_bytes"), text("x"), text("y"))), "TypeError")


def test_the_same_storage_a_million_times(refused):
    payload = storage_bytes(1 << 20)
    load = name("torch.storage", "_load_from_bytes")
    body = stored(payload) + b"q\x63" + b"0](" + (load + b"(h\x63tR") * 1000 + b"e"
    refused(generator_with(body), "the same data again and again")


def test_tensors_beyond_their_storage(refused):
    rebuild, storage = name("torch._utils", "_rebuild_tensor_v2"), nested(storage_bytes())

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def tensor(offset, size, stride):
        numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride)]
        return call(rebuild, storage, number(offset), *numbers, b"\x89", b"N")

    for body in (
        tensor(0, [5], [1]),  # the storage has 4 elements
        tensor(3, [2], [1]),
        tensor(-1, [2], [1]),
        tensor(0, [2], [-1]),
        tensor(0, [-1], [1]),
        tensor(0, [2**40], [0]),  # a view that swells when it is copied
        tensor(0, [2**31, 2**31, 2**31], [0, 0, 0]),
        tensor(2**62, [1], [1]),
        tensor(0, [1, 1], [1]),
    ):
        refused(generator_with(body), "a tensor of size")
    refused(generator_with(call(rebuild, b"N", number(0), b")", b")", b"\x89", b"N")), "made of a NoneType")
    refused(generator_with(call(name("torch._utils", "_rebuild_parameter"), b"N")), "a parameter made of a NoneType")


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_arrays_of_objects(refused, sentinel):
    for value in (np.array([{}, []], dtype=object), np.array([Runs(os.system, f"touch {sentinel}")], dtype=object)):
        for protocol in (2, 4, 5):
            data = nvidia.dumps({"G_ema": nvidia.network(nvidia.random_state((2,), 2, 2), ""), "x": value}, protocol)
            refused(data, r"plain numbers|system")
    records = np.zeros(2, dtype=[("a", "f4"), ("b", "O")])
    refused(nvidia.dumps({"G_ema": PLAIN, "x": records}), "plain numbers")
    refused(nvidia.dumps({"G_ema": PLAIN, "x": np.array(["text"])}), "plain numbers")


def test_arrays_that_are_larger_than_their_data(refused):
    core = "numpy._core.multiarray"
    array = call(name(core, "_reconstruct"), name("numpy", "ndarray"), b"K\x00\x85", stored(b"b"))
    dtype = call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
    for shape in (b"K\x05\x85", b"\x8a\x08" + struct.pack("<q", 1 << 60) + b"\x85"):
        state = b"(K\x01" + shape + dtype + b"\x89" + stored(bytes(16)) + b"tb"
        refused(generator_with(array + state), "reshape|array is too big|size|shape")
    refused(generator_with(call(name("numpy", "dtype"), text("V2000000000"))), "plain numbers")
    refused(generator_with(call(name("numpy", "dtype"), b"N")), "plain numbers")


# -- states ------------------------------------------------------------------------------------------------------------


def test_states_that_change_what_stands_in_for_a_name(refused, sentinel):
    state = b"}" + text("__call__") + text("x") + b"s"
    slots = b"N" + state + b"\x86"
    functions = [
        ("torch_utils.persistence", "_reconstruct_persistent_obj"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        ("dnnlib.util", "EasyDict"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("torch", "float32"),
    ]
    for module, attribute in functions:
        for change in (state, slots):
            refused(generator_with(name(module, attribute) + change + b"b"), rf"BUILD\) for {module}\.{attribute}")
    for body in (b"]", b"}", b")", b"N", text("x"), b"\x8f"):
        refused(generator_with(body + state + b"b"), r"a state \(BUILD\) for a")
    module = name("torch.nn.modules.container", "ModuleList") + b")\x81"
    refused(generator_with(module + b"]b"), "a ModuleList with a list as its state")


def test_states_of_dictionaries_are_dropped(tmp_path):
    state = nvidia.random_state((3, 2), 2, 2)
    ordered = name("collections", "OrderedDict") + b")R" + b"}" + text("items") + text("x") + b"sb"
    path = tmp_path / "network.pkl"
    path.write_bytes(generator_with(ordered))
    assert torch.equal(load_generator(path).latent_avg, state["mapping.w_avg"])


def test_things_that_may_be_named_but_not_called(refused):
    for module, attribute in (("numpy", "ndarray"), ("torch", "float32"), ("builtins", "object")):
        refused(generator_with(call(name(module, attribute))), f"{module}.{attribute}, which may only be named")
        refused(generator_with(name(module, attribute) + b")\x81"), "may only be named")
    refused(generator_with(b"K\x01)R"), "a call of a int")
    refused(generator_with(text("os.system") + b")R"), "a call of a str")
    refused(generator_with(name("collections", "OrderedDict") + b"]R"), "expected a tuple")
    encode = name("_codecs", "encode")
    for encoding in ("punycode", "idna", "rot13", "hex", "zlib"):
        refused(generator_with(call(encode, text("x"), text(encoding))), "_codecs.encode to")
    base = name("copyreg", "_reconstructor")
    refused(generator_with(call(base, name("numpy", "ndarray"), name("builtins", "object"), b"N")), "_reconstructor")


# -- opcodes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"\x82\x01", "the opcode EXT1"),
        (b"\x83\x01\x00", "the opcode EXT2"),
        (b"\x84\x01\x00\x00\x00", "the opcode EXT4"),
        (b"(iposix\nsystem\n", "the opcode INST"),
        (b"(" + b"K\x01o", "the opcode OBJ"),
        (b"Pid\n", "the opcode PERSID"),
        (b"K\x01Q", "a persistent id"),
        (b"\x97", "the opcode NEXT_BUFFER"),
        (b"\x98", "the opcode READONLY_BUFFER"),
        (b"N}}\x92", "the opcode NEWOBJ_EX"),
        (b"S'x'\n", "the opcode STRING"),
        (b"\xff", "byte 0xff, which is no opcode"),
        (b"K\x01K\x02\x93", "a name made of int and int"),
        (text("posix") + b"K\x01\x93", "a name made of str and int"),
        (b"a", "a .* for a .*|nothing on the stack"),
        (b"h\x7e", "object 126, which was never stored"),
        (b"j\xff\xff\xff\xff", "object 4294967295, which was never stored"),
        (b"t", "no mark"),
        (b"cposix", "a name without end"),
        (b"cposix\n" + b"x" * 2000, "a name without end"),
        (b"c\xff\xfe\nsystem\n", "UnicodeDecodeError"),
    ],
)
def test_opcodes_beyond_plain_data(refused, body, what):
    refused(pickled(body), what)


def test_only_what_a_file_may_name_is_ever_looked_up(refused):
    asked = []

    def find(module, attribute):
        asked.append((module, attribute))
        raise PickleRefused("asked")

    with pytest.raises(PickleRefused, match="asked"):
        PickleMachine(pickled(name("posix", "system")), find).read()
    assert asked == [("posix", "system")]
    content, end = PickleMachine(b"\x80\x04K\x05.rest", find).read()
    assert (content, end) == (5, 5)
    assert not hasattr(Named("x"), "__dict__")


# -- bombs -------------------------------------------------------------------------------------------------------------


def test_declared_sizes(refused):
    for code, size in (
        (b"B", struct.pack("<I", 2**32 - 1)),
        (b"\x8e", struct.pack("<Q", 2**63 - 1)),
        (b"\x8e", struct.pack("<Q", 2**64 - 1)),
        (b"\x96", struct.pack("<Q", 2**40)),
        (b"\x8d", struct.pack("<Q", 2**40)),
        (b"X", struct.pack("<I", 2**31)),
        (b"T", struct.pack("<i", -1)),
        (b"\x8b", struct.pack("<i", -5)),
        (b"\x8b", struct.pack("<i", 2**31 - 1)),
    ):
        refused(pickled(code + size + b"abc"), "are declared at byte")


def test_memo_bombs(refused):
    # A memo index that a table would need gigabytes for.
    refused(pickled(b"Nr\xff\xff\xff\xff"), "Python pickle of a NoneType")
    # Nested tuples that share their parts: 2^60 steps to hash, as a key.
    doubled = b")" + b"2\x86" * 60
    refused(generator_with(b"}" + doubled + b"Ns"), "the opcode DUP|a tuple as a name")
    shared = b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    refused(generator_with(b"}" + shared + b"Ns"), "a tuple as a name in a dict or set")
    refused(generator_with(b"\x8f(" + shared + b"\x90"), "a tuple as a name in a dict or set")
    refused(generator_with(b"(" + shared + b"\x91"), "a tuple as a name in a dict or set")
    # The same in torch's own files.
    refused(legacy(b"}" + shared + b"Ns", b"]", b""), "a tuple as a name", "generator.pt")


def test_networks_that_hold_themselves(refused):
    """A network whose parts are the same part twice, forty levels deep, and one that is its own part."""
    persistent = name("torch_utils.persistence", "_reconstruct_persistent_obj")

    def network(*children):
        modules = b"}(" + b"".join(text(f"m{i}") + child for i, child in enumerate(children)) + b"u"
        state = b"}" + text("_modules") + modules + b"s"
        meta = b"}(" + text("type") + text("class") + text("class_name") + text("G") + text("state") + state + b"u"
        return persistent + b"(" + meta + b"tR"

    whole = network()
    for _ in range(12):
        whole = network(whole, whole)
    assert len(whole) < 2_000_000
    body = network() + b"q\x00" + b"0"
    for level in range(38):
        body += network(b"h" + bytes([level]), b"h" + bytes([level])) + b"q" + bytes([level + 1]) + b"0"
    refused(pickled(body + b"}" + text("G_ema") + b"h" + bytes([38]) + b"s"), "a network of more than")
    deep = network() + b"q\x00" + b"0"
    for level in range(100):
        deep += network(b"h" + bytes([level])) + b"q" + bytes([level + 1]) + b"0"
    refused(pickled(deep + b"}" + text("G_ema") + b"h" + bytes([100]) + b"s"), "nested deeper than")
    module = name("torch.nn.modules.container", "ModuleList") + b")\x81q\x00"
    own = module + b"}" + text("_modules") + b"}" + text("x") + b"h\x00ssb"
    refused(pickled(b"}" + text("G_ema") + own + b"s"), "nested deeper than")


def test_deep_nesting(refused):
    deep = 50_000
    refused(pickled(b"(" * deep), "nested deeper than 1000")
    refused(pickled(b"]" * deep + b"a" * (deep - 1)), "Python pickle of a list")
    refused(pickled(b"N" + b"\x85" * deep), "Python pickle of a tuple")
    refused(pickled(b"}" + (text("a") + b"}") * deep + b"s" * deep), "no tensors")
    refused(pickled(b"0" * deep), "nothing on the stack")
    with pytest.raises(PickleRefused, match="more than 1000 opcodes"):
        PickleMachine(pickled(b"]" * 1500), lambda *_: None, max_opcodes=1000).read()


def test_deep_nesting_in_torch_files(refused):
    deep = 100_000
    refused(legacy(b"]" * deep + b"a" * (deep - 1), b"]", b""), "holds a list", "generator.pt")
    refused(legacy(b"(" * deep, b"]", b""), "nested deeper than 1000", "generator.pt")


def test_a_file_that_is_an_archive_from_its_end(refused):
    """Python's zip reader looks at the end of a file, torch at the beginning: so that is what is looked through."""
    shared = b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    innocent = io.BytesIO()
    with zipfile.ZipFile(innocent, "w") as new:
        new.writestr("x/data.pkl", pickle.dumps({}, 2))
    refused(legacy(b"}" + shared + b"Ns", b"]", innocent.getvalue()), "a tuple as a name", "generator.pt")


def test_declared_sizes_in_torch_files(refused):
    for count in (2**40, 2**62):
        refused(legacy(b"}" + text("a") + claim(count) + b"s"), "truncated.*elements is declared", "generator.pt")
    refused(legacy(b"}" + text("a") + claim(-7) + b"s"), "truncated.*-7 elements", "generator.pt")


# -- threads -----------------------------------------------------------------------------------------------------------


def test_files_read_at_once_do_not_share_anything(tmp_path, sentinel):
    good, bad = tmp_path / "good.pkl", tmp_path / "bad.pkl"
    good.write_bytes(generator_with(b"N"))
    bad.write_bytes(generator_with(call(name("posix", "system"), touching(sentinel))))
    ends = []

    def read(path):
        try:
            ends.append(load_generator(path).family)
        except CheckpointError:
            ends.append("refused")

    threads = [threading.Thread(target=read, args=(path,)) for path in (good, bad) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["refused"] * 4 + ["stylegan2"] * 4
