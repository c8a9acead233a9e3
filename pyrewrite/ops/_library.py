"""What every operator needs: the binary module or the reason why it is missing, and the choice between implementations.

An operator takes ``impl=None | "cuda" | "cpu" | "torch"``. A named implementation is the one that runs, or an error
says why it cannot. ``None`` follows a fixed rule, which ``python -m pyrewrite`` prints: tensors on a CUDA device go
to this package's CUDA kernel where this build holds one for the operator, tensors on the processor to its C++ kernel,
and data types that these do not take, and other devices, to plain torch. A kernel that fails raises; nothing is tried
in its place.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrewrite._version import __version__

IMPLEMENTATIONS = ("cuda", "cpu", "torch")
# The numbers of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Operator(NamedTuple):
    """An operator's name, the data types its kernels take, and its functions in the binary module (None: no such
    kernel yet).
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    cpu: str | None
    cuda: str | None


# In the order in which the diagnosis lists them. Insertion chooses between its implementations by itself.
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "second_moment_",
            (torch.float32, torch.float16, torch.bfloat16),
            cpu="second_moment",
            cuda="second_moment_cuda",
        ),
        Operator("project_", (torch.float32,), cpu="project_cpu", cuda="project_cuda"),
        Operator("project_adam_", (torch.float32,), cpu="project_cpu", cuda="project_cuda"),
        Operator("conv3x3", (torch.float32,), cpu="conv3x3_cpu", cuda=None),
        Operator("upconv3x3", (torch.float32,), cpu="upconv3x3_cpu", cuda=None),
        Operator("insert_low_rank", (torch.float32,), cpu="insertion_steps_cpu", cuda="insertion_steps_cuda"),
    )
}


class TorchOperator:
    """A function as a torch operator "pyrewrite::...": dispatch, `torch.compile`, and `register_fake` and
    `register_autograd` as those of `torch.library.custom_op`.

    That one is not used because its first call imports the compiler (torch._dynamo), which takes two to three seconds
    of every process that never compiles. mutates: the first so many arguments, tensors or lists of tensors, that are
    changed in place; their version counters move, which an operator defined from its parts has to do by itself.
    """

    def __init__(self, name: str, function: Callable, mutates: Sequence[str]) -> None:
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(function)
        def kernel(*arguments: Any) -> Any:
            for changed in arguments[: len(mutates)]:
                tensors = [changed] if isinstance(changed, Tensor) else changed
                # A tensor made in inference mode keeps no versions.
                torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
            return function(*arguments)

        torch.library.impl(name, "default", kernel)
        namespace, short = name.split("::")
        self._operator = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *arguments: Any) -> Any:
        return self._operator(*arguments)

    def register_fake(self, function: Callable) -> Callable:
        return torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


def torch_operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable], TorchOperator]:
    """Decorator: the function as `TorchOperator`."""
    return lambda function: TorchOperator(name, function, mutates)


