"""Batches of the training run: pictures, captions, backgrounds. Batch k depends on (seed, k) only."""

from dataclasses import dataclass

import numpy as np

from rfkernels.models import text
from rfkernels.train import concepts
from rfkernels.train.data import Dataset, Entry

__all__ = ["Batch", "caption", "compose", "known_words", "make_batch", "sampling_weights"]

TRAIN_WORDS = 12  # longer captions are cut in training, so that every batch has one shape
DROP = 0.1  # captions dropped for guidance
STYLED = 0.85  # captions that name their style
BACKGROUND = 0.2  # pictures on a named background
TAIL_WORDS = ("emoji", "icon", "style")


@dataclass(frozen=True)
class Batch:
    """pictures: float32[batch, 4, size, size] in [-1, 1]; captions, "" where dropped; index: dataset rows."""

    pictures: np.ndarray
    captions: list[str]
    index: np.ndarray


def sampling_weights(data: Dataset) -> np.ndarray:
    """The probability of each row: its weight if it is in the training split, else 0."""
    weights = np.array([e.weight if e.split == "train" else 0.0 for e in data.entries])
    return weights / weights.sum()


def _subject(entry: Entry, rng: np.random.Generator) -> str:
    """Mostly the label, else an everyday name, the label with a tag, or a distinct tag alone."""
    u = rng.random()
    if entry.names and u < 0.45:
        return entry.names[rng.integers(len(entry.names))]
    if entry.tags and u > 0.75:
        tag = entry.tags[rng.integers(len(entry.tags))]
        return tag if u > 0.87 else f"{entry.label} {tag}"
    return entry.label


def caption(entry: Entry, background: str | None, rng: np.random.Generator) -> str:
    """One caption: [article] subject [style] [emoji] [on a COLOUR background], in a few word orders."""
    parts = [_subject(entry, rng)]
    if rng.random() < 0.35:
        parts.insert(0, "an" if parts[0][0].lower() in "aeiou" else "a")
    tail = str(rng.choice(TAIL_WORDS)) if rng.random() < 0.2 else ""
    if rng.random() < STYLED:
        if rng.random() < 0.3:
            parts.insert(0, entry.style)
            parts.append("" if tail == "style" else tail)
        else:
            parts += [entry.style, tail]
    if background:
        article = "a " if rng.random() < 0.5 else ""
        preposition = "on " if rng.random() < 0.8 else ""
        parts.append(f"{preposition}{article}{background} background")
    return " ".join(p for p in parts if p).lower()


def compose(image: np.ndarray, colour: tuple[float, float, float] | None) -> np.ndarray:
    """float32[4, size, size] in [-1, 1] of a premultiplied RGBA picture, on an opaque colour if given."""
    c = image.astype(np.float32).transpose(2, 0, 1) / 255
    if colour is not None:
        solid = np.array([*colour, 1.0], dtype=np.float32)[:, None, None]
        c = c + (1 - c[3:]) * solid
    return c * 2 - 1


def _background(
    entry: Entry, rng: np.random.Generator
) -> tuple[str | None, tuple[float, float, float] | None]:
    if rng.random() >= BACKGROUND:
        return None, None
    names = [n for n in concepts.BACKGROUNDS if n != "blue" or entry.label not in concepts.NEVER_ON_BLUE]
    name = names[rng.integers(len(names))]
    jitter = rng.uniform(-0.04, 0.04, 3)
    colour = np.clip(np.array(concepts.BACKGROUNDS[name]) / 255 + jitter, 0, 1)
    return name, tuple(colour)


def make_batch(data: Dataset, weights: np.ndarray, size: int, seed: int, step: int) -> Batch:
    """Batch number `step` of the run with this seed; `weights` from `sampling_weights`."""
    rng = np.random.default_rng([seed, step])
    index = rng.choice(len(data.entries), size, p=weights)
    pictures, captions = [], []
    for i in index:
        entry = data.entries[i]
        name, colour = _background(entry, rng)
        line = caption(entry, name, rng)
        captions.append("" if rng.random() < DROP else line)
        pictures.append(compose(data.images[i], colour))
    return Batch(np.stack(pictures), captions, index)


def known_words(data: Dataset) -> np.ndarray:
    """int32 keys, sorted, of every word that a training caption may hold."""
    lines = ["a an on background", *TAIL_WORDS, *concepts.BACKGROUNDS]
    for e in data.entries:
        if e.split == "train":
            lines += [e.label, e.style, *e.names, *e.tags]
    keys = {text.word_key(w) for line in lines for w in text.words(line)}
    return np.array(sorted(keys), dtype=np.int32)
