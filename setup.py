"""Builds pyrewrite._C with CMake. Everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Handed on to CMake when set, so that `PYREWRITE_CUDA=OFF pip install .` and `cmake -DPYREWRITE_CUDA=OFF` mean the
# same.
OPTIONS = ("PYREWRITE_CUDA", "PYREWRITE_CUDA_ARCHITECTURES", "PYREWRITE_CUDA_RUNTIME")
BYTES_PER_JOB = 2 << 30  # a compiler of ours peaks well below this


def tool(name: str) -> str:
    """Path of `name`, first beside the running Python (an isolated build keeps its tools there), then on PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise RuntimeError(f"building pyrewrite needs `{name}`, and there is none on PATH (pip install {name})")
    return found


def build_jobs() -> int:
    """Parallel compilers: what the caller asks for, else one a core, and no more than memory holds."""
    for variable in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"):
        if os.environ.get(variable):
            return max(1, int(os.environ[variable]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every platform tells
        return min(cores, 4)
    return max(1, min(cores, memory // BYTES_PER_JOB))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        wanted = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install keeps its objects between builds and its module in the source folder, so that
        # `cmake --build build/editable-...` is enough after a change. Anything else starts from nothing.
        editable = bool(self.inplace or self.editable_mode)
        if editable:
            folder = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
            target = ROOT / "pyrewrite" / wanted.name
        else:
            folder = Path(self.build_temp).resolve() / "cmake"
            target = wanted
        folder.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYREWRITE_MODULE={target}",
            *(f"-D{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)),
        ]  # fmt: skip
        if not editable:
            configure.append("--fresh")
        jobs = build_jobs()
        print(f"pyrewrite: building {target.name} with CMake, {jobs} job(s), in {folder}", flush=True)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel", str(jobs)], check=True)
        if target != wanted:  # setuptools looks for it there
            wanted.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, wanted)


setup(ext_modules=[Extension("pyrewrite._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
