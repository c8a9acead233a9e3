"""The benchmark report at sizes that say nothing about speed: complete, right, and told when a kernel is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
SIZES = """
[cpu]
rounds = 1
second_moment = [
  { d = 8, rows = 2048, dtype = "float32", layout = "nchw" },
  { d = 8, rows = 2048, dtype = "bfloat16", layout = "rows" },
]
projection = [
  { shape = [8, 8, 3, 3], rank = 2, kind = "alone" },
  { shape = [8, 8, 3, 3], rank = 2, kind = "with Adam" },
  { shape = [8, 8, 3, 3], rank = 2, kind = "Adam alone", layers = 2 },
]
convolution = [
  { in = 16, out = 16, side = 4, kind = "plain" },
  { in = 16, out = 16, side = 4, kind = "nearest" },
  { in = 16, out = 16, side = 4, kind = "transposed" },
]
insertion = [{ channels = 8, rank = 1, targets = 2, height = 4, width = 5, steps = 8, sample = 4 }]
rendering = [
  { generator = "stylegan2", channels = [16, 8], images = 2 },
  { generator = "progan", channels = [16, 8], images = 2 },
]
"""
WITHOUT_COMPILER = "import torch; torch.compile = lambda function: function\n"


@pytest.fixture
def report(tmp_path):
    """Runs the report beside a copy of bench/, where no source folder hides the installed package."""
    shutil.copytree(BENCH, tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sizes.toml").write_text(SIZES)

    def run(code: str = "") -> tuple[int, str, list[dict]]:
        start = "import sys; from bench.report import main; sys.exit(main(sys.argv[1:]))"
        options = ["--device", "cpu", "--sizes", "sizes.toml", "--out", "out"]
        command = [sys.executable, "-c", WITHOUT_COMPILER + code + start, *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
        assert (tmp_path / "out" / "report.json").exists(), done.stdout + done.stderr
        rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
        assert (tmp_path / "out" / "report.txt").read_text().count("\n") > len(rows)
        return done.returncode, done.stdout, rows

    return run


@pytest.mark.slow
def test_report(report):
    status, out, rows = report()
    assert status == 0, out
    kernels = {"second_moment", "projection", "insertion", "convolution", "rendering"}
    assert {row["kernel"] for row in rows} == kernels
    ours = [row for row in rows if row["way"] == "pyrewrite"]
    assert len(ours) == 11
    for row in ours:
        assert row["ratio"] == 1
        assert row["seconds"] > 0
        assert row["percent_of_floor"] > 0
    missing = {row["way"] for row in rows if "missing" in row}
    assert missing == {"cuBLAS syrk", "Triton symmetric product", "low-rank autograd in a CUDA graph"}
    for row in rows:  # the peers compute the same
        assert row.get("error", 0) < (1e-2 if row["kernel"] == "insertion" else 1e-5), row


@pytest.mark.slow
def test_a_wrong_kernel_is_told_and_not_timed(report):
    wrong = "import bench.projection as b; b.project_ = lambda w, base, d: w\n"
    status, _, rows = report(wrong)
    assert status == 1
    found = [row for row in rows if row["kernel"] == "projection" and row["size"].endswith("alone")]
    assert any(row.get("cache") == "wrong result" for row in found)
    assert not [row for row in rows if row.get("cache") == "wrong result" and "seconds" in row]
