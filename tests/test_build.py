"""The binary module: of this release, without torch in it, and explained by `python -m pyrewrite`.

Every process runs in an empty folder: beside the sources, `-c` and `-m` would import those, not what is installed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyrewrite
from pyrewrite import _C


def test_versions_agree():
    assert _C.version() == pyrewrite.__version__


def test_no_torch_symbol_in_the_binary():
    data = Path(_C.__file__).read_bytes()
    for name in (b"libtorch", b"libc10", b"at::Tensor", b"_ZN2at", b"_ZN3c10"):
        assert name not in data


def test_the_binary_imports_alone(tmp_path):
    code = "import sys, pyrewrite._C as c; assert c.build_info()['version']; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_diagnosis(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "pyrewrite"], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    for part in (f"pyrewrite {pyrewrite.__version__}", "pyrewrite._C", "second_moment_", "insert_low_rank"):
        assert part in out


def test_diagnosis_without_the_binary(tmp_path):
    code = "import sys, runpy; sys.modules['pyrewrite._C'] = None; runpy.run_module('pyrewrite', run_name='__main__')"
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "the binary module pyrewrite._C is missing" in out.stdout


def test_an_op_without_the_binary_says_what_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['pyrewrite._C'] = None\n"
        "import torch; from pyrewrite.ops import second_moment_, MissingKernelError\n"
        "try: second_moment_(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, 2), impl='cpu')\n"
        "except MissingKernelError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
