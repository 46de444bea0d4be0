"""Scenes composed of glyphs, with captions that are true of them, and which of them training never shows.

A scene says what is drawn where; `render` draws it. Scenes of a step are a function of (bank, seed, step).
"""

import random
import zlib
from bisect import bisect
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from rfkernels.train import concepts
from rfkernels.train.captions import NUMBERS, PLACES, TURNS, Captions, colourless, is_plural, pick
from rfkernels.train.glyphs import Bank
from rfkernels.train.layouts import Item, accessory_items, on_top, slot_of

__all__ = ["DROP", "KINDS", "Item", "Scene", "SceneSampler", "evaluation_scenes", "held_out"]

DROP = 0.1  # captions dropped for guidance
BACKGROUND = 0.25  # scenes on a named background
POPULAR_SHARE = 0.8  # of the objects of composed scenes; the others are of weight 1 and more
KINDS = {
    "plain": 0.42,
    "tint": 0.12,
    "count": 0.12,
    "relation": 0.14,
    "corner": 0.06,
    "turned": 0.04,
    "accessory": 0.10,
}
TRIES = 200  # for a combination that is allowed, before a scene becomes plain
OWN_HUE = 30  # degrees: a glyph is not tinted to a colour this near to its own
POINTS = {  # centres of small objects
    "top left": (0.2, 0.2),
    "top right": (0.8, 0.2),
    "bottom left": (0.2, 0.8),
    "bottom right": (0.8, 0.8),
    "top": (0.5, 0.2),
    "bottom": (0.5, 0.8),
    "left": (0.2, 0.5),
    "right": (0.8, 0.5),
    "centre": (0.5, 0.5),
}
ANGLES = {"upside down": 180, "left": -90, "right": 90, "tilted left": -30, "tilted right": 30}
ROWS = {  # arrangements of equal objects: (size, centres)
    2: ((0.47, ((0.26, 0.5), (0.74, 0.5))),),
    3: (
        (0.46, ((0.5, 0.27), (0.26, 0.73), (0.74, 0.73))),
        (0.46, ((0.26, 0.27), (0.74, 0.27), (0.5, 0.73))),
        (0.32, ((0.17, 0.5), (0.5, 0.5), (0.83, 0.5))),
    ),
    4: ((0.46, ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))),),
}


@dataclass(frozen=True)
class Scene:
    """What is drawn, from the back to the front, on which background, and the words for it.

    background: the colour's name or None, rgb: its colour in 0..1. relation: of the first item to the second
    ("left", "above", "beside", "bigger"), of the second to the first ("on", "eyes", "head", "beside it"), the place in the picture of kind
    "corner", the turn of kind "turned", "" for other kinds.
    """

    kind: str
    items: tuple[Item, ...]
    background: str | None = None
    rgb: tuple[float, float, float] | None = None
    caption: str = ""
    relation: str = ""


# ------------------------------------------------------------------------------------------- what is held out


def _by_hash(key: str) -> bool:
    """5 % of all combinations, the same ones for ever."""
    return zlib.crc32(key.encode()) % 20 == 0


def _combination(bank: Bank, scene: Scene) -> str:
    """The combination of a composed scene that is in training or held out as a whole; "" for a plain one."""
    labels = [bank.concepts[bank.glyphs[i.glyph].concept].label for i in scene.items]
    if scene.kind == "plain":
        return ""
    if scene.kind == "tint":
        return f"{scene.items[0].tint} {colourless(labels[0]) or labels[0]}"
    if scene.kind == "count":
        return f"{len(labels)} {labels[0]}"
    if scene.kind == "relation":
        return " and ".join(sorted(labels[:2]))
    return f"{scene.kind} {scene.relation} {' on '.join(reversed(labels))}"


def _combination_held_out(bank: Bank, scene: Scene) -> bool:
    key = _combination(bank, scene)
    if scene.kind != "tint":
        return bool(key) and _by_hash(key)
    concept = bank.concepts[bank.glyphs[scene.items[0].glyph].concept]
    named = {f"{scene.items[0].tint} {colourless(n.lower())}" for n in (concept.label, *concept.names)}
    if named & set(concepts.HELD_OUT):
        return True
    return _by_hash(key) and not _is_label(bank, key)  # "green apple" is an emoji and trained as one


