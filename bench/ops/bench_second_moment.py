"""The second moment on the processor against x.T @ x in torch; ratios of one run.

    python -m pytest bench/ops/bench_second_moment.py -s

Each benchmark first checks the results against float64, then prints the ratio to x.T @ x in float32 (for maps after the
copy to rows that it needs) and to BLAS on the blocks of one triangle with float64 totals, with the errors of all.
"""

from __future__ import annotations

import pytest
import torch

from bench.core import interleaved
from bench.second_moment import case

ROWS = 1 << 14
OTHERS = ("x.T @ x, float32", "BLAS on a triangle")


@pytest.mark.parametrize("layout", ["rows", "nchw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [64, 128, 256, 512, 1024])
def test_second_moment(benchmark, d, dtype, layout):
    this = case("cpu", {"d": d, "rows": ROWS, "dtype": dtype, "layout": layout})
    ways = [way for way in this.ways if way.name in ("pyrewrite", *OTHERS)]
    errors = {way.name: way.error(way.run()) for way in ways}
    assert errors["pyrewrite"] < this.bound
    # Products of two bfloat16 are exact in float32: torch is better there.
    assert errors["pyrewrite"] <= errors[OTHERS[0]] / (10 if dtype == "float32" else 5)

    times = interleaved(ways, "cpu", rounds=7)
    benchmark.pedantic(ways[0].run, rounds=5, warmup_rounds=1)
    ratios = {name: times[name] / times["pyrewrite"] for name in OTHERS}
    benchmark.extra_info.update({f"ratio to {name}": round(value, 2) for name, value in ratios.items()})
    told = ", ".join(f"{value:.2f}x faster than {name} ({errors[name]:.0e})" for name, value in ratios.items())
    rate = this.flop / times["pyrewrite"] / 1e9
    print(
        f"\nd = {d}, {ROWS} rows, {dtype} {layout}: {times['pyrewrite'] * 1e3:.1f} ms on {torch.get_num_threads()} "
        f"threads, {rate:.0f} GFLOP/s, error {errors['pyrewrite']:.0e}; {told}"
    )
    if d == 512 and dtype == "float32":
        assert ratios[OTHERS[0]] >= 1.3
