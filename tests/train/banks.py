"""A tiny synthetic bank of glyphs for tests: coloured shapes under real labels, nothing downloaded."""

import colorsys

import numpy as np

from rfkernels.train.glyphs import Bank, Concept, Glyph

STYLES = ("noto", "flat")
HELD_OUT = (("pizza", "flat"), ("rocket", "noto"))

# label: (shape, colour, group, subgroup, names, tags, foreign, face)
SHAPES = {
    "red heart": ("heart", (220, 30, 40), "smileys-emotion", "heart", ("heart",), (), ("rotes herz",), 0),
    "blue heart": ("heart", (40, 80, 230), "smileys-emotion", "heart", (), ("azure",), ("blaues herz",), 0),
    "red circle": ("disc", (220, 30, 40), "symbols", "geometric", (), (), ("roter kreis",), 0),
    "blue circle": ("disc", (40, 80, 230), "symbols", "geometric", (), (), ("blauer kreis",), 0),
    "green square": ("square", (40, 160, 60), "symbols", "geometric", (), (), ("grünes quadrat",), 0),
    "star": ("star", (250, 200, 40), "travel-places", "sky-weather", (), ("astronomy",), ("stern",), 0),
    "grinning face": ("face", (250, 200, 40), "smileys-emotion", "face-smiling", ("smiley",), (), (), 1),
    "cat face": (
        "face",
        (240, 160, 50),
        "animals-nature",
        "animal-mammal",
        ("cat",),
        ("pet",),
        ("katze",),
        1,
    ),
    "dog face": ("face", (170, 110, 60), "animals-nature", "animal-mammal", ("dog",), (), ("hund",), 1),
    "pizza": ("triangle", (240, 170, 60), "food-drink", "food-prepared", (), ("slice",), ("pizza",), 0),
    "red apple": ("disc", (200, 40, 40), "food-drink", "food-fruit", ("apple",), (), ("apfel",), 0),
    "automobile": ("bar", (230, 60, 40), "travel-places", "transport-ground", ("car",), (), ("auto",), 0),
    "rocket": ("triangle", (120, 120, 125), "travel-places", "transport-air", (), ("space",), (), 0),
    "sunglasses": ("bar", (25, 25, 25), "objects", "clothing", (), ("dark", "eyewear"), (), 0),
    "top hat": ("square", (30, 30, 30), "objects", "clothing", (), ("hat",), ("zylinder",), 0),
    "crown": ("star", (250, 190, 30), "objects", "clothing", (), ("king",), ("krone",), 0),
}


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the points (x, y) of [-1, 1]^2, y down, are in the shape."""
    if shape == "heart":
        u, v = x / 0.7, 0.15 - y / 0.75
        return (u * u + v * v - 1) ** 3 < u * u * v**3
    if shape == "star":
        return np.abs(x) ** 0.6 + np.abs(y) ** 0.6 < 0.9**0.6
    return {
        "disc": x * x + y * y < 0.64,
        "face": x * x + y * y < 0.72,
        "square": np.maximum(abs(x), abs(y)) < 0.7,
        "triangle": (y < 0.8) & (y > 2 * abs(x) - 0.8),
        "bar": (abs(x) < 0.9) & (abs(y) < 0.35),
    }[shape]


def draw(shape: str, colour: tuple[int, int, int], size: int) -> np.ndarray:
    """uint8[size, size, 4]: the shape on nothing with smooth edges, premultiplied; a face has dark eyes."""
    y, x = ((np.mgrid[: 4 * size, : 4 * size] + 0.5) / (2 * size)) - 1
    alpha = _inside(shape, x, y).astype(float)
    rgb = alpha[..., None] * np.array(colour, float)
    if shape == "face":
        rgb[(abs(x) - 0.3) ** 2 + (y + 0.15) ** 2 < 0.015] = 20
    fine = np.concatenate([rgb, 255 * alpha[..., None]], -1)
    return np.round(fine.reshape(size, 4, size, 4, 4).mean((1, 3))).astype(np.uint8)


def hue_of(colour: tuple[int, int, int]) -> float | None:
    """Hue in degrees of a colour, None for a grey one."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    return 360 * hue if saturation > 0.3 else None


def make_bank(size: int = 32) -> Bank:
    """16 concepts in two styles ("flat" is darker); 2 glyphs held out; four faces have `face` set."""
    images, glyphs, concepts = [], [], []
    for i, (label, row) in enumerate(SHAPES.items()):
        shape, colour, group, subgroup, names, tags, foreign, face = row
        foreign = tuple(("de", name) for name in foreign)
        weight = 4.0 if i < 8 else 1.0
        concepts.append(
            Concept(f"{0x1F300 + i:x}", label, group, subgroup, names, tags, foreign, weight, bool(face))
        )
        for style in STYLES:
            tone = colour if style == "noto" else tuple(int(0.85 * c) for c in colour)
            split = "held-out" if (label, style) in HELD_OUT else "train"
            images.append(draw(shape, tone, size))
            glyphs.append(Glyph(i, style, split, hue_of(tone)))
    return Bank(np.stack(images), tuple(glyphs), tuple(concepts), ())
