"""Concepts: what an emoji is called, in English and other languages, and how often it is trained on."""

from dataclasses import dataclass

__all__ = ["Concept"]


@dataclass(frozen=True)
class Concept:
    """One emoji apart from its art.

    label: CLDR English, lower case. names: everyday English for the same thing. tags: words that can stand
    for it. foreign: (language, name) pairs. weight: how often it is sampled. face: accessories fit on it.
    """

    hexcode: str
    label: str
    group: str
    subgroup: str
    names: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0
    face: bool = False
