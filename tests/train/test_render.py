import colorsys
import dataclasses
import random

import numpy as np
import pytest
import torch
from scipy import ndimage

from rfkernels.train import concepts
from rfkernels.train.render import Renderer
from rfkernels.train.scenes import Item, Scene, SceneSampler
from tests.train.banks import make_bank

SIZE = 32


@pytest.fixture(scope="module")
def bank():
    return make_bank(SIZE)


@pytest.fixture(scope="module")
def renderer(bank):
    return Renderer(bank)


@pytest.fixture(scope="module")
def drawn(bank, renderer):
    """1,200 scenes of a sampler and their pictures as RGBA in 0..1."""
    scenes = [s for s in SceneSampler(bank, 11).scenes(0, 1400) if s.caption][:1200]
    return list(zip(scenes, (renderer(scenes).numpy() + 1) / 2, strict=True))


def row(bank, label, style="noto"):
    return bank.glyph_of(bank.concept_of(label), style)


def label_of(bank, item):
    return bank.concepts[bank.glyphs[item.glyph].concept].label


def glyph(bank, index):
    return bank.images[index].transpose(2, 0, 1) / 255


def centre(mask):
    y, x = ndimage.center_of_mass(mask)
    return (x + 0.5) / mask.shape[1], (y + 0.5) / mask.shape[0]


def test_a_plain_scene_is_the_glyph_itself(bank, renderer):
    scenes = [Scene("plain", (Item(i),)) for i in range(len(bank.glyphs))]
    pictures = renderer(scenes)
    assert pictures.dtype == torch.float32 and pictures.shape == (len(scenes), 4, SIZE, SIZE)
    expected = np.stack([glyph(bank, i) for i in range(len(scenes))]) * 2 - 1
    np.testing.assert_allclose(pictures.numpy(), expected, atol=1e-6)


def test_a_scene_alone_or_in_a_batch_has_the_same_bits(bank, renderer, drawn):
    scenes = [s for s, _ in drawn[:60]]
    together = renderer(scenes)
    for i in range(0, 60, 3):
        assert torch.equal(renderer([scenes[i]])[0], together[i])
    assert torch.equal(renderer.draw([torch.from_numpy(a) for a in renderer.pack(scenes)]), together)


@pytest.mark.parametrize("size", [16, 20, 64])
def test_the_size_of_pictures_is_free(bank, renderer, size):
    scenes = [Scene("plain", (Item(0),)), Scene("corner", (Item(4, size=0.4, x=0.3, y=0.7),))]
    pictures = Renderer(bank, size=size)(scenes)
    assert pictures.shape == (2, 4, size, size)
    full = renderer(scenes)
    np.testing.assert_allclose(pictures.mean((2, 3)), full.mean((2, 3)), atol=0.02)
    if size == 16:
        means = glyph(bank, 0).reshape(4, 16, 2, 16, 2).mean((2, 4))
        np.testing.assert_allclose((pictures[0].numpy() + 1) / 2, means, atol=0.51 / 255)


def test_counts_are_blobs(bank, drawn):
    checked = 0
    for scene, picture in drawn:
        if scene.kind == "count" and scene.background is None and label_of(bank, scene.items[0]) != "star":
            assert ndimage.label(picture[3] > 0.5)[1] == len(scene.items), scene
            checked += 1
    assert checked > 50


def test_backgrounds_have_the_colour_that_is_said_and_fill_the_picture(drawn):
    checked = 0
    for scene, picture in drawn:
        if scene.background:
            assert (picture[3] > 0.999).all()
            edge = np.concatenate([picture[:3, 0], picture[:3, -1]], 1).T
            nearest = np.abs(edge - np.array(concepts.BACKGROUNDS[scene.background]) / 255).max(1).min()
            assert nearest <= 0.041, scene
            checked += 1
    assert checked > 200


def test_relations_are_as_the_caption_says(bank, drawn):
    """Red and blue things: where the caption puts the red one, its pixels are."""
    sampler, checked = SceneSampler(bank, 5), set()
    red, blue = row(bank, "red heart"), row(bank, "blue circle")
    sampler._two = lambda rng: (red, blue) if rng.random() < 0.5 else (blue, red)
    rng, renderer = random.Random(2), Renderer(bank)
    for _ in range(150):
        scene = sampler._relation(rng)
        picture = (renderer([scene])[0].numpy() + 1) / 2
        masks = {"red": picture[0] > picture[2] + 0.3, "blue": picture[2] > picture[0] + 0.3}
        place = {name: centre(mask) for name, mask in masks.items()}
        caption = sampler.captions.line(scene, rng).replace("heart", "thing").replace("red thing", "red")
        caption = caption.replace("thing", "red").replace("blue circle", "blue").replace("emoji", "")
        for phrase, axis, sign in PHRASES:
            if phrase in caption:
                name = "red" if "red" in caption.partition(phrase)[0] else "blue"
                other = "blue" if name == "red" else "red"
                assert sign * (place[name][axis] - place[other][axis]) > 0.2, (caption, place)
                checked.add(phrase)
        for word, sign in (("big", 1), ("small", -1)):
            if f"{word} red" in caption or f"{word} blue" in caption:
                name = "red" if f"{word} red" in caption else "blue"
                other = "blue" if name == "red" else "red"
                assert sign * (masks[name].sum() - masks[other].sum()) > 0, caption
                checked.add(word)
    assert checked == {p for p, _, _ in PHRASES} | {"big", "small"}


