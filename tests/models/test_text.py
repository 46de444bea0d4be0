import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfkernels.models import text
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red Heart, noto!", ["a", "red", "heart", "noto"]),
        ("", []),
        ("  \n\t ", []),
        ("ハート 赤い", ["ハート", "赤い"]),
        ("smiley 😀", ["smiley"]),
        ("T-Rex 3d", ["t", "rex", "3d"]),
    ],
)
def test_words_are_lower_case_runs_of_letters_and_digits(prompt, expected):
    assert text.words(prompt) == expected


def test_word_rows_hold_the_word_and_its_trigrams():
    import zlib

    rows, weights = text.word_rows("cat", 8192)
    pieces = ["cat", "#<ca", "#cat", "#at>"]
    assert list(rows[:4]) == [zlib.crc32(p.encode()) % 8192 for p in pieces]
    assert weights[:4] == pytest.approx((0.5, 1 / 6, 1 / 6, 1 / 6))
    assert weights[4:] == (0.0,) * 4


@given(st.text(max_size=200))
def test_any_text_tokenizes_within_bounds(prompt):
    rows, weights, mask = text.tokenize([prompt, "red"], 64)
    assert rows.shape == weights.shape == (2, mask.shape[1], text.PIECES)
    assert 1 <= mask.shape[1] <= text.MAX_WORDS
    assert ((rows >= 0) & (rows < 64)).all()
    torch.testing.assert_close(torch.from_numpy(weights.sum(-1)), torch.from_numpy(mask).float())


def test_words_beyond_the_limit_are_cut_and_named():
    encoded = tiny_model().encode([" ".join(f"w{i}" for i in range(20)), "red"])
    assert encoded.mask.sum(1).tolist() == [16, 1]
    assert encoded.truncated == [["w16", "w17", "w18", "w19"], []]


def test_unknown_words_are_named():
    encoded = tiny_model().encode(["Red qwerty heart", "", "coeur"])
    assert encoded.unknown == [["qwerty"], [], ["coeur"]]


def test_long_prompt_is_quick_and_cut():
    encoded = tiny_model().encode(["heart " * 2000])
    assert encoded.mask.shape == (1, 16)
    assert len(encoded.truncated[0]) == 1984


def test_word_order_matters_and_padding_does_not():
    model = tiny_model()

    def features(prompts):
        t = model.encode(prompts)
        return model.text(t.rows, t.weights, t.mask)

    alone, pooled = features(["red heart"])
    padded, pooled_padded = features(["red heart", "red heart on blue background"])
    torch.testing.assert_close(padded[0, :2], alone[0])
    torch.testing.assert_close(pooled_padded[0], pooled[0])
    turned, _ = features(["heart red"])
    assert (turned[0].flip(0) - alone[0]).abs().max() > 0.01
    nothing, pooled_nothing = features([""])
    assert not nothing.any() and not pooled_nothing.any()
