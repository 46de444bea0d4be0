"""The code of docs/quantise.md runs as it stands, from top to bottom, and its table holds."""

import re
from pathlib import Path

import pytest
import torch

import rfkernels
from rfkernels.nn import QuantLinear
from rfkernels.quantization import quantize_weight

pytest.importorskip("diffusers")
DOC = (Path(__file__).parents[2] / "docs/quantise.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


def test_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in CODE:
        exec(code, names)


def test_every_format_has_its_row():
    rows = re.findall(r"^\| `\"(.+?)\"` \|", DOC, re.MULTILINE)
    assert rows == list(rfkernels.nn.FORMATS)


def relative_error(format, outliers, **options):
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(256, 1024, generator=g), torch.randn(256, 1024, generator=g)
    if outliers:
        x[:, torch.randperm(1024, generator=g)[:8]] *= 20
    y = x @ w.T
    return ((QuantLinear(format, **quantize_weight(w, format, **options))(x) - y).norm() / y.norm()).item()


@pytest.mark.parametrize(
    "format, options",
    [
        ("int8", [{}]),
        ("int8-convrot", [{}]),
        ("fp8", [{}, {"quantize_input": True}]),
        ("w4a16", [{}]),
        ("w4a8", [{}]),
        ("svdq-int4", [{}]),
    ],
)
def test_errors_of_the_table(format, options):
    row = re.search(rf"^\| `\"{format}\"` .*", DOC, re.MULTILINE)[0].split("|")
    for cell, outliers in ((row[5], False), (row[6], True)):
        for text, chosen in zip(cell.split(";"), options, strict=True):
            if "%" in text:
                written = float(text.replace("%", "")) / 100
                assert relative_error(format, outliers, **chosen) == pytest.approx(written, rel=0.1)
