"""The projection of a weight's change against the einsum pair in torch; ratios of one run.

python -m pytest bench/ops/bench_projection.py -s
"""

from __future__ import annotations

import pytest
import torch
from timing import in_turn

from pyrewrite.ops import project_, project_adam_, project_ref


@pytest.mark.parametrize("rank", [1, 30])
@pytest.mark.parametrize("adam", [False, True], ids=["alone", "with Adam"])
def test_projection(benchmark, rank, adam):
    torch.manual_seed(0)
    base = torch.randn(512, 512, 3, 3)
    weight, grad = base + 0.01 * torch.randn_like(base), torch.randn_like(base)
    direction = torch.linalg.qr(torch.randn(512, rank))[0].t().contiguous()  # r x I
    exp_avg, exp_avg_sq = torch.zeros_like(base), torch.zeros_like(base)
    truth = project_ref(weight.double(), base.double(), direction.double())
    assert (project_(weight.clone(), base, direction).double() - truth).abs().max() < 1e-5

    def einsum_pair() -> None:
        if adam:
            exp_avg.lerp_(grad, 0.1)
            exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
            weight.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(1e-8), value=-1e-4)
        change = torch.einsum("oihw,ri->orhw", weight - base, direction)
        weight.copy_(base + torch.einsum("orhw,ri->oihw", change, direction))

    def ours() -> None:
        if adam:
            project_adam_(weight, base, direction, grad, exp_avg, exp_avg_sq, step=10, lr=1e-4)
        else:
            project_(weight, base, direction)

    fast, slow = in_turn(ours, einsum_pair)
    benchmark.pedantic(ours, rounds=3)
    least = base.numel() * (32 if adam else 12)  # bytes: every element read and written once
    benchmark.extra_info.update({"ratio to the einsum pair": slow / fast})
    print(
        f"\nprojection {'with Adam' if adam else 'alone'}, 512x512x3x3, rank {rank}: {fast * 1e3:.2f} ms, "
        f"{slow / fast:.1f}x faster than the einsum pair, {least / fast / 1e9:.1f} GB/s of the least traffic"
    )
