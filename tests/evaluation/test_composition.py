from dataclasses import replace

import pytest
import torch

from rfkernels.evaluation.composition import named_colour
from rfkernels.evaluation.emoji import moved
from rfkernels.train.concepts import BACKGROUNDS
from rfkernels.train.layouts import Item, accessory_items, on_top, slot_of
from rfkernels.train.render import Renderer
from rfkernels.train.scenes import ANGLES, POINTS, ROWS, Scene


@pytest.fixture(scope="module")
def look(bank, examiner):
    renderer = Renderer(bank, "cpu")
    return lambda scene, shown=None: examiner.examine([scene], moved(renderer([shown or scene])))[0]


def item(bank, label: str, **more) -> Item:
    return Item(bank.glyph_of(bank.concept_of(label), "noto"), **more)


def ground(scene: Scene, name: str) -> Scene:
    return replace(scene, background=name, rgb=tuple(c / 255 for c in BACKGROUNDS[name]))


def row_of(bank, number: int) -> Scene:
    size, centres = ROWS[number][0] if number > 1 else (0.5, ((0.5, 0.5),))
    return Scene("count", tuple(item(bank, "red heart", size=0.9 * size, x=x, y=y) for x, y in centres))


def pair(bank, relation: str, first="red heart", second="green square", swap=False) -> Scene:
    a, b = (item(bank, label).glyph for label in (first, second))
    if relation == "on":
        return Scene("relation", on_top(bank, a, b) if swap else on_top(bank, b, a), relation=relation)
    places = [(0.45, 0.25, 0.5), (0.45, 0.75, 0.5)]
    if relation == "above":
        places = [(s, y, x) for s, x, y in places]
    if relation == "bigger":
        places = [(0.6, 0.3, 0.5), (0.25, 0.85, 0.5)]
    places = places[::-1] if swap else places
    items = tuple(Item(g, size=s, x=x, y=y) for g, (s, x, y) in zip((a, b), places, strict=True))
    return Scene("relation", items, relation=relation)


def worn(bank, thing: str | None) -> Scene:
    face = item(bank, "grinning face").glyph
    if thing is None:
        return Scene("accessory", (Item(face),))
    return Scene("accessory", accessory_items(bank, face, item(bank, thing).glyph, slot_of(thing)))


@pytest.mark.parametrize("colour", ["blue", "green", "purple"])
def test_tints(bank, look, colour):
    scene = Scene("tint", (item(bank, "automobile", tint=colour),), caption=f"a {colour} car")
    assert look(scene) == look(ground(scene, "grey")) and look(scene).right and look(scene).colour
    other = look(scene, replace(scene, items=(item(bank, "automobile", tint="pink"),)))
    assert not other.attribute and other.colour is False and other.object


@pytest.mark.parametrize("number", [2, 3, 4])
def test_counts(bank, look, number):
    assert look(row_of(bank, number)).right
    other = look(row_of(bank, number), row_of(bank, number - 1))
    assert other.object and not other.attribute


@pytest.mark.parametrize("relation", ["left", "above", "on", "bigger"])
def test_relations(bank, look, relation):
    scene = pair(bank, relation)
    assert look(scene).right and look(ground(scene, "turquoise")).right
    wrong = look(scene, replace(pair(bank, relation, swap=True), relation=relation))
    assert not wrong.attribute
    stranger = pair(bank, relation, second="star")
    assert not look(scene, stranger).object


def test_beside_takes_either_order_but_not_above(bank, look):
    scene = pair(bank, "beside")
    assert look(scene).right and look(scene, pair(bank, "beside", swap=True)).right
    assert not look(scene, pair(bank, "above")).attribute


@pytest.mark.parametrize("place", ["top left", "right", "bottom", "centre"])
def test_corners(bank, look, place):
    at = dict(zip("xy", POINTS[place], strict=True))
    scene = Scene("corner", (item(bank, "red heart", size=0.3, **at),), relation=place)
    assert look(scene).right
    large = replace(scene, items=(item(bank, "red heart", size=0.8, **at),))
    elsewhere = replace(scene, items=(item(bank, "red heart", size=0.3, x=0.8, y=0.8),))
    assert not look(scene, large).attribute and not look(scene, elsewhere).attribute


@pytest.mark.parametrize("turn", ["upside down", "left", "tilted right"])
def test_turns(bank, look, turn):
    scene = Scene("turned", (item(bank, "red heart", size=0.8, angle=ANGLES[turn]),), relation=turn)
    assert look(scene).right and look(ground(scene, "black")).right
    upright = replace(scene, items=(item(bank, "red heart", size=0.8),))
    assert not look(scene, upright).attribute


@pytest.mark.parametrize("thing", ["sunglasses", "top hat", "crown", "star"])
def test_accessories(bank, look, thing):
    assert look(worn(bank, thing)).attribute
    for other in {None, "sunglasses", "top hat"} - {thing}:
        assert not look(worn(bank, thing), worn(bank, other)).attribute


def test_grounds(bank, look):
    scene = ground(Scene("plain", (item(bank, "pizza"),)), "blue")
    clear = replace(scene, background=None, rgb=None)
    assert look(scene).right
    assert not look(scene, ground(scene, "red")).attribute and not look(scene, clear).attribute
    assert look(clear).right


def test_an_empty_picture_is_wrong(bank, examiner):
    scenes = [
        row_of(bank, 2),
        pair(bank, "left"),
        Scene("corner", (item(bank, "star"),), relation="top left"),
    ]
    for verdict in examiner.examine(scenes, torch.full((3, 4, 32, 32), -1.0)):
        assert not verdict.right
    with pytest.raises(ValueError, match="3 scenes need"):
        examiner.examine(scenes, torch.zeros(1, 4, 32, 32))


def test_colours_are_named_by_tint_or_by_label_and_caption(bank):
    tinted = Scene("tint", (item(bank, "star", tint="blue"),), caption="blue star")
    apple = Scene("plain", (item(bank, "red apple"),), caption="apple on a blue background")
    assert named_colour(tinted, bank) == "blue" and named_colour(apple, bank) is None
    assert named_colour(replace(apple, caption="a red apple"), bank) == "red"
