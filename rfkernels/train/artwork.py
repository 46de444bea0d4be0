"""From the art packages to small square pictures: finding an emoji's artwork, drawing it, packing it."""

import io
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from rfkernels.train.fxemoji import FX_ICONS
from rfkernels.train.names import Concept
from rfkernels.train.packages import Archive

__all__ = ["FAITHFUL", "dominant_hue", "draw", "finder", "square"]

FAITHFUL = 36.0  # dB between a drawn picture and what is read back from its WebP
ROOM = 1.25  # a lossless WebP may be this much larger than a lossy one
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
)


# ------------------------------------------------------------------------------------ finding


def finder(
    archive: Archive, style: str, slugs: Sequence[dict[str, str]] = ()
) -> Callable[[Concept], str | bytes | None]:
    """Concept -> its artwork in one package: SVG text, WebP bytes, or None where the package lacks it.

    slugs: hexcode -> icon name as other iconify sets have it, for those that have no such list of their own.
    """
    if "icons.json" not in archive.files:
        return lambda concept: _webp(archive, concept.hexcode)
    data = archive.json("icons.json")
    if style == "fx":
        return lambda concept: _svg(data, _fx_names(concept))
    lists = (archive.json("chars.json"), *slugs)

    def find(concept: Concept) -> str | None:
        codes = (concept.hexcode, concept.hexcode.replace("-fe0f", ""))
        known = [names.get(code) for names in lists for code in codes]
        return _svg(data, [*known, _slug(concept.label)])

    return find


def _fx_names(concept: Concept) -> list[str]:
    """What fxemoji may call an emoji: the recorded icon alone, else its label and names in one word."""
    if concept.label in FX_ICONS:
        return [FX_ICONS[concept.label]]
    return [re.sub(r"[^a-z0-9]", "", name) for name in (concept.label, *concept.names)]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.replace("'", "")).strip("-")


def _webp(archive: Archive, hexcode: str) -> bytes | None:
    names = (hexcode, hexcode.replace("-fe0f", ""), f"{hexcode}-fe0f")
    return next((archive.files[p] for n in names if (p := f"assets/{n}.webp") in archive.files), None)


def _svg(data: dict, names: list[str | None]) -> str | None:
    """The first of `names` that an iconify set has, as SVG text; aliases may mirror their parent."""
    icons, aliases = data["icons"], data.get("aliases", {})
    name = next((n for n in names if n in icons or n in aliases), None)
    if name is None:
        return None
    mirrored = False
    while name in aliases:
        mirrored ^= aliases[name].get("hFlip", False)
        name = aliases[name]["parent"]
    icon = {"left": 0, "top": 0, "width": data.get("width", 16), "height": data.get("height", 16)}
    icon |= icons[name]
    if mirrored:
        middle = 2 * icon["left"] + icon["width"]
        icon["body"] = f'<g transform="translate({middle} 0) scale(-1 1)">{icon["body"]}</g>'
    return SVG.format(**icon)


# ------------------------------------------------------------------------------------ drawing


def draw(artwork: str | bytes, size: int) -> tuple[bytes, float | None]:
    """(WebP of the artwork at `size` x `size`, its dominant hue). SVG is drawn at twice the size.

    Lossless where that takes at most 1.25 times the room of quality 92, or where quality 92 is further than
    FAITHFUL from the picture (colours at half resolution are, on thin strokes).
    """
    if isinstance(artwork, str):
        import resvg_py

        across, down = (float(v) for v in re.search(r'width="(\S+)" height="(\S+)"', artwork).groups())
        width = max(1, round(2 * size * across / max(across, down)))
        artwork = bytes(resvg_py.svg_to_bytes(svg_string=artwork, width=width, skip_system_fonts=True))
    picture = square(Image.open(io.BytesIO(artwork)), size)
    straight = Image.fromarray(picture, "RGBa").convert("RGBA")
    lossless, lossy = _encoded(straight, lossless=True, quality=75), _encoded(straight, quality=92)
    small = len(lossless) <= ROOM * len(lossy) or _psnr(picture, lossy) < FAITHFUL
    return (lossless if small else lossy), dominant_hue(picture)


def _encoded(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", method=4, **options)
    return out.getvalue()


def _psnr(picture: np.ndarray, webp: bytes) -> float:
    read = np.asarray(Image.open(io.BytesIO(webp)).convert("RGBA").convert("RGBa"))
    return 10 * np.log10(255**2 / max(((picture.astype(float) - read) ** 2).mean(), 1e-9))


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8[size, size, 4]: the image centred on a square, colour premultiplied, area-averaged."""
    side = max(image.size)
    whole = Image.new("RGBA", (side, side))
    whole.paste(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(whole.convert("RGBa").resize((size, size), Image.Resampling.BOX))


def dominant_hue(picture: np.ndarray) -> float | None:
    """The hue in degrees that most colour of a premultiplied picture has; None where no hue leads.

    The peak of a histogram of hues weighted by chroma and alpha, refined by the mean around it. It leads
    where at least a quarter of the opaque area is within 40 degrees of it, neither grey nor nearly black.
    """
    hsv = np.asarray(Image.fromarray(picture, "RGBa").convert("RGBA").convert("RGB").convert("HSV"))
    hue, chroma = hsv[..., 0] * (360 / 255), hsv[..., 1] * (hsv[..., 2] / 255**2)
    alpha = picture[..., 3] / 255
    coloured = (hsv[..., 1] > 64) & (chroma > 0.2)
    weight = chroma * alpha * coloured
    bins = np.bincount((hue / 10).astype(int).ravel() % 36, weight.ravel(), minlength=36)
    peak = 10 * (bins + np.roll(bins, 1) + np.roll(bins, -1)).argmax() + 5
    offset = (hue - peak + 180) % 360 - 180
    near = (np.abs(offset) < 40) & coloured
    if (alpha * near).sum() < 0.25 * alpha.sum() or not near.any():
        return None
    mean = (offset * weight * near).sum() / (weight * near).sum()
    return round(float((peak + mean) % 360), 1)
