"""A GPU of pretence: tensors that say "cuda:0" or "cuda:1", hold their numbers on the processor, and refuse what a GPU
refuses: operators over tensors of two devices, `.numpy()`, a look at their addresses, integer matrix products, random
numbers of another device's generator.

For a torch without CUDA. Where a build of pyrewrite has no CUDA kernels its operators take plain torch on it, so
everything above them runs as on a GPU, to the same numbers as on the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

aten = torch.ops.aten
COUNT = 2  # devices
CUDA, META = 1, 14  # c10::DeviceType
C10 = next(path for path in Path(torch.__file__).parent.glob("lib/*c10*") if path.suffix in (".so", ".dylib", ".dll"))

# Operators that take tensors of two devices, as on a GPU: copies, and indices on the processor.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
MIXING = {aten.copy_.default, aten._to_copy.default, aten.fill_.Tensor, *INDEXING}
NO_INTEGERS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.convolution.default}
MISSING = {aten.histogram.bins_tensor, aten.histogram.bin_ct}  # no kernel for CUDA


class Watched:
    """What was asked of the device: how often each thing was."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.current = 0  # the current device
        self.later: list[tuple[Tensor, Tensor]] = []  # copies to the processor that are under way

    def arrive(self) -> None:
        for there, copied in self.later:
            there.copy_(copied)
        self.later.clear()

    def wait(self) -> None:
        self.counts["waits"] += 1
        self.arrive()


watched = Watched()


