"""Where the parts of a scene go when they touch: on top of each other, glasses and hats on faces."""

from dataclasses import dataclass, replace

import numpy as np

from rfkernels.train.glyphs import Bank

__all__ = ["Item", "accessory_items", "box_of", "on_top", "slot_of"]


@dataclass(frozen=True)
class Item:
    """One glyph in a scene: a row of the bank, a colour of TINTS or None, and its place.

    size: edge as a share of the picture's; x, y: centre in 0..1, y down; angle: degrees clockwise.
    """

    glyph: int
    tint: str | None = None
    size: float = 1.0
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0


# What faces wear: label -> place.
SLOTS = {
    "sunglasses": "eyes",
    "glasses": "eyes",
    "top hat": "head",
    "crown": "head",
    "graduation cap": "head",
    "billed cap": "head",
    "woman\u2019s hat": "head",
    "red heart": "beside it",
    "blue heart": "beside it",
    "star": "beside it",
    "rose": "beside it",
    "sunflower": "beside it",
    "cherry blossom": "beside it",
}

# Kind of face -> height of the eyes, width of glasses, height where a hat ends, width of a hat, as shares of
# the face's bounding box.
ANCHORS = {
    "round": (0.4, 0.84, 0.2, 0.7),
    "animal": (0.45, 0.7, 0.24, 0.5),
}
MARGIN = 0.02


def slot_of(label: str) -> str | None:
    """Where a face wears the object with this label; None if it does not."""
    return SLOTS.get(label)


def box_of(bank: Bank, row: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is visible of a glyph, as shares of its edge."""
    seen = bank.images[row, ..., 3] > 100
    columns, lines = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    if not len(columns):
        return 0.0, 0.0, 1.0, 1.0
    n = seen.shape[0]
    return columns[0] / n, lines[0] / n, (columns[-1] + 1) / n, (lines[-1] + 1) / n


def _fit(bank: Bank, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The items moved together, and made smaller if they must be, so that all of them are in the picture."""
    boxes = [box_of(bank, i.glyph) for i in items]
    spans = []
    for axis, centre in (0, "x"), (1, "y"):
        ends = [
            getattr(i, centre) + (b[edge] - 0.5) * i.size
            for i, b in zip(items, boxes, strict=True)
            for edge in (axis, axis + 2)
        ]
        spans.append((min(ends), max(ends)))
    scale = min(1.0, (1 - 2 * MARGIN) / max(high - low for low, high in spans))
    (x, y) = ((low + high) / 2 for low, high in spans)
    return tuple(
        replace(i, size=i.size * scale, x=0.5 + (i.x - x) * scale, y=0.5 + (i.y - y) * scale) for i in items
    )


def _placed(row: int, box, width: float, x: float, *, top=None, bottom=None, middle=None) -> Item:
    """The glyph with its visible box this wide, centred on x, with the one given edge or middle in y."""
    left, up, right, down = box
    size = width / (right - left)
    if top is not None:
        y = top - (up - 0.5) * size
    elif bottom is not None:
        y = bottom - (down - 0.5) * size
    else:
        y = middle - ((up + down) / 2 - 0.5) * size
    return Item(row, size=size, x=x - ((left + right) / 2 - 0.5) * size, y=y)


def on_top(bank: Bank, upper: int, lower: int) -> tuple[Item, ...]:
    """`upper` standing on `lower`: their visible boxes touch; the lower one first in the tuple."""
    above, below = box_of(bank, upper), box_of(bank, lower)
    base = Item(lower, size=0.6, x=0.5, y=0.5)
    top = 0.5 + (below[1] - 0.5) * base.size
    tall = (above[3] - above[1]) / (above[2] - above[0])  # height by width
    width = min(0.42, 0.42 / tall)
    return _fit(bank, (base, _placed(upper, above, width, 0.5, bottom=top + 0.015)))


def accessory_items(bank: Bank, face: int, thing: int, slot: str) -> tuple[Item, ...]:
    """A face and what it wears on its eyes or head or has beside it, the accessory in front."""
    left, top, right, bottom = box_of(bank, face)
    worn = box_of(bank, thing)
    width, height, x = right - left, bottom - top, (left + right) / 2
    concept = bank.concepts[bank.glyphs[face].concept]
    eyes, glasses, rim, hat = ANCHORS["animal" if "animal" in concept.subgroup else "round"]
    tall = (worn[3] - worn[1]) / (worn[2] - worn[0])
    if slot == "eyes":
        item = _placed(thing, worn, glasses * width, x, middle=top + eyes * height)
    elif slot == "head":
        item = _placed(thing, worn, min(hat, 0.6 / tall) * width, x, bottom=top + rim * height)
    else:
        item = _placed(thing, worn, 0.36 * width * min(1, 1 / tall), right - 0.02, top=top - 0.02)
    return _fit(bank, (Item(face), item))
