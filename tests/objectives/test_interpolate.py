"""The noisy state and its target: every path and target, pairs, annealing, windows."""

import importlib
import math
from itertools import pairwise

import pytest
import torch

from rfkernels.objectives import (
    VP,
    Cosine,
    RectifiedPath,
    SubVP,
    Table,
    anneal_rate,
    ddpm_table,
    elementwise_huber,
    interpolate,
    joint_flip,
    phased_interpolate,
    phased_window,
    velocity_loss,
)
from rfkernels.ops import affine_step, noise_keys, philox_normal
from tests.objectives.problem import F64, column, normal

module = importlib.import_module("rfkernels.objectives.interpolate")
PATHS = [RectifiedPath(), RectifiedPath(1e-5), VP(), SubVP(), Cosine()]
every_path = pytest.mark.parametrize("path", PATHS, ids=str)
SIGMA = torch.tensor([0.1, 0.6, 0.95], dtype=F64)


@every_path
def test_states_and_targets(path):
    x0, noise = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    alpha, sigma = (column(c, x0) for c in path(SIGMA))
    expected = {
        "u": noise - x0,
        "x0": x0,
        "eps": noise,
        "w": alpha * noise - sigma * x0,
        "velocity": column(path.rates(SIGMA)[0], x0) * x0 + column(path.rates(SIGMA)[1], x0) * noise,
    }
    for target, value in expected.items():
        x, made = interpolate(x0, SIGMA, noise, path=path, target=target)
        torch.testing.assert_close(x, alpha * x0 + sigma * noise, rtol=0, atol=1e-15)
        torch.testing.assert_close(made, value, rtol=1e-14, atol=1e-14)


@every_path
def test_rates_are_derivatives(path):
    t, h = torch.linspace(0.01, 0.99, 50, dtype=F64), 1e-6
    for after, before, rate in zip(path(t + h), path(t - h), path.rates(t), strict=True):
        torch.testing.assert_close(rate, (after - before) / (2 * h), rtol=1e-6, atol=1e-8)


@every_path
def test_paths_are_finite_at_both_ends(path):
    for values in (
        path(torch.tensor([0.0, 1.0], dtype=F64)),
        path.rates(torch.tensor([0.0, 1.0], dtype=F64)),
    ):
        assert all(v.isfinite().all() for v in values)


def test_velocity_of_rectified_flow_is_u_to_the_bit():
    x0, noise = normal(3, 4), normal(3, 4, seed=1)
    assert torch.equal(interpolate(x0, SIGMA, noise)[1], noise - x0)
    assert torch.equal(interpolate(x0, SIGMA, noise)[1], interpolate(x0, SIGMA, noise, target="u")[1])
    ends = torch.tensor([0.0, 1.0, 0.5], dtype=F64)
    x, _ = interpolate(x0, ends, noise)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[1], noise[1])


def test_one_launch_makes_both(monkeypatch):
    calls = []
    combine = module.combine
    monkeypatch.setattr(module, "combine", lambda *a, **k: calls.append(a) or combine(*a, **k))
    keys = noise_keys(0, 3)
    interpolate(normal(3, 4), SIGMA, normal(3, 4, seed=1), keys=keys, anneal=0.3)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_noise_is_that_of_the_keys(dtype):
    x0, keys = normal(3, 4, 5, dtype=dtype), noise_keys(11, 3, step=2)
    x, target = interpolate(x0, SIGMA, keys=keys)
    assert x.dtype == dtype and target.dtype == dtype
    noise = philox_normal(x0.shape, keys, dtype=F64)
    expected = (1 - column(SIGMA, noise)) * x0.double() + column(SIGMA, noise) * noise
    tolerance = {F64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=tolerance)
    alone, _ = interpolate(x0[1:2], SIGMA[1:2], keys=keys[1:2])
    assert torch.equal(alone, x[1:2])


