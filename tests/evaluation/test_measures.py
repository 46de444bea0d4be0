import colorsys

import numpy as np
import pytest
import torch

from rfkernels.evaluation import measures
from rfkernels.train import concepts
from rfkernels.train.captions import compose
from tests.tiny import disc


def picture(image: np.ndarray, ground: tuple[float, float, float] | None = None) -> torch.Tensor:
    return torch.from_numpy(compose(image, ground))[None]


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


def test_overlap_is_intersection_over_union():
    a, b = np.zeros((2, 16, 16, 4), np.uint8)
    a[:, :8], b[:, 4:12] = 255, 255
    got = measures.silhouette_overlap(torch.cat([picture(a), picture(b)]), picture(a))
    torch.testing.assert_close(got, torch.tensor([1.0, 1 / 3]))


def test_nearest_is_the_nearest():
    torch.manual_seed(0)
    references = torch.rand(20, 4, 16, 16) * 2 - 1
    chosen = torch.tensor([3, 17, 5])
    distance, index = measures.nearest(references[chosen] * 0.9, references)
    assert index.tolist() == chosen.tolist()
    exact = (references[chosen] * 0.1 / 2).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(distance, exact, rtol=1e-3, atol=1e-5)
