"""The second moment's memory traffic and matrix products, where the CUDA runtime counts them."""

from __future__ import annotations

import pytest

RUN = """
import sys, torch
from pyrewrite.ops import second_moment
d, rows, dtype, layout, precision = (int(a) if a.isdigit() else a for a in sys.argv[1:])
torch.manual_seed(0)
x = torch.rand(rows, d) if layout == "rows" else torch.rand(rows // 256, d, 16, 16)
second_moment(x.to(getattr(torch, dtype)), precision=precision, impl="cuda")
"""


# Boxes are counted in units where they arrive: of the 8 of d = 512 in the square beside the diagonal 6 in each of two
# blocks, in two on it 4 and 3 each; of fp32 instead in two tiles 4, in four on the diagonal 2. Matrix instructions of
# four warps for 16 rows: of 16 bits one for 128 columns or a last 64, of float32 one or three for each square of 64.
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("d", "rows", "dtype", "layout", "precision", "reads", "products"),
    [
        (512, 1024, "bfloat16", "rows", "fp32", 26 / 8, 20),
        (512, 1024, "float16", "nchw", "fp32", 26 / 8, 20),
        (512, 1024, "float32", "rows", "fp32", 28 / 8, 108),
        (512, 1024, "float32", "nchw", "fp32", 28 / 8, 108),
        (512, 1024, "float32", "rows", "tf32", 26 / 8, 36),
        (256, 1024, "float32", "nchw", "tf32", 7 / 4, 10),
        (384, 1024, "float32", "rows", "fp32", 18 / 6, 63),
        (384, 1024, "bfloat16", "rows", "fp32", 17 / 6, 12),
        (448, 1024, "float32", "rows", "tf32", 22 / 7, 28),
        (128, 4096, "float32", "rows", "fp32", 1, 9),
        (64, 4096, "bfloat16", "rows", "fp32", 1, 1),
    ],
)
def test_hopper_kernels(d, rows, dtype, layout, precision, reads, products, launches):
    # Of several launches the one that computes the partial sums.
    (launch,) = (one for one in launches(RUN, d, rows, dtype, layout, precision) if "_moment" in one["kernel"])
    if "sm90" not in launch["kernel"]:
        pytest.skip("not the GPU that the kernels are for, or a build without them")
    size = rows * d * (4 if dtype == "float32" else 2)
    scales = 4 * d if dtype == "float32" else 0
    assert launch["distinct_load_bytes"] == size + scales
    # A warp's lanes read the scales of the channels that they convert.
    assert reads * size <= launch["global_load_bytes"] <= reads * size + 256 * 16 * scales
    assert launch["wgmma"] == products * rows // 16
    assert launch["shared_wavefronts"] == launch["shared_ideal_wavefronts"]
    assert launch["local_bytes"] == 0
