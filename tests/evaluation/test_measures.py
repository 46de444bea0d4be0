import colorsys

import numpy as np
import pytest
import torch

from rfkernels.evaluation import measures
from rfkernels.train import concepts
from tests.tiny import disc


def picture(image: np.ndarray, ground: tuple[float, float, float] | None = None) -> torch.Tensor:
    """[1, 4, size, size] in [-1, 1] of premultiplied RGBA, on an opaque colour if given."""
    c = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    if ground is not None:
        c = c + (1 - c[:, 3:]) * torch.tensor([*ground, 1.0])[:, None, None]
    return c * 2 - 1


def coloured(hue: float, saturation: float, value: float = 0.9) -> torch.Tensor:
    return picture(disc(tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue / 360, saturation, value))))


@pytest.mark.parametrize("name", concepts.TINTS)
def test_main_colour_is_named(name):
    rgb = colorsys.hsv_to_rgb(concepts.TINTS[name][0] / 360, 0.8, 0.9)
    image = disc(tuple(int(255 * c) for c in rgb))
    image[6:10, 6:10] = (30, 60, 200, 255)  # a smaller blue part
    assert measures.colour_names(picture(image)) == [name]


def test_grey_and_empty_pictures_have_no_colour():
    empty = np.zeros((16, 16, 4), np.uint8)
    assert measures.colour_names(torch.cat([picture(disc((128, 128, 128))), picture(empty)])) == ["", ""]


@pytest.mark.parametrize("name", concepts.BACKGROUNDS)
def test_background_is_named(name):
    ground = tuple(c / 255 for c in concepts.BACKGROUNDS[name])
    x = picture(disc((200, 30, 30), 64), ground)
    assert measures.background_names(x) == [name]
    assert measures.background_names(-x.abs()) == [""]  # alpha -1: nothing there
    assert not measures.transparent_corners(x).any()


def test_clear_corners_are_found():
    x = picture(disc((200, 30, 30), 64))
    assert measures.transparent_corners(x).all() and measures.background_names(x) == [""]


def test_deep_pink_is_red_and_pale_pink_is_not():
    x = torch.cat([coloured(342, 0.78), coloured(338, 0.55), coloured(329, 0.78), coloured(20, 0.8)])
    assert measures.colour_names(x) == ["red", "pink", "pink", "orange"]


def test_colour_is_that_of_the_mask():
    x = torch.cat([coloured(125, 0.8), coloured(212, 0.8)], 3)
    left = torch.zeros(1, 16, 32, dtype=torch.bool)
    left[..., :16] = True
    assert measures.colour_names(x, left) == ["green"] and measures.colour_names(x, ~left) == ["blue"]
    assert measures.colour_names(x, left & ~left) == [""]


def test_nearest_is_the_nearest():
    torch.manual_seed(0)
    references = torch.rand(20, 4, 16, 16) * 2 - 1
    chosen = torch.tensor([3, 17, 5])
    distance, index = measures.nearest(references[chosen] * 0.9, references)
    assert index.tolist() == chosen.tolist()
    exact = (references[chosen] * 0.1 / 2).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(distance, exact, rtol=1e-3, atol=1e-5)