PHRASES = [
    (" left of ", 0, -1),
    (" right of ", 0, 1),
    (" above ", 1, -1),
    (" over ", 1, -1),
    (" below ", 1, 1),
    (" under ", 1, 1),
    (" on top of ", 1, -1),
    (" sitting on ", 1, -1),
    (" on the left and ", 0, -1),
    (" at the top and ", 1, -1),
]


def test_corners_hold_the_object(drawn):
    seen = set()
    for scene, picture in drawn:
        if scene.kind == "corner" and scene.background is None:
            x, y = centre(picture[3] > 0.5)
            assert ("left" in scene.relation) == (x < 0.4) and ("right" in scene.relation) == (x > 0.6)
            assert ("top" in scene.relation) == (y < 0.4) and ("bottom" in scene.relation) == (y > 0.6)
            seen.add(scene.relation)
    assert len(seen) == 9


@pytest.mark.parametrize("angle, turns", [(180, 2), (90, -1), (-90, 1)])
def test_turns_are_clockwise(bank, renderer, angle, turns):
    index = row(bank, "red heart")
    picture = (renderer([Scene("turned", (Item(index, angle=angle),))])[0].numpy() + 1) / 2
    np.testing.assert_allclose(picture, np.rot90(glyph(bank, index), turns, (1, 2)), atol=1e-3)


def test_tilted_right_leans_right(bank, renderer):
    index = row(bank, "pizza")  # a triangle on its base
    picture = renderer([Scene("turned", (Item(index, size=0.8, angle=30),))])[0, 3].numpy() > 0
    top = np.flatnonzero(picture[np.flatnonzero(picture.any(1))[0]]).mean()
    assert top > 0.6 * SIZE


def reference_tint(picture, hue, colour):
    """The definition, pixel by pixel with colorsys: near the dominant hue, turn to the colour's."""
    target, more, light = concepts.TINTS[colour]
    out = picture.copy()
    for y, x in np.ndindex(picture.shape[1:]):
        alpha = picture[3, y, x]
        if alpha == 0:
            continue
        h, s, v = colorsys.rgb_to_hsv(*np.clip(picture[:3, y, x] / alpha, 0, 1))
        if abs((h - hue / 360 + 0.5) % 1 - 0.5) < 50 / 360 and s > 0.2:
            turned = colorsys.hsv_to_rgb(target / 360, min(s * more, 1), min(v * light, 1))
            out[:3, y, x] = np.array(turned) * alpha
    return out


@pytest.mark.parametrize("colour", concepts.TINTS)
def test_tints_are_the_definition(bank, renderer, colour):
    for label in ("star", "cat face", "green square"):
        index = row(bank, label)
        picture = (renderer([Scene("tint", (Item(index, tint=colour),))])[0].numpy() + 1) / 2
        expected = reference_tint(glyph(bank, index), bank.glyphs[index].hue, colour)
        np.testing.assert_allclose(picture, expected, atol=1e-5)
    assert (picture[:3] != glyph(bank, index)[:3]).any()


def test_worn_things_are_where_they_are_worn(bank, drawn):
    seen = set()
    for scene, picture in drawn:
        if scene.kind == "accessory":
            face, worn = scene.items
            assert bank.concepts[bank.glyphs[face.glyph].concept].face
            seen.add(scene.relation)
            assert abs(worn.x - face.x) < 0.15 or scene.relation == "beside it"
            assert worn.y < face.y
            if scene.background is None:
                rim = np.concatenate([picture[3, 0], picture[3, -1], picture[3, :, 0], picture[3, :, -1]])
                assert rim.mean() < 0.1
    assert seen == {"eyes", "head", "beside it"}


def test_items_are_laid_over_in_their_order(bank, renderer):
    thin = bank.images.copy()
    front, back = row(bank, "blue circle"), row(bank, "red circle")
    thin[front] = thin[front] // 2
    half = Renderer(dataclasses.replace(bank, images=thin))
    scene = Scene("relation", (Item(back), Item(front)), "white", (1.0, 1.0, 1.0))
    picture = (half([scene])[0].numpy() + 1) / 2
    a, b = thin[front].transpose(2, 0, 1) / 255, thin[back].transpose(2, 0, 1) / 255
    expected = a + (1 - a[3:]) * (b + (1 - b[3:]))
    np.testing.assert_allclose(picture, expected, atol=1e-6)


def test_small_things_are_not_aliased(bank):
    """A fine chequer of one pixel becomes even grey at a third of its size."""
    images = bank.images.copy()
    images[0] = 255
    images[0, ..., :3] = 255 * (np.indices((SIZE, SIZE)).sum(0) % 2)[..., None]
    picture = Renderer(dataclasses.replace(bank, images=images))([Scene("corner", (Item(0, size=0.375),))])
    inner = (picture[0, 0, 12:20, 12:20] + 1) / 2
    assert (inner - 0.5).abs().max() < 0.01


def test_errors_say_what_is_needed(bank, renderer):
    with pytest.raises(ValueError, match="1 to 4 items were required, got 5"):
        renderer([Scene("count", (Item(0),) * 5)])
    with pytest.raises(ValueError, match=r"a tint of red.*got 'mauve' for glyph 0"):
        renderer([Scene("tint", (Item(0, tint="mauve"),))])
    with pytest.raises(ValueError, match="got 'red' for glyph"):
        renderer([Scene("tint", (Item(row(bank, "sunglasses"), tint="red"),))])
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        Renderer(bank, size=18)
