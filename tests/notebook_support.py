"""Notebooks in tests: folders of their own, so that nothing of this person's Jupyter is read or written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KERNEL = "pyrewrite-tests"  # this very Python
QUIET = {  # else JupyterLab asks at its first start whether it may fetch news
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}


def shared_data() -> Path:
    """share/jupyter of the installation that holds JupyterLab and the widget's part of it."""
    files = importlib.metadata.files("anywidget") or []
    found = [Path(file.locate()).resolve() for file in files if "labextensions/anywidget" in file.as_posix()]
    assert found, "anywidget is installed without its JupyterLab extension"
    return next(parent for parent in found[0].parents if parent.name == "jupyter")


def environment(folder: Path) -> dict[str, str]:
    """Variables that keep Jupyter and pyrewrite in `folder`, where the kernel KERNEL is made."""
    for name, content in QUIET.items():
        path = folder / "config" / "lab" / "user-settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    spec = folder / "data" / "kernels" / KERNEL / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": KERNEL, "language": "python"}))
    return {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_PATH": str(shared_data()),
        "JUPYTER_PLATFORM_DIRS": "1",  # what Jupyter itself will do one day; it warns where nothing is said
        "IPYTHONDIR": str(folder / "ipython"),
        "PYREWRITE_CACHE": str(folder / "cache"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


@contextmanager
def jupyterlab(folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A JupyterLab of its own on the notebooks of `folder`: its address, which ends with a slash, and its token."""
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser"),
        *("--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={folder}", "--ServerApp.terminals_enabled=False"),
        f"--LabApp.app_dir={shared_data() / 'lab'}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        *(["--allow-root"] if os.geteuid() == 0 else []),
    ]
    log = folder.parent / "jupyterlab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline, told = time.monotonic() + 60, []
        while not told:  # the server writes down where it is once it listens
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
            told = list(Path(environment["JUPYTER_RUNTIME_DIR"]).glob(f"jpserver-{server.pid}.json"))
            told = [path for path in told if path.read_text().rstrip().endswith("}")]
        said = json.loads(told[0].read_text())
        yield said["url"], said["token"]
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