def _is_label(bank: Bank, text: str) -> bool:
    return any(text == c.label for c in bank.concepts)


def held_out(scene: Scene, bank: Bank) -> bool:
    """Whether training never shows this scene.

    Held out are the glyphs of that split, captions of HELD_OUT in every style, objects of NEVER_ON_BLUE on
    blue, and 5 % by hash of all (colour, object), (number, object), (object, object) in whatever relation,
    (accessory, face), (place, object) and (turn, object).
    """
    glyphs = [bank.glyphs[i.glyph] for i in scene.items]
    labels = [bank.concepts[g.concept].label for g in glyphs]
    return (
        any(g.split == "held-out" for g in glyphs)
        or any(label in concepts.HELD_OUT for label in labels)
        or (scene.background == "blue" and any(label in concepts.NEVER_ON_BLUE for label in labels))
        or _combination_held_out(bank, scene)
    )


# ---------------------------------------------------------------------------------------------- the sampler


class _Pool:
    """Concepts to draw from, each with its weight."""

    def __init__(self, indices: list[int], weights: list[float]):
        self.indices, self.sums = indices, list(accumulate(weights))

    def draw(self, rng: random.Random) -> int:
        at = bisect(self.sums, rng.random() * self.sums[-1])
        return self.indices[min(at, len(self.indices) - 1)]


