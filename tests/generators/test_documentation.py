"""The code of docs/generators.md runs as it stands; the example of a family of one's own is in test_registering.py."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent.parent / "docs" / "generators.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_all_blocks_are_here():
    assert ["register_family" in block for block in BLOCKS] == [False, False, False, True]
    assert all(block.startswith("import ") for block in BLOCKS)


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")  # random weights
@pytest.mark.parametrize("number", range(3))
def test_code_runs(number, tmp_path, monkeypatch):
    block = BLOCKS[number]
    monkeypatch.setenv("PYREWRITE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = {}
    exec(compile(block.replace('"cuda"', '"cpu"'), str(DOCS), "exec"), found)
    if "model" in found:
        assert not torch.equal(found["out"], found["model"](found["batch"]))
    else:
        assert found["g"].image_size == 128
