"""Sheets: every picture in its place, transparency readable, labels below."""

import pytest
from PIL import Image, ImageChops

from rfkernels.cli import sheet as sheets


def plain(colour: tuple[int, int, int, int], side: int = 32) -> Image.Image:
    return Image.new("RGBA", (side, side), colour)


@pytest.mark.parametrize(
    ("count", "per_row", "columns"),
    [(1, 1, 1), (2, 1, 2), (4, 1, 2), (5, 5, 3), (16, 1, 4), (6, 3, 3), (16, 8, 8), (20, 10, 5), (12, 12, 4)],
)
def test_columns(count, per_row, columns):
    assert sheets.columns_for(count, per_row) == columns


def test_pictures_stand_in_reading_order():
    colours = [(255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)]
    page = sheets.sheet([plain(colour) for colour in colours], None, 2)
    assert page.size == (2 * 44 + 12, 2 * 44 + 12)
    assert [page.getpixel(at) for at in ((28, 28), (72, 28), (28, 72))] == [colour[:3] for colour in colours]
    assert page.getpixel((72, 72)) == (255, 255, 255)


def test_transparency_shows_a_checker_board():
    page = sheets.sheet([plain((0, 0, 0, 0))], None, 1)
    assert {colour for _, colour in page.crop((12, 12, 44, 44)).getcolors()} == {
        (255, 255, 255),
        (240, 240, 242),
    }


def ink_rows(page: Image.Image, side: int = 128) -> list[int]:
    """Rows below the first picture that hold ink."""
    below = page.crop((0, 12 + side, page.width, page.height)).convert("L")
    return [y for y in range(below.height) if below.crop((0, y, below.width, y + 1)).getextrema()[0] < 200]


def test_labels_stand_below_and_stay_within_their_picture():
    short = sheets.sheet([plain((0, 0, 0, 255), 128)], ["a fox"], 1)
    long = sheets.sheet([plain((0, 0, 0, 255), 128)], ["word " * 100], 1)
    assert 0 < len(ink_rows(short)) <= 17 < len(ink_rows(long)) <= 34
    for page in (short, long):
        margins = (page.crop((0, 140, 11, page.height)), page.crop((141, 140, page.width, page.height)))
        assert all(margin.convert("L").getextrema() == (255, 255) for margin in margins)


@pytest.mark.parametrize("label", ["", "coeur à la crème", "赤いハート", "❤", "x" * 500, "قلب", "a\nb\tc"])
def test_any_label_leaves_ink(label):
    assert ink_rows(sheets.sheet([plain((0, 0, 0, 255), 128)], [label], 1))


def test_enlarging_keeps_clear_pixels_from_bleeding():
    image = plain((0, 255, 0, 0), 4)
    image.paste((255, 0, 0, 255), (0, 0, 2, 4))
    large = sheets.enlarge(image, 8)
    visible = [pixel for _, pixel in large.getcolors(10_000) if pixel[3] > 16]
    assert large.size == (32, 32) and visible and max(pixel[1] for pixel in visible) < 16


def test_nearest_repeats_pixels():
    image = Image.effect_noise((6, 6), 80).convert("RGBA")
    large = sheets.enlarge(image, 5, "nearest")
    assert ImageChops.difference(large.resize((6, 6), Image.Resampling.NEAREST), image).getbbox() is None
    assert sheets.enlarge(image, 1) is image
