"""Pictures in the terminal: two pixels per character cell, as coloured half-blocks."""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from PIL import Image

__all__ = ["colour_depth", "half_blocks", "preview"]

_GAP = 2  # columns between pictures
_SIDE = 32  # widest picture, in columns
_RESET = "\x1b[0m"
_LEVELS = (0, 95, 135, 175, 215, 255)  # of the 6x6x6 cube in the 256-colour palette


def colour_depth(stream: TextIO | None = None) -> int:
    """Bits of colour that `stream` (default: stdout) shows: 24, 8, or 0 where there should be no colour.

    0 if it is not a terminal, if NO_COLOR is set, or if TERM promises fewer than 256 colours.
    """
    stream = sys.stdout if stream is None else stream
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return 0
    if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return 24
    return 8 if "256color" in os.environ.get("TERM", "") else 0


def preview(images: Sequence[Image.Image], depth: int, columns: int | None = None) -> str:
    """The pictures side by side in half-blocks, as many in a row as fit into `columns` (default: the window).

    At most 8 pictures are shown; a last line says how many are not.
    """
    columns = columns or shutil.get_terminal_size().columns
    shown = [_thumbnail(image, min(_SIDE, columns)) for image in images[:8]]
    per_row = max(1, (columns + _GAP) // (max(image.width for image in shown) + _GAP))
    lines: list[str] = []
    for start in range(0, len(shown), per_row):
        blocks = [half_blocks(image, depth) for image in shown[start : start + per_row]]
        lines += [(" " * _GAP).join(parts) for parts in zip(*blocks, strict=True)]
    if len(images) > len(shown):
        lines.append(f"(and {len(images) - len(shown)} more)")
    return "\n".join(lines)


def half_blocks(image: Image.Image, depth: int) -> list[str]:
    """One line of text per two rows of `image`; pixels less than half opaque show the terminal's ground."""
    image = image.convert("RGBA")
    width, height = image.size
    pixels = image.load()
    lines = []
    for y in range(0, height, 2):
        cells = []
        for x in range(width):
            upper = pixels[x, y]
            lower = pixels[x, y + 1] if y + 1 < height else (0, 0, 0, 0)
            cells.append(_cell(upper, lower, depth))
        lines.append("".join(cells) + _RESET)
    return lines


def _cell(upper: tuple[int, ...], lower: tuple[int, ...], depth: int) -> str:
    has_upper, has_lower = upper[3] >= 128, lower[3] >= 128
    if has_upper and has_lower:
        return f"\x1b[{_colour(38, upper, depth)};{_colour(48, lower, depth)}m\u2580"
    if has_upper:
        return f"\x1b[0;{_colour(38, upper, depth)}m\u2580"
    if has_lower:
        return f"\x1b[0;{_colour(38, lower, depth)}m\u2584"
    return "\x1b[0m "


def _colour(layer: int, pixel: tuple[int, ...], depth: int) -> str:
    red, green, blue = pixel[:3]
    if depth == 24:
        return f"{layer};2;{red};{green};{blue}"
    cube = [min(range(6), key=lambda i, value=value: abs(_LEVELS[i] - value)) for value in (red, green, blue)]
    return f"{layer};5;{16 + 36 * cube[0] + 6 * cube[1] + cube[2]}"


def _thumbnail(image: Image.Image, side: int) -> Image.Image:
    if image.width <= side:
        return image
    height = max(1, round(image.height * side / image.width))
    return image.resize((side, height), Image.Resampling.LANCZOS)
