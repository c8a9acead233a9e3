"""What the compiler made of the CUDA kernels in the built binary: no register spilled to memory, and the instructions
they were written for. It needs cuobjdump and nvdisasm (from the CUDA toolkit, or as the `test` extra brings them), but
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

from pyrewrite import _C

# Machine code in the binary, such as 90a.
ARCHITECTURES = [
    name.removesuffix("-real")
    for name in _C.build_info().get("cuda_architectures", "").split()
    if not name.endswith("-virtual")
]

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
    (r"loss_kernel|schedule_kernel|unit_kernel|telling_kernel", []),
]
# Copies element by element keep an address in local memory, outside the products; ptxas does not call it a spill.
LOCAL_MEMORY = r"sm80_moment.*AccessE2E"


def tool(name: str) -> str:
    """The path of a binary tool of the CUDA toolkit: a wheel's, or the toolkit's."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for found in Path(folder).glob(f"*/bin/{name}"):
            return str(found)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} (pip install nvidia-cuda-{name})")
    return found


def output(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, cwd=cwd).stdout


def expected_of(kernel: str) -> list[str]:
    found = next((wanted for pattern, wanted in EXPECTED if re.search(pattern, kernel)), None)
    assert found is not None, f"{kernel} stands in no line of EXPECTED"
    return found


@pytest.fixture(params=ARCHITECTURES or [pytest.param("", marks=pytest.mark.skip("the binary holds no machine code"))])
def resources(request) -> tuple[str, dict[str, dict[str, int]]]:
    """An architecture, and what each of its kernels takes: REG, STACK, SHARED, LOCAL (bytes but for the first)."""
    report = output(tool("cuobjdump"), "--dump-resource-usage", "-arch", f"sm_{request.param}", _C.__file__)
    found = re.findall(r"Function (\S+):\n(.*)", report)
    assert found
    return request.param, {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def test_no_register_is_spilled(resources):
    for name, takes in resources[1].items():
        expected_of(name)
        assert takes["STACK"] <= (8 if re.search(LOCAL_MEMORY, name) else 0), name
        assert takes["LOCAL"] == 0, name


def test_the_code_tells_what_it_was_compiled_for(resources):
    """`code_here` reads it from the shared memory of two kernels, less what the system reserves in both."""
    architecture, kernels = resources
    telling, unit = (
        [t["SHARED"] for name, t in kernels.items() if kind in name] for kind in ("telling_kernel", "unit_kernel")
    )
    own = architecture.endswith("a")
    assert (telling[0] - unit[0]) / 128 == 2 * int(architecture.rstrip("a")) + own


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


@pytest.mark.skipif("90a" not in ARCHITECTURES, reason="the binary holds no machine code for 9.0a")
def test_instructions(tmp_path):
    output(tool("cuobjdump"), "-arch", "sm_90a", "-xelf", "all", _C.__file__, cwd=tmp_path)
    kernels: dict[str, Counter] = {}
    for cubin in tmp_path.iterdir():
        kernels |= instructions(output(tool("nvdisasm"), "-c", cubin))
    for pattern, _ in EXPECTED:
        assert [name for name in kernels if re.search(pattern, name)], f"no kernel is {pattern}"
    for name, counts in kernels.items():
        for pattern in expected_of(name):
            assert any(re.fullmatch(pattern, one) for one in counts), f"{name} has no {pattern}: {sorted(counts)}"
        if not re.search(LOCAL_MEMORY, name):
            assert not [one for one in counts if one.startswith(("LDL", "STL"))], name
        if "sm90_moment" in name:
            # Fences of the whole GPU: at both ends; none before products.
            assert counts["MEMBAR.ALL.GPU"] <= 2
        if "unfolded_kernel" in name:
            assert counts["MEMBAR.ALL.GPU"] <= 2  # at both ends, none in a step
