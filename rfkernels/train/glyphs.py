"""The training pictures: emoji in six art styles from npm packages, with names, as one packed file."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rfkernels.train.names import Concept

__all__ = ["Bank", "Concept", "Glyph"]


@dataclass(frozen=True)
class Glyph:
    """One picture: the index of its concept, its style, its part of the split and its dominant hue.

    hue is in degrees; None says that no colour dominates, so the picture cannot be tinted.
    """

    concept: int
    style: str
    split: str  # "train" or "held-out"
    hue: float | None


@dataclass(frozen=True)
class Bank:
    """Pictures uint8[n, size, size, 4] (RGBA, premultiplied), one glyph each, their concepts and packages."""

    images: np.ndarray
    glyphs: tuple[Glyph, ...]
    concepts: tuple[Concept, ...]
    sources: tuple[dict, ...]

    @property
    def size(self) -> int:
        return self.images.shape[1]

    @cached_property
    def _rows(self) -> dict[tuple[int, str], int]:
        return {(g.concept, g.style): row for row, g in enumerate(self.glyphs)}

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {c.label: i for i, c in enumerate(self.concepts)}

    def indices(self, split: str) -> np.ndarray:
        """int64: the rows of one part of the split."""
        return np.array([i for i, g in enumerate(self.glyphs) if g.split == split], dtype=np.int64)

    def glyph_of(self, concept: int, style: str) -> int | None:
        """The row that shows `concept` in `style`; None where that style lacks it."""
        return self._rows.get((concept, style))

    def concept_of(self, label: str) -> int:
        """The index of the concept called `label`; ValueError if there is none."""
        if label not in self._labels:
            raise ValueError(f"the label of a concept was required, such as 'red heart'; got {label!r}")
        return self._labels[label]
