"""Second moment of feature vectors: ``sum over rows k of k k^T``, the C of "Rewriting a Deep Generative Model" (Bau
et al., ECCV 2020, section 3.2), uncentred and not divided by the number of rows.

Products are float32 (float64 for float64 input), sums of few rows float32 (96 on the processor, at most 8192 on a GPU
and in torch) and everything beyond as good as float64: the error does not grow with the number of rows, as it does in
``x.T @ x``. Only one triangle is computed; the other is its mirror, exactly. docs/kernels.md has the CUDA kernels.

On the processor the C++ kernel is taken at every d: with AVX2 it was measured faster than ``x.T @ x`` in float32 and
than BLAS on the blocks of one triangle with float64 totals, from d = 64 to 1024 (bench/ops/bench_second_moment.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyrewrite.ops import _library

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PRECISIONS = ("fp32", "tf32")  # in the order of csrc/second_moment/params.h
_CUDA_FAMILY = 0  # which CUDA kernels: 0 by rule; tests and benchmarks set another MomentFamily of params.h
_TORCH_ROWS = {"cpu": 1024, "cuda": 8192}  # rows of one product; more would keep a GPU busier and the sums longer


def second_moment_ref(x: Tensor) -> Tensor:
    """Reference in plain torch: rows N x d, or maps B x d x H x W -> d x d float64, all of it in float64."""
    rows = _as_rows(x).to(torch.float64)  # N x d
    return rows.T @ rows


def second_moment_(moment: Tensor, x: Tensor, *, precision: str = "fp32", impl: str | None = None) -> Tensor:
    """Add the second moment of `x` to `moment`, in place, and return `moment`.

    moment: d x d float64, any strides; x: N x d rows, or B x d x H x W maps, whose rows are the channels at each
    pixel, float32, float16, bfloat16 or (in torch) float64. Any strides: NCHW, channels_last, slices and batch
    strides are read where they lie. N, B, H and W may be 0. NaN and infinity propagate: a NaN in channel j makes row
    and column j NaN, and nothing else.

    precision: "fp32", or "tf32", which allows a GPU's tensor cores to round the factors to 10 fraction bits. On tensor
    cores "fp32" makes two numbers of 11 bits of every float32 factor: a product is good to 2^-21. "fp32" is kept also
    where torch is set to lower its own (``torch.set_float32_matmul_precision``): the torch implementation then
    multiplies in float64.

    Raises ValueError or TypeError for shapes, data types and devices that do not fit, MissingKernelError for an
    `impl` that is not there (see pyrewrite.ops._library for the rule of ``impl=None``). `moment` is then unchanged.
    """
    if torch.is_grad_enabled() and (moment.requires_grad or x.requires_grad):
        raise RuntimeError(
            "second_moment_ adds in place and has no gradient: call it under torch.no_grad(), or use second_moment(x)"
        )
    _second_moment_(moment, x, precision, impl)
    return moment


def second_moment(x: Tensor, *, precision: str = "fp32", impl: str | None = None) -> Tensor:
    """The second moment of `x` as a new d x d float64 tensor; differentiable. Arguments as for second_moment_."""
    return _second_moment(x, precision, impl)


@_library.torch_operator("pyrewrite::second_moment_", mutates=("moment",))
def _second_moment_(moment: Tensor, x: Tensor, precision: str, impl: str | None = None) -> None:
    _check(x, precision, impl)
    _check_moment(moment, x)
    if _library.resolve("second_moment_", impl, x) == "cuda":
        _add_cuda(moment, x, precision)
    else:
        moment.add_(_compute(x, precision, impl))


@_second_moment_.register_fake
def _(moment: Tensor, x: Tensor, precision: str, impl: str | None = None) -> None:
    _check(x, precision, impl)
    _check_moment(moment, x)


@_library.torch_operator("pyrewrite::second_moment")
def _second_moment(x: Tensor, precision: str, impl: str | None = None) -> Tensor:
    _check(x, precision, impl)
    return _compute(x, precision, impl)


@_second_moment.register_fake
def _(x: Tensor, precision: str, impl: str | None = None) -> Tensor:
    _check(x, precision, impl)
    return x.new_empty((x.shape[1], x.shape[1]), dtype=torch.float64)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad: Tensor):
    (x,) = ctx.saved_tensors
    # d/dx of <G, X^T X> is X (G + G^T), row by row.
    symmetric = (grad + grad.T).to(x.dtype)  # d x d
    if x.ndim == 2:
        return x @ symmetric, None, None
    return torch.einsum("bchw,cd->bdhw", x, symmetric), None, None


_second_moment.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, precision: str, impl: str | None) -> None:
    _library.check_impl(impl)
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be 'fp32' or 'tf32', got {precision!r}")
    if x.ndim not in (2, 4):
        raise ValueError(f"x must be rows N x d or maps B x d x H x W, got shape {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {str(x.dtype).removeprefix('torch.')}")


def _check_moment(moment: Tensor, x: Tensor) -> None:
    d = x.shape[1]
    if moment.dtype != torch.float64:
        raise TypeError(f"moment must be float64, got {str(moment.dtype).removeprefix('torch.')}")
    if tuple(moment.shape) != (d, d):
        raise ValueError(f"moment must be {d} x {d} for x of shape {tuple(x.shape)}, got {tuple(moment.shape)}")
    if d > 1 and 0 in moment.stride():
        raise ValueError("moment is an expanded tensor: its elements share memory, so nothing can be added to them")
    if moment.device != x.device:
        raise ValueError(f"moment and x must be on one device, got {moment.device} and {x.device}")


def _compute(x: Tensor, precision: str, impl: str | None) -> Tensor:
    """d x d float64, both triangles."""
    impl = _library.resolve("second_moment_", impl, x)
    if impl == "torch" and x.numel() > 0:
        return _compute_torch(x, precision)
    total = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
    if impl == "cuda":
        _add_cuda(total, x, precision)
    elif impl == "cpu":
        _library.native().second_moment(*_native_view(x), total.data_ptr(), torch.get_num_threads())
    return total


def _native_view(x: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Address, data type, shape and strides as images x channels x height x width."""
    if x.ndim == 2:
        shape, strides = (1, x.shape[1], 1, x.shape[0]), (0, x.stride(1), 0, x.stride(0))
    else:
        shape, strides = tuple(x.shape), x.stride()
    return x.data_ptr(), _library.DTYPE_CODES[x.dtype], shape, strides


