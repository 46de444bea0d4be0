"""The code of docs/objectives.md runs as it stands, from top to bottom, and gives what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rfkernels import objectives, ops
from tests.pages import run_page

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text()


@pytest.fixture(scope="module")
def names(page):
    """What the page has made when it ends."""
    return run_page(page)


def test_the_page_runs(names):
    for loss in (names.loss, names.per_frame, names.reflow, names.grpo.loss):
        assert loss.shape == () and loss.isfinite() and loss > -10
    assert names.levels.shape == (2, 5) and names.noisy.shape == names.frames.shape
    assert all(p.grad.isfinite().all() for p in names.model.parameters())
    assert names.v.grad.any() and not names.grpo.clipped


def test_levels_of_frames_are_those_of_the_page(names):
    sigma = names.levels[:, None, :, None, None]
    noise = (names.noisy - (1 - sigma) * names.frames) / sigma
    torch.testing.assert_close(noise - names.frames, names.frames_target.double(), rtol=1e-3, atol=1e-3)


def test_everything_public_is_on_the_page(page):
    for name in objectives.__all__:
        if name not in ("Density", "Path", "Chain", "PolicyLoss", "policy_loss", "dpo_logits", "bump_table"):
            assert re.search(rf"\b{name}\b", page), name
    for name in re.findall(r"`ops\.(\w+)`", page):
        assert hasattr(ops, name), name
    for name in re.findall(r"^\| `(\w+)", page, re.MULTILINE):
        assert name == "ops" or hasattr(objectives, name), name


def test_sampling_does_not_import_it():
    code = (
        "import sys, rfkernels.samplers, rfkernels.pipeline; assert 'rfkernels.objectives' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