class SceneSampler:
    """Draws scenes that are not held out; with `held=True`, combinations that are, of glyphs that are not."""

    def __init__(self, bank: Bank, seed: int, *, held: bool = False):
        self.bank, self.seed, self.held = bank, seed, held
        self.captions = Captions(bank)
        self.rows: dict[int, dict[str, int]] = {}  # concept -> style -> row, of the training split
        for row, glyph in enumerate(bank.glyphs):
            if glyph.split == "train" and bank.concepts[glyph.concept].label not in concepts.HELD_OUT:
                self.rows.setdefault(glyph.concept, {})[glyph.style] = row
        if not self.rows:
            raise ValueError("scenes: a bank with glyphs of the training split was required, got none")
        self._pools()
        self.makers = {
            "tint": self._tint,
            "count": self._count,
            "relation": self._relation,
            "corner": self._corner,
            "turned": self._turned,
            "accessory": self._accessory,
        }
        self.kinds = list(KINDS)
        self.shares = list(accumulate(KINDS.values()))

    def _pools(self) -> None:
        every, weight = list(self.rows), {i: self.bank.concepts[i].weight for i in self.rows}
        self.all = _Pool(every, [weight[i] for i in every])
        known = [i for i in every if weight[i] >= 1] or every
        popular = [i for i in known if weight[i] >= 4] or known
        share = POPULAR_SHARE / len(popular)
        rest = (1 - POPULAR_SHARE) / len(known)
        likely = set(popular)
        self.simple = _Pool(known, [rest + share * (i in likely) for i in known])
        self.faces = [i for i in every if self.bank.concepts[i].face and weight[i] >= 1]
        self.worn = [i for i in every if slot_of(self.bank.concepts[i].label)]

    def _styles(self, *indices: int) -> list[str]:
        """The styles in which all these concepts can be drawn."""
        first, *others = (self.rows[i] for i in indices)
        return [s for s in first if all(s in o for o in others)]

    def scenes(self, step: int, count: int) -> list[Scene]:
        """`count` scenes with captions, DROP of these ""; the same for the same (bank, seed, step)."""
        rng = random.Random(self.seed * 1_000_003 + step)
        found = []
        for _ in range(count):
            kind = self.kinds[min(bisect(self.shares, rng.random()), len(self.kinds) - 1)]
            scene = self.scene(kind, rng)
            found.append(replace(scene, caption="") if rng.random() < DROP else scene)
        return found

    def scene(self, kind: str, rng: random.Random) -> Scene:
        """One scene with its caption; a plain one where the bank has nothing for the kind."""
        scene = self._composed(kind, rng) if kind != "plain" else None
        scene = scene or self._plain(rng)
        if rng.random() < BACKGROUND:
            scene = self.on_background(scene, rng)
        return replace(scene, caption=self.captions.line(scene, rng))

    def _composed(self, kind: str, rng: random.Random) -> Scene | None:
        for _ in range(TRIES):
            scene = self.makers[kind](rng)
            if scene and _combination_held_out(self.bank, scene) == self.held:
                return scene
        return None

    def on_background(self, scene: Scene, rng: random.Random, name: str | None = None) -> Scene:
        """The scene on a background of that name, or of any name that it may have."""
        if name is None:
            labels = {self.bank.concepts[self.bank.glyphs[i.glyph].concept].label for i in scene.items}
            never = {"blue"} if labels & concepts.NEVER_ON_BLUE else set()
            never |= {i.tint for i in scene.items}
            name = pick(rng, [n for n in concepts.BACKGROUNDS if n not in never])
        rgb = (min(max(c / 255 + 0.08 * (rng.random() - 0.5), 0), 1) for c in concepts.BACKGROUNDS[name])
        return replace(scene, background=name, rgb=tuple(rgb))

    # One maker for each kind: a scene without words and background, or None for an unlucky draw.

    def _plain(self, rng: random.Random) -> Scene:
        concept = self.all.draw(rng)
        return Scene("plain", (Item(self.rows[concept][pick(rng, list(self.rows[concept]))]),))

    def _row(self, rng: random.Random) -> int:
        """A glyph for a composed scene."""
        concept = self.simple.draw(rng)
        return self.rows[concept][pick(rng, list(self.rows[concept]))]

    def _tint(self, rng: random.Random) -> Scene | None:
        row, colour = self._row(rng), pick(rng, list(concepts.TINTS))
        hue = self.bank.glyphs[row].hue
        if hue is None or abs((hue - concepts.TINTS[colour][0] + 180) % 360 - 180) < OWN_HUE:
            return None
        label = self.bank.concepts[self.bank.glyphs[row].concept].label
        return Scene("tint", (Item(row, tint=colour),)) if colourless(label) else None

    def _count(self, rng: random.Random) -> Scene | None:
        row, number = self._row(rng), pick(rng, list(NUMBERS))
        if any(is_plural(n) for n in self.captions.nouns[self.bank.glyphs[row].concept]):
            return None
        size, centres = pick(rng, ROWS[number])
        size *= 0.85 + 0.15 * rng.random()
        return Scene("count", tuple(Item(row, size=size, x=x, y=y) for x, y in centres))

    def _two(self, rng: random.Random) -> tuple[int, int] | None:
        """Rows of two different objects of one style."""
        a, b = self.simple.draw(rng), self.simple.draw(rng)
        styles = self._styles(a, b)
        shared = set(self.captions.nouns[a]) & set(self.captions.nouns[b])
        if a == b or shared or not styles:
            return None
        style = pick(rng, styles)
        return self.rows[a][style], self.rows[b][style]

    def _relation(self, rng: random.Random) -> Scene | None:
        rows = self._two(rng)
        if rows is None:
            return None
        first, second = rows
        relation = pick(rng, ("left", "above", "beside", "on", "bigger"))
        size, shift = 0.4 + 0.07 * rng.random(), 0.04 * (rng.random() - 0.5)
        near, far, middle = 0.255, 0.745, 0.5 + shift
        if relation == "on":
            return Scene("relation", on_top(self.bank, first, second), relation=relation)
        if relation == "above":
            places = (size, middle, near), (size, middle, far)
        elif relation == "bigger":
            small = 0.24 + 0.08 * rng.random()
            places = (0.64, 0.34, 0.5 + shift), (small, 0.98 - small / 2, 0.2 + 0.6 * rng.random())
        else:
            places = (size, near, middle), (size, far, middle)
        if relation in ("beside", "bigger") and rng.random() < 0.5:
            places = tuple((s, 1 - x, y) for s, x, y in places)
        items = tuple(Item(r, size=s, x=x, y=y) for r, (s, x, y) in zip(rows, places, strict=True))
        return Scene("relation", items, relation=relation)

    def _corner(self, rng: random.Random) -> Scene:
        row, place = self._row(rng), pick(rng, list(PLACES))
        (x, y), size = POINTS[place], 0.24 + 0.14 * rng.random()
        x, y = (c if c == 0.5 else 0.5 + (c - 0.5) * (0.9 + 0.1 * rng.random()) for c in (x, y))
        return Scene("corner", (Item(row, size=size, x=x, y=y),), relation=place)

    def _turned(self, rng: random.Random) -> Scene | None:
        row, turn = self._row(rng), pick(rng, list(TURNS))
        angle, size = ANGLES[turn], 1.0
        if "tilted" in turn:
            angle, size = angle * (0.8 + 0.5 * rng.random()), 0.8
        picture = self.bank.images[row, ::4, ::4].astype(np.int16)
        other = np.rot90(picture, 2 if angle == 180 else 1)
        if np.abs(picture - other).mean() < 12:  # a ball looks the same
            return None
        return Scene("turned", (Item(row, size=size, angle=angle),), relation=turn)

    def _accessory(self, rng: random.Random) -> Scene | None:
        if not self.faces or not self.worn:
            return None
        face, thing = pick(rng, self.faces), pick(rng, self.worn)
        styles = self._styles(face, thing)
        slot = slot_of(self.bank.concepts[thing].label)
        if face == thing or not styles:
            return None
        style = pick(rng, styles)
        items = accessory_items(self.bank, self.rows[face][style], self.rows[thing][style], slot)
        return items and Scene("accessory", items, relation=slot)


