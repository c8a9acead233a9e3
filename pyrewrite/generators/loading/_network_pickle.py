"""Reading pickles of whole networks, as NVIDIA's repositories write them: PyTorch's, and TensorFlow's before them.

Such a file holds persistent objects: the source text of a module, the name of a class in it, and the object's state.
The source is never executed here, nor anything else of the file: the state is all that is wanted. Names that may stand
in such a file are listed one by one, and each stands for something of ours.
"""

from __future__ import annotations

import io
import mmap
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrewrite.errors import DamagedCheckpointError, NotACheckpointError
from pyrewrite.generators.loading._pickle_machine import (
    Budget,
    Inert,
    Items,
    Named,
    PickleDamaged,
    PickleMachine,
    PickleRefused,
    checked_key,
)
from pyrewrite.generators.loading._plain_arrays import DType, PlainArray, plain_array, plain_scalar
from pyrewrite.generators.loading._torch_file import LOCK, STORAGES

MAX_MODULES = 20_000
MAX_NAMES = 100_000
MAX_NAME = 250  # characters
MAX_DEPTH = 40

# torch.save before 1.6, and of a storage to this day: a number, a version, the system, the object, keys, then the data.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_PLAIN_MODULES = {
    "container": ("Sequential", "ModuleList", "ModuleDict", "ParameterList"),
    "linear": ("Linear", "Identity"),
    "conv": ("Conv1d", "Conv2d", "ConvTranspose2d"),
    "activation": ("LeakyReLU", "ReLU", "Tanh", "Sigmoid", "Softplus"),
    "normalization": ("LayerNorm", "GroupNorm"),
    "batchnorm": ("BatchNorm1d", "BatchNorm2d", "SyncBatchNorm"),
    "pooling": ("AvgPool2d", "AdaptiveAvgPool2d", "MaxPool2d"),
    "upsampling": ("Upsample",),
    "flatten": ("Flatten",),
}


