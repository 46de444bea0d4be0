import dataclasses
import random

import pytest

from rfkernels.models.text import MAX_WORDS, word_key, words
from rfkernels.train.captions import NUMBERS, article, colourless, is_plural, known_words, plural
from rfkernels.train.scenes import KINDS, SceneSampler
from tests.train.banks import make_bank


@pytest.fixture(scope="module")
def bank():
    return make_bank(16)


@pytest.fixture(scope="module")
def scenes(bank):
    return SceneSampler(bank, 3).scenes(0, 3000)


def of_kind(scenes, kind):
    return [s for s in scenes if s.kind == kind and s.caption]


@pytest.mark.parametrize(
    "one, many, with_article",
    [
        ("heart", "hearts", "a heart"),
        ("mouse", "mice", "a mouse"),
        ("cherry blossom", "cherry blossoms", "a cherry blossom"),
        ("strawberry", "strawberries", "a strawberry"),
        ("monkey", "monkeys", "a monkey"),
        ("fox", "foxes", "a fox"),
        ("octopus", "octopuses", "an octopus"),
        ("unicorn", "unicorns", "a unicorn"),
        ("hourglass done", "hourglasses done", "an hourglass done"),
        ("face with tears of joy", "faces with tears of joy", "a face with tears of joy"),
        ("snowman without snow", "snowmen without snow", "a snowman without snow"),
        ("four leaf clover", "four leaf clovers", "a four leaf clover"),
        ("fallen leaf", "fallen leaves", "a fallen leaf"),
    ],
)
def test_plurals_and_articles(one, many, with_article):
    assert plural(one) == many and article(one) == with_article and not is_plural(one)


@pytest.mark.parametrize("noun", ["grapes", "glasses", "french fries", "cherries"])
def test_plural_nouns_have_no_article(noun):
    assert is_plural(noun) and article(noun) == noun


def test_colour_words_are_taken_off_the_front_only():
    assert colourless("light blue heart") == "heart" and colourless("orange") == ""
    assert colourless("heart on a red ground") == "heart on a red ground"


def test_captions_are_short_known_and_sometimes_dropped(bank, scenes):
    known = set(known_words(bank).tolist())
    said = [words(s.caption) for s in scenes]
    assert max(map(len, said)) <= MAX_WORDS
    assert {w for line in said for w in line if word_key(w) not in known} == set()
    assert word_key("zyxwv") not in known
    assert 0.08 < sum(not line for line in said) / len(said) < 0.12
    assert {s.kind for s in scenes if not s.caption} == set(KINDS)


def test_long_names_never_make_a_caption_longer_than_the_limit(bank):
    name = "smiling face with open mouth smiling eyes and a cold sweat"
    long = tuple(
        dataclasses.replace(c, label=f"{name} {i}", names=(), tags=(), foreign=())
        for i, c in enumerate(bank.concepts)
    )
    sampler, rng = SceneSampler(dataclasses.replace(bank, concepts=long), 0), random.Random(1)
    for _ in range(200):
        assert name in sampler.scene("plain", rng).caption
    assert max(len(words(sampler.scene("relation", rng).caption)) for _ in range(200)) <= MAX_WORDS


def test_counts_are_said_in_words_and_digits(scenes):
    starts = {number: set() for number in NUMBERS}
    for scene in of_kind(scenes, "count"):
        said = [n for n, forms in NUMBERS.items() for f in forms if f" {f} " in f" {scene.caption} "]
        assert said == [len(scene.items)], scene.caption
        starts[len(scene.items)].add(scene.caption.split()[0])
    assert all({str(n), NUMBERS[n][0]} <= found for n, found in starts.items())


def test_tints_backgrounds_and_places_are_said(bank, scenes):
    for scene in scenes:
        if not scene.caption:
            continue
        said = words(scene.caption)
        assert ("background" in said) == (scene.background is not None)
        if scene.background:
            assert said[said.index("background") - 1] == scene.background
        if scene.kind == "tint":
            assert scene.items[0].tint in said
        if scene.kind == "corner":
            place = {"top": "top upper", "bottom": "bottom lower", "centre": "centre center middle"}
            for word in scene.relation.split():
                assert set(place.get(word, word).split()) & set(said), scene
        if scene.kind == "accessory":
            worn = bank.concepts[bank.glyphs[scene.items[1].glyph].concept]
            assert any(name in scene.caption for name in (worn.label, *worn.names))


def test_styles_are_said_in_most_captions_and_never_a_wrong_one(bank, scenes):
    said = 0
    for scene in scenes:
        style = bank.glyphs[scene.items[0].glyph].style
        assert {bank.glyphs[i.glyph].style for i in scene.items} == {style}
        named = {"noto", "flat"} & set(words(scene.caption))
        assert named <= {style}
        said += bool(named)
    assert 0.5 < said / (0.9 * len(scenes)) < 0.7


def test_other_languages_stand_alone_with_the_style(bank, scenes):
    foreign = {name for c in bank.concepts for _, name in c.foreign} - {"pizza"}
    lines = [s for s in of_kind(scenes, "plain") if any(f" {n} " in f" {s.caption} " for n in foreign)]
    assert len(lines) > 20 and all(s.background is None for s in lines)
