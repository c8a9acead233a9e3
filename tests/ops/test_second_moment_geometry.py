"""The arithmetic behind the second moment's CUDA kernels: who computes what, where things lie, and how large the error
of their sums is. No GPU is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_geometry(tmp_path):
    program = tmp_path / "geometry"
    source = ROOT / "tests" / "ops" / "second_moment_geometry.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def rounded(x: np.ndarray) -> np.ndarray:
    """To TF32's 10 fraction bits, ties away from zero, as the kernels do it."""
    bits = (x.astype(np.float32).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def half(x: np.ndarray) -> np.ndarray:
    """To a half number, as csrc/second_moment/sm90.cuh does it after it has scaled the channel."""
    return x.astype(np.float16).astype(np.float64)


def to_float32(x: np.ndarray, cut: bool) -> np.ndarray:
    near = x.astype(np.float32)
    if cut:
        over = np.abs(near.astype(np.float64)) > np.abs(x)
        near[over] = np.nextafter(near[over], np.float32(0))
    return near.astype(np.float64)


def tensor_core_sum(
    x: np.ndarray, y: np.ndarray, split: bool, chain: int, total: int, cut: bool, halves: bool
) -> float:
    """sum of x y as csrc/second_moment/sm80.cuh makes it from instructions of 8 rows, or sm90.cuh (`halves`) from those
    of 16: `chain` rows in an accumulator, `total` rows in float32.
    """
    rows, part = (16, half) if halves else (8, rounded)
    if halves:  # the largest value to 128 ... 256
        scale = [2.0 ** (7 - np.floor(np.log2(v.max()))) for v in (x, y)]
        scaled = [v.astype(np.float64) * s for v, s in zip((x, y), scale, strict=True)]
    else:
        scale, scaled = [1.0, 1.0], [x, y]
    high = [part(v).reshape(-1, chain // rows, rows) for v in scaled]
    low = [part(v - part(v)).reshape(-1, chain // rows, rows) for v in scaled]
    sums = np.zeros(high[0].shape[0])
    if split:
        for step in range(chain // rows):
            sums = to_float32(sums + (high[0] * low[1])[:, step].sum(1), cut)
            sums = to_float32(sums + (low[0] * high[1])[:, step].sum(1), cut)
    for step in range(chain // rows):
        sums = to_float32(sums + (high[0] * high[1])[:, step].sum(1), cut)
    sums = sums.reshape(-1, total // chain)
    totals = np.zeros(sums.shape[0])
    for step in range(sums.shape[1]):
        totals = to_float32(totals + sums[:, step], cut=False)
    return totals.sum() / (scale[0] * scale[1])


@pytest.mark.parametrize("cut", [False, True], ids=["rounded", "cut"])
@pytest.mark.parametrize(
    ("split", "chain", "total", "bound", "halves"),
    [
        (True, 32, 8192, 3e-7, False),
        (False, 256, 8192, 3e-6, False),
        (True, 32, 8192, 3e-7, True),
        (False, 64, 8192, 3e-6, True),
    ],
    ids=["fp32", "tf32", "fp32 of halves", "tf32 of halves"],
)
def test_error_of_two_million_rows(split, chain, total, bound, halves, cut):
    """Values that are never negative: nothing cancels, so every cut sum errs in the same direction."""
    random = np.random.default_rng(0)
    columns = [random.random(1 << 21, np.float32), np.maximum(random.standard_normal(1 << 21, np.float32), 0)]
    for x, y in ((columns[0], columns[0]), (columns[0], columns[1]), (columns[1], columns[1])):
        truth = (x.astype(np.float64) * y).sum()
        assert abs(tensor_core_sum(x, y, split, chain, total, cut, halves) / truth - 1) < bound
