"""The code of docs/files.md runs as it stands, and its table has every family."""

import re
from pathlib import Path

import pytest
import torch

from rfkernels.formats import load
from rfkernels.formats.configs import CLASSES
from rfkernels.formats.detect import PREFIXES, detect
from rfkernels.nn import QuantLinear
from tests.pages import run_page

pytest.importorskip("diffusers")
DOC = (Path(__file__).parents[2] / "docs/files.md").read_text()


def test_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    page = run_page(DOC)
    state = page.model.state_dict()
    assert all(torch.equal(page.again.state_dict()[name], tensor) for name, tensor in state.items())
    back = load(page.FluxTransformer2DModel(**page.small).half(), tmp_path / "back.safetensors")
    assert all(torch.equal(back.state_dict()[name], tensor.half()) for name, tensor in state.items())
    assert sum(isinstance(module, QuantLinear) for module in page.quantised.modules()) > 10
    assert detect(tmp_path / "out.safetensors").naming == "original"
    out = capsys.readouterr()
    assert "model     flux" in out.out and out.err.count("missing.safetensors") == 1


def test_every_family_and_prefix_is_there():
    rows = re.findall(
        r"^\| (`.*?) \|.*\|.*\|$", DOC.partition("## Which")[2].partition("## Other")[0], re.MULTILINE
    )
    assert set(re.findall(r"`([\w-]+)`", "".join(rows))) == set(CLASSES)
    assert all(f"`{prefix}`" in DOC for prefix in PREFIXES)
