import dataclasses

import pytest
import torch

from rfkernels.evaluation import draw as drawing
from rfkernels.evaluation import emoji
from rfkernels.models.text import words
from rfkernels.train import concepts
from rfkernels.train.captions import compose
from rfkernels.train.data import DataError, Dataset
from tests.tiny import disc, tiny_dataset, tiny_model

SEEN = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 110, 230)}
PALETTE = {**SEEN, "orange": (240, 130, 30), "purple": (130, 60, 190)}


def perfect(model, prompts, **settings):
    """Draws what the caption says: a disc of its colour, on its background."""
    pictures = []
    for prompt in prompts:
        spoken = words(prompt)
        ground = None
        if "background" in spoken:
            ground = tuple(c / 255 for c in concepts.BACKGROUNDS[spoken[spoken.index("background") - 1]])
        pictures.append(torch.from_numpy(compose(disc(PALETTE.get(spoken[0], (240, 190, 60)), 16), ground)))
    return torch.stack(pictures)


@pytest.fixture
def data() -> Dataset:
    tiny = tiny_dataset()
    renamed = [dataclasses.replace(e, style="noto" if e.style == "noto" else "flat") for e in tiny.entries]
    return dataclasses.replace(tiny, entries=tuple(renamed))


def test_perfect_pictures_score_one(monkeypatch, data):
    monkeypatch.setattr(emoji, "draw", perfect)
    scores = emoji.evaluate(tiny_model(), data=data, count=4)
    for name in ("held_out_colour", "background", "background_never_seen", "transparent", "held_out_overlap"):
        assert scores[name] == 1.0, name
    assert scores["judge_labels"] == 3
    assert scores["nearest_seen_distance"] < 0.05 and scores["nearest_seen_label"] == 1


def test_wrong_pictures_score_nothing(monkeypatch, data):
    def wrong(model, prompts, **settings):
        ground = (0.5, 0.9, 0.5)
        return torch.from_numpy(compose(disc((90, 90, 90)) * 0, ground)).expand(len(prompts), -1, -1, -1)

    monkeypatch.setattr(emoji, "draw", wrong)
    scores = emoji.evaluate(tiny_model(), data=data, count=4)
    assert scores["held_out_colour"] <= 1 / 3 and scores["background"] < 0.2 and scores["transparent"] == 0
    assert scores["background_never_seen"] == 0 and scores["nearest_seen_distance"] > 0.2


def test_without_data_the_other_scores_stay(monkeypatch):
    def missing(*_, **__):
        raise DataError("training data: npm is needed")

    monkeypatch.setattr(emoji, "draw", perfect)
    monkeypatch.setattr(emoji, "open_data", missing)
    scores = emoji.evaluate(tiny_model())
    assert scores["held_out_colour"] == 1 and "npm is needed" in scores["data"]
    assert not any(name.startswith(("judge", "nearest")) for name in scores)


def test_draw_depends_on_its_seed_and_not_on_its_company(monkeypatch):
    model = tiny_model()
    prompts = ["red heart", "blue circle", ""]
    together = drawing.draw(model, prompts, seed=5, steps=2)
    monkeypatch.setattr(drawing, "CHUNK", 1)
    torch.testing.assert_close(drawing.draw(model, prompts, seed=5, steps=2), together, rtol=1e-3, atol=1e-3)
    alone = drawing.draw(model, prompts[1:2], seed=6, steps=2)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-3, atol=1e-3)
    assert (drawing.draw(model, prompts, seed=6, steps=2) - together).abs().max() > 0.1


def test_held_out_captions_are_in_every_style():
    captions = emoji._held_out_captions(("noto", "flat"))
    assert len(captions) == 3 * 2 * len(concepts.HELD_OUT)
    assert {words(c)[1] for c, _ in captions} == set(emoji.OBJECT)
