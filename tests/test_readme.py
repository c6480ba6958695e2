"""README's tables are the measured numbers in results/, and its Python is at least Python."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not (ROOT / "examples").exists(), reason="needs the checkout")
def test_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tables

    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme) == readme
    assert readme.count("<!-- table:") == len(tables.TABLES)
    sys.modules.pop("tables")


def test_code_blocks_parse():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) > 3
    for block in blocks:
        ast.parse(block)
