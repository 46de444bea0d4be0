import dataclasses

import pytest
import torch
from PIL import Image

from rfkernels.evaluation import emoji, few_steps, forms, report
from rfkernels.train.layouts import Item
from rfkernels.train.render import Renderer
from rfkernels.train.scenes import Scene, evaluation_scenes
from tests.tiny import CONFIG, tiny_model

KINDS = ("plain", "tint", "relation", "corner", "background")
COUNT = 4
SMALL = dataclasses.replace(CONFIG, size=32, steps=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model(config=SMALL)


def scores_of(model, bank, examiner, **more):
    chosen = {"kinds": KINDS, "forms": ("bf16",), "count": COUNT, **more}
    return emoji.evaluate_bank(model, bank, examiner, settings={"steps": None, "guidance": None}, **chosen)


@pytest.fixture
def drawn(bank, monkeypatch):
    """Draws every caption's own scene; the others are seen ones."""
    renderer = Renderer(bank, "cpu")
    scenes = {s.caption: s for k in KINDS for s in evaluation_scenes(bank, k, COUNT, emoji._seed(k))}
    labels = {c.label: i for i, c in enumerate(bank.concepts)}

    def perfect(model, captions, **settings):
        found = []
        for caption in captions:
            label, _, style = caption.rpartition(" ")
            row = bank.glyph_of(labels[label], style) if caption not in scenes else None
            found.append(scenes.get(caption) or Scene("plain", (Item(row),)))
        if settings.get("path") is not None:
            settings["path"][:] = [torch.full((len(found), 1), (25.0 - i) / 25) for i in range(26)]
        return renderer(found)

    for module in (emoji, few_steps, forms):
        monkeypatch.setattr(module, "draw", perfect)


def test_perfect_pictures_score_one(drawn, model, bank, examiner, tmp_path):
    scores = scores_of(model, bank, examiner, sheet=tmp_path / "sheet.png")
    assert scores["composition"] >= 0.6 and scores["composition_ruler"] >= 0.6  # some shapes are alike
    assert min(row["attribute"] for row in scores["kinds"].values()) == 1
    assert scores["colour_right"] == 1 and scores["transparent"] == 1 and list(scores["kinds"]) == [*KINDS]
    assert scores["sharpness"] == pytest.approx(1) and scores["straightness"] == pytest.approx(0, abs=1e-9)
    assert scores["seen"]["top1"] >= 0.7 and scores["seen"]["nearest_distance"] < 1e-3
    assert scores["seen"]["nearest_label"] == 1 and scores["seen"]["nearest_style"] == 1
    assert [row["psnr"] for row in scores["steps_table"].values()] == [100] * 4
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 32 and sheet.getbbox() == (0, 0, *sheet.size)
    text = report.table(scores)
    assert all(kind in text for kind in KINDS) and "composition ruler" in text


def test_noise_scores_nothing_and_is_reported_by_form_and_steps(model, bank, examiner):
    scores = scores_of(model, bank, examiner)
    assert scores["composition"] <= 0.2 and scores["seen"]["top1"] <= 0.3 and scores["steps"] == 2
    assert list(scores["steps_table"]) == [1, 2, 4, 8] and list(scores["forms"]) == ["float32", "bf16"]
    assert scores["forms"]["bf16"]["bytes"] < 0.6 * scores["forms"]["float32"]["bytes"]
    assert 20 < scores["forms"]["bf16"]["psnr"] < 100 and scores["straightness"] > 0
    assert scores["sharpness"] > 2 and all(row["ms"] > 0 for row in scores["forms"].values())


def test_adapters_change_all_but_the_reference(model, bank, examiner, monkeypatch):
    def shift(model, file):
        assert file == "few.safetensors"
        model.out.bias.add_(0.5)

    monkeypatch.setattr(emoji, "_load", shift)
    before = model.out.bias.clone()
    scores = scores_of(model, bank, examiner, lora="few.safetensors", kinds=("plain",), forms=())
    model.out.bias.copy_(before)
    plain = scores_of(model, bank, examiner, kinds=("plain",), forms=())
    assert scores["steps_without_lora"] == plain["steps_table"] != scores["steps_table"]
    assert scores["straightness"] == plain["straightness"] != scores["straightness_lora"]


def test_more_steps_come_nearer(model):
    captions = ["red heart", "blue circle"]
    reference, _ = few_steps.reference_of(model, captions, seed=1)
    found = few_steps.compare_steps(model, captions, reference, lambda x: float(len(x)), seed=1)
    assert found[8]["psnr"] > found[1]["psnr"] and found[8]["ssim"] > found[1]["ssim"]
    assert {row["right"] for row in found.values()} == {2.0}


def test_what_cannot_be_evaluated_is_refused(model, bank):
    with pytest.raises(ValueError, match="got colours"):
        emoji.evaluate(model, data=bank, kinds=("plain", "colours"))
    with pytest.raises(ValueError, match="count of 1 or more required, got 0"):
        emoji.evaluate(model, data=bank, count=0)
