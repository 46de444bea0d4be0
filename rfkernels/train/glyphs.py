"""The training pictures: emoji in six art styles from npm packages, with names, as one packed file.

The pack, a pure function of the packages (and of the image library that writes WebP):

    8 bytes   "RFKGLYPH"
    uint32    bytes of the description, little endian
    uint32    crc32 of the description and all pictures
    ...       the description: zlib-compressed JSON with format, size, sources, concepts, glyphs and the bytes
              of every picture
    ...       the pictures, WebP, one behind the other in the order of the glyphs
"""

import io
import json
import multiprocessing
import struct
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from rfkernels.train.artwork import draw, finder
from rfkernels.train.concepts import POPULAR, WRONG_ART
from rfkernels.train.names import Concept, concepts_of
from rfkernels.train.packages import PACKAGES, Archive, DataError, fetch_packages

__all__ = ["Bank", "Concept", "DataError", "Glyph", "build", "load", "open_bank"]

DEFAULT_FOLDER = Path.home() / ".cache" / "rfkernels"
MAGIC = b"RFKGLYPH"
FORMAT = 1
SIZE = 128
HELD_OUT = 20  # one of so many glyphs is held out
MANY = 200  # pictures that are worth a second process


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


# --------------------------------------------------------------------------------------------- building


def build(folder: Path | str | None = None, size: int = SIZE) -> Path:
    """The pack `emoji-<size>.pack` in `folder`, made from the packages if it is not there (some minutes).

    Args:
        folder: where the packages (in `npm`) and the pack are kept; default `~/.cache/rfkernels`.
        size: edge of the square pictures in pixels.

    Raises:
        DataError: a package or the renderer is missing; the message names the command that helps.
    """
    folder = Path(folder or DEFAULT_FOLDER)
    path = folder / f"emoji-{size}.pack"
    if path.exists():
        return path
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise DataError(
            "training data: resvg_py is needed to render SVG; run `pip install resvg_py`"
        ) from None
    fetch_packages(folder / "npm")
    archives = {p: Archive(folder / "npm", p) for p in PACKAGES}
    concepts = concepts_of(archives[PACKAGES[-1]])
    found = list(_artwork(archives, concepts))
    concepts, found = _shown(concepts, found)
    drawn = _draw_all([(artwork, size) for _, _, artwork in found])
    parts = _splits([(concepts[c].label, style) for c, style, _ in found])
    glyphs = [
        Glyph(c, style, part, hue) for (c, style, _), part, (_, hue) in zip(found, parts, drawn, strict=True)
    ]
    _write(path, size, concepts, glyphs, [webp for webp, _ in drawn])
    return path


def _artwork(archives: dict, concepts: tuple[Concept, ...]) -> Iterator[tuple[int, str, str | bytes]]:
    """(index of the concept, style, artwork) of all packages, style by style."""
    slugs = [a.json("chars.json") for a in archives.values() if "chars.json" in a.files]
    for package, archive in archives.items():
        if package.style:
            find = finder(archive, package.style, slugs)
            fit = ((i, c) for i, c in enumerate(concepts) if (c.label, package.style) not in WRONG_ART)
            found = ((i, package.style, find(c)) for i, c in fit)
            yield from (f for f in found if f[2] is not None)


def _shown(concepts, found):
    """The concepts that have a picture, and `found` with indices into them."""
    used = sorted({c for c, _, _ in found})
    index = {old: new for new, old in enumerate(used)}
    return tuple(concepts[c] for c in used), [(index[c], style, art) for c, style, art in found]


def _splits(pairs: list[tuple[str, str]]) -> list[str]:
    """Every 20th (label, style) by its crc32 is held out, but no popular one and never all of a label."""
    out = {p for p in pairs if zlib.crc32("|".join(p).encode()) % HELD_OUT == 0 and p[0] not in POPULAR}
    trained = {label for label, style in pairs if (label, style) not in out}
    return ["held-out" if p in out and p[0] in trained else "train" for p in pairs]


def _draw_all(jobs: list[tuple[str | bytes, int]]) -> list[tuple[bytes, float | None]]:
    """`draw` of every job, in two processes where there are many."""
    if len(jobs) < MANY:
        return [draw(*job) for job in jobs]
    drawn = []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for done in pool.imap(_draw_one, jobs, chunksize=16):
            drawn.append(done)
            if len(drawn) % 500 == 0 or len(drawn) == len(jobs):
                print(f"drawing emoji: {len(drawn)} of {len(jobs)}", file=sys.stderr, flush=True)
    return drawn


