"""Types of the binary module, csrc/bindings.cpp.

Every function takes addresses (`Tensor.data_ptr()`), sizes, and strides in elements, and checks little: the callers in
pyrewrite/ops do. ValueError for arguments that do not fit, RuntimeError for what fails while running.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

_Four: TypeAlias = Sequence[int]  # images, channels, height, width; or out, in, height, width of a weight
_Two: TypeAlias = Sequence[int]
_Place: TypeAlias = tuple[int, _Four]  # address, strides

class Weight:
    """One weight of a batch with its tensors: weight, base[, grad, exp_avg, exp_avg_sq]."""

    def __init__(self, shape: _Four, places: Sequence[_Place], direction: tuple[int, _Two], rank: int) -> None: ...

class Adam:
    """Settings of one step of Adam."""

    def __init__(self, step: float, lr: float, beta1: float, beta2: float, eps: float, project: bool) -> None: ...

class InsertionEdit:
    """One edit: the addresses of its arrays, its sizes and settings."""

    def __init__(
        self,
        sizes: Sequence[int],
        starts: Sequence[int],
        shape: tuple[int, int, bool],
        shapes: Sequence[int],
        problem: Sequence[int],
        state: Sequence[int],
        settings: Sequence[float],
    ) -> None: ...

def version() -> str: ...
def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def second_moment(x: int, dtype: int, shape: _Four, strides: _Four, total: int, threads: int) -> None: ...
def project_cpu(weights: Sequence[Weight], adam: Adam | None, threads: int) -> None: ...
def insertion_steps_cpu(edits: Sequence[InsertionEdit], threads: int) -> None: ...
def conv3x3_prepare(weight: int, out: int, in_: int, prepared: int, threads: int) -> None: ...
def upconv3x3_prepare(weight: int, out: int, in_: int, prepared: int, threads: int) -> None: ...
def linear_cpu(arrays: Sequence[int], sizes: Sequence[int], scale: float, rate: float) -> None: ...
def colours_cpu(arrays: Sequence[int], sizes: Sequence[int], clamp: float, threads: int) -> None: ...
def demodulation_cpu(
    arrays: Sequence[int], sizes: Sequence[int], scale: float, epsilon: float, gain: float
) -> None: ...
def conv3x3_cpu(
    arrays: Sequence[int], sizes: Sequence[int], upsample: bool, negative_slope: float, threads: int
) -> None: ...
def upconv3x3_cpu(
    arrays: Sequence[int],
    sizes: Sequence[int],
    vertical: Sequence[float],
    horizontal: Sequence[float],
    negative_slope: float,
    threads: int,
) -> None: ...

# The rest is there only where build_info()["cuda"] is true.
def cuda_report() -> dict[str, Any]: ...
def second_moment_family(major: int, minor: int, sm90: bool, dtype: int, precision: int) -> str: ...
def second_moment_workspace(
    x: int, dtype: int, shape: _Four, strides: _Four, precision: int, family: int, device: int
) -> int: ...
def second_moment_cuda(
    x: int,
    dtype: int,
    shape: _Four,
    strides: _Four,
    precision: int,
    family: int,
    moment: int,
    moment_strides: _Two,
    workspace: int,
    device: int,
    stream: int,
    wait: bool,
) -> None: ...
def project_cuda(weights: Sequence[Weight], adam: Adam | None, device: int, stream: int, wait: bool) -> None: ...
def insertion_workspace(edits: Sequence[InsertionEdit], device: int) -> int: ...
def insertion_steps_cuda(
    edits: Sequence[InsertionEdit], workspace: int, device: int, stream: int, wait: bool
) -> None: ...
