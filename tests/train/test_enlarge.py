import pytest
import torch
import torch.nn.functional as F

from rfkernels.train.enlarge import enlarge, level_of_means
from tests.tiny import CONFIG, tiny_model


def test_level_of_means_is_the_share_of_noise_in_them():
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    level = level_of_means(sigma, 2)
    torch.testing.assert_close(level * (1 - sigma), (1 - level) * sigma / 2)  # noise over signal
    assert level[0] == 0 and level[-1] == 1
    torch.testing.assert_close(level_of_means(sigma, 1), sigma)


@torch.no_grad()
def test_enlarged_model_does_on_means_what_the_small_one_does():
    small = tiny_model()
    with torch.enable_grad():
        large = enlarge(small, 2, steps=300)
    assert (large.config.size, large.config.patch, large.grid) == (32, 8, small.grid)
    text = small.encode(["red circle", "blue heart on a blue background"])
    arrays = (text.rows, text.weights, text.mask)
    x = torch.randn(2, 4, 32, 32)
    sigma = torch.full(
        (2,), 2 - 2**0.5
    )  # where noisy means are smaller by sqrt 2, as the first layer expects
    found = large.predict(x, sigma, *arrays)
    wanted = small.predict(2**0.5 * F.avg_pool2d(x, 2), level_of_means(sigma, 2), *arrays)
    assert (F.avg_pool2d(found, 2) - wanted).norm() < 0.03 * wanted.norm()
    assert (found - F.interpolate(F.avg_pool2d(found, 2), scale_factor=2)).abs().max() < 1e-5
    wrong = small.predict(2**0.5 * F.avg_pool2d(x, 2), sigma, *arrays)
    assert (F.avg_pool2d(found, 2) - wrong).norm() > 2 * (F.avg_pool2d(found, 2) - wanted).norm()


def test_factor_one_is_the_same_model_and_zero_is_refused():
    small = tiny_model()
    same = enlarge(small, 1, steps=0)
    assert same.config == CONFIG
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), small.parameters(), strict=True))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        enlarge(small, 0)
