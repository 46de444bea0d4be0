"""The code of docs/schedules.md runs as it stands, from top to bottom, and its tables are complete."""

import re
from pathlib import Path

import pytest
import torch

from rfkernels.samplers import MODEL_SCHEDULES, SCHEDULES, model_schedule, schedule, schedules
from tests.pages import run_page

pytest.importorskip("diffusers")
PAGE = Path(__file__).parents[1] / "docs" / "schedules.md"
DOC = PAGE.read_text()


@pytest.fixture(scope="module")
def names():
    """What the page has made when it ends."""
    torch.manual_seed(0)
    return run_page(DOC)


def test_levels_are_what_the_page_says(names):
    assert names.sigmas.tolist() == schedules.shift(8, 3.0).tolist() and names.own[-1] == 0
    torch.testing.assert_close(names.flux, schedule("dynamic", 28, tokens=4096))
    assert names.stretched[-2].item() == pytest.approx(0.1) and names.stretched[0] == 1
    assert names.told.tolist() == [int(1000 * s) for s in names.stretched[:-1].tolist()]


def test_grids_and_runs_are_what_the_page_says(names):
    assert len(names.best) == 7 and (names.best.diff() < 0).all()
    assert names.cost.shape == (11, 11) and names.chain[0] == 0 and names.chain[-1] == 10
    assert len(names.chain) == 4 and names.total > 0
    assert names.x.isfinite().all() and names.latents.isfinite().all()
    assert names.scheduler.step_index == 8 and names.scheduler.config.shift == 3.0


def test_every_name_is_on_the_page():
    rows = re.findall(r"^\| (`[^|]*)\|", DOC, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([\w.-]+)`", row)}
    assert set(SCHEDULES) <= listed and set(MODEL_SCHEDULES) <= listed
    unknown = {n for n in listed if re.fullmatch(r"[a-z0-9]+[.-][a-z0-9.-]+", n)} - set(MODEL_SCHEDULES)
    assert not unknown


def test_numbers_of_the_traps():
    doubled = [round(s, 3) for s in model_schedule("sd3-medium", 4, compat="diffusers").tolist()]
    assert doubled == [1, 0.858, 0.602, 0.009, 0] and "1, .858, .602, .0089, 0" in DOC


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", DOC):
        assert (PAGE.parent / target).exists(), target
