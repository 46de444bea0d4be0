"""Pictures for looking at: enlarged, and laid out on a sheet with their prompts below."""

import math
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["RESAMPLING", "columns_for", "enlarge", "sheet"]

RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}

_MARGIN = 12  # pixels between cells and around the sheet
_TILE = 8  # side of a square of the checker board
_CHECKER = ((255, 255, 255, 255), (240, 240, 242, 255))
_INK = (60, 60, 67)
_FONT_SIZE = 13
_LABEL_LINES = 2
_LINE_HEIGHT = 17
# Tried in this order for labels that the built-in font (ASCII only) cannot draw.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "arial.ttf",
)


def enlarge(image: Image.Image, scale: int, resample: str = "lanczos") -> Image.Image:
    """`image` with every side `scale` times as long."""
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), RESAMPLING[resample])


def columns_for(count: int, per_row: int = 1) -> int:
    """Columns of a sheet of `count` pictures: rows of `per_row` that belong together, else nearly square."""
    return per_row if 1 < per_row <= 8 and count > per_row else math.ceil(math.sqrt(count))


def sheet(images: Sequence[Image.Image], labels: Sequence[str] | None, columns: int) -> Image.Image:
    """An RGB sheet of equal-sized `images` on a checker board, each with its label below (or none)."""
    width, height = images[0].size
    label_height = _LABEL_LINES * _LINE_HEIGHT + 6 if labels else 0
    rows = math.ceil(len(images) / columns)
    columns = min(columns, len(images))
    page = Image.new(
        "RGB",
        (columns * (width + _MARGIN) + _MARGIN, rows * (height + label_height + _MARGIN) + _MARGIN),
        (255, 255, 255),
    )
    board = _checker(width, height)
    for index, image in enumerate(images):
        left = _MARGIN + index % columns * (width + _MARGIN)
        top = _MARGIN + index // columns * (height + label_height + _MARGIN)
        page.paste(Image.alpha_composite(board, image.convert("RGBA")).convert("RGB"), (left, top))
        if labels:
            _draw_label(page, labels[index], left, top + height + 4, width)
    return page


def _checker(width: int, height: int) -> Image.Image:
    board = Image.new("RGBA", (width, height), _CHECKER[0])
    draw = ImageDraw.Draw(board)
    for y in range(0, height, _TILE):
        for x in range(y // _TILE % 2 * _TILE, width, 2 * _TILE):
            draw.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), fill=_CHECKER[1])
    return board


def _draw_label(page: Image.Image, label: str, left: int, top: int, width: int) -> None:
    font, text = _font_for(" ".join(label.split()) or "(no prompt)")
    draw = ImageDraw.Draw(page)
    for line in _wrap(text, font, width):
        indent = (width - font.getlength(line)) / 2
        draw.text((left + indent, top), line, fill=_INK, font=font)
        top += _LINE_HEIGHT


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in at most `_LABEL_LINES` lines of `width` pixels, cut with dots where it does not fit."""
    lines: list[str] = []
    rest = text[:200]
    while rest and len(lines) < _LABEL_LINES:
        count = len(rest)
        while count > 1 and font.getlength(rest[:count]) > width:
            space = rest.rfind(" ", 0, count)
            count = space if space > 0 else count - 1
        lines.append(rest[:count])
        rest = rest[count:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines[-1] = last + "..."
    return lines


def _font_for(text: str) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font that has every character of `text`; failing that the built-in one, with `text` put in ASCII."""
    default = ImageFont.load_default(_FONT_SIZE)
    if text.isascii():
        return default, text
    for name in _FONTS:
        try:
            font = ImageFont.truetype(name, _FONT_SIZE)
        except OSError:
            continue
        missing = font.getmask("\U0010fffe")
        if all(char == " " or bytes(font.getmask(char)) != bytes(missing) for char in set(text)):
            return font, text
    from rfkernels.prompts import spelled  # brings torch

    text = spelled(text)
    letters = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return default, letters.encode("ascii", "replace").decode()