def _add_cuda(moment: Tensor, x: Tensor, precision: str) -> None:
    """Adds to both triangles of `moment` on the current stream."""
    if x.numel() == 0:
        return
    how = (*_native_view(x), _PRECISIONS.index(precision), _CUDA_FAMILY)
    device, stream, wait = _library.launch_place(x)
    workspace = _library.workspace(_library.native().second_moment_workspace(*how, device), x)
    _library.native().second_moment_cuda(
        *how, moment.data_ptr(), moment.stride(), workspace.data_ptr(), device, stream, wait
    )


def _compute_torch(x: Tensor, precision: str) -> Tensor:
    lowered = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    wide = torch.float64 if x.dtype == torch.float64 or lowered else torch.float32
    total = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
    for block in _row_blocks(x, _TORCH_ROWS.get(x.device.type, 1024)):
        rows = block.to(wide)  # n x d
        total += rows.T @ rows
    return _mirror(total)


def _mirror(total: Tensor) -> Tensor:
    return total.triu() + total.triu(1).T


def _as_rows(x: Tensor) -> Tensor:
    """N x d; a view where the strides allow one."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _row_blocks(x: Tensor, most: int) -> Iterator[Tensor]:
    """`x` as pieces of at most about `most` rows (a line of a map is not cut), so that copies are bounded."""
    if x.ndim == 2:
        yield from x.split(most)
        return
    pixels = x.shape[2] * x.shape[3]
    for images in x.split(max(1, most // pixels)):
        for lines in images.split(max(1, most // x.shape[3]), dim=2):
            yield _as_rows(lines)
