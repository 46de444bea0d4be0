"""Windows that agree: the gradient, what agreement leaves alone, and a series of sinusoids."""

import math
from itertools import pairwise

import pytest
import torch

from rfkernels.editing import (
    cut_windows,
    join_windows,
    stitch_gradient,
    stitch_loss,
    wave_stitch,
    window_starts,
)
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.samplers import sample, schedule
from tests.editing.fields import F64, close, column, wild
from tests.editing.test_inversion import draw

GRID = schedule("linear", 12)


@pytest.mark.parametrize("length, size, stride", [(20, 8, 3), (21, 8, 2), (20, 8, 5), (16, 8, 8), (9, 9, 4)])
def test_gradient_against_finite_differences(length, size, stride):
    starts = window_starts(length, size, stride)
    windows = draw(2, len(starts), 2, size)
    g, step = stitch_gradient(windows, starts), 1e-5
    for index in torch.randint(windows.numel(), (40,), generator=torch.Generator().manual_seed(0)).tolist():
        e = torch.zeros(windows.numel(), dtype=F64)
        e[index] = step
        e = e.view_as(windows)
        slope = (stitch_loss(windows + e, starts) - stitch_loss(windows - e, starts)) / (2 * step)
        assert g.flatten()[index].item() == pytest.approx(slope.item(), abs=1e-8)
    agreeing = cut_windows(draw(2, 2, length), size, starts)
    assert stitch_loss(agreeing, starts) == 0 and not stitch_gradient(agreeing, starts).any()


def test_agreeing_windows_follow_the_flow():
    """A velocity that acts on each value alone keeps windows equal where they overlap."""
    noise = draw(2, 3, 20)
    field = lambda x, s: torch.sin(3 * x) + column(s, x) * x
    close(wave_stitch(field, noise, GRID, size=8, stride=3), sample(field, noise, GRID))


@pytest.mark.parametrize("churn", [0.0, 0.4])
@pytest.mark.parametrize("through", [False, True])
def test_a_step_is_its_equation(churn, through):
    noise, y = draw(1, 2, 20), draw(1, 2, 20, seed=1)
    mask = (draw(1, 1, 20, seed=2) > 0.3).double()
    starts = window_starts(20, 8, 3)
    grid = torch.tensor([0.9, 0.5], dtype=F64)
    cut = lambda t: cut_windows(t.expand(1, 2, 20), 8, starts)[0]
    x = cut(noise).requires_grad_()
    v = wild(x, torch.full((len(starts),), 0.9, dtype=F64))
    x0 = x - 0.9 * v
    z = cut(philox_normal(noise.shape, noise_keys(3, 1, step=1), dtype=F64))
    after = 0.5 * x0 + 0.5 * (math.sqrt(1 - churn**2) * (x + 0.1 * v) + churn * z)
    loss = stitch_loss(after[None], starts) + (cut(mask) * (x0 - cut(y)) ** 2).sum()
    if through:
        (g,) = torch.autograd.grad(loss, x)
    else:
        g = stitch_gradient(after[None], starts)[0] + 2 * cut(mask) * (x0 - cut(y))
    moved = (after - 0.07 * g).detach()
    expected = torch.cat([moved[0], *(moved[i][:, -3:] for i in range(1, len(starts)))], -1)
    expected = torch.where(mask[0] == 1, y[0], expected)
    result = wave_stitch(wild, noise, grid, size=8, stride=3, observed=y, mask=mask, rate=0.07, churn=churn,
                         through_network=through, seeds=3)  # fmt: skip
    close(result[0], expected)


def gaussian(size, total):
    """The velocity of windows of `size` of sinusoids with random phases and sizes: normal, exactly."""
    t = torch.arange(total, dtype=F64)
    waves = [f(2 * math.pi * t / period) for period in (7.0, 12.5, 19.0) for f in (torch.sin, torch.cos)]
    basis = torch.stack(waves, 1)
    covariance = basis @ basis.T / 3 + 1e-3 * torch.eye(total, dtype=F64)
    values, vectors = torch.linalg.eigh(covariance[:size, :size])  # stationary: of every window

    def velocity(x, sigma):
        s = column(sigma, x)
        centred = (x @ vectors) / ((1 - s) ** 2 * values + s**2)
        return (s * centred - (1 - s) * values * centred) @ vectors.T

    truth = basis @ draw(6, seed=5) / math.sqrt(3)
    return velocity, basis, truth


def test_a_long_series_of_sinusoids():
    velocity, basis, truth = gaussian(32, 90)
    noise, fine = draw(1, 90, seed=1), schedule("linear", 40)
    starts = window_starts(90, 32, 8)
    assert starts[-1] == 58  # a tail

    def off(series):
        """How far the stretches of 32 across the seams are from sinusoids."""
        stretches, waves = series[0].unfold(0, 32, 1).T, basis[:32]
        return (stretches - waves @ torch.linalg.lstsq(waves, stretches).solution).std()

    apart = sample(velocity, cut_windows(noise, 32, starts)[0], fine)
    free = wave_stitch(velocity, noise, fine, size=32, stride=8)
    assert free.shape == (1, 90)
    assert off(free) < 0.7 * off(join_windows(apart[None], starts))
    mask = torch.zeros(90, dtype=F64)
    mask[::3] = 1
    filled = wave_stitch(velocity, noise, fine, size=32, stride=8, observed=truth, mask=mask)
    assert torch.equal(filled[0, ::3], truth[::3])
    assert (filled[0] - truth).std() < 0.25 * truth.std()
    assert (free[0] - truth).std() > 0.5 * truth.std()


def test_churn_keeps_the_level_of_noise():
    """Standard deviation, not variance: white data stay white."""
    flat = lambda x, s: x * (2 * column(s, x) - 1) / (column(s, x) ** 2 + (1 - column(s, x)) ** 2)
    noise = draw(50, 400)
    for a, b in pairwise((0.9, 0.5, 0.2)):
        grid = torch.linspace(a, b, 200, dtype=F64)
        start = math.hypot(a, 1 - a) * noise
        result = wave_stitch(flat, start, grid, size=100, stride=50, churn=0.05, rate=0.0)
        close(result.std(), math.hypot(b, 1 - b), 0.01)


def test_refusals():
    with pytest.raises(ValueError, match="go together"):
        wave_stitch(wild, draw(1, 20), GRID, size=8, stride=3, mask=torch.ones(20))
    with pytest.raises(ValueError, match="got 3, 30, 20"):
        wave_stitch(wild, draw(1, 20), GRID, size=30, stride=3)
    with pytest.raises(ValueError, match=r"rate must be 0 \.\. 0\.25, got 0\.3: it diverges"):
        wave_stitch(wild, draw(1, 20), GRID, size=8, stride=3, rate=0.3)
    with pytest.raises(ValueError, match=r"churn must be 0 \.\. 1, got 2"):
        wave_stitch(wild, draw(1, 20), GRID, size=8, stride=3, churn=2)
