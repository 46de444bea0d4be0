"""The code of docs/editing.md runs as it stands, from top to bottom, and gives what the page says."""

import re
from pathlib import Path

import pytest
import torch

from rfkernels import editing
from tests.pages import run_page

PAGE = Path(__file__).parents[2] / "docs" / "editing.md"
DOC = PAGE.read_text()


@pytest.fixture(scope="module")
def names():
    """What the page has made when it ends."""
    torch.manual_seed(0)
    return run_page(DOC)


def blue(x):
    """How much bluer than red the opaque part is."""
    seen = x[:, 3] > 0
    return (x[:, 2] - x[:, 0])[seen].mean()


def test_a_round_trip_comes_back(names):
    assert (names.back - names.source).square().mean() < 0.01


def test_edits_turn_the_heart_blue_and_keep_its_place(names):
    assert blue(names.source) < -1
    for picture in (names.edited, names.pulled):
        assert blue(picture) > 0.5
        overlap = (picture[:, 3] > 0) == (names.source[:, 3] > 0)
        assert overlap.float().mean() > 0.85


def test_known_pixels_and_measurements_hold(names):
    kept = names.mask.expand(1, 4, 128, 128) == 1
    assert torch.equal(names.filled[kept], names.source[kept])
    assert blue(names.filled) < -1
    small = editing.operators.measure(names.large, names.rows, names.rows)
    torch.testing.assert_close(small, names.small, rtol=0, atol=1e-4)
    assert (names.large - names.source).square().mean() < 0.05


def test_sharing_keeps_more_of_the_source(names):
    assert 0 < (names.shared - names.source).square().mean() < (names.edited - names.source).square().mean()


def test_videos_and_series(names):
    assert torch.equal(names.video[:, :, 0], names.first[:, :, 0])
    assert names.long.shape[2] == 9 and torch.equal(names.long[:, :, :5], names.video)
    assert not names.series[0, ::10].any() and names.series.std() > 0.5


def test_every_editor_is_on_the_page():
    parts = (editing.inversion, editing.flowedit, editing.flowchef, editing.features)
    for name in (name for part in parts for name in part.__all__):
        assert name in DOC, name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", DOC):
        assert (PAGE.parent / target).exists(), target
