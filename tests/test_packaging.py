"""The source distribution and the wheel: complete, built in an empty folder without torch and without the network.

The build requirements are downloaded once; from there on pip and uv are given that folder and no index, and proxies
that lead nowhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyrewrite
from pyrewrite.interface import module

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = (".ci/", ".gitignore")  # of the files that git tracks
NOWHERE = "http://127.0.0.1:9"  # no proxy listens there


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files that git tracks and that are there."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict[str, str]:
    """An environment in which pip and uv find the build requirements in a folder and nothing else anywhere."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*download, *requirements], capture_output=True, text=True, timeout=170)
    if done.returncode:
        pytest.skip(f"the build requirements cannot be downloaded: {done.stderr.strip()[-200:]}")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "PYREWRITE_", "PYTHON"))}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), NOWHERE)
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_RETRIES": "0"}
    uv = {"UV_OFFLINE": "1", "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(folder), "UV_NO_CONFIG": "1"}
    return {**kept, **proxies, **pip, **uv, "PYREWRITE_CUDA": "OFF"}


@pytest.fixture(scope="module")
def sdist(tracked, offline, tmp_path_factory) -> Path:
    """Built from a copy of what git tracks: a file that only lies about cannot help."""
    source, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, source, cwd=out, env=offline)
    return next(out.glob("pyrewrite-*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The sdist's contents, alone in a folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked, offline, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, unpacked, cwd=out, env=offline)
    return next(out.glob("pyrewrite-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel in a folder of its own; torch and the rest are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    run(sys.executable, *command, cwd=folder)
    return folder


@pytest.mark.slow
def test_sdist_holds_what_git_tracks(sdist, tracked):
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert [name for name in tracked if name not in inside and not name.startswith(NOT_SHIPPED)] == []
    assert not [name for name in inside if name.endswith((".so", ".pyc")) or name.startswith("build/")]


@pytest.mark.slow
def test_wheel_is_whole(wheel, tracked):
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert [name for name in tracked if name.startswith("pyrewrite/") and name not in inside] == []
    assert {"pyrewrite/py.typed", "pyrewrite/_C.pyi"} <= inside
    front = {f"pyrewrite/interface/front/{name}" for name in ("index.html", *module.PARTS, *module.STYLES)}
    assert front <= inside, "the interface would be blank"
    assert len([name for name in inside if name.startswith("pyrewrite/_C.") and name.endswith((".so", ".pyd"))]) == 1
    assert not [name for name in inside if not name.startswith(("pyrewrite/", "pyrewrite-"))]


@pytest.mark.slow
def test_installed_wheel_runs(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "error"}
    out = run(sys.executable, "-m", "pyrewrite", cwd=tmp_path, env=env)
    assert f"pyrewrite {pyrewrite.__version__}" in out
    assert "this build holds no CUDA kernels" in out
    code = "import pyrewrite, pyrewrite._C as c; print(pyrewrite.__file__, c.__file__, c.build_info()['cuda'])"
    package, binary, cuda = run(sys.executable, "-c", code, cwd=tmp_path, env=env).split()
    assert Path(package).is_relative_to(installed)
    assert Path(binary).is_relative_to(installed)
    assert cuda == "False"
    script = installed / "bin" / "pyrewrite"
    info = run(sys.executable, script, "info", "peeps", cwd=tmp_path, env={**env, "PYREWRITE_CACHE": str(tmp_path)})
    assert "layer6" in info


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_builds_the_same_wheel(unpacked, wheel, offline, tmp_path):
    run(
        "uv", "build", "--wheel", "--python", sys.executable, "--out-dir", tmp_path, unpacked, cwd=tmp_path, env=offline
    )
    with zipfile.ZipFile(next(tmp_path.glob("pyrewrite-*.whl"))) as ours, zipfile.ZipFile(wheel) as theirs:
        assert set(ours.namelist()) == set(theirs.namelist())
