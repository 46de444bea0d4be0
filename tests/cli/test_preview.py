"""Half-blocks: the colours of the picture, and silence where colours do not belong."""

import re

import pytest
from PIL import Image

from rfkernels.cli.preview import colour_depth, half_blocks, preview


class Terminal:
    def __init__(self, is_terminal: bool = True) -> None:
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(
    ("environment", "is_terminal", "depth"),
    [
        ({"COLORTERM": "truecolor"}, True, 24),
        ({"COLORTERM": "24bit"}, True, 24),
        ({"TERM": "xterm-256color"}, True, 8),
        ({"TERM": "dumb"}, True, 0),
        ({"TERM": "xterm"}, True, 0),
        ({"COLORTERM": "truecolor"}, False, 0),
        ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, True, 0),
        ({"COLORTERM": "truecolor", "NO_COLOR": ""}, True, 24),
    ],
)
def test_colour_depth(monkeypatch, environment, is_terminal, depth):
    for name in ("COLORTERM", "TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert colour_depth(Terminal(is_terminal)) == depth


def image_of(*rows: list[tuple[int, int, int, int]]) -> Image.Image:
    image = Image.new("RGBA", (len(rows[0]), len(rows)))
    for y, row in enumerate(rows):
        for x, pixel in enumerate(row):
            image.putpixel((x, y), pixel)
    return image


RED, BLUE, CLEAR = (255, 0, 0, 255), (0, 0, 255, 255), (9, 9, 9, 0)


def test_two_pixels_share_a_cell():
    assert half_blocks(image_of([RED], [BLUE]), 24) == ["\x1b[38;2;255;0;0;48;2;0;0;255m\u2580\x1b[0m"]
    assert half_blocks(image_of([RED], [BLUE]), 8) == ["\x1b[38;5;196;48;5;21m\u2580\x1b[0m"]


def test_clear_pixels_show_the_ground():
    line = half_blocks(image_of([RED, CLEAR, CLEAR], [CLEAR, BLUE, CLEAR]), 24)[0]
    assert line == "\x1b[0;38;2;255;0;0m\u2580\x1b[0;38;2;0;0;255m\u2584\x1b[0m \x1b[0m"


def test_an_odd_last_row_is_shown():
    assert len(half_blocks(image_of([RED], [RED], [BLUE]), 24)) == 2


def width_of(line: str) -> int:
    return len(re.sub(r"\x1b\[[0-9;]*m", "", line))


@pytest.mark.parametrize(("columns", "lines"), [(200, 16), (70, 2 * 16), (34, 3 * 16), (10, 3 * 5)])
def test_pictures_fill_the_window_and_no_more(columns, lines):
    text = preview([Image.new("RGBA", (64, 64), RED)] * 3, 24, columns).splitlines()
    assert len(text) == lines and max(map(width_of, text)) <= columns


def test_many_pictures_are_counted_not_shown():
    text = preview([Image.new("RGBA", (8, 8), RED)] * 11, 8, 80)
    assert text.splitlines()[-1] == "(and 3 more)"
