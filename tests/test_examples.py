"""The example notebook from a fresh kernel: it runs, its numbers hold, and it is stored without outputs."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="notebooks are run by nbclient: pip install 'pyrewrite[test]'")
pytest.importorskip("ipykernel", reason="notebooks need a kernel: pip install 'pyrewrite[test]'")
pytest.importorskip("anywidget", reason="the widget needs anywidget: pip install 'pyrewrite[ui]'")

import nbclient
import nbformat
import notebook_support
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "rewriting.ipynb"


def test_it_is_stored_without_outputs_and_names_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert NOTEBOOK.stat().st_size < 20_000


@pytest.mark.slow
def test_it_runs_from_a_fresh_kernel(tmp_path, monkeypatch):
    for name, value in notebook_support.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    client = nbclient.NotebookClient(
        notebook, timeout=170, kernel_name=notebook_support.KERNEL, resources={"metadata": {"path": str(folder)}}
    )
    with warnings.catch_warnings():
        # What Jupyter's own client does with asyncio is not ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        client.execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [o for o in outputs if o.output_type == "stream" and o.name == "stderr"] == []  # no warning, no noise
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(o.data["image/png"])))
        for o in outputs
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 4
    assert all(picture.width > 900 for picture in pictures)
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    wear = int(re.search(r"(\d+)% of 24 wear a hat", said)[1])
    assert wear >= 90
    assert (folder / "beanie.safetensors").stat().st_size < 1_000_000
    assert sorted(p.name for p in folder.iterdir()) == ["beanie.safetensors"]

    # The widget is the last output, and what would be stored of it holds no picture.
    assert "application/vnd.jupyter.widget-view+json" in outputs[-1].data
    assert ".serve()" in outputs[-1].data["text/plain"]
    state = json.dumps(notebook.metadata.get("widgets", {}))
    assert "AnyModel" in state
    assert "data:image" not in state
    assert len(state) < 250_000