class NetworkState:
    """Stands in for a network or a part of one: the class's name and what the object held."""

    def __init__(self, class_name: str, state: Any = None) -> None:
        self.class_name, self.state = class_name, {}
        if state is not None:
            self.set_state(state)

    def set_state(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise PickleRefused(f"a {self.class_name} with a {type(state).__name__} as its state, expected a dict")
        self.state = state


class TensorFlowNetwork(NetworkState):
    """Stands in for a network of NVIDIA's TensorFlow code, whose state is names and arrays, and networks within it."""


class _Array(PlainArray):
    set_state = PlainArray.__setstate__


class _ArrayType(DType):
    set_state = DType.__setstate__


class _StorageClaim:
    """What a stored storage says of itself."""

    def __init__(self, pid: Any) -> None:
        if type(pid) is not tuple or len(pid) != 6 or pid[0] != "storage" or type(pid[1]) is not Named:
            raise PickleRefused("a persistent id that is not that of a torch storage")
        _, kind, key, _, count, _ = pid
        if type(key) is not str or type(count) is not int or count < 0:
            raise PickleRefused("a torch storage of which key or size make no sense")
        self.size = count * STORAGES[kind.name.rsplit(".", 1)[1]]


def read_network_pickle(path: Path) -> dict[str, Any]:
    """The content of a pickle: dicts, lists, numbers, text, tensors on the CPU, and networks as flat dicts of names.

    Raises NotACheckpointError, which names what was found and refused, or DamagedCheckpointError.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, LOCK:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's about typed storages
                content, end = PickleMachine(data, _allowed(Budget(2 * size))).read()
            if end != size:
                raise PickleDamaged(f"{size - end} bytes follow its end")
        content = _flat_networks(content)
    except PickleRefused as error:
        raise NotACheckpointError(
            f"{str(path)!r} is a Python pickle that holds {error}: only networks as NVIDIA's repositories write them, "
            "tensors, numbers, text and plain arrays are read from pickles, and nothing in one is run"
        ) from error
    except (PickleDamaged, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{str(path)!r} is a Python pickle, and truncated or damaged ({size} bytes): {error}"
        ) from error
    if not isinstance(content, dict):
        raise NotACheckpointError(
            f"{str(path)!r} is a Python pickle of a {type(content).__name__}, expected a network or a dict of networks"
        )
    return content


# -- the names that may stand in a file --------------------------------------------------------------------------------


def _allowed(budget: Budget) -> Callable[[str, str], Named]:
    """The allow-list, made anew for each file."""

    def encoded(text: Any, encoding: Any = None) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise PickleRefused(f"_codecs.encode to {encoding!r}, expected the latin1 of a stored byte string")
        budget.spend(len(text))
        return text.encode("latin-1")

    def byte_array(data: Any = b"") -> bytes:
        if type(data) not in (str, bytes):
            raise PickleRefused(f"a bytearray of a {type(data).__name__}, expected bytes")
        budget.spend(len(data))
        return _stored_bytes(data)

    def ordered(pairs: Any = ()) -> Items:
        items = _ordered(pairs)
        budget.spend(len(items))
        return items

    def scalar(dtype: Any, data: Any) -> Any:
        return _plain(plain_scalar, dtype, _stored_bytes(data))

    def from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> PlainArray:
        budget.spend(len(data))
        array = _Array()
        array.array = _plain(plain_array, data, dtype, shape, "F" if order == "F" else "C")
        return array

    class BudgetedArray(_Array):
        def set_state(self, state: tuple) -> None:
            version, shape, dtype, fortran, data = state
            data = _stored_bytes(data)
            budget.spend(len(data))
            _plain(super().__setstate__, (version, shape, dtype, fortran, data))

    def new_object(cls: Any, base: Any, state: Any) -> Any:
        if type(cls) is not Named or cls.new is None or type(base) is not Named or state is not None:
            raise PickleRefused("copyreg._reconstructor of something that is not a plain object")
        return cls.new()

    table: dict[tuple[str, str], tuple[Any, Any]] = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): (_persistent_object, None),
        ("torch._utils", "_rebuild_tensor_v2"): (_tensor, None),
        ("torch._utils", "_rebuild_parameter"): (_parameter, None),
        ("torch.storage", "_load_from_bytes"): (lambda data: _storage(data, budget), None),
        ("torch", "device"): (_device, None),
        ("torch", "Size"): (_size, None),
        ("collections", "OrderedDict"): (ordered, Items),
        ("dnnlib.util", "EasyDict"): (ordered, Items),
        ("dnnlib.tflib.network", "Network"): (None, lambda: TensorFlowNetwork("Network")),
        ("tfutil", "Network"): (None, lambda: TensorFlowNetwork("Network")),
        ("argparse", "Namespace"): (None, Inert),
        ("_codecs", "encode"): (encoded, None),
        ("numpy", "ndarray"): (None, None),
        ("numpy", "dtype"): (lambda code, *_: _plain(_ArrayType, code), None),
    }
    for builtins in ("builtins", "__builtin__"):
        table[builtins, "set"] = (_set, None)
        table[builtins, "object"] = (None, None)
        table[builtins, "bytearray"] = (byte_array, None)
    for copyreg in ("copyreg", "copy_reg"):
        table[copyreg, "_reconstructor"] = (new_object, None)
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = (lambda *_: BudgetedArray(), None)
        table[f"{core}.multiarray", "scalar"] = (scalar, None)
        table[f"{core}.numeric", "_frombuffer"] = (from_buffer, None)
    for kind in ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"):
        table["torch", kind] = (None, None)
        table["numpy", kind] = (None, None)
    for module, names in _PLAIN_MODULES.items():
        for name in names:
            table[f"torch.nn.modules.{module}", name] = (None, _module_maker(name))

    def find(module: str, name: str) -> Named:
        if (module, name) not in table:
            raise PickleRefused(f"{module}.{name}")
        call, new = table[module, name]
        return Named(f"{module}.{name}", call, new)

    return find


def _plain(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except pickle.UnpicklingError as error:
        raise PickleRefused(str(error)) from error


def _stored_bytes(data: Any) -> bytes:
    """Bytes, or the text as which Python 2 stored them."""
    return data.encode("latin-1") if type(data) is str else data


def _module_maker(name: str) -> Callable[[], NetworkState]:
    return lambda: NetworkState(name)


def _device(*parts: Any) -> str:
    if len(parts) > 2 or any(type(part) not in (str, int) or len(str(part)) > 20 for part in parts):
        raise PickleRefused("a torch.device that is not a name and a number")
    return ":".join(map(str, parts))


def _size(numbers: Any = ()) -> tuple[int, ...]:
    if type(numbers) not in (tuple, list) or len(numbers) > 8 or any(type(number) is not int for number in numbers):
        raise PickleRefused("a torch.Size that is not a few whole numbers")
    return tuple(numbers)


def _ordered(pairs: Any = ()) -> Items:
    if type(pairs) not in (tuple, list, dict):
        raise PickleRefused(f"an OrderedDict of a {type(pairs).__name__}")
    items = Items()
    for name, value in pairs.items() if type(pairs) is dict else pairs:
        if type(name) is not str:
            raise PickleRefused(f"a {type(name).__name__} as a name in an OrderedDict, expected a text")
        items[name] = value
    return items


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (tuple, list) or any(type(item) not in (str, int, float, bool) for item in items):
        raise PickleRefused("a set of other things than texts and numbers")
    return set(map(checked_key, items))


def _persistent_object(meta: Any) -> NetworkState:
    if not isinstance(meta, dict) or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise PickleRefused("a persistent object without a class name")
    return NetworkState(meta["class_name"], meta.get("state"))


# -- tensors -----------------------------------------------------------------------------------------------------------


def _declared(module: str, name: str) -> Named:
    if module != "torch" or name not in STORAGES:
        raise PickleRefused(f"{module}.{name} inside of torch.storage._load_from_bytes")
    return Named(f"{module}.{name}")


def _storage(data: Any, budget: Budget) -> Any:
    """The torch storage in `data`, which must be exactly that, by torch's reader that runs nothing.

    Its own header is read first: torch would ask for as much memory as is declared there, and would read other things.
    """
    if type(data) is not bytes:
        raise PickleRefused(f"torch.storage._load_from_bytes of a {type(data).__name__}, expected bytes")
    budget.spend(len(data))
    machine = PickleMachine(data, _declared, _StorageClaim, max_opcodes=10_000)
    magic, at = machine.read()
    if magic != LEGACY_MAGIC:
        raise PickleRefused("something in torch.storage._load_from_bytes that torch never stored there")
    _, at = machine.read(at)  # the version
    _, at = machine.read(at)  # the system
    claim, at = machine.read(at)
    keys, at = machine.read(at)
    if type(claim) is not _StorageClaim or type(keys) is not list or len(keys) != 1:
        raise PickleRefused(f"a {type(claim).__name__} in torch.storage._load_from_bytes, expected one storage")
    if claim.size != len(data) - at - 8:
        raise PickleDamaged(f"a storage of {claim.size} declared bytes, of which {len(data) - at - 8} are there")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage that lies within it; no view has more elements than its storage."""
    if not isinstance(storage, torch.TypedStorage):
        raise PickleRefused(f"a tensor made of a {type(storage).__name__}, expected a torch storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise PickleDamaged(f"a tensor of size {size}, strides {stride} and offset {offset}")
    available, count, last = len(storage), int(np.prod([1, *size], dtype=object)), offset
    last += sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count and (count > available or last >= available):
        raise PickleDamaged(f"a tensor of size {size}, strides {stride} and offset {offset} in {available} elements")
    if not count:
        return torch.empty(size, dtype=storage.dtype)
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped(), offset, size, stride)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise PickleRefused(f"a parameter made of a {type(data).__name__}, expected a tensor")
    return data


# -- networks ----------------------------------------------------------------------------------------------------------


def _flat_networks(content: Any) -> Any:
    """Networks at the top of the file, or in its dict or tuple, as dicts of names."""
    if type(content) is tuple and len(content) == 3 and all(isinstance(n, TensorFlowNetwork) for n in content):
        content = dict(zip(("G", "D", "Gs"), content, strict=True))
    if isinstance(content, NetworkState):
        return flat(content)
    if isinstance(content, dict):
        looks = _looks()
        networks = {name for name, value in content.items() if isinstance(value, NetworkState)}
        return {name: flat(value, looks) if name in networks else value for name, value in content.items()}
    return content


def _looks() -> Budget:
    return Budget(2 * MAX_NAMES, "names of parts")


def flat(network: NetworkState, looks: Budget | None = None) -> dict[str, Any]:
    """name -> tensor, and name -> setting for the plain numbers, texts and truth values among the attributes.

    looks: names that may still be looked at, in all networks of the file: parts may be shared.
    """
    looks = looks or _looks()
    found: dict[str, Any] = {}
    waiting, seen = [("", network, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        if not isinstance(module, NetworkState):
            raise PickleRefused(f"a {type(module).__name__} within a network, expected a network")
        seen += 1
        if seen > MAX_MODULES or depth > MAX_DEPTH or len(found) > MAX_NAMES:
            raise PickleRefused(
                f"a network of more than {MAX_MODULES} parts or {MAX_NAMES} names, or nested deeper than {MAX_DEPTH}"
            )
        if isinstance(module, TensorFlowNetwork):
            own, parts, ending = _variables(module), _entries(module, "components"), "/"
        else:
            own = [item for kind in ("_parameters", "_buffers") for item in _entries(module, kind)]
            own = [item for item in own if isinstance(item[1], Tensor)]
            known = {name for name, _ in own}
            own += [(name, value) for name, value in module.state.items() if _is_setting(name, value, known)]
            parts = [item for item in _entries(module, "_modules") if isinstance(item[1], NetworkState)]
            ending = "."
        looks.spend(1 + len(own) + len(parts) + len(module.state))
        longest = max((len(name) for name, _ in (*own, *parts)), default=0)
        if len(prefix) + longest > MAX_NAME:
            raise PickleRefused(f"a network with names of {len(prefix) + longest} characters, expected {MAX_NAME}")
        found |= {f"{prefix}{name}": value for name, value in own}
        waiting += [(f"{prefix}{name}{ending}", part, depth + 1) for name, part in reversed(parts)]
    return found


def _is_setting(name: Any, value: Any, weights: set[str]) -> bool:
    return (
        isinstance(name, str)
        and not name.startswith("_")
        and name not in weights
        and type(value) in (str, int, float, bool)
    )


def _variables(module: TensorFlowNetwork) -> list[tuple[str, Any]]:
    """Names and tensors, and the settings that decide how they are used."""
    variables = module.state.get("variables") or []
    found = []
    for pair in variables if isinstance(variables, list) else [variables]:
        if type(pair) is not tuple or len(pair) != 2 or type(pair[0]) is not str:
            raise PickleRefused(f"a network whose variables are a {type(pair).__name__}, expected names and arrays")
        name, value = pair
        if isinstance(value, PlainArray):
            found.append((name, torch.from_numpy(value.array)))
        elif type(value) in (int, float):
            found.append((name, torch.tensor(float(value))))
        else:
            raise PickleRefused(f"a variable {name} that is a {type(value).__name__}, expected an array")
    settings = _entries(module, "static_kwargs")
    return found + [item for item in settings if type(item[1]) in (str, int, float, bool, list)]


def _entries(module: NetworkState, kind: str) -> list[tuple[str, Any]]:
    entries = module.state.get(kind) or {}
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise PickleRefused(f"a {module.class_name} whose {kind} are not names and values")
    return list(entries.items())
