"""Every kernel against its peers in one process: `python -m bench.report --out DIR`.

For each size of sizes.toml the results are checked against float64 first, and then the ways of computing it take
turns. The table, the same as JSON, and where matplotlib is installed a roofline plot go to DIR. Exit status 1 where a
kernel of this package gave a wrong result, which is then not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import torch

import bench.convolution
import bench.insertion
import bench.projection
import bench.rendering
import bench.second_moment
import pyrewrite
from bench.core import Machine, measure, measure_machine
from pyrewrite.ops import _library

KERNELS = {
    "second_moment": bench.second_moment.case,
    "projection": bench.projection.case,
    "insertion": bench.insertion.case,
    "convolution": bench.convolution.case,
    "rendering": bench.rendering.case,
}
COLUMNS = ("way", "ms", "ratio", "GB/s", "TFLOP/s", "% of floor", "error")


def table(rows: list[dict]) -> str:
    """One block a size; `ratio` is the time over this package's."""
    lines, before = [], None
    for row in rows:
        head = (row["kernel"], row["size"], row["device"], row.get("cache", before[3] if before else ""))
        if head != before:
            lines += ["", f"{head[0]}: {head[1]} ({head[2]}; cache {head[3]})"]
            lines.append("  {:<42} {:>10} {:>8} {:>8} {:>9} {:>11} {:>9}".format(*COLUMNS))
            before = head
        if "missing" in row:
            lines.append(f"  {row['way']:<42} not here: {row['missing']}")
        elif "seconds" not in row:
            lines.append(f"  {row['way']:<42} error {row['error']:.1e}")
        else:
            lines.append(
                f"  {row['way']:<42} {row['seconds'] * 1e3:>10.3f} {row['ratio']:>8.2f} {row['gb_per_s']:>8.1f} "
                f"{row['tflop_per_s']:>9.3f} {row['percent_of_floor']:>11.1f} {row['error']:>9.1e}"
            )
    return "\n".join(lines) + "\n"


def bend_rate(machine: Machine, rate: float, intensity: float) -> float:
    """TFLOP/s that the machine allows at so many operations a byte."""
    return min(rate, machine.copy_rate * intensity) / 1e12


def plot(rows: list[dict], machines: list[Machine], path: Path) -> str:
    """A roofline of the timed rows. Returns why there is none, or nothing."""
    try:
        import matplotlib
    except ImportError:
        return "no roofline: matplotlib is not installed (pip install 'pyrewrite[bench]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(machines), figsize=(8 * len(machines), 6), squeeze=False)
    for axis, machine in zip(axes[0], machines, strict=True):
        timed = [r for r in rows if r["device"] == machine.name and "seconds" in r and r["cache"] != "warm"]
        spread = [r["intensity"] for r in timed] or [1.0]
        x = [min(spread) / 4, max(spread) * 4]
        for rate in sorted(set(machine.flop_rates.values())):
            name = ", ".join(n for n, r in machine.flop_rates.items() if r == rate)
            corner = rate / machine.copy_rate
            bend = [x[0], *([corner] if x[0] < corner < x[1] else []), x[1]]
            axis.plot(bend, [bend_rate(machine, rate, i) for i in bend], color="grey", linewidth=0.8)
            axis.annotate(name, (x[1], bend_rate(machine, rate, x[1])), fontsize=7, ha="right", va="bottom")
        for ours in (True, False):
            chosen = [r for r in timed if (r["way"] == "pyrewrite") is ours]
            points = [r["intensity"] for r in chosen], [r["tflop_per_s"] for r in chosen]
            axis.scatter(*points, s=24 if ours else 8, label="pyrewrite" if ours else "others")
        axis.set(xscale="log", yscale="log", title=machine.name, xlabel="operations a byte", ylabel="TFLOP/s")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the results (default: report)")
    parser.add_argument("--device", choices=["cpu", "cuda"], action="append", help="default: all that are here")
    parser.add_argument("--kernel", choices=list(KERNELS), action="append", help="default: all")
    parser.add_argument("--sizes", type=Path, default=Path(__file__).with_name("sizes.toml"))
    options = parser.parse_args(arguments)
    sizes = tomllib.loads(options.sizes.read_text(encoding="utf-8"))
    devices = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    kernels = options.kernel or list(KERNELS)
    options.out.mkdir(parents=True, exist_ok=True)

    machines, rows, wrong = [], [], 0
    print(f"pyrewrite {pyrewrite.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for device in devices:
        machine = measure_machine(device)
        machines.append(machine)
        rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in machine.flop_rates.items())
        print(f"{machine.name}: copy {machine.copy_rate / 1e9:.1f} GB/s; TFLOP/s of products: {rates}", flush=True)
        for kernel in kernels:
            for size in sizes[device].get(kernel, []):
                found = measure(KERNELS[kernel](device, size), machine, sizes[device]["rounds"])
                wrong += found[0]["cache"] == "wrong result"
                rows += found
                print(table(found), end="", flush=True)
                torch.compiler.reset()  # the next size is compiled for itself
    note = plot(rows, machines, options.out / "roofline.png")
    if note:
        print(note)
    native = _library.native()
    about = {
        "pyrewrite": pyrewrite.__version__,
        "build": native.build_info(),
        "processor kernels": native.cpu_isa(),
        "torch": torch.__version__,
        "machines": [vars(m) for m in machines],
    }
    (options.out / "report.json").write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")
    (options.out / "report.txt").write_text(table(rows), encoding="utf-8")
    print(f"{options.out}/report.txt, report.json" + ("" if note else ", roofline.png"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
