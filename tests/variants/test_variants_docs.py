"""The code of docs/variants.md runs as it stands, from top to bottom, and gives what the page says."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.pages import run_page

PAGE = Path(__file__).parents[2] / "docs" / "variants.md"
DOC = PAGE.read_text()
MODULES = re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE)


@pytest.fixture(scope="module")
def names():
    """What the page has made when it ends."""
    torch.manual_seed(0)
    return run_page(DOC)


def test_a_folded_camera_makes_the_same_video(names):
    assert names.video.shape == names.noise.shape
    torch.testing.assert_close(names.folded, names.video, rtol=1e-4, atol=1e-4)
    assert not hasattr(names.wan.blocks[0], "cam_encoder")


def test_positions_differ_and_the_branch_is_zero(names):
    assert names.released.shape == names.stacked.shape and not torch.equal(names.released, names.stacked)
    assert torch.equal(names.fused, names.h)


def test_connectors_are_silent_at_first_and_motion_is_not(names):
    assert names.shares == [i // 7 for i in range(42)]
    assert not torch.allclose(names.moved, names.still, atol=1e-3)


def test_shapes_of_the_trunk(names):
    assert names.data.shape == (2, 64, 32) and names.latents.shape == (2, 12, 32)


def test_positions_are_told_apart_by_the_factor(names):
    spread = lambda x: (x - x[:, :1]).abs().max()
    assert spread(names.before) < 1e-5 < 1e-2 < spread(names.after)


def test_the_edit_is_a_picture_and_samples_are_alone(names):
    assert names.edited.shape == names.picture.shape and names.edited.isfinite().all()
    rows = slice(0, 3 + 16)  # the first sample
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t[:, rows].transpose(1, 2) for t in (names.q, names.k, names.v))
    )
    torch.testing.assert_close(
        names.packed[rows], expected[0].transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(names.of_words[:3], names.packed[:3]) and len(names.of_pixels) == 20


def test_every_module_of_the_table_is_used():
    for module in MODULES:
        assert import_module(f"rfkernels.variants.{module}").__all__
        assert f"from rfkernels.variants.{module} import" in DOC, module
    assert len(MODULES) == 9
