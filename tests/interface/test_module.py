"""The one module of both hosts: the parts in order, without their imports, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from pyrewrite.interface import module

A = ("a.js", "export const one = 1;\nexport function two() {}\n")


def test_parts_are_joined_in_order_without_their_imports():
    b = ("b.js", 'import { one, two } from "./a.js";\n\nexport class Three {}\nexport default one;\n')
    text = module.join([A, b])
    assert "import" not in text
    assert text.index("const one") < text.index("class Three") < text.index("export default one;")
    assert module.join([]) == ""


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("b.js", 'import { one } from "./a.js";\n'), A], "b.js imports one from a.js, which does not"),  # too late
        ([A, ("b.js", 'import { three } from "./a.js";\n')], "b.js imports three from a.js"),
        ([A, ("b.js", 'import { one } from "./c.js";\n')], "b.js imports one from c.js"),
        ([A, ("b.js", 'import * as a from "./a.js";\n')], "b.js: expected imports such as"),
        ([A, ("b.js", "import {\n  one,\n} from './a.js';\n")], "b.js: expected imports such as"),
        ([A, ("b.js", "export const two = 2;\n")], "b.js and a.js both export two"),
    ],
)
def test_what_would_break_in_the_browser_is_refused(parts, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        module.join(parts)


def test_every_file_of_the_front_end_is_in_it():
    assert sorted(os.listdir(module.FRONT)) == sorted(["index.html", *module.PARTS, *module.STYLES])
    assert module.module().count("export default") == 1


@pytest.mark.parametrize("name", module.PARTS[:-1])
def test_a_part_names_all_that_it_uses(name):
    """The joined module would hide a missing import; a reader of one file would miss it."""
    text = module.read(name)
    used = re.sub(r'^import.*$|//.*$|/\*[^/]*\*/|"[^"\n]*"', "", text, flags=re.MULTILINE)
    imported = {n for names in re.findall(r"^import \{ ([\w, ]+) \}", text, re.MULTILINE) for n in names.split(", ")}
    for other in module.PARTS:
        for export in re.findall(r"^export (?:async function|function|class) (\w+)", module.read(other), re.MULTILINE):
            if other != name and re.search(rf"(?<![\w.]){export}\(", used):
                assert export in imported, (other, export)
    for export in imported:
        assert re.search(rf"\b{export}\b", re.sub(r"^import.*$", "", text, flags=re.MULTILINE)), f"{export} is not used"


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_it_is_a_module(tmp_path):
    file = tmp_path / "pyrewrite.mjs"
    file.write_text(module.module())
    done = subprocess.run(["node", "--check", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
