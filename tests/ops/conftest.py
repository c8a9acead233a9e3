"""Counting the traffic of kernels, where the CUDA runtime can."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def launches(tmp_path: Path) -> Callable[..., list[dict]]:
    """Runs a script in a process of its own and returns what each of its launches did.

    A GPU's runtime counts nothing. One that runs kernels on the processor (tests/conftest.py) can append a line a
    launch to a file.
    """
    try:
        ctypes.CDLL("libcudart.so.13").emu_register_range  # noqa: B018
    except (OSError, AttributeError):
        pytest.skip("this CUDA runtime counts no traffic")

    def run(script: str, *arguments: object) -> list[dict]:
        report = tmp_path / "report"
        report.unlink(missing_ok=True)
        # Whatever a run around this one asks of the runtime (checks, models of arithmetic), only the device stays.
        env = {name: value for name, value in os.environ.items() if not name.startswith("EMU_") or name == "EMU_DEVICE"}
        env |= {"EMU_COUNTERS": "1", "EMU_REPORT": str(report)}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        subprocess.run(command, check=True, cwd=tmp_path, env=env, capture_output=True, timeout=120)
        return [json.loads(line) for line in report.read_text().splitlines()]

    return run
