from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from pyrewrite.ops import _library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well (CI does: CI=true)")


def cuda_skip_reason() -> str:
    """Why tests marked cuda cannot run here; empty where they can."""
    report = _library.cuda_report()
    if report["problem"]:
        return report["problem"]
    if not torch.cuda.is_available() and not report["devices"][0]["reads_host_memory"]:
        return "torch is built without CUDA, and the GPU cannot read the processor's memory"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow") or os.environ.get("CI", "") not in ("", "0", "false")
    cuda = ""
    if any("cuda" in item.keywords for item in items):
        cuda = cuda_skip_reason()
    for item in items:
        if "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="slow; runs in CI, or with --slow"))
        if "cuda" in item.keywords and cuda:
            item.add_marker(pytest.mark.skip(reason=f"no CUDA kernel can run: {cuda}"))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Puts a tensor where impl='cuda' takes it: on the GPU, or in place where the device reads the processor's
    memory. A runtime that runs kernels on the processor and checks their accesses is told which memory is theirs, the
    operators' own scratch included.
    """
    if torch.cuda.is_available():
        yield lambda tensor: tensor.cuda()
        return
    registered: list[torch.Tensor] = []
    try:
        runtime = ctypes.CDLL("libcudart.so.13")
        register, unregister = runtime.emu_register_range, runtime.emu_unregister_range
    except (OSError, AttributeError):
        register = unregister = None

    def place(tensor: torch.Tensor) -> torch.Tensor:
        if register is not None:
            storage = tensor.untyped_storage()
            register(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()))
            registered.append(tensor)  # keeps the memory
        return tensor

    allocate = _library.workspace
    monkeypatch.setattr(_library, "workspace", lambda *arguments: place(allocate(*arguments)))
    yield place
    for tensor in registered:
        unregister(ctypes.c_void_p(tensor.untyped_storage().data_ptr()))
