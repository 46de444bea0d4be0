"""The training pictures: four emoji art sets from npm packages, rendered to RGBA with names and tags.

Nothing is downloaded with the library. `build` fetches pinned packages through the npm client into a folder,
checks the licence that each one states, renders the curated concepts (`concepts.py`) and writes one `.npz`.
The file is a pure function of the packages: the same packages give the same bytes in it.
"""

import colorsys
import io
import json
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rfkernels.train import concepts

__all__ = [
    "PACKAGES",
    "STYLES",
    "DataError",
    "Dataset",
    "Entry",
    "Package",
    "build",
    "fetch_packages",
    "load",
    "open_data",
]

DEFAULT_FOLDER = Path.home() / ".cache" / "rfkernels"
FORMAT = 1


class DataError(RuntimeError):
    """The training data cannot be had; the message says what to install."""


@dataclass(frozen=True)
class Package:
    """One pinned npm package and the licence that it must state."""

    name: str
    version: str
    licence: str
    style: str | None  # the caption word of its art; None for names and tags

    @property
    def archive(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "noto"),
    Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "blob"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "flat"),
    Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "3d"),
    Package("emojibase-data", "17.0.0", "MIT", None),
)
STYLES = tuple(p.style for p in PACKAGES if p.style)


@dataclass(frozen=True)
class Entry:
    """One picture: its label, style, everyday names, tags, weight in sampling and part of the split."""

    label: str
    style: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    weight: float
    split: str  # "train" or "held-out"
    tinted: bool


@dataclass(frozen=True)
class Dataset:
    """Pictures uint8[n, size, size, 4] (RGBA, premultiplied), their entries, the packages they come from."""

    images: np.ndarray
    entries: tuple[Entry, ...]
    sources: tuple[dict, ...]

    def indices(self, split: str) -> np.ndarray:
        return np.array([i for i, e in enumerate(self.entries) if e.split == split], dtype=np.int64)


# --------------------------------------------------------------------------------------------- packages


def fetch_packages(folder: Path) -> None:
    """Puts every archive of PACKAGES that is not there yet into `folder`, through `npm pack`."""
    missing = [p for p in PACKAGES if not (folder / p.archive).exists()]
    if not missing:
        return
    names = " ".join(f"{p.name}@{p.version}" for p in missing)
    by_hand = f"run `npm pack {names}` in {folder}"
    if shutil.which("npm") is None:
        raise DataError(
            f"training data: npm is needed to fetch the emoji packages; install Node.js, or {by_hand}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", *names.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    still = [p.archive for p in missing if not (folder / p.archive).exists()]
    if done.returncode or still:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"training data: npm could not fetch the emoji packages ({reason}); {by_hand}")


class _Archive:
    """The files of one npm archive, after its licence has been checked."""

    def __init__(self, folder: Path, package: Package):
        with tarfile.open(folder / package.archive) as tar:
            members = [m for m in tar if m.isfile()]
            self.files = {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in members}
        stated = self.json("package.json").get("license")
        info = self.json("info.json") if "info.json" in self.files else {}
        art = info.get("license", {}).get("spdx", package.licence)
        if stated != package.licence or art != package.licence:
            raise DataError(
                f"{package.name}: licence {package.licence} was expected, the package states {stated}/{art}"
            )

    def json(self, path: str) -> dict:
        return json.loads(self.files[path])


# --------------------------------------------------------------------------------------------- concepts


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("\u2019", "")).strip("-")


def _concepts(emojibase: _Archive) -> list[dict]:
    """The chosen emoji of emojibase in its own order: hexcode, label, tags."""
    order = {s["order"]: s["key"] for s in emojibase.json("en/messages.json")["subgroups"]}
    order[46] = "food-sweet"  # emojibase numbers two subgroups 46
    chosen = []
    for emoji in emojibase.json("en/data.json"):
        label = emoji["label"].lower()
        plain = label.replace("\u2019", "'")
        wanted = order.get(emoji.get("subgroup")) in concepts.SUBGROUPS and plain not in concepts.EXCLUDED
        if wanted or label in concepts.INCLUDED:
            chosen.append({"hex": emoji["hexcode"].lower(), "label": label, "tags": emoji.get("tags", [])})
    return chosen


def _distinct_tags(chosen: list[dict]) -> dict[str, tuple[str, ...]]:
    """label -> its tags that at most two other chosen concepts share: words that can stand for the label."""
    count: dict[str, int] = {}
    for c in chosen:
        for tag in c["tags"]:
            count[tag] = count.get(tag, 0) + 1
    return {c["label"]: tuple(t for t in c["tags"] if count[t] <= 3 and t.isascii()) for c in chosen}


# --------------------------------------------------------------------------------------------- rendering


