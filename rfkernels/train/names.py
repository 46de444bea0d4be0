"""Concepts: what an emoji is called, in English and other languages, and how often it is trained on."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from rfkernels.train.concepts import ALIASES, EXCLUDED, FACELESS, FACES, INCLUDED, NEVER, POPULAR, SUBGROUPS
from rfkernels.train.packages import Archive

__all__ = ["Concept", "concepts_of"]

UNUSED_LANGUAGES = ("en", "en-gb", "es-mx", "bn", "hi", "th")  # the last three have scripts of their own
COLOURS = re.compile(r"\b(black|white|red|orange|yellow|green|blue|purple|pink|brown|grey)\b")
UNUSED_GROUPS = ("component", "flags")
UNUSED_SUBGROUPS = ("keycap", "flag", "country-flag", "subdivision-flag")
DRESSED = ("face-hand", "face-hat", "face-glasses", "face-costume")  # smileys that wear something already
MOST_SHARED = 3  # a tag of more emoji than this says too little
FOREIGN_TAGS = 2


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


def concepts_of(emojibase: Archive) -> tuple[Concept, ...]:
    """The emoji of emojibase in its own order, without flags, skin tones, letters and trademarks."""
    groups, subgroups = _groups(emojibase)
    chosen = []
    for emoji in emojibase.json("en/data.json"):
        group, subgroup = groups.get(emoji.get("group")), subgroups.get(emoji.get("subgroup"))
        if group is None or group in UNUSED_GROUPS or subgroup in UNUSED_SUBGROUPS:
            continue
        if (label := _plain(emoji["label"])) not in NEVER:
            chosen.append({**emoji, "label": label, "group": group, "subgroup": subgroup})
    taken = {e["label"] for e in chosen}.union(*ALIASES.values())
    shortcodes = emojibase.json("en/shortcodes/emojibase.json")
    foreign = _foreign(emojibase, frozenset(e["hexcode"] for e in chosen))
    shared = Counter(tag for e in chosen for tag in set(e.get("tags", ())))
    return tuple(_concept(e, taken, shortcodes, shared, foreign[e["hexcode"]]) for e in chosen)


def _groups(emojibase: Archive) -> tuple[dict[int, str], dict[int, str]]:
    messages = emojibase.json("en/messages.json")
    groups = {g["order"]: g["key"] for g in messages["groups"]}
    subgroups = {s["order"]: s["key"] for s in messages["subgroups"]}
    return groups, subgroups  # emojibase numbers two subgroups 46; the second, food-sweet, is the one in use


def _plain(label: str) -> str:
    return re.sub(r"[\u201c\u201d]", "", label.replace("\u2019", "'")).lower()


def _concept(emoji: dict, taken: set[str], shortcodes: dict, shared: Counter, foreign: tuple) -> Concept:
    label, subgroup = emoji["label"], emoji["subgroup"]
    names = _names(emoji, taken, shortcodes.get(emoji["hexcode"], ()))
    taken = taken.union(names)
    tags = (t for t in emoji.get("tags", ()) if shared[t] <= MOST_SHARED)
    tags = tuple(
        dict.fromkeys(
            t for t in map(str.lower, tags) if t not in taken and re.fullmatch(r"[a-z][a-z' -]+", t)
        )
    )
    chosen = label in INCLUDED or (subgroup in SUBGROUPS and label not in EXCLUDED)
    weight = 4.0 if label in POPULAR else 1.0 if chosen else 0.3
    smiley = subgroup == "cat-face" or (subgroup.startswith("face-") and subgroup not in DRESSED)
    face = label in FACES or (smiley and label not in FACELESS)
    hexcode = emoji["hexcode"].lower()
    return Concept(hexcode, label, emoji["group"], subgroup, names, tags, foreign, weight, face)


def _names(emoji: dict, taken: set[str], shortcodes: str | list[str]) -> tuple[str, ...]:
    """The chosen everyday names, then Unicode's name and the shortcodes as far as they are plain words."""
    label = emoji["label"]
    code = "".join(chr(int(c, 16)) for c in emoji["hexcode"].split("-") if c != "FE0F")
    unicode = unicodedata.name(code, "").lower() if len(code) == 1 else ""
    shortcodes = [shortcodes] if isinstance(shortcodes, str) else shortcodes
    found = (n for n in (unicode, *(s.replace("_", " ") for s in shortcodes)) if n not in taken)
    plain = (n for n in found if _everyday(n) and set(COLOURS.findall(n)) <= set(COLOURS.findall(label)))
    return tuple(n for n in dict.fromkeys((*ALIASES.get(label, ()), *plain)) if n != label)


def _everyday(name: str) -> bool:
    """Up to five words of letters, none of which is an abbreviation."""
    words = name.replace("-", " ").split()
    return 1 <= len(words) <= 5 and all(re.fullmatch(r"[a-z]*[aeiouy][a-z]*", w) for w in words)


def _foreign(emojibase: Archive, wanted: frozenset[str]) -> dict[str, tuple[tuple[str, str], ...]]:
    """hexcode -> (language, name) pairs: the label and up to two tags that only one or two emoji have."""
    found: dict[str, list[tuple[str, str]]] = {hexcode: [] for hexcode in wanted}
    for language in sorted(p.removesuffix("/data.json") for p in emojibase.files if p.endswith("/data.json")):
        if language in UNUSED_LANGUAGES:
            continue
        emoji = [e for e in emojibase.json(f"{language}/data.json") if e["hexcode"] in wanted]
        shared = Counter(tag for e in emoji for tag in set(e.get("tags", ())))
        for e in emoji:
            tags = [t for t in e.get("tags", ()) if shared[t] <= 2 and t.lower() != e["label"].lower()]
            names = (e["label"], *tags[:FOREIGN_TAGS])
            found[e["hexcode"]] += [(language, n.lower()) for n in names]
    return {hexcode: tuple(dict.fromkeys(names)) for hexcode, names in found.items()}