def _draw_one(job: tuple[str | bytes, int]) -> tuple[bytes, float | None]:
    return draw(*job)


# --------------------------------------------------------------------------------------------- the pack


def _write(path: Path, size: int, concepts, glyphs, pictures: list[bytes]) -> None:
    description = {
        "format": FORMAT,
        "size": size,
        "sources": [asdict(p) for p in PACKAGES],
        "concepts": [asdict(c) for c in concepts],
        "glyphs": [asdict(g) for g in glyphs],
        "bytes": [len(p) for p in pictures],
    }
    text = zlib.compress(json.dumps(description, ensure_ascii=False).encode(), 9)
    body = text + b"".join(pictures)
    partial = path.with_suffix(".partial")
    partial.write_bytes(MAGIC + struct.pack("<II", len(text), zlib.crc32(body)) + body)
    partial.replace(path)


def _read(path: Path) -> tuple[dict, list[memoryview]]:
    """The description and the pictures of a pack; DataError where it is none, or damaged."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: a pack of glyphs was required ({error.strerror})") from None
    if raw[:8] != MAGIC or len(raw) < 16:
        raise DataError(f"{path}: a pack of glyphs was required, this file starts with {raw[:8]!r}")
    length, crc = struct.unpack("<II", raw[8:16])
    body = memoryview(raw)[16:]
    if zlib.crc32(body) != crc:
        raise DataError(f"{path}: the pack is truncated or damaged (its checksum differs); build it anew")
    description = json.loads(zlib.decompress(body[:length]))
    if description["format"] != FORMAT:
        raise DataError(
            f"{path}: pack format {FORMAT} was expected, got {description['format']}; build it anew"
        )
    ends = length + np.cumsum(description["bytes"], dtype=np.int64)
    return description, [body[e - n : e] for e, n in zip(ends, description["bytes"], strict=True)]


def load(path: Path | str) -> Bank:
    """The bank in a pack that `build` wrote; DataError where it is another file, truncated or damaged."""
    description, pictures = _read(Path(path))
    size = description["size"]
    images = np.empty((len(pictures), size, size, 4), np.uint8)

    def decode(row: int) -> None:
        images[row] = np.asarray(Image.open(io.BytesIO(pictures[row])).convert("RGBA").convert("RGBa"))

    with ThreadPoolExecutor() as threads:
        list(threads.map(decode, range(len(pictures))))
    concepts = tuple(_concept(c) for c in description["concepts"])
    glyphs = tuple(Glyph(**g) for g in description["glyphs"])
    return Bank(images, glyphs, concepts, tuple(description["sources"]))


def _concept(fields: dict) -> Concept:
    lists = {key: tuple(fields[key]) for key in ("names", "tags")}
    return Concept(**fields | lists | {"foreign": tuple(map(tuple, fields["foreign"]))})


def open_bank(source: Path | str | None = None, size: int = SIZE) -> Bank:
    """The bank of a pack, or of a folder whose pack is built first if need be, at `size` pixels.

    Args:
        source: a `.pack` file, or the folder of `build`.
        size: the pack's own size or a fraction of it (128: 64, 32, ...), averaged down by area.
    """
    path = Path(source or DEFAULT_FOLDER)
    bank = load(path if path.suffix == ".pack" else build(path))
    if size < 1 or bank.size % size:
        raise ValueError(f"size: a whole fraction of the pack's {bank.size} pixels was required, got {size}")
    if size == bank.size:
        return bank
    return Bank(_averaged(bank.images, size), bank.glyphs, bank.concepts, bank.sources)


def _averaged(images: np.ndarray, size: int) -> np.ndarray:
    """uint8[n, size, size, 4]: means of square blocks, a few pictures at a time."""
    step = images.shape[1] // size
    out = np.empty((len(images), size, size, 4), np.uint8)
    for i in range(0, len(images), 256):
        blocks = images[i : i + 256].reshape(-1, size, step, size, step, 4)
        out[i : i + 256] = np.rint(blocks.mean((2, 4), dtype=np.float32))
    return out
