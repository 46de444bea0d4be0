"""What the README says of the ops is true."""

import re
from pathlib import Path

import pytest

from rfkernels import ops

README = Path(__file__).parents[1] / "README.md"


def test_readme_lists_every_op():
    listed = re.findall(r"^\| \[`(\w+)`\]\((csrc/\w+)\)", README.read_text(), re.M)
    assert {name for name, _ in listed} == {op for op in ops.OPS if not op.endswith("_backward")}
    assert all((README.parent / room / "README.md").exists() for _, room in listed)


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if "://" not in target and not (README.parent / target).exists():
            pytest.fail(f"README links to {target}, which is not there")