def _premultiplied(image: Image.Image, size: int) -> np.ndarray:
    """uint8[size, size, 4], colour premultiplied, area-averaged."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGBa").resize((size, size), Image.Resampling.BOX))


def _iconify_renderer(archive: _Archive, size: int):
    """(hexcode, slug) -> picture or None, for an iconify set."""
    import resvg_py

    data = archive.json("icons.json")
    chars = archive.json("chars.json")
    icons, aliases = data["icons"], data.get("aliases", {})

    def render(hexcode: str, slug: str) -> np.ndarray | None:
        name = chars.get(hexcode) or chars.get(hexcode.replace("-fe0f", "")) or slug
        while name in aliases:
            name = aliases[name]["parent"]
        if name not in icons:
            return None
        icon = icons[name]
        width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * size, skip_system_fonts=True)
        return _premultiplied(Image.open(io.BytesIO(bytes(png))), size)

    return render


def _webp_renderer(archive: _Archive, size: int):
    """(hexcode, slug) -> picture or None, for a folder of WebP files named by code points."""

    def render(hexcode: str, slug: str) -> np.ndarray | None:
        for name in (hexcode, hexcode.replace("-fe0f", ""), f"{hexcode}-fe0f"):
            path = f"assets/{name}.webp"
            if path in archive.files:
                return _premultiplied(Image.open(io.BytesIO(archive.files[path])), size)
        return None

    return render


def tint(image: np.ndarray, colour: str) -> np.ndarray:
    """`image` with the pixels of its dominant hue turned to `colour` of TINTS; other pixels stay."""
    hue, saturation, value = concepts.TINTS[colour]
    alpha = image[..., 3:].astype(np.float32) / 255
    rgb = np.divide(image[..., :3] / 255.0, alpha, out=np.zeros((*image.shape[:2], 3)), where=alpha > 0)
    hsv = np.apply_along_axis(lambda p: colorsys.rgb_to_hsv(*np.clip(p, 0, 1)), -1, rgb)
    weight = (hsv[..., 1] * alpha[..., 0]) * (hsv[..., 1] > 0.25)
    bins = np.bincount((hsv[..., 0] * 36).astype(int).ravel() % 36, weight.ravel(), minlength=36)
    smooth = bins + np.roll(bins, 1) + np.roll(bins, -1)
    dominant = (smooth.argmax() + 0.5) / 36
    distance = np.abs((hsv[..., 0] - dominant + 0.5) % 1 - 0.5)
    chosen = (distance < 50 / 360) & (hsv[..., 1] > 0.2)
    turned = np.where(
        chosen[..., None],
        np.stack([np.full_like(alpha[..., 0], hue / 360), hsv[..., 1] * saturation, hsv[..., 2] * value], -1),
        hsv,
    )
    out = np.apply_along_axis(lambda p: colorsys.hsv_to_rgb(*np.clip(p, 0, 1)), -1, turned)
    return np.concatenate([np.round(out * alpha * 255).astype(np.uint8), image[..., 3:]], -1)


# --------------------------------------------------------------------------------------------- the file


def _split(label: str, style: str) -> str:
    """Held-out captions, and 4 % of all (label, style) pairs by their hash."""
    by_hash = zlib.crc32(f"{label}|{style}".encode()) % 25 == 0 and label not in concepts.POPULAR
    return "held-out" if label in concepts.HELD_OUT or by_hash else "train"


def _weight(label: str) -> float:
    if label in concepts.POPULAR:
        return 4.0
    return 2.0 if label.split()[-1] in ("heart", "circle", "square") else 1.0


def _tinted(image: np.ndarray, label: str, style: str) -> Iterator[tuple[np.ndarray, Entry]]:
    word = concepts.TINT_OBJECTS[label]
    for colour in concepts.TINTS:
        name = f"{colour} {word}"
        if name != label:
            yield tint(image, colour), Entry(name, style, (), (), 0.3, _split(name, style), True)


def _render_all(folder: Path, size: int) -> Iterator[tuple[np.ndarray, Entry]]:
    archives = {p.name: _Archive(folder, p) for p in PACKAGES}
    chosen = _concepts(archives["emojibase-data"])
    tags = _distinct_tags(chosen)
    slugs = archives["@iconify-json/noto"].json("chars.json")
    for package in PACKAGES:
        if package.style is None:
            continue
        archive = archives[package.name]
        svg = "icons.json" in archive.files
        render = (_iconify_renderer if svg else _webp_renderer)(archive, size)
        for c in chosen:
            label = c["label"]
            image = render(c["hex"], slugs.get(c["hex"].replace("-fe0f", ""), _slug(label)))
            if image is None:
                continue
            names = concepts.ALIASES.get(label, ())
            split = _split(label, package.style)
            yield image, Entry(label, package.style, names, tags[label], _weight(label), split, False)
            if label in concepts.TINT_OBJECTS:
                yield from _tinted(image, label, package.style)


def build(folder: Path | None = None, *, size: int = 64) -> Path:
    """The built file `emoji-<size>.npz` in `folder`, made from the packages if it is not there.

    Args:
        folder: where packages and the file are kept; default `~/.cache/rfkernels`.
        size: edge of the square pictures in pixels.

    Raises:
        DataError: a package or the renderer is missing; the message names the command that helps.
    """
    folder = Path(folder or DEFAULT_FOLDER)
    path = folder / f"emoji-{size}.npz"
    if path.exists():
        return path
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise DataError(
            "training data: resvg_py is needed to render SVG; run `pip install resvg_py`"
        ) from None
    fetch_packages(folder / "npm")
    pairs = list(_render_all(folder / "npm", size))
    sources = [asdict(p) for p in PACKAGES]
    meta = {"format": FORMAT, "sources": sources, "entries": [asdict(e) for _, e in pairs]}
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, images=np.stack([i for i, _ in pairs]), meta=np.array(json.dumps(meta)))
    partial.replace(path)
    return path


def load(path: Path) -> Dataset:
    """Reads a file that `build` wrote."""
    with np.load(path) as file:
        images, meta = file["images"], json.loads(str(file["meta"]))
    if meta["format"] != FORMAT:
        raise DataError(
            f"{path}: data format {FORMAT} was expected, got {meta['format']}; delete it to build it anew"
        )
    entries = tuple(
        Entry(**{**e, "names": tuple(e["names"]), "tags": tuple(e["tags"])}) for e in meta["entries"]
    )
    return Dataset(images, entries, tuple(meta["sources"]))


def open_data(folder: Path | None = None, *, size: int = 64) -> Dataset:
    """The data set in `folder`, built first if need be."""
    return load(build(folder, size=size))
