"""Emoji in prompts are read as words, and everything else is left as it is."""

import unicodedata

import pytest

from rfkernels.models.text import words
from rfkernels.prompts import spelled


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("🐱 with 🕶️", "cat face with dark sunglasses"),
        ("a ❤️ on a 🟦", "a red heart on a large blue square"),
        ("👍🏽", "thumbs up sign"),
        ("👩🏽‍🚀", "woman rocket"),
        ("🇩🇪!", "flag de !"),
        ("1️⃣ star", "1 star"),
        ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "waving black flag"),
        ("🐱🐶", "cat face dog face"),
        ("a red heart", "a red heart"),
        ("rotes herz", "rotes herz"),
        ("赤いハート", "赤いハート"),
        ("a → b, 5 ÷ 3", "a → b, 5 ÷ 3"),
    ],
)
def test_emoji_are_words(prompt, expected):
    assert spelled(prompt) == expected


def test_other_languages_are_words_of_the_tokenizer():
    assert words(spelled("rotes herz")) == ["rotes", "herz"]
    assert words(spelled("赤いハート 🐱")) == ["赤いハート", "cat", "face"]
    assert words(spelled("cafe\u0301")) == ["café"]  # one word, not cut at the combining accent


def test_a_code_point_without_a_name_is_a_word_that_nothing_knows():
    code = next(c for c in range(0x1FAFF, 0x1FA00, -1) if unicodedata.category(chr(c)) == "Cn")
    assert words(spelled(f"a {chr(code)}")) == ["a", f"u{code:x}"]
