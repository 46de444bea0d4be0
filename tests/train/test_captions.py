import dataclasses

import numpy as np
import pytest

from rfkernels.models.text import word_key, words
from rfkernels.train import captions, concepts
from tests.tiny import disc, tiny_dataset


def batches(data, count=40, size=16, seed=3):
    weights = captions.sampling_weights(data)
    return [captions.make_batch(data, weights, size, seed, step) for step in range(count)]


def test_batch_is_a_function_of_seed_and_step():
    data, weights = tiny_dataset(), captions.sampling_weights(tiny_dataset())
    a, b, c = (captions.make_batch(data, weights, 8, 1, step) for step in (5, 5, 6))
    assert a.captions == b.captions and (a.pictures == b.pictures).all()
    assert a.captions != c.captions


def test_held_out_rows_are_never_drawn():
    data = tiny_dataset()
    drawn = np.concatenate([b.index for b in batches(data)])
    assert set(drawn) == set(data.indices("train"))


def test_captions_name_the_background_that_the_picture_has():
    data = tiny_dataset()
    grounds = 0
    for batch in batches(data):
        for picture, caption in zip(batch.pictures, batch.captions, strict=True):
            assert np.abs(picture).max() <= 1
            corner = (picture[:, 0, 0] + 1) / 2
            if "background" not in caption:
                assert corner[3] == 0 or caption == ""
                continue
            grounds += 1
            name = words(caption)[words(caption).index("background") - 1]
            assert corner[3] == 1
            assert np.abs(corner[:3] - np.array(concepts.BACKGROUNDS[name]) / 255).max() <= 0.041
    assert grounds > 50


def test_some_captions_are_dropped_and_all_words_are_known():
    data = tiny_dataset()
    known = set(captions.known_words(data).tolist())
    lines = [line for batch in batches(data) for line in batch.captions]
    assert 0.05 < np.mean([line == "" for line in lines]) < 0.15
    assert {word_key(w) for line in lines for w in words(line)} <= known
    assert word_key("zyxwv") not in known
    assert any("flat" in line for line in lines) and any("disc" in line for line in lines)


def test_blue_is_kept_from_the_named_objects():
    data = tiny_dataset()
    lines = [line for batch in batches(data, count=150) for line in batch.captions]
    grounds = {words(line)[-2] for line in lines if "background" in line and "pizza" in line}
    assert "pizza" in concepts.NEVER_ON_BLUE and "blue" not in grounds and len(grounds) > 8
    assert any("circle" in line and "blue background" in line for line in lines)


def test_composition_is_the_over_operator():
    image = disc((200, 100, 0))
    image[8, 8] = (50, 25, 0, 64)  # premultiplied, a quarter opaque
    clear, solid = captions.compose(image, None), captions.compose(image, (0.0, 0.5, 1.0))
    assert clear[:, 8, 8] == pytest.approx(np.array([50, 25, 0, 64]) / 127.5 - 1)
    alpha = 64 / 255
    expected = np.array([50 / 255, 25 / 255 + 0.5 * (1 - alpha), 1 - alpha, 1.0]) * 2 - 1
    assert solid[:, 8, 8] == pytest.approx(expected, abs=1e-6)
    assert (clear[:, 0, 0] == -1).all()


def test_weights_follow_the_entries():
    data = tiny_dataset()
    heavy = dataclasses.replace(data.entries[0], weight=3.0)
    weights = captions.sampling_weights(dataclasses.replace(data, entries=(heavy, *data.entries[1:])))
    assert weights.sum() == pytest.approx(1) and weights[0] == pytest.approx(3 * weights[1])
    assert weights[5] == 0  # held out
