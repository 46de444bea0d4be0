import pytest
import torch
import torch.nn.functional as F

from rfkernels.models.blocks import sinusoid
from rfkernels.models.emoji import load_emoji
from rfkernels.train.enlarge import enlarge, level_of_means
from tests.tiny import CONFIG, tiny_model


def test_level_of_means_is_the_share_of_noise_in_them():
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    level = level_of_means(sigma, 2)
    torch.testing.assert_close(level * (1 - sigma), (1 - level) * sigma / 2)  # noise over signal
    assert level[0] == 0 and level[-1] == 1
    torch.testing.assert_close(level_of_means(sigma, 1), sigma)


def test_enlarged_model_does_on_means_what_the_small_one_does():
    small = tiny_model()
    small.time[2].weight.zero_()  # says the same at each level: nothing to fit
    large = enlarge(small, 2, steps=0)
    assert (large.config.size, large.config.patch, large.grid) == (32, 8, small.grid)
    text = small.encode(["red circle", "blue heart on a blue background"])
    arrays = (text.rows, text.weights, text.mask)
    x, sigma = torch.randn(2, 4, 32, 32), torch.full((2,), 0.5)
    with torch.no_grad():
        found = large.predict(x, sigma, *arrays)
        wanted = small.predict(2**0.5 * F.avg_pool2d(x, 2), sigma, *arrays)
    torch.testing.assert_close(found, F.interpolate(wanted, scale_factor=2), rtol=1e-4, atol=1e-4)


def test_time_of_the_shipped_model_is_moved_to_the_level_of_means():
    model = load_emoji()
    large = enlarge(model, 2, steps=200)
    sigma = torch.linspace(0.02, 0.98, 50)
    says = lambda m, s: m.time(sinusoid(s, model.config.width))
    with torch.no_grad():
        wanted = says(model, level_of_means(sigma, 2))
        assert (says(large, sigma) - wanted).norm() < 0.1 * wanted.norm()
        assert (says(model, sigma) - wanted).norm() > 0.15 * wanted.norm()


def test_factor_one_is_the_same_model_and_zero_is_refused():
    small = tiny_model()
    same = enlarge(small, 1, steps=0)
    assert same.config == CONFIG
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), small.parameters(), strict=True))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        enlarge(small, 0)
