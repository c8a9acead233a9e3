"""Where a GPU holds no cluster of blocks at once (a part of a GPU, or one whose parts are uneven), the rule takes the
next kernels; where it holds few, the second moment plans for as many. A library of pretence says how many there are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyrewrite.ops import _library

COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

PRETENCE = """
#include <stdlib.h>
int cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const void* launch) {
  *count = atoi(getenv("CLUSTERS"));
  return 0;
}
"""

# What the operators give, and how much scratch a moment asks for: the sums of all its blocks.
RUN = """
import importlib, json, sys
import torch
sys.path.insert(0, sys.argv[1])
from insertion_support import case, cast
from pyrewrite.ops import _library, insert_low_rank, second_moment, second_moment_, second_moment_ref

moment_op = importlib.import_module("pyrewrite.ops.second_moment")
place = torch.Tensor.cuda if torch.cuda.is_available() else torch.Tensor.contiguous
allocate, sizes = _library.workspace, []
_library.workspace = lambda size, like: sizes.append(size) or allocate(size, like)
torch.manual_seed(0)
told = {}
for d, dtype in ((100, torch.float32), (264, torch.float32), (264, torch.bfloat16)):
    x = place(torch.rand(3000, d).to(dtype))
    moment, truth = second_moment(x, impl="cuda"), second_moment_ref(x)
    moment_op._CUDA_FAMILY = 2  # the kernels of 8.0
    older = second_moment(x, impl="cuda")
    moment_op._CUDA_FAMILY = 0
    error = ((moment - truth).norm() / truth.norm()).item()
    told[f"{d} {dtype}"] = {"error": error, "older": torch.equal(moment, older), "size": sizes[0]}
    sizes.clear()
for name, variant in {
    "unfolded": {"o": 265, "i": 8, "rank": 1, "sizes": ((43, 37),)},
    "cluster": {"o": 5, "i": 8, "rank": 5, "sizes": ((5, 6), (2, 3)), "demodulate": True},
}.items():
    layer, direction, targets = case(**variant)
    truth = insert_low_rank(layer, direction, targets, steps=3, lr=0.01)
    single = cast(layer, direction, targets)
    for x in (single[0], *single[2]):
        for field, value in vars(x).items():
            if isinstance(value, torch.Tensor):
                object.__setattr__(x, field, place(value))
    result = insert_low_rank(single[0], place(single[1]), single[2], steps=3, lr=0.01, impl="cuda")
    error = (result.lambda_.cpu().double() - truth.lambda_).abs().median().item()
    told[name] = {"error": error, "bits": result.lambda_.cpu().numpy().tobytes().hex()}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if _library.native().build_info().get("cuda_runtime") != "shared":
        pytest.skip("the CUDA runtime is part of the module")
    capability = _library.cuda_report()["devices"][0]["capability"]
    if capability != (9, 0) or "90a" not in _library.native().build_info()["cuda_architectures"]:
        pytest.skip("not the GPU that the kernels in clusters are for, or a build without them")
    folder = tmp_path_factory.mktemp("pretence")
    (folder / "pretence.c").write_text(PRETENCE)
    library = folder / "pretence.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", folder / "pretence.c", "-o", library], check=True)

    def run(clusters: int | None) -> dict:
        env = {name: value for name, value in os.environ.items() if not name.startswith("EMU_") or name == "EMU_DEVICE"}
        if clusters is not None:
            env |= {"CLUSTERS": str(clusters), "LD_PRELOAD": f"{library}:{env.get('LD_PRELOAD', '')}"}
        command = [sys.executable, "-c", RUN, str(Path(__file__).parents[1])]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.cuda
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_the_next_kernels_take_what_has_no_room(run):
    usual, none, few = run(None), run(0), run(5)
    for told in (usual, none, few):
        assert all(one["error"] < 1e-6 for one in told.values()), told
    for name, one in usual.items():
        if "bits" in one:  # an insertion's plan does not depend on how many clusters run at once
            assert none[name]["bits"] != one["bits"] == few[name]["bits"]
        else:
            assert [told[name]["older"] for told in (usual, none, few)] == [False, True, False]
            assert few[name]["size"] < one["size"]
