"""Insertion against the same algorithm in torch with autograd and Adam; ratios of one run.

    python -m pytest bench/ops/bench_insertion.py -s

Each benchmark first checks the result, then prints its ratio to the published algorithm as it is written in torch: the
whole weight W0 + Lambda D under autograd, convolved with the whole keys; and to autograd on conv(D key, Lambda), the
best stock form. The baselines' times are those of fewer steps, scaled: a step costs the same from first to last.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.insertion import low_rank_autograd, problem, published
from pyrewrite.ops import ConvLayer, InsertionTarget, insert_low_rank, insert_projected, insertion_loss, solve_low_rank
from pyrewrite.ops.insertion import target_loss

CHANNELS = 256


def published_projected(layer: ConvLayer, direction: Tensor, targets: list[InsertionTarget], steps: int) -> Tensor:
    """Losses of Adam on the whole weight, projected every ten steps, under autograd."""
    weight = layer.weight.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    losses = torch.zeros(steps)
    for step in range(steps):
        loss = sum(target_loss(layer, t, weight) for t in targets) / len(targets)
        losses[step] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            with torch.no_grad():
                change = torch.einsum("oihw,ri->orhw", weight - layer.weight, direction)
                weight.copy_(layer.weight + torch.einsum("orhw,ri->oihw", change, direction))
    return losses


def seconds(function: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def report(benchmark, name: str, best: float, **baselines: float) -> None:
    ratios = {key: value / best for key, value in baselines.items()}
    benchmark.extra_info.update({f"ratio to {key}": round(value, 1) for key, value in ratios.items()})
    told = ", ".join(f"{value:.1f}x faster than {key}" for key, value in ratios.items())
    print(f"\n{name}: {best * 1e3:.1f} ms on {torch.get_num_threads()} threads; {told}")


@pytest.mark.parametrize(
    ("name", "rank", "count", "size", "steps", "sample", "wanted"),
    [
        ("10x10 crop, rank 1", 1, 1, (10, 10), 2001, 40, 20),
        ("eight targets of 12x36, rank 30", 30, 8, (12, 36), 301, 6, 8),
    ],
)
def test_low_rank(benchmark, name, rank, count, size, steps, sample, wanted):
    layer, direction, targets = problem(rank, count, *size, CHANNELS)
    result = insert_low_rank(layer, direction, targets, steps=sample)
    assert torch.allclose(result.losses.float(), published(layer, direction, targets, sample), rtol=2e-3)
    assert torch.allclose(result.losses.float(), low_rank_autograd(layer, direction, targets, sample), rtol=2e-3)

    whole = seconds(lambda: published(layer, direction, targets, sample)) * steps / sample
    low_rank = seconds(lambda: low_rank_autograd(layer, direction, targets, sample)) * steps / sample
    benchmark.pedantic(lambda: insert_low_rank(layer, direction, targets, steps=steps), rounds=3, warmup_rounds=1)
    best = benchmark.stats.stats.min
    flop = 4 * CHANNELS * rank * 9 * count * size[0] * size[1] * steps  # two products a step
    print(f"\n{name}: {flop / best / 1e9:.0f} GFLOP/s in the products")
    report(benchmark, name, best, **{"published": whole, "low-rank autograd": low_rank})
    assert whole / best >= wanted
    if rank == 1:
        assert best < 1


def test_closed_form(benchmark):
    layer, direction, targets = problem(30, 8, 12, 36, CHANNELS)
    lambda_ = solve_low_rank(layer, direction, targets)
    before = insertion_loss(layer, direction, targets, torch.zeros_like(lambda_))
    assert sum(insertion_loss(layer, direction, targets, lambda_)) < sum(before)
    benchmark.pedantic(lambda: solve_low_rank(layer, direction, targets), rounds=7, warmup_rounds=2)
    print(f"\nclosed form, eight targets of 12x36, rank 30: {benchmark.stats.stats.min * 1e3:.1f} ms")
    assert benchmark.stats.stats.min < 0.1


def test_projected(benchmark):
    layer, direction, targets = problem(1, 1, 8, 12, 192)
    steps = 101
    result = insert_projected(layer, direction, targets, steps=steps)
    assert torch.allclose(result.losses.float(), published_projected(layer, direction, targets, steps), rtol=2e-2)
    whole = seconds(lambda: published_projected(layer, direction, targets, steps), 2)
    benchmark.pedantic(lambda: insert_projected(layer, direction, targets, steps=steps), rounds=3, warmup_rounds=1)
    best = benchmark.stats.stats.min
    report(benchmark, f"projected, 8x12 crop, 192 channels, {steps} steps", best, published=whole)
    print(f"\nprojected: {best / steps * 1e3:.2f} ms a step")
