"""For which GPUs a build compiles its kernels: cmake/architectures.cmake, asked as the build asks it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "cmake" / "architectures.cmake"
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="no cmake"),
    pytest.mark.skipif(not SCRIPT.is_file(), reason="not beside the sources"),
]


def ask(call: str, folder: Path, path: str = os.environ.get("PATH", "")) -> subprocess.CompletedProcess:
    """What the variable `list` holds after a call of the script's functions, one entry a line."""
    script = folder / "ask.cmake"
    script.write_text(f'include("{SCRIPT}")\n{call}\nforeach(one ${{list}})\nmessage("= ${{one}}")\nendforeach()\n')
    return subprocess.run(
        [CMAKE, "-P", str(script)], capture_output=True, text=True, cwd=folder, env={**os.environ, "PATH": path}
    )


def entries(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return re.findall(r"^= (.*)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("75 80 86 87 89 90 100 103 110 120 121", "75-real 80-real 86-real 89-real 90a-real 100-real 120"),
        # PTX of 90a runs on no later GPU.
        ("50 75 80 86 87 89 90", "75-real 80-real 86-real 89-real 90a-real 90-virtual"),
        ("75 80 86 89", "75-real 80-real 86-real 89"),
    ],
)
def test_machine_code_for_all_and_ptx_that_later_gpus_take(known, expected, tmp_path):
    answer = "".join(f"compute_{number}\\n" for number in known.split())
    assert entries(ask(f'architectures_of("{answer}" list)', tmp_path)) == expected.split()


def nvidia_smi(folder: Path, body: str) -> str:
    """A PATH on which such a program is the first nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return os.pathsep.join([str(folder), os.environ.get("PATH", "")])


def test_native_is_90a_on_hopper(tmp_path):
    path = nvidia_smi(tmp_path, "printf '9.0\\n8.0\\n9.0\\n12.0\\n'")
    assert entries(ask("architectures_here(list)", tmp_path, path)) == ["90a-real", "80-real", "120-real"]


@pytest.mark.parametrize("body", ["echo 'No devices were found'", "echo failed >&2; exit 9", ":", "echo '[N/A]'"])
def test_native_without_a_gpu_says_so(body, tmp_path):
    done = ask("architectures_here(list)", tmp_path, nvidia_smi(tmp_path, body))
    assert done.returncode != 0
    assert "nvidia-smi shows no GPU" in " ".join(done.stderr.split())
