"""The projection on the processor against the published pair of einsum; ratios of one run.

    python -m pytest bench/ops/bench_projection.py -s

Each benchmark first checks the results against float64, then prints the ratio to the published form and to what
torch.compile makes of the reference.
"""

from __future__ import annotations

import pytest
import torch

from bench.core import interleaved
from bench.projection import case


@pytest.mark.parametrize("kind", ["alone", "with Adam", "Adam alone"])
@pytest.mark.parametrize(("channels", "rank"), [(256, 1), (512, 1), (512, 10), (512, 30)])
def test_projection(benchmark, channels, rank, kind):
    this = case("cpu", {"shape": [channels, channels, 3, 3], "rank": rank, "kind": kind})
    ours, published = this.ways[:2]
    errors = [way.error(way.run()) for way in (ours, published)]
    assert errors[0] <= this.bound
    assert errors[0] <= 2 * errors[1] + 1e-8

    times = interleaved([ours, published], "cpu", rounds=7)
    benchmark.pedantic(ours.run, rounds=5, warmup_rounds=1)
    best, ratio = times[ours.name], times[published.name] / times[ours.name]
    benchmark.extra_info[f"ratio to {published.name}"] = round(ratio, 2)
    print(
        f"\n{this.size}: {best * 1e3:.1f} ms on {torch.get_num_threads()} threads, {this.bytes / best / 1e9:.1f} GB/s, "
        f"error {errors[0]:.0e}; {ratio:.2f}x faster than {published.name} ({errors[1]:.0e})"
    )