def test_a_level_for_each_frame():
    x0, noise = normal(2, 3, 4, 2, 2), normal(2, 3, 4, 2, 2, seed=1)
    sigma = torch.linspace(0, 1, 8, dtype=F64).view(2, 1, 4)
    x, target = interpolate(x0, sigma, noise)
    for f in range(4):
        frame, _ = interpolate(x0[:, :, f].contiguous(), sigma[:, 0, f], noise[:, :, f].contiguous())
        assert torch.equal(frame, x[:, :, f])
    assert torch.equal(target, noise - x0)
    assert torch.equal(x[0, :, 0], x0[0, :, 0])  # sigma 0: a clean frame


def test_annealed_pairs_are_normal_and_end_as_reflow():
    x0, noise, keys = normal(4, 50_000), normal(4, 50_000, seed=1), noise_keys(2, 4)
    one = torch.ones(4, dtype=F64)
    for r in (0.3, 0.8, 1.0):
        mixed, _ = interpolate(x0, one, noise, keys=keys, anneal=r)
        assert float(mixed.var()) == pytest.approx(1, abs=4 * (2 / 200_000) ** 0.5)
        correlation = float((mixed * noise).mean())
        assert correlation == pytest.approx(math.sqrt(1 - r * r), abs=4 / 200_000**0.5)
    sigma = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=F64)
    annealed = interpolate(x0, sigma, noise, anneal=0.0)
    plain = interpolate(x0, sigma, noise)
    assert all(torch.equal(a, b) for a, b in zip(annealed, plain, strict=True))
    v = normal(4, 50_000, seed=5)
    assert torch.equal(velocity_loss(v, annealed[1]), velocity_loss(v, noise - x0))
    # r = 1: fresh noise alone
    fresh = interpolate(x0, sigma, noise, keys=keys, anneal=1.0)
    for a, b in zip(fresh, interpolate(x0, sigma, keys=keys), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_anneal_rates():
    assert [anneal_rate(k, 100) for k in (0, 25, 100, 400)] == [1.0, 0.75, 0.0, 0.0]
    cosine = [anneal_rate(k, 100, "cosine") for k in (0, 50, 100, 101)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-15) and cosine[2] == 0
    assert anneal_rate(100, 100, "exponential") == pytest.approx(math.exp(-1))
    assert anneal_rate(2000, 100, "exponential") == 0
    for bad in [(-1, 10, "linear"), (1, 0, "linear"), (1, 10, "warmup")]:
        with pytest.raises(ValueError, match="anneal_rate"):
            anneal_rate(*bad)


def test_pairs_flip_together():
    x0, noise, keys = normal(64, 3, 4), normal(64, 3, 4, seed=1), noise_keys(0, 64)
    a, b = joint_flip(x0, noise, keys)
    flipped = (a == x0.flip(-1)).flatten(1).all(1)
    assert 16 < int(flipped.sum()) < 48
    expected = lambda t: torch.where(flipped[:, None, None], t.flip(-1), t)
    assert torch.equal(a, expected(x0)) and torch.equal(b, expected(noise))
    again, _ = joint_flip(x0[5:6], noise[5:6], keys[5:6])
    assert torch.equal(again, a[5:6])


def test_stable_diffusions_tables():
    assert float(ddpm_table("linear").alphas[-1] ** 2) == pytest.approx(0.00158, abs=5e-6)
    assert float(ddpm_table("scaled_linear").alphas[-1] ** 2) == pytest.approx(0.00466, abs=5e-6)
    table = ddpm_table()
    t = torch.tensor([0, 500, 999])
    x0, noise = normal(3, 4), normal(3, 4, seed=1)
    x, target = interpolate(x0, t, noise, path=table, target="eps")
    alpha, sigma = table.alphas[t][:, None], table.sigmas[t][:, None]
    torch.testing.assert_close(x, alpha * x0 + sigma * noise, rtol=0, atol=1e-15)
    assert torch.equal(target, noise)
    with pytest.raises(ValueError, match="no velocity"):
        interpolate(x0, t, noise, path=table)
    with pytest.raises(ValueError, match="got 'cosine'"):
        ddpm_table("cosine")


@pytest.mark.parametrize("path", [VP(), SubVP(), RectifiedPath()], ids=str)
def test_constant_noise_is_one_step(path):
    # Rectified Diffusion: with a constant noise prediction one step is exact.
    x0, noise = normal(2, 5), normal(2, 5, seed=1)
    grid = torch.linspace(0.5, 0.1, 9, dtype=F64)
    at = [interpolate(x0, t.expand(2), noise, path=path)[0] for t in grid]
    x = at[0]
    for t, after in pairwise(grid):
        (a, s), (b, r) = path(t), path(after)
        x = affine_step(x, noise, b / a, r - b * s / a)
    torch.testing.assert_close(x, at[-1], rtol=0, atol=1e-14)
    (a, s), (b, r) = path(grid[0]), path(grid[-1])
    torch.testing.assert_close(affine_step(at[0], noise, b / a, r - b * s / a), at[-1], rtol=0, atol=1e-14)


def test_windows_of_phased_rectified_diffusion():
    path = ddpm_table()
    start, tau, end = (path(torch.tensor([t, t])) for t in (999, 870, 749))
    x_start, x_end = normal(2, 6), normal(2, 6, seed=1)
    x, noise = phased_interpolate(x_start, x_end, start, tau, end)
    n = lambda level: column(level[1] / level[0], x)
    expected = (x_end / column(end[0], x) - x_start / column(start[0], x)) / (n(end) - n(start))
    torch.testing.assert_close(noise, expected, rtol=1e-12, atol=1e-12)
    state = column(tau[0], x) * (x_start / column(start[0], x) + (n(tau) - n(start)) * expected)
    torch.testing.assert_close(x, state, rtol=1e-12, atol=1e-12)
    # from tau the window's own noise arrives at its end
    a, b = end[0] / tau[0], end[1] - end[0] * tau[1] / tau[0]
    arrived = affine_step(x, noise, a, b)
    torch.testing.assert_close(arrived, x_end, rtol=0, atol=1e-12)
    assert float(elementwise_huber([arrived, x_end], [1.0, -1.0])) < 1e-12
    assert torch.equal(phased_interpolate(x_start, x_end, start, end, end)[0], x_end)
    assert torch.equal(phased_interpolate(x_start, x_end, start, start, end)[0], x_start)
    with pytest.raises(ValueError, match="start and end must differ"):
        phased_interpolate(x_start, x_end, start, tau, start)


def test_windows_are_those_of_the_authors():
    assert [phased_window(i) for i in (0, 9, 10, 25, 39)] == [
        (249, 0),
        (249, 0),
        (499, 249),
        (749, 499),
        (999, 749),
    ]
    for bad in ({"index": 40}, {"index": 0, "phases": 3}, {"index": -1}):
        with pytest.raises(ValueError, match="phased_window"):
            phased_window(**bad)


def test_refusals():
    x0, keys = normal(3, 4), noise_keys(0, 3)
    for arguments, message in [
        ({}, "expected noise or keys"),
        ({"noise": x0, "keys": keys}, "anneal above 0"),
        ({"noise": x0, "anneal": 0.5}, "needs both"),
        ({"keys": keys, "anneal": 0.5}, "needs both"),
        ({"noise": x0, "keys": keys, "anneal": 1.5}, "in 0 .. 1, got 1.5"),
        ({"noise": x0, "target": "v"}, "got 'v'"),
    ]:
        with pytest.raises(ValueError, match=message):
            interpolate(x0, SIGMA, **arguments)
    with pytest.raises(ValueError, match="sigma_min"):
        RectifiedPath(1.0)


def test_a_table_of_ones_own():
    table = Table(torch.tensor([1.0, 0.5], dtype=F64), torch.tensor([0.0, 0.5], dtype=F64))
    x, _ = interpolate(normal(2, 3), torch.tensor([0, 1]), normal(2, 3, seed=1), path=table, target="u")
    assert torch.equal(x[0], normal(2, 3)[0])


def test_a_level_may_be_a_number():
    x0, noise = normal(2, 3), normal(2, 3, seed=1)
    for a, b in zip(
        interpolate(x0, 0.3, noise), interpolate(x0, torch.tensor([0.3, 0.3], dtype=F64), noise), strict=True
    ):
        assert torch.equal(a, b)