# -------------------------------------------------------------------------------------------- for evaluation


def evaluation_scenes(bank: Bank, kind: str, count: int, seed: int) -> list[Scene]:
    """`count` scenes that training never shows, different combinations as long as there are new ones.

    Args:
        kind: one of KINDS, held out by its glyph ("plain") or by its combination of known glyphs (the
            others), or "background": objects of NEVER_ON_BLUE on blue.

    Raises:
        ValueError: another kind, or the bank has nothing of it that is held out.
    """
    if kind not in KINDS and kind != "background":
        raise ValueError(
            f"scenes: kind was required to be one of {', '.join(KINDS)}, background; got {kind!r}"
        )
    sampler, rng = SceneSampler(bank, seed, held=True), random.Random(seed)
    scenes, seen, misses = [], set(), 0
    plain = _held_out_rows(bank, sampler, kind)
    while len(scenes) < count:
        if kind in ("plain", "background"):
            scene = Scene("plain", (Item(pick(rng, plain)),)) if plain else None
        else:
            scene = sampler._composed(kind, rng)
        if scene is None:
            raise ValueError(f"scenes: held-out scenes of kind {kind} were required, the bank has none")
        key = (_combination(bank, scene), scene.items[0].glyph if kind in ("plain", "background") else 0)
        if key in seen and misses < 50:
            misses += 1
            continue
        seen.add(key)
        misses = 0
        if kind == "background":
            scene = sampler.on_background(scene, rng, "blue")
        elif rng.random() < BACKGROUND:
            scene = sampler.on_background(scene, rng)
        scenes.append(replace(scene, caption=sampler.captions.line(scene, rng)))
    return scenes


def _held_out_rows(bank: Bank, sampler: SceneSampler, kind: str) -> list[int]:
    if kind == "background":
        labels = concepts.NEVER_ON_BLUE
        known = [i for i in sampler.rows if bank.concepts[i].label in labels]
        return [row for i in known for row in sampler.rows[i].values()]
    held = [g.split == "held-out" or bank.concepts[g.concept].label in concepts.HELD_OUT for g in bank.glyphs]
    return [row for row, out in enumerate(held) if out]
