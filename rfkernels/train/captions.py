"""The words of a scene: synonyms, articles, plurals and several word orders, at most 16 words."""

import random
import re

import numpy as np

from rfkernels.models.text import MAX_WORDS, word_key, words
from rfkernels.train import concepts
from rfkernels.train.glyphs import Bank, Concept

__all__ = ["NUMBERS", "Captions", "article", "known_words", "plural"]

STYLED = 0.6  # captions that name their style
FOREIGN = 0.08  # plain scenes without a background whose caption is in another language

NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4")}
SMALL, BIG = ("small", "tiny", "little"), ("big", "large", "huge")
TAILS = ("emoji", "icon")

# {a} and {b} are the nouns of the first and second item, with their articles.
RELATIONS = {
    "left": (
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{b} right of {a}",
        "{b} to the right of {a}",
        "{a} on the left and {b} on the right",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{a} at the top and {b} at the bottom",
    ),
    "beside": ("{a} and {b}", "{b} and {a}", "{a} next to {b}", "{b} beside {a}"),
    "on": ("{b} on top of {a}", "{b} sitting on {a}", "{b} on {a}"),
    "bigger": ("{a} and {b}", "{b} and {a}", "{a} next to {b}", "{b} next to {a}"),
    "eyes": ("{a} wearing {b}", "{a} with {b}", "{a} in {b}", "{a} with {b} on"),
    "head": ("{a} wearing {b}", "{a} with {b}", "{a} in {b}", "{a} with {b} on its head"),
    "beside it": ("{a} with {b}", "{a} with {b} beside it"),
}

# {n} is the noun, {a} the noun with its article; "small" has gone into both.
PLACES = {
    "top left": ("{a} in the top left corner", "{a} at the top left", "{a} in the upper left"),
    "top right": ("{a} in the top right corner", "{a} at the top right", "{a} in the upper right"),
    "bottom left": ("{a} in the bottom left corner", "{a} at the bottom left", "{a} in the lower left"),
    "bottom right": ("{a} in the bottom right corner", "{a} at the bottom right", "{a} in the lower right"),
    "top": ("{a} at the top",),
    "bottom": ("{a} at the bottom",),
    "left": ("{a} on the left", "{a} on the left side"),
    "right": ("{a} on the right", "{a} on the right side"),
    "centre": ("{a} in the centre", "{a} in the middle", "{a} in the center"),
}

TURNS = {
    "upside down": ("{a} upside down", "an upside down {n}", "upside down {n}", "{a} on its head"),
    "left": ("{a} turned to the left", "{a} rotated left by 90 degrees"),
    "right": ("{a} turned to the right", "{a} rotated right by 90 degrees"),
    "tilted left": ("{a} tilted left", "{a} tilted to the left", "{a} leaning left"),
    "tilted right": ("{a} tilted right", "{a} tilted to the right", "{a} leaning right"),
}

TINTS = ("{c} {n}", "a {c} {n}", "a {c} {n}", "{c} coloured {n}", "{a} in {c}")
STYLES = ("{t} {s}", "{t} {s} style", "{t} in {s} style", "{t} {s} emoji", "{s} style {t}", "{s} {t}")
BACKGROUNDS = (
    "{t} on a {c} background",
    "{t} on {c} background",
    "{t} {c} background",
    "{t} with a {c} background",
    "{c} background {t}",
)

COLOURS = frozenset({*concepts.TINTS, "brown", "black", "white", "grey", "gray", "light", "dark"})
IRREGULAR = {
    "mouse": "mice",
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "snowman": "snowmen",
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "tooth": "teeth",
    "foot": "feet",
    "leaf": "leaves",
    "wolf": "wolves",
    "knife": "knives",
    "loaf": "loaves",
    "cactus": "cacti",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "ox": "oxen",
    "sushi": "sushi",
}
HEAD = re.compile(r"\s(?:with|without|of|in|on|pointed|over|behind|and|showing|to|done|tilted)\b.*")
VOWEL_SOUND = re.compile(r"(?!uni|use|ufo|uk|eu|one\b)[aeiou]|hour|x-?ray")


def _head(noun: str) -> tuple[str, str]:
    """The part of a noun that takes the plural, and what follows it: ("face", " with tears of joy")."""
    match = HEAD.search(noun)
    return (noun[: match.start()], match.group()) if match else (noun, "")


def is_plural(noun: str) -> bool:
    """Whether a noun names several things, such as "grapes" and "glasses"."""
    last = _head(noun)[0].split(" ")[-1]
    return last.endswith("s") and not last.endswith(("ss", "us", "is", "as"))


def article(noun: str) -> str:
    """The noun with "a" or "an", or alone if it is a plural."""
    if is_plural(noun) or noun.startswith(("the ", "two ")):
        return noun
    return f"an {noun}" if VOWEL_SOUND.match(noun) else f"a {noun}"


def plural(noun: str) -> str:
    """The plural of an English noun: "faces with tears of joy", "mice", "cherries", "boxes"."""
    head, rest = _head(noun)
    before, _, last = head.rpartition(" ")
    if last in IRREGULAR:
        many = IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        many = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return f"{before} {many}{rest}".strip()


def colourless(noun: str) -> str:
    """The noun without the colour words that it starts with: "heart" of "light blue heart"."""
    parts = noun.split(" ")
    while parts and parts[0] in COLOURS:
        parts.pop(0)
    return " ".join(parts)


