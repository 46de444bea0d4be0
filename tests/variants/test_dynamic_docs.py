"""The code of docs/dynamic.md runs as it stands, from top to bottom, and gives what the page says."""

import re
from pathlib import Path

import pytest
import torch

from tests.pages import run_page

pytest.importorskip("diffusers")
PAGE = Path(__file__).parents[2] / "docs" / "dynamic.md"
DOC = PAGE.read_text()


@pytest.fixture(scope="module")
def names():
    """What the page has made when it ends."""
    return run_page(DOC)


def test_smaller_blocks_are_the_masked_ones(names):
    torch.testing.assert_close(names.y, names.masked, rtol=1e-4, atol=1e-4)
    plan = names.plan
    assert any(b.attn.heads < names.heads for step in range(8) for b in plan.blocks(step))
    assert names.macs.shape == (names.batch,) and names.macs.isfinite().all()


def test_tokens_are_left_out(names):
    same = (names.image_out == names.x).all(-1)
    assert (same.sum(1) >= 8).all() and not same.all()  # a room of 8 of 16
    assert names.expert.shape == names.token.shape == names.sliced.shape == names.x.shape
    assert [chosen.index.shape[1] for _, chosen in names.routing] == [16, 8, 4]


def test_whole_and_cheap_modules(names):
    torch.testing.assert_close(names.whole, names.mlp(names.x), rtol=1e-4, atol=1e-4)
    assert names.cheap.isfinite().all() and names.loss > 0
    assert names.labels.min() >= 0 and names.labels.max() <= 4


def test_exits_depths_and_budgets(names):
    assert names.labels_of_exits.tolist() == [1, 0]
    assert names.keep.sum().item() == 7 and names.skipped.shape == names.x.shape == names.left.shape
    y = names.x
    for b in names.six:
        y = b(y, names.c)
    torch.testing.assert_close(names.deep, y, rtol=1e-4, atol=1e-4)
    spent = sum(int(m.sum()) * cost for m, cost in zip(names.kept, names.costs, strict=True))
    assert spent <= 0.6 * 4 * names.heads * sum(names.costs) < spent + sum(names.costs)
    assert len(names.small_blocks) == 4


def test_merged_tokens_come_back(names):
    assert names.merged.shape[1] == 12 and names.restored.shape == names.x.shape
    assert names.size.sum(1).tolist() == [16.0, 16.0]


def test_every_piece_is_on_the_page_and_links_lead_somewhere():
    pieces = {p.stem for p in (PAGE.parents[1] / "rfkernels" / "variants").glob("*.py")}
    mine = ["dynamic", "dyflux", "recursion", "adaptive", "exits", "growth", "onepruning", "merging"]
    assert pieces.issuperset(mine) and all(f"variants.{name} import" in DOC for name in mine)
    for target in re.findall(r"\]\(([^)]+)\)", DOC):
        assert (PAGE.parent / target).exists(), target
