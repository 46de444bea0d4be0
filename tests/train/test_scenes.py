import dataclasses
from collections import Counter

import numpy as np
import pytest

from rfkernels.train import concepts, scenes
from rfkernels.train.scenes import KINDS, Item, Scene, SceneSampler, evaluation_scenes, held_out
from tests.train.banks import make_bank


@pytest.fixture(scope="module")
def bank():
    return make_bank(16)


def label_of(bank, item):
    return bank.concepts[bank.glyphs[item.glyph].concept].label


def scene_of(bank, kind, labels, relation="", **item):
    rows = [bank.glyph_of(bank.concept_of(label), "noto") for label in labels]
    return Scene(kind, tuple(Item(row, **item) for row in rows), relation=relation)


def test_scenes_are_a_function_of_seed_and_step(bank):
    sampler = SceneSampler(bank, 1)
    first = sampler.scenes(5, 50)
    assert sampler.scenes(6, 50) != first
    assert sampler.scenes(5, 50) == first == SceneSampler(bank, 1).scenes(5, 50)
    assert SceneSampler(bank, 2).scenes(5, 50) != first
    assert sampler.scenes(5, 20) == first[:20]


def test_training_never_draws_what_is_held_out_and_keeps_the_shares(bank):
    drawn = SceneSampler(bank, 7).scenes(0, 20_000)
    assert not any(held_out(s, bank) for s in drawn)
    kinds = Counter(s.kind for s in drawn)
    for kind, share in KINDS.items():
        assert kinds[kind] / len(drawn) == pytest.approx(share, abs=0.015)
    assert sum(s.background is not None for s in drawn) / len(drawn) == pytest.approx(0.25, abs=0.015)
    assert all(0 <= i.x <= 1 and 0 <= i.y <= 1 and 0 < i.size <= 1 for s in drawn for i in s.items)
    blue = {label_of(bank, s.items[0]) for s in drawn if s.background == "blue" and s.kind == "plain"}
    assert blue and not blue & concepts.NEVER_ON_BLUE


@pytest.mark.parametrize("kind", [*KINDS, "background"])
def test_evaluation_gives_only_what_is_held_out(bank, kind):
    try:
        drawn = evaluation_scenes(bank, kind, 30, 1)
    except ValueError as error:
        assert kind == "accessory" and "the bank has none" in str(error)  # 16 labels are few
        return
    assert len(drawn) == 30 and all(held_out(s, bank) and s.caption for s in drawn)
    assert {s.kind for s in drawn} == {"plain" if kind == "background" else kind}
    assert drawn == evaluation_scenes(bank, kind, 30, 1) != evaluation_scenes(bank, kind, 30, 2)
    if kind == "background":
        assert {s.background for s in drawn} == {"blue"}
    if kind not in ("plain", "background"):  # the objects themselves are known
        assert all(bank.glyphs[i.glyph].split == "train" for s in drawn for i in s.items)


def test_what_is_held_out_never_changes():
    found = [f"{n} {c}" for n in (2, 3, 4) for c in ("cat", "pizza", "rocket", "star", "dog", "fox", "bus")]
    assert [key for key in found if scenes._by_hash(key)] == PINNED
    assert 0.045 < sum(scenes._by_hash(f"red thing {i}") for i in range(20_000)) / 20_000 < 0.055


PINNED = ["2 rocket"]


def test_named_captions_are_held_out_however_they_come_about(bank):
    assert held_out(scene_of(bank, "tint", ["red heart"], tint="green"), bank)  # "green heart"
    assert held_out(scene_of(bank, "tint", ["automobile"], tint="purple"), bank)  # by its name "car"
    concept = bank.concept_of("blue circle")
    renamed = [
        dataclasses.replace(c, label="orange circle") if i == concept else c
        for i, c in enumerate(bank.concepts)
    ]
    assert held_out(Scene("plain", (Item(2 * concept),)), dataclasses.replace(bank, concepts=tuple(renamed)))
    assert not held_out(Scene("plain", (Item(2 * concept),)), bank)
    assert held_out(
        Scene("plain", (Item(bank.glyph_of(bank.concept_of("pizza"), "flat")),)), bank
    )  # its split
    heart = scene_of(bank, "plain", ["red heart"])
    assert held_out(dataclasses.replace(heart, background="blue"), bank)
    assert not held_out(dataclasses.replace(heart, background="green"), bank)


def test_pairs_are_held_out_in_both_orders_and_every_relation(bank):
    for scene in evaluation_scenes(bank, "relation", 20, 3):
        for relation in ("left", "above", "beside", "on", "bigger"):
            turned = dataclasses.replace(scene, items=scene.items[::-1], relation=relation, background=None)
            assert held_out(turned, bank)


def test_tints_change_the_colour(bank):
    for scene in SceneSampler(bank, 0).scenes(1, 1500):
        if scene.kind == "tint":
            hue = bank.glyphs[scene.items[0].glyph].hue
            distance = abs((hue - concepts.TINTS[scene.items[0].tint][0] + 180) % 360 - 180)
            assert distance >= 30 and scene.background != scene.items[0].tint


def test_popular_concepts_are_drawn_more_often(bank):
    drawn = Counter(
        label_of(bank, s.items[0]) for s in SceneSampler(bank, 0).scenes(2, 6000) if s.kind == "plain"
    )
    popular, others = ([drawn[c.label] for c in bank.concepts if (c.weight >= 4) == four] for four in (1, 0))
    assert np.mean(popular) / np.mean(others) == pytest.approx(4, rel=0.15)  # weights 4 and 1


def test_a_bank_without_faces_gives_plain_scenes_instead(bank):
    bare = dataclasses.replace(
        bank, concepts=tuple(dataclasses.replace(c, face=False) for c in bank.concepts)
    )
    kinds = Counter(s.kind for s in SceneSampler(bare, 0).scenes(0, 800))
    assert kinds["accessory"] == 0 and kinds["plain"] > 350
    with pytest.raises(ValueError, match="held-out scenes of kind accessory were required"):
        evaluation_scenes(bare, "accessory", 1, 0)


def test_errors_say_what_is_needed(bank):
    with pytest.raises(ValueError, match=r"kind was required to be one of plain.*background; got 'colour'"):
        evaluation_scenes(bank, "colour", 1, 0)
    held = tuple(dataclasses.replace(g, split="held-out") for g in bank.glyphs)
    with pytest.raises(ValueError, match="glyphs of the training split was required, got none"):
        SceneSampler(dataclasses.replace(bank, glyphs=held), 0)