def pick(rng: random.Random, options):
    """One of the options, all alike in probability."""
    return options[int(rng.random() * len(options))]


class Captions:
    """Writes captions for the scenes of one bank: `line(scene, rng)`."""

    def __init__(self, bank: Bank):
        self.bank = bank
        self.nouns = [self._nouns(c) for c in bank.concepts]  # the label first

    @staticmethod
    def _nouns(concept: Concept) -> tuple[str, ...]:
        """Short names that stand as a noun in a sentence; the label alone if there are none."""
        label = concept.label.lower()
        names = [n.lower() for n in concept.names if not n.endswith("ing")]
        return tuple(n for n in (label, *names) if len(words(n)) <= 4) or (label,)

    def _noun(self, concept: int, rng: random.Random) -> str:
        nouns = self.nouns[concept]
        return nouns[0] if rng.random() < 0.5 else pick(rng, nouns)

    def _plain(self, index: int, rng: random.Random) -> str:
        """Mostly the label, else an everyday name, the label with a tag, or a distinct tag alone."""
        concept, u = self.bank.concepts[index], rng.random()
        if concept.names and u < 0.4:
            text = pick(rng, concept.names)
        elif concept.tags and u > 0.78:
            tag = pick(rng, concept.tags)
            text = tag if u > 0.88 else f"{concept.label} {tag}"
        else:
            text = concept.label
        text = text.lower()
        return article(text) if rng.random() < 0.35 else text

    def _pair(self, scene, first: int, second: int, rng: random.Random) -> str:
        a, b = self._noun(first, rng), self._noun(second, rng)
        if scene.relation == "bigger":
            a, b = f"{pick(rng, BIG)} {a}", f"{pick(rng, SMALL)} {b}"
        if rng.random() < 0.75:
            a, b = article(a), article(b)
        return pick(rng, RELATIONS[scene.relation]).format(a=a, b=b)

    def _subject(self, scene, rng: random.Random) -> str:
        first, *others = [self.bank.glyphs[i.glyph].concept for i in scene.items]
        if scene.kind == "plain":
            return self._plain(first, rng)
        if scene.kind in ("relation", "accessory"):
            return self._pair(scene, first, others[0], rng)
        noun = self._noun(first, rng)
        if scene.kind == "count":
            return f"{pick(rng, NUMBERS[len(scene.items)])} {plural(noun)}"
        if scene.kind == "tint":
            noun = colourless(noun) or colourless(self.nouns[first][0])
            line = pick(rng, TINTS).format(c=scene.items[0].tint, n=noun, a=article(noun))
            return line.replace("a orange", "an orange")
        if scene.kind == "corner":
            noun, forms = f"{pick(rng, SMALL)} {noun}", PLACES[scene.relation]
        else:
            forms = TURNS[scene.relation]
        return pick(rng, forms).format(n=noun, a=article(noun) if rng.random() < 0.75 else noun)

    def _sentence(self, scene, rng: random.Random, styled: bool) -> str:
        style = self.bank.glyphs[scene.items[0].glyph].style
        concept = self.bank.concepts[self.bank.glyphs[scene.items[0].glyph].concept]
        spoken = [name for _, name in concept.foreign if len(words(name)) <= MAX_WORDS - 4]
        foreign = scene.kind == "plain" and scene.background is None and rng.random() < FOREIGN
        line = pick(rng, spoken).lower() if spoken and foreign else self._subject(scene, rng)
        late = rng.random() < 0.4  # the style after the background
        if scene.background and late:
            line = pick(rng, BACKGROUNDS).format(t=line, c=scene.background)
        if styled:
            line = pick(rng, STYLES).format(t=line, s=style)
        elif rng.random() < 0.1 and scene.kind == "plain":
            line = f"{line} {pick(rng, TAILS)}"
        if scene.background and not late:
            line = pick(rng, BACKGROUNDS).format(t=line, c=scene.background)
        return line

    def line(self, scene, rng: random.Random) -> str:
        """A true caption of the scene in at most 16 words; one that would be longer is put another way."""
        styled = rng.random() < STYLED
        for attempt in range(32):
            line = self._sentence(scene, rng, styled and attempt < 8)
            if len(words(line)) <= MAX_WORDS:
                return line
        return " ".join(words(line)[:MAX_WORDS])


def known_words(bank: Bank) -> np.ndarray:
    """int32 keys, sorted, of every word that a training caption may hold."""
    forms = [f for table in (RELATIONS, PLACES, TURNS, NUMBERS) for row in table.values() for f in row]
    forms += [*TINTS, *STYLES, *BACKGROUNDS, *SMALL, *BIG, *TAILS, "a an", *concepts.TINTS]
    lines = [re.sub(r"{\w}", "", form) for form in forms] + list(concepts.BACKGROUNDS)
    captions = Captions(bank)
    for index in sorted({g.concept for g in bank.glyphs if g.split == "train"}):
        c = bank.concepts[index]
        lines += [c.label, *c.names, *c.tags, *(name for _, name in c.foreign)]
        lines += [plural(noun) for noun in captions.nouns[index]]
    lines += sorted({g.style for g in bank.glyphs})
    return np.array(sorted({word_key(w) for line in lines for w in words(line)}), dtype=np.int32)