class MissingKernelError(RuntimeError):
    """The implementation that was asked for is not there. The message says what is missing and why."""


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The binary module, or None and the reason."""
    try:
        from pyrewrite import _C
    except ImportError as error:
        problem = f"the binary module pyrewrite._C is missing or cannot be loaded ({error}). "
        if other := _installed_elsewhere():
            return None, problem + (
                f"Python took the source folder that it was started in, and not the pyrewrite installed in {other}: "
                "start it elsewhere, or install with `pip install -e .`"
            )
        return None, problem + (
            "It is built by `pip install .` (or `pip install -e .`) in the source folder, with a C++17 compiler"
        )
    if _C.version() != __version__:
        return None, (
            f"the Python files are pyrewrite {__version__} and the binary module is {_C.version()} ({_C.__file__}): "
            f"two releases are mixed. Install again"
        )
    return _C, ""


def _installed_elsewhere() -> Path | None:
    """Where another pyrewrite than this one is installed; None where there is none."""
    here = Path(__file__).parent.parent
    for found in importlib.metadata.distributions(name="pyrewrite"):
        package = Path(str(found.locate_file("pyrewrite")))
        if (package / "__init__.py").is_file() and package.resolve() != here.resolve():
            return package
    return None


# Loaded before a fork, the module can tell that torch's threads are not in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_load)


def native_problem() -> str:
    """Why the binary module cannot be used; empty where it can."""
    return _load()[1]


def native(what: str = "this operator") -> Any:
    """The binary module pyrewrite._C. Raises MissingKernelError with the reason where it cannot be used."""
    module, problem = _load()
    if module is None:
        raise MissingKernelError(f"{what}: {problem}")
    return module


@functools.cache
def cuda_report() -> dict[str, Any]:
    """Driver, runtime and devices as the binary module sees them; `problem` says why no kernel can run, empty where
    one can.
    """
    module, problem = _load()
    if module is None:
        return {"devices": [], "problem": problem}
    if not module.build_info()["cuda"]:
        return {
            "devices": [],
            "problem": "this build holds no CUDA kernels: no nvcc was found, or it was built with PYREWRITE_CUDA=OFF",
        }
    report = dict(module.cuda_report())
    report["problem"] = _explain(report)
    return report


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _explain(report: dict[str, Any]) -> str:
    if report["devices"]:
        return ""
    if not report["error"]:
        return "there is no GPU"
    text = f"CUDA error {report['error']}, {report['message']}"
    if report["error"] == 35:  # cudaErrorInsufficientDriver
        runtime = _version(report["runtime"])
        if report["driver"]:
            text += (
                f": the NVIDIA driver here is for CUDA {_version(report['driver'])}, the runtime in this build is "
                f"{runtime}. Update the driver, or build with an older toolkit"
            )
        else:
            text += (
                f": no NVIDIA driver was found (the runtime in this build is {runtime}). On a machine without a GPU "
                f"that is as it should be"
            )
    return text


def check_impl(impl: str | None) -> None:
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")


def resolve(name: str, impl: str | None, tensor: Tensor) -> str:
    """The implementation of operator `name` for tensors like this one. Raises where the one that was asked for is not
    there.
    """
    check_impl(impl)
    operator = OPERATORS[name]
    takes = tensor.dtype in operator.dtypes
    if impl is None:
        kind = tensor.device.type
        if not takes or kind not in ("cuda", "cpu") or (kind == "cuda" and not _has_cuda_kernel(operator)):
            return "torch"
        impl = kind
    if impl == "torch":
        return impl
    if not takes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in operator.dtypes)
        raise TypeError(
            f"{name}: impl={impl!r} takes {names}, got {str(tensor.dtype).removeprefix('torch.')} "
            "(impl='torch' takes it)"
        )
    if impl == "cpu":
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: impl='cpu' takes tensors on the processor, got one on {tensor.device}")
        native(name)
        return impl
    if operator.cuda is None:
        raise MissingKernelError(
            f"{name}: this release has no CUDA kernel for it. On a CUDA device impl='torch' (or None) computes it "
            "with torch"
        )
    native(name)
    if tensor.device.type not in ("cuda", "cpu"):
        raise ValueError(f"{name}: impl='cuda' takes tensors on a CUDA device, got one on {tensor.device}")
    report = cuda_report()
    if report["problem"]:
        raise MissingKernelError(f"{name}: impl='cuda' cannot run: {report['problem']}")
    if tensor.device.type == "cpu" and not report["devices"][0]["reads_host_memory"]:
        raise ValueError(
            f"{name}: impl='cuda' takes tensors on a CUDA device, got one on the processor, whose memory GPU 0 "
            f"({report['devices'][0]['name']}) cannot read"
        )
    return impl


def _has_cuda_kernel(operator: Operator) -> bool:
    module, _ = _load()
    # Without the module the call goes on to the kernel's own error message.
    return operator.cuda is not None and (module is None or bool(module.build_info()["cuda"]))


def launch_place(tensor: Tensor) -> tuple[int, int, bool]:
    """Device number, stream handle and whether to wait, for a CUDA kernel on `tensor`: torch's current stream, so
    that the kernel takes its turn among torch's. Host memory that the device reads is used by the caller at once, so
    there the call waits.
    """
    if tensor.device.type == "cuda":
        return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream, False
    return 0, 0, True


def workspace(size: int, like: Tensor) -> Tensor:
    """Uninitialised bytes beside `like`. torch gives them to nobody else before the current stream is done with them,
    and a CUDA graph keeps them.
    """
    return like.new_empty(size, dtype=torch.uint8)
