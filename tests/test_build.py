"""The binary module: of this release, without torch in it, and explained by `python -m pyrewrite`.

Every process runs in an empty folder: beside the sources, `-c` and `-m` would import those, not what is installed.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pyrewrite
from pyrewrite import _C
from pyrewrite.__main__ import moment_families
from pyrewrite.ops import _library


def test_versions_agree():
    assert _C.version() == pyrewrite.__version__


def test_no_torch_symbol_in_the_binary():
    data = Path(_C.__file__).read_bytes()
    # "libtorch_cpu.so" alone is there: parallel.cpp asks a torch that is loaded already for its threads.
    for name in (b"libc10", b"at::Tensor", b"_ZN2at", b"_ZN3c10"):
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


def test_diagnosis_names_the_kernels_of_each_architecture():
    class Module:
        @staticmethod
        def build_info():
            return {"cuda_architectures": "86-real 90a-real 90 120 120-virtual"}

        @staticmethod
        def second_moment_family(major, minor, sm90, dtype, precision):
            return f"k{major}{minor}{sm90:d}" if precision or major == 9 else "plain"

    text = "8.6: plain (tf32 and 16-bit input: k860), 9.0: k901, 9.0: k900, 12.0: plain (tf32 and 16-bit input: k1200)"
    assert moment_families(Module) == text


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="a build without CUDA kernels")
@pytest.mark.parametrize(
    ("architecture", "fp32", "tf32"),
    [
        ((7, 5, False), "simt", "simt"),
        ((8, 0, False), "sm80", "sm80"),
        ((8, 9, False), "simt", "sm80"),
        ((9, 0, True), "sm90", "sm90"),
        ((9, 0, False), "sm80", "sm80"),
        ((10, 0, False), "sm80", "sm80"),
        ((12, 0, False), "simt", "sm80"),
    ],
)
def test_kernels_of_an_architecture(architecture, fp32, tf32):
    assert _C.second_moment_family(*architecture, 0, 0) == fp32
    assert _C.second_moment_family(*architecture, 0, 1) == tf32
    assert _C.second_moment_family(*architecture, 2, 0) == tf32  # 16-bit input


def test_diagnosis_without_the_binary(tmp_path):
    code = "import sys, runpy; sys.modules['pyrewrite._C'] = None; runpy.run_module('pyrewrite', run_name='__main__')"
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "the binary module pyrewrite._C is missing" in out.stdout


def test_a_source_folder_before_the_installed_package_is_named(tmp_path):
    """`pip install .` and then Python in the clone: it finds the sources, which have no binary."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "assets")
    for place in ("clone", "site"):
        shutil.copytree(Path(pyrewrite.__file__).parent, tmp_path / place / "pyrewrite", ignore=ignored)
    metadata = tmp_path / "site" / "pyrewrite-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: pyrewrite\nVersion: 0.1.0\n")
    code = "import sys; sys.modules['pyrewrite._C'] = None; "  # an editable install's hook would find it
    code += "import pyrewrite.ops._library as l; print(l.native_problem())"
    path = os.pathsep.join(str(tmp_path / place) for place in ("clone", "site"))
    env = {**os.environ, "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert f"and not the pyrewrite installed in {tmp_path / 'site' / 'pyrewrite'}" in out.stdout, out.stderr


def test_an_op_without_the_binary_says_what_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['pyrewrite._C'] = None\n"
        "import torch; from pyrewrite.ops import second_moment_, MissingKernelError\n"
        "try: second_moment_(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, 2), impl='cpu')\n"
        "except MissingKernelError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_two_releases_that_meet_are_named(monkeypatch):
    monkeypatch.setattr(_library, "__version__", "0.0.1")
    module, problem = _library._load.__wrapped__()
    assert module is None
    assert f"the Python files are pyrewrite 0.0.1 and the binary module is {_C.version()}" in problem
    assert _C.__file__ in problem


def test_import_under_strict_warnings(tmp_path):
    code = "import pyrewrite, pyrewrite.ops, pyrewrite._C"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has its global lock: nothing to see"
)
def test_import_leaves_the_global_lock_off(tmp_path):
    code = "import sys, pyrewrite._C; raise SystemExit(sys._is_gil_enabled())"
    subprocess.run([sys.executable, "-X", "gil=0", "-W", "error", "-c", code], check=True, cwd=tmp_path)


def test_import_needs_nothing_of_the_interface(tmp_path):
    """Neither the package nor a session imports what only `pip install 'pyrewrite[ui]'` brings."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(('tornado', 'anywidget', 'ipywidgets')))\n"
    code = hidden + "import pyrewrite, pyrewrite.cli, pyrewrite.interface; print(pyrewrite.interface.Session.__name__)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)


def elf(*options: str) -> str:
    readelf = shutil.which("readelf")
    if readelf is None or sys.platform != "linux":
        pytest.skip("no readelf here")
    return subprocess.run([readelf, *options, _C.__file__], check=True, capture_output=True, text=True).stdout


def test_libraries_that_the_binary_needs():
    """The C and C++ libraries, and the CUDA runtime only where it was asked to be shared."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", elf("--dynamic", "--wide"))
    allowed = r"(libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|librt|ld-linux.*)\.so.*"
    if _C.build_info().get("cuda_runtime") == "shared":
        allowed += r"|libcudart\.so.*"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_symbols_that_the_binary_shows_and_wants():
    lines = [line.split() for line in elf("--dyn-syms", "--wide").splitlines() if re.match(r"\s*\d+:", line)]
    names = {line[7].partition("@")[0]: line[6] for line in lines if len(line) > 7}
    assert not [name for name in names if re.search(r"torch|N2at|N3c10|c10", name)]
    shown = {name for name, section in names.items() if section != "UND"}
    assert "PyInit__C" in shown
    assert not [name for name in shown if name.startswith("cuda")], "the static runtime must stay inside"


def declared() -> dict[str, list[str]]:
    """Names in the stub with their arguments, `Class.__init__` for a class."""
    tree = ast.parse(Path(pyrewrite.__file__).with_name("_C.pyi").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = [a.arg for f in node.body if isinstance(f, ast.FunctionDef) for a in f.args.args][1:]
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = [a.arg for a in node.args.args]
    return found


def test_stub_holds_what_the_binary_holds():
    stub = declared()
    real = {name for name in dir(_C) if not name.startswith("__")}
    missing = set(stub) - real
    assert real <= set(stub)
    if _C.build_info()["cuda"]:
        assert not missing
    assert all(re.search("cuda|_workspace$|_family$", name) for name in missing)
    for name in real:
        thing = getattr(_C, name)
        text = (thing.__init__ if isinstance(thing, type) else thing).__doc__.splitlines()[0]
        arguments = [a for a in re.findall(r"[(,] ?(\w+): ", text) if a != "self"]
        assert arguments == stub[name], text
