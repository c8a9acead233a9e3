"""What the compiler makes of the CUDA kernels: no register spilled to memory, and the instructions they were written
for. It needs nvcc, and for the instructions nvdisasm (from the CUDA toolkit or `pip install nvidia-cuda-nvdisasm`), but
no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob("*/*.cu"))

# Kernels by a pattern of their mangled name: instructions that each must hold, as patterns of whole names. The first
# line that fits counts, and every kernel fits one.
EXPECTED = [
    # Projection: every weight in 128-bit accesses, the row through shared memory; Adam alone only streams.
    (r"contiguous14project_kernelILb1ELb0E", [r"LDG\.E\.128.*", r"STG\.E\.128.*"]),
    (r"contiguous14project_kernel", [r"LDG\.E\.128.*", r"STG\.E\.128.*", r"LDS\.128", r"STS\.128", r"SHFL\.BFLY"]),
    (r"strided14project_kernel", [r"FFMA.*"]),
    # Second moment: tensor cores behind asynchronous copies of 16 bytes, or, where elements lie apart, of 4 and fewer.
    (r"sm80_moment.*AccessE2E", [r"HMMA\..*", r"LDSM\..*"]),
    # On 9.0a: products of four warps (the size of HGMMA is written with a small x) behind boxes that are copied to
    # several blocks at once. float32: made half numbers in registers, the columns back to shared memory.
    (r"sm90_moment.*Boxes", [r"HGMMA\.64", r"UTMALDG\.3D\.MULTICAST", r"WARPGROUP\.ARRIVE"]),
    (
        r"sm90_moment.*Halves",
        [
            *[r"HGMMA\.64", r"UTMALDG\.3D\.MULTICAST", r"F2FP\.F16\..*", r"USETMAXREG\..*"],
            *[r"LDS\.64", r"LDS\.128", r"STS\.64"],
        ],
    ),
    (r"peaks_kernel", [r"LDG\.E.*"]),
    (r"sm80_moment.*Float32Math", [r"HMMA\.1688\.F32\.TF32", r"LDGSTS\..*128.*", r"LDSM\..*|LDS\.128"]),
    (r"sm80_moment.*Tf32Math", [r"HMMA\.1688\.F32\.TF32", r"LDGSTS\..*128.*", r"LDSM\..*|LDS\.128"]),
    (r"sm80_moment.*HalfMath", [r"HMMA\.16816\.F32.*", r"LDGSTS\..*128.*", r"LDSM\..*"]),
    (r"simt_momentIf.*AccessE[01]E", [r"FFMA", r"LDG\.E\.128.*", r"LDS\.128"]),
    (r"simt_moment", [r"FFMA", r"LDS\.128"]),
    (r"reduce_kernel", [r"DADD|DFMA"]),
    # Insertion: products with many directions on tensor cores, with few on the float32 units out of shared memory.
    (r"cluster_kernel", [r"HMMA\.16816\.F32", r"LDSM\..*"]),
    (r"resident_kernel", [r"FFMA", r"LDS\.128"]),
    # Its sums go to other blocks by stores that count at a barrier (STAS), which need no fence of the GPU.
    (r"unfolded_kernel", [r"HMMA\.16816\.F32", r"HMMA\.1688\.F32", r"LDSM\..*", r"LDS\.128", r"STAS", r"F2FP\..*"]),
    (r"general_kernel", [r"FFMA"]),
    (r"cluster_maps_kernel", [r"LDG\.E.*"]),
    (r"loss_kernel|schedule_kernel|empty_kernel|telling_kernel", []),
]
# Copies element by element keep a few addresses in local memory, outside the products; ptxas calls none of it a spill.
LOCAL_MEMORY = r"sm80_moment.*AccessE2E"


def nvdisasm() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for found in Path(folder).glob("*/bin/nvdisasm"):
            return str(found)
    return shutil.which("nvdisasm")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a source once for an architecture: the object's path and the assembler's report."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    folder, done = tmp_path_factory.mktemp("cubin"), {}

    def compile_(source: str, architecture: str) -> tuple[Path, str]:
        if (source, architecture) not in done:
            cubin = folder / f"{source.replace('/', '-')}-{architecture}.cubin"
            command = ["nvcc", "-std=c++17", "-O3", "-DPYREWRITE_HAS_CUDA=1", "-I", str(ROOT / "csrc")]
            command += [f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", str(cubin), str(ROOT / source)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=170)
            assert result.returncode == 0, result.stderr
            done[source, architecture] = cubin, result.stderr
        return done[source, architecture]

    return compile_


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a", "100", "120"])
@pytest.mark.parametrize("source", SOURCES)
def test_no_register_is_spilled(source, architecture, compiled):
    _, report = compiled(source, architecture)
    kernels = report.count("Compiling entry function")
    stores = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    loads = [int(n) for n in re.findall(r"(\d+) bytes spill loads", report)]
    assert len(stores) == len(loads) >= kernels
    assert sum(stores) == sum(loads) == 0, report
    assert "__global__" not in (ROOT / source).read_text() or kernels


def instructions(listing: str) -> dict[str, Counter]:
    """How often each kernel holds each instruction."""
    found: dict[str, Counter] = {}
    kernel = None
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^\s,]+),", line):
            kernel = found.setdefault(section[1], Counter())
        elif kernel is not None and (one := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.]*)", line)):
            kernel[one[1]] += 1
    return found


@pytest.mark.slow
@pytest.mark.skipif(nvdisasm() is None, reason="there is no nvdisasm (pip install nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("source", SOURCES)
def test_instructions(source, compiled):
    cubin, report = compiled(source, "90a")
    listing = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = instructions(listing)
    assert len(kernels) >= report.count("Compiling entry function")
    for name, counts in kernels.items():
        expected = next((wanted for pattern, wanted in EXPECTED if re.search(pattern, name)), None)
        assert expected is not None, f"{name} stands in no line of EXPECTED"
        for pattern in expected:
            assert any(re.fullmatch(pattern, one) for one in counts), f"{name} has no {pattern}: {sorted(counts)}"
        if not re.search(LOCAL_MEMORY, name):
            assert not [one for one in counts if one.startswith(("LDL", "STL"))], name
        if "sm90_moment" in name:
            # Fences of the whole GPU: at both ends; none before products.
            assert counts["MEMBAR.ALL.GPU"] <= 2
        if "unfolded_kernel" in name:
            assert counts["MEMBAR.ALL.GPU"] <= 2  # at both ends, none in a step
