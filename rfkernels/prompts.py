"""Prompts as the text encoder takes them: cleaned, and with emoji spelled out in words."""

import re
import unicodedata

from rfkernels.settings import require

__all__ = ["clean", "spelled"]

_MAX_PROMPT = 1000  # characters; the text encoder reads far fewer words than these hold

_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]+")  # regional indicators, a letter each
# Characters whose Unicode name says something else than what everybody sees.
_SEEN_AS = {
    "❤": "red heart",
    "♥": "red heart",
    "⭐": "star",
    "☀": "sun",
    "✈": "airplane",
    "☎": "telephone",
    "☠": "skull and crossbones",
    "⚽": "soccer ball",
    "🚗": "red car",
    "🍎": "red apple",
    "🍏": "green apple",
    "☕": "coffee",
    "🤍": "white heart",
}


def clean(prompts: list[str]) -> tuple[list[str], list[str]]:
    """The prompts in one line each, not too long, and what there is to say about them."""
    texts, warnings = [], []
    for prompt in prompts:
        require(isinstance(prompt, str), f"a prompt must be text, got {type(prompt).__name__}")
        text = " ".join(prompt.encode("utf-8", "replace").decode("utf-8").split())
        if len(text) > _MAX_PROMPT:
            warnings.append(f"prompt cut to its first {_MAX_PROMPT} of {len(text)} characters")
            text = text[:_MAX_PROMPT]
        if not text:
            warnings.append("empty prompt: the picture is unconditional, anything may come")
        texts.append(text)
    return texts, list(dict.fromkeys(warnings))


def spelled(prompt: str) -> str:
    """`prompt` with every emoji as the words of its Unicode name: "🐱 🕶️" is "cat face dark sunglasses".

    Variation selectors, skin tones, keycaps and tags say nothing that the model knows and are left out, and
    so are the joiners of a sequence, whose members are named one after the other. A flag is "flag" and its
    two letters. A code point that Python has no name for is `u` and its number, a word that no training saw.
    """
    text = unicodedata.normalize("NFC", prompt)
    if text.isascii():
        return text
    text = _FLAG.sub(lambda flag: f" flag {''.join(chr(ord(c) - 0x1F185) for c in flag[0])} ", text)
    return " ".join("".join(map(_spelled, text)).split())


def _spelled(char: str) -> str:
    code = ord(char)
    if code in (0x200D, 0x20E3) or 0xFE00 <= code <= 0xFE0F or 0xE0000 <= code <= 0xE007F:
        return " " if code == 0x200D else ""
    if 0x1F3FB <= code <= 0x1F3FF:  # skin tones
        return ""
    if char in _SEEN_AS:
        return f" {_SEEN_AS[char]} "
    if unicodedata.category(char) != "So" and not (
        0x1F000 <= code <= 0x1FAFF and unicodedata.category(char) == "Cn"
    ):
        return char
    name = unicodedata.name(char, f"u{code:x}").lower().removeprefix("emoji component ")
    return f" {name.replace('-', ' ')} "
