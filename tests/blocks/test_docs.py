"""The code of docs/blocks.md is code that runs, and its numbers are counted."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import activations, embeddings, normalization
from diffusers.models.transformers import transformer_flux, transformer_wan

from rfkernels import ops
from tests.blocks import traffic

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/blocks.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


def lines_of(text: str) -> list[str]:
    """Lines of code without indentation and comments."""
    lines = (re.sub(r"(^|  )#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.splitlines()[0])
def test_code(code):
    origin, _, body = code.partition("\n")
    if origin == "# diffusers":
        modules = (activations, embeddings, normalization, transformer_flux, transformer_wan)
        theirs = {line for module in modules for line in lines_of(Path(module.__file__).read_text())}
        assert [line for line in lines_of(body) if line not in theirs] == []
    elif origin.startswith("# rfkernels/models/"):
        assert body in (ROOT / origin.removeprefix("# ")).read_text()
    else:
        torch.manual_seed(0)
        exec(code, {"torch": torch, "F": F, "ops": ops})


def test_traffic():
    assert traffic.table() in DOC


def test_passes():
    double = traffic.SIZES[0]
    tokens = 2 * (4096 + 512) * 3072  # bytes
    passes = [round(traffic.moved_bytes(double, side) / tokens) for side in (double.theirs, double.ours)]
    rows = re.findall(r"^\| (.+) \| (\d+) T \| (\d+) T \|$", DOC, re.MULTILINE)
    *regions, (name, *total) = [(name, int(theirs), int(ours)) for name, theirs, ours in rows]
    assert name == "sum" and total == passes
    assert [sum(column) for column in list(zip(*regions, strict=True))[1:]] == passes
