"""The second moment against `x.T @ x` in torch float32; ratios of one run.

    python -m pytest bench/ops/bench_second_moment.py -s

Each benchmark first compares both with float64, then times them in turn, so that a busy machine slows both alike.
"""

from __future__ import annotations

import pytest
import torch
from timing import in_turn
from torch import Tensor

from pyrewrite.ops import second_moment_
from pyrewrite.ops.second_moment import second_moment_ref

ROWS = {64: 1 << 17, 128: 1 << 17, 256: 1 << 16, 512: 1 << 16, 1024: 1 << 14}  # d -> N


def error(result: Tensor, truth: Tensor) -> float:
    """Relative, Frobenius norm."""
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("layout", ["rows", "NCHW"])
@pytest.mark.parametrize("d", list(ROWS))
def test_second_moment(benchmark, d, layout):
    torch.manual_seed(0)
    x = torch.rand(ROWS[d], d)  # non-negative: nothing cancels, as after a leaky ReLU nearly
    if layout == "NCHW":
        x = x.reshape(-1, 32, 32, d).permute(0, 3, 1, 2).contiguous()  # B x d x 32 x 32
    truth = second_moment_ref(x)
    moment = torch.zeros(d, d, dtype=torch.float64)

    def torch_form() -> Tensor:
        rows = x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, d)
        return rows.T @ rows

    ours, theirs = error(second_moment_(moment, x), truth), error(torch_form(), truth)
    fast, slow = in_turn(lambda: second_moment_(moment, x), torch_form)
    benchmark.pedantic(lambda: second_moment_(moment, x), rounds=3)
    rate = ROWS[d] * d * (d + 1) / fast / 1e9
    benchmark.extra_info.update({"ratio to x.T @ x": slow / fast, "error": ours, "error of x.T @ x": theirs})
    print(
        f"\nd {d}, {layout}: {fast * 1e3:.1f} ms, {slow / fast:.2f}x faster than x.T @ x ({rate:.0f} GFLOP/s in one "
        f"triangle); error {ours:.1e}, x.T @ x {theirs:.1e}"
    )
    if d == 512:
        assert slow / fast >= 1.3
        assert theirs / ours >= 10
