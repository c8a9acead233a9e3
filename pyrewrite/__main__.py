"""`python -m pyrewrite`: what was built, what this machine offers, and which implementation each op takes.

With arguments it is the command line, for launchers that start modules: `torchrun ... -m pyrewrite stats ...`.
"""

from __future__ import annotations

import platform
import re
import sys
from types import ModuleType

from ._version import __version__


def main() -> None:
    """Print the diagnosis. It works without the binary module, and then says why that is missing."""
    print(f"pyrewrite {__version__}, Python {platform.python_version()}, {platform.machine()}")
    try:
        import torch
    except ImportError as error:
        print(f"torch is missing or cannot be loaded ({error}); pip install 'torch>=2.10'")
        sys.exit(1)
    from .ops._library import OPERATORS, MissingKernelError, cuda_report, native

    print(f"torch {torch.__version__}, CUDA in torch: {torch.version.cuda or 'none'}")
    try:
        module = native("pyrewrite")
    except MissingKernelError as error:
        print(error)
    else:
        built = ", ".join(f"{name} {value}" for name, value in module.build_info().items())
        print(f"pyrewrite._C {module.version()}: {built}")
        print(f"processor kernels: {module.cpu_isa()}")
        if families := moment_families(module):  # none without CUDA, or with nothing but PTX
            print(f"second_moment_ on a GPU of {families}")
    report = cuda_report()
    if report["problem"]:
        print(f"CUDA kernels cannot run: {report['problem']}")
    for device in report["devices"]:
        print(f"CUDA device: {device}")
    for operator in OPERATORS.values():
        on_cuda = "CUDA kernel" if operator.cuda and report["devices"] else "torch"
        on_cpu = "C++ kernel" if operator.cpu else "torch"
        print(f"{operator.name}: on the processor {on_cpu}, on a GPU {on_cuda}")


def moment_families(module: ModuleType) -> str:
    """Which of the second moment's kernels (csrc/second_moment) each compiled architecture takes by rule."""
    found = []
    # "90a-real 100-real 120": the last digit is the minor number; 9.0 takes its own kernels where 90a was compiled.
    compiled = module.build_info().get("cuda_architectures", "")
    for major, minor, own in re.findall(r"\b(\d+)(\d)(a?)(?:-real)?(?![\w-])", compiled):
        sm90 = (major, minor, own) == ("9", "0", "a")
        fp32, tf32 = (module.second_moment_family(int(major), int(minor), sm90, 0, precision) for precision in (0, 1))
        found.append(f"{major}.{minor}: {fp32}" + ("" if fp32 == tf32 else f" (tf32 and 16-bit input: {tf32})"))
    return ", ".join(found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from .cli import main as command_line

        command_line(prog_name="python -m pyrewrite")
    main()
