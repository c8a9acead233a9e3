"""The operators as torch sees them: what a call imports, and the versions of what it changes."""

import subprocess
import sys
from pathlib import Path

import torch

from pyrewrite.ops import project_, second_moment_


def test_a_call_does_not_import_the_compiler():
    code = (
        "import sys, torch; from pyrewrite.ops import second_moment_;"
        "second_moment_(torch.zeros(3, 3, dtype=torch.float64), torch.ones(2, 3));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    # Not in the source folder, which would hide the installed package.
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def test_versions_of_lists_move():
    weights = [torch.randn(2, 3, 1, 1), torch.randn(4, 3, 3, 3)]
    bases = [w + 1 for w in weights]
    before = [w._version for w in weights]
    project_(weights, bases, torch.eye(3)[:1])
    assert all(w._version > version for w, version in zip(weights, before, strict=True))
    assert [b._version for b in bases] == [0, 0]


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        moment = torch.zeros(3, 3, dtype=torch.float64)
        second_moment_(moment, torch.ones(2, 3))
    assert torch.equal(moment, torch.full((3, 3), 2.0, dtype=torch.float64))
