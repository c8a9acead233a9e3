"""The second moment and its peers."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bench.core import Case, Way, compiled, relative_error
from pyrewrite.ops import second_moment_, second_moment_ref

BLOCK, PANEL = 128, 2048  # columns and rows of BLAS products on the blocks of one triangle
OUTER_ROWS = 512  # the published code's outer products are timed on about as many; each takes as long as the next
BOUNDS = {"fp32": 1e-6, "tf32": 1e-3}


def rows_of(x: Tensor) -> Tensor:
    """N x d, copied where x are maps B x d x H x W."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def stock(x: Tensor) -> Tensor:
    """x.T @ x in float32."""
    rows = rows_of(x).float()
    return rows.T @ rows


def triangle(x: Tensor) -> Tensor:
    """BLAS on the blocks of the upper triangle, a panel of rows at a time, float64 totals."""
    d = x.shape[1]
    total = torch.zeros(d, d, dtype=torch.float64, device=x.device)
    for panel in rows_of(x).split(PANEL):
        panel = panel.float()
        for i in range(0, d, BLOCK):
            total[i : i + BLOCK, i:] += panel[:, i : i + BLOCK].T @ panel[:, i:]
    return total.triu() + total.triu(1).T


def published(x: Tensor) -> Tensor:
    """A sum of outer products, as in the published code."""
    rows = rows_of(x).float()
    return torch.addbmm(rows.new_zeros(rows.shape[1], rows.shape[1]), rows[:, :, None], rows[:, None, :])


def with_precision(precision: str, product, x: Tensor) -> Tensor:
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return product(x)
    finally:
        torch.set_float32_matmul_precision(kept)


def maps_product(x: Tensor) -> Tensor:
    """One product an image, on maps as they lie, summed."""
    flat = x.flatten(2)  # B x d x HW
    return torch.bmm(flat, flat.transpose(1, 2)).sum(0)


def cublas_syrk(x: Tensor) -> Tensor:
    """cublasSsyrk of the library that torch has loaded: one triangle, mirrored by the caller of the result."""
    library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}")
    n, d = x.shape
    result = torch.zeros(d, d, device=x.device)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(result.data_ptr()))
    # Row-major N x d is column-major d x N: no transposition; its upper triangle is our lower one.
    status = library.cublasSsyrk_v2(
        handle, 1, 0, d, n, ctypes.byref(one), pointers[0], d, ctypes.byref(zero), pointers[1], d
    )
    if status:
        raise RuntimeError(f"cublasSsyrk: status {status}")
    return result


def triton_symmetric(x: Tensor) -> Tensor:
    from flash_muon.matmul_transpose_triton import matmul_transpose_assign

    result = torch.empty(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype)
    matmul_transpose_assign(x.T, result)
    return result


def full(triangular: Tensor) -> Tensor:
    """Both triangles of a result that has only one."""
    upper = triangular.triu() if triangular.tril(-1).abs().sum() == 0 else triangular.tril().T
    return upper.triu() + upper.triu(1).T


def case(device: str, size: dict) -> Case:
    """`size`: d, rows, dtype, layout ("rows" or "nchw": maps of 32 x 32) and perhaps precision."""
    torch.manual_seed(0)
    d, rows, dtype = size["d"], size["rows"], getattr(torch, size["dtype"])
    precision, maps = size.get("precision", "fp32"), size["layout"] == "nchw"
    x = (torch.rand(rows // 1024, d, 32, 32) if maps else torch.rand(rows, d)).to(device, dtype)
    truth = sum(second_moment_ref(part) for part in x.split(max(1, len(x) // 16)))

    def error(result: Tensor) -> float:
        return relative_error(result, truth)

    moment = torch.zeros(d, d, dtype=torch.float64, device=device)
    ways = [
        Way("pyrewrite", lambda: second_moment_(moment.zero_(), x, precision=precision), error),
        Way("x.T @ x, float32", lambda: stock(x), error),
        Way("BLAS on a triangle", lambda: triangle(x), error),
    ]
    part = x[: max(1, OUTER_ROWS * len(x) // rows)]
    ways.append(
        Way(
            "published",
            lambda: published(part),
            lambda r: relative_error(r, second_moment_ref(part)),
            len(x) / len(part),
        )
    )
    compiled_stock = compiled(stock)
    ways.append(Way("torch.compile(x.T @ x)", lambda: compiled_stock(x), error))
    missing = {}
    if device == "cuda":
        ways.append(Way("x.T @ x, TF32", lambda: with_precision("high", stock, x), error))
        if maps:
            ways.append(Way("bmm, float32", lambda: maps_product(x), error))
            ways.append(Way("bmm, TF32", lambda: with_precision("high", maps_product, x), error))
        elif dtype == torch.float32:
            ways.append(Way("cuBLAS syrk", lambda: cublas_syrk(x), lambda r: error(full(r))))
        if dtype != torch.float32:
            ways.append(Way(f"x.T @ x, {size['dtype']}", lambda: rows_of(x).T @ rows_of(x), error))
        ways.append(Way("Triton symmetric product", lambda: triton_symmetric(rows_of(x)), error))
    else:
        missing = dict.fromkeys(["cuBLAS syrk", "Triton symmetric product"], "needs a GPU")
    rate = "bf16" if dtype != torch.float32 else "tf32" if precision == "tf32" else "fp32 grade"
    label = f"{rows} x {d} {size['dtype']} {size['layout']} {precision}"
    return Case("second_moment", label, device, x.nbytes, rows * d * (d + 1), rate, BOUNDS[precision], ways, missing)