class DeviceTensor(Tensor):
    """held: the numbers, on the processor. Views hold views of them."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> DeviceTensor:
        assert type(held) is Tensor, type(held)
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=device, requires_grad=False,
        )  # fmt: skip
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch(function, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["held"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict, device: torch.device, size: Any, stride: Any) -> DeviceTensor:
        return DeviceTensor(inner["held"], device)

    def __repr__(self, **ignored: Any) -> str:
        return f"{self.held!r} on {self.device}"

    def data_ptr(self) -> int:
        """An identity; a kernel on the processor must not get it."""
        caller = sys._getframe(1).f_code.co_filename
        assert "ops" not in Path(caller).parts, f"{caller} asked for the address of a device's tensor"
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: int) -> Any:
        raise AssertionError("a device's tensor was pickled: it would need that device where it is read")

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = DeviceTensor(self.held.detach().clone(), self.device)
        result = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        memo[id(self)] = result
        return result


def number(device: torch.device | None) -> torch.device:
    """The device with its number."""
    if device is not None and device.type == "cuda" and device.index is None:
        return torch.device("cuda", watched.current)
    return device if device is not None else torch.device("cpu")


def dispatch(function: Any, args: tuple, kwargs: dict) -> Any:
    if function.namespace == "pyrewrite":  # an operator of this package: its function, which calls torch
        return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
    name = str(function)
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    on = {x.device for x in given if isinstance(x, DeviceTensor)}
    off = [x for x in given if not isinstance(x, DeviceTensor)]
    if function in MISSING:
        raise NotImplementedError(f"{name} has no kernel for CUDA")
    if function not in MIXING:
        # A tensor of no dimensions on the processor is a number to elementwise operators.
        bad = [x for x in off if x.ndim > 0 or torch.Tag.pointwise not in function.tags]
        if bad or len(on) > 1:
            found = [f"{tuple(x.shape)} on {x.device}" for x in given]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {', '.join(found)}")
    elif function in (
        aten.index.Tensor,
        aten.index_put_.default,
        aten.index_put.default,
        aten._index_put_impl_.default,
    ):
        own = args[0].device
        strangers = [x for x in args[1] if x is not None and x.device not in (own, torch.device("cpu"))]
        values = args[2] if len(args) > 2 else None
        if strangers or (values is not None and values.device != own and values.ndim > 0):
            raise RuntimeError(f"{name}: indices and values must be on {own} (indices: or on the processor)")
    if function in NO_INTEGERS and any(not x.is_floating_point() for x in given):
        raise RuntimeError(f"{name} is not implemented for integers on CUDA")
    generator = kwargs.get("generator")
    if generator is not None and on and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
    if function in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
        watched.counts["waits"] += 1
        watched.arrive()
    if function is aten.is_pinned.default:
        return False
    if function is aten.copy_.default and not isinstance(args[0], DeviceTensor) and (args[2:] or (False,))[0]:
        watched.later.append((args[0], args[1].held.detach().clone()))  # there once somebody has waited
        return args[0]

    device = number(kwargs["device"]) if kwargs.get("device") is not None else next(iter(on), torch.device("cpu"))
    if function is aten._to_copy.default and kwargs.get("device") is None:
        device = args[0].device
    inner = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    if "device" in kwargs:
        inner["device"] = torch.device("cpu")
    held_args, held_kwargs = tree_map_only(DeviceTensor, lambda x: x.held, (args, inner))
    before = [(x, x.held.shape, x.held.stride()) for x in given if isinstance(x, DeviceTensor)]
    result = function(*held_args, **held_kwargs)
    for x, shape, strides in before:
        if x.held.shape != shape or x.held.stride() != strides:
            raise NotImplementedError(f"{name} changes the shape of its argument, which this device cannot")
    if device.type == "cpu":
        # A copy to the processor must not share memory.
        return result
    owners = {id(x.held): x for x in given if isinstance(x, DeviceTensor)}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return owners[id(x)] if id(x) in owners else DeviceTensor(x, device)

    return tree_map(wrapped, result)


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
           memory_format: Any = None) -> Tensor:  # fmt: skip
    held = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    return DeviceTensor(_poisoned(held), number(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                   pin_memory: Any = None) -> Tensor:  # fmt: skip
    return DeviceTensor(_poisoned(torch.empty_strided(size, stride, dtype=dtype, device="cpu")), number(device))


MAKERS = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "randperm")


def _maker(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    function = getattr(getattr(aten, packet), overload or "default")

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return DeviceTensor(function(*args, device="cpu", **kwargs), number(device))

    return make


def _poisoned(held: Tensor) -> Tensor:
    """Memory that was not written must not look right by chance."""
    return held.fill_(float("nan")) if held.is_floating_point() else held


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda_stream = device, 0

    def record_event(self, event: Any = None) -> Any:
        return SimpleNamespace(query=lambda: not watched.later, synchronize=watched.wait)

    def synchronize(self) -> None:
        watched.wait()


@contextlib.contextmanager
def another_device() -> Iterator[Watched]:
    """torch with two GPUs of pretence, within the block."""
    assert not torch.backends.cuda.is_built(), "for a torch without CUDA"
    watched.__init__()

    def numbered(function: Callable) -> Callable:
        def call(device: Any = None, *arguments: Any) -> Any:
            device = torch.device("cuda", device) if isinstance(device, int) else device
            return function(number(torch.device(device if device is not None else "cuda")), *arguments)

        return call

    def free(device: torch.device) -> tuple[int, int]:
        assert device.type == "cuda"
        return 6 << 30, 8 << 30

    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: COUNT,
        "current_device": lambda: watched.current,
        "mem_get_info": numbered(free),
        "empty_cache": lambda: watched.counts.update(["empty_cache"]),
        "synchronize": numbered(lambda device: watched.wait()),
        "current_stream": numbered(Stream),
        "memory_allocated": numbered(lambda device: 1 << 30),
        "memory_reserved": numbered(lambda device: 3 << 30),
    }  # fmt: skip

    # torch's own functions that make tensors of Python numbers do not pass by a device of Python.
    move, make, convert, empty = Tensor.to, torch.tensor, torch.as_tensor, torch.empty

    def to(self: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        arguments = [number(torch.device(x)) if isinstance(x, str | torch.device) else x for x in arguments]
        if settings.get("device") is not None:
            settings["device"] = number(torch.device(settings["device"]))
        return move(self, *arguments, **settings)

    def tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
        made = make(data, **settings)
        return made if device is None else to(made, device)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        made = data if isinstance(data, Tensor) else convert(data)
        return to(made, device=device, dtype=dtype)

    def new_tensor(self: Tensor, data: Any, *, device: Any = None, dtype: Any = None) -> Tensor:
        return tensor(data, device=device or self.device, dtype=dtype or self.dtype)

    def unpinned(*size: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
        made = empty(*size, **settings)
        return _poisoned(made) if pin_memory else made

    patches = [mock.patch.object(torch, "empty", unpinned)]
    patches += [mock.patch.object(torch, "tensor", tensor), mock.patch.object(torch, "as_tensor", as_tensor)]
    patches += [mock.patch.object(Tensor, "to", to), mock.patch.object(Tensor, "new_tensor", new_tensor)]
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "CUDA")
    library.impl("empty_strided", _empty_strided, "CUDA")
    for name in MAKERS:
        library.impl(name, _maker(name), "CUDA")
    guards = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(C10), "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[META]  # what switches devices: nothing
    try:
        with contextlib.ExitStack() as stack:
            for patch in (mock.patch.multiple(torch.cuda, **cuda), *patches):
                stack.enter_context(patch)
            yield watched
    finally:
        library._destroy()
        guards[CUDA] = None
