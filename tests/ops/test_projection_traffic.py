"""The projection's memory traffic, where the CUDA runtime counts it."""

from __future__ import annotations

import pytest

RUN = """
import sys, torch
from pyrewrite.ops import project_, project_adam_
out, channels, size, rank, kind = (a if a.isalpha() else int(a) for a in sys.argv[1:])
torch.manual_seed(0)
weight, base, grad, exp_avg, exp_avg_sq = (torch.rand(out, channels, size, size) for _ in range(5))
direction = torch.linalg.qr(torch.randn(channels, rank))[0].T.contiguous()
if kind == "alone":
    project_(weight, base, direction, impl="cuda")
else:
    state = (grad, exp_avg, exp_avg_sq)
    project_adam_(weight, base, direction, *state, step=1, lr=0.1, project=kind == "fused", impl="cuda")
"""


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("out", "channels", "size", "rank", "kind", "least"),
    [
        (512, 512, 3, 1, "alone", 12),
        (512, 512, 3, 30, "alone", 12),
        (512, 512, 3, 64, "alone", 12),
        (128, 512, 1, 1, "alone", 12),
        (64, 512, 3, 1, "fused", 32),
        (64, 512, 3, 30, "fused", 32),
        (64, 512, 3, 1, "step", 28),
    ],
)
def test_every_element_moves_once(out, channels, size, rank, kind, least, launches):
    (launch,) = launches(RUN, out, channels, size, rank, kind)
    elements = out * channels * size**2
    directions = 4 * rank * channels * (kind != "step")
    distinct = launch["distinct_load_bytes"] + launch["distinct_store_bytes"]
    assert distinct == least * elements + directions
    # What the threads ask for is that and the directions of each block, which meet in the first-level cache: once
    # for the dot products and once for the sum, or once in all where they are few.
    asked = launch["global_load_bytes"] + launch["global_store_bytes"]
    assert asked == least * elements + out * directions * (1 if rank <= 2 else 2)
    if rank == 1 and size == 3:
        assert asked <= 1.05 * least * elements
    assert launch["global_load_sectors"] * 32 == launch["global_load_bytes"]
    assert launch["global_load_requests"] * 512 == launch["global_load_bytes"]
    assert launch["global_store_sectors"] * 32 == launch["global_store_bytes"]
    assert launch["shared_wavefronts"] <= 1.01 * launch["shared_ideal_wavefronts"]
    assert launch["local_bytes"] == 0
