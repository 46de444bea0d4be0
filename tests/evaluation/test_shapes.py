import pytest
import torch

from rfkernels.evaluation import shapes


def mask(*rectangles: tuple[int, int, int, int], size: int = 32) -> torch.Tensor:
    """True within each (left, top, right, bottom)."""
    m = torch.zeros(1, size, size, dtype=torch.bool)
    for left, top, right, bottom in rectangles:
        m[:, top:bottom, left:right] = True
    return m


def test_blobs_are_the_connected_parts():
    m = mask((0, 0, 8, 8), (10, 0, 20, 10), (20, 10, 26, 16), (0, 28, 2, 30))
    large, small = shapes.blobs(m)[0]  # corners touch: one part; the last is a detail
    assert (large == mask((10, 0, 20, 10), (20, 10, 26, 16))[0]).all()
    assert (small == mask((0, 0, 8, 8))[0]).all()
    assert [len(b) for b in shapes.blobs(torch.cat([m, mask(), ~mask()]))] == [2, 0, 1]


def test_a_long_snake_is_one_blob():
    m = torch.ones(1, 64, 64, dtype=torch.bool)
    m[:, 1::4, :-1] = m[:, 3::4, 1:] = False
    assert len(shapes.blobs(m)[0]) == 1


def test_boxes_and_centres():
    m = torch.cat([mask((4, 8, 12, 32)), mask()])
    assert shapes.boxes(m).tolist() == [[0.125, 0.25, 0.375, 1.0], [0, 0, 0, 0]]
    assert shapes.centres(m).tolist() == [[0.25, 0.625], [0.5, 0.5]]


def test_foreground_is_what_is_opaque_or_not_the_ground():
    x = torch.full((2, 4, 32, 32), -1.0)
    x[1] = torch.tensor([0.2, -0.6, 0.8, 1.0])[:, None, None]
    x[:, :, 8:20, 8:20] = torch.tensor([0.8, 0.8, -1.0, 1.0])[:, None, None]
    expected = mask((8, 8, 20, 20))[0]
    assert (shapes.foreground(x, torch.tensor([False, True])) == expected).all()
    assert shapes.foreground(x, torch.tensor([False, False]))[1].all()


@pytest.mark.parametrize("size", [32, 64])
def test_crop_shows_the_box_and_its_margin(size):
    k = size // 32
    m = mask((4 * k, 16 * k, 12 * k, 28 * k), size=size)
    x = torch.where(m[:, None], 1.0, -1.0).expand(1, 4, size, size)
    view = shapes.crop(x, shapes.boxes(m), 16, margin=0)
    wide = (view[0, 0] > 0).sum(1).float().mean().item()
    assert view.shape == (1, 4, 16, 16) and wide == pytest.approx(16 * 8 / 12, abs=1)
    assert (view[0, 0, 1:-1, 8] > 0.9).all()  # as high as the view
    assert shapes.crop(x, shapes.boxes(m), 16, margin=0.5)[0, 0, :3].max() == -1


def test_cut_out_leaves_nothing_around():
    x = torch.rand(1, 4, 32, 32)
    assert (shapes.cut_out(x, mask((0, 0, 5, 5)))[..., 5:, :] == -1).all()
