"""Inversion and controlled editing: what is exact, golden values, marginals, released forms."""

import math
from itertools import pairwise

import pytest
import torch

from rfkernels.editing import Transport, invert, rf_inversion, rf_inversion_edit
from rfkernels.editing import inversion as module
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.samplers import sample, schedule
from tests.editing.fields import END, F64, SIGMA, C, X, Y, close, guided, normal, wild, wild_pair
from tests.samplers import golden

DOWN = schedule("shift", 7, shift=3.0)
UP = DOWN.flip(0)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def launches(monkeypatch):
    calls, real = [], module.Launches.__call__
    monkeypatch.setattr(module.Launches, "__call__", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


@pytest.mark.parametrize("grid", [DOWN, schedule("linear", 3), torch.tensor([0.7, 0.2, 0.0])])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("stochastic", [False, True])
def test_full_control_returns_the_target_to_the_bit(grid, dtype, stochastic):
    x, y = draw(2, 3, 4).to(dtype), draw(2, 3, 4, seed=1).to(dtype)
    result = rf_inversion_edit(wild, x, grid, target=y, eta=1, stop=99, stochastic=stochastic)
    assert torch.equal(result, y)


def test_full_pull_inverts_to_the_noise_to_the_bit():
    x, y = draw(2, 6), draw(2, 6, seed=1)
    assert torch.equal(rf_inversion(wild, x, UP, noise=y, gamma=1), y)
    drawn = philox_normal(x.shape, noise_keys([3, 5], 2), dtype=F64)
    assert torch.equal(rf_inversion(wild, x, UP, gamma=1, seeds=[3, 5]), drawn)


def test_no_pull_is_euler():
    x, y = draw(2, 6), draw(2, 6, seed=1)
    close(rf_inversion(wild, x, UP, noise=y, gamma=0), sample(wild, x, UP), 1e-15)
    close(rf_inversion_edit(wild, x, DOWN, target=y, eta=0), sample(wild, x, DOWN), 1e-15)
    close(rf_inversion_edit(wild, x, DOWN, target=y, stop=0), sample(wild, x, DOWN), 1e-15)


def test_inversion_is_its_equation():
    x, y = draw(2, 6), draw(2, 6, seed=1)
    expected = x
    for a, b in pairwise(UP.tolist()):
        v = wild(expected, torch.full((2,), a, dtype=F64))
        expected = expected + (b - a) * (v + 0.3 * ((y - expected) / (1 - a) - v))
    close(rf_inversion(wild, x, UP, noise=y, gamma=0.3), expected)


def test_released_inversion_asks_at_other_times():
    x, y, asked = draw(1, 6), draw(1, 6, seed=1), []

    def velocity(x, sigma):
        asked.append(sigma.item())
        return wild(x, sigma)

    result = rf_inversion(velocity, x, UP, noise=y, gamma=0.3, compat="diffusers")
    s, n = DOWN.tolist(), 7
    close(torch.tensor(asked, dtype=F64), [i / 8 for i in range(n)])
    expected = x
    for i in range(n):
        t = i / (n + 1)
        v = wild(expected, torch.full((1,), t, dtype=F64))
        expected = expected + (v + 0.3 * ((y - expected) / (1 - t) - v)) * (s[i] - s[i + 1])
    close(result, expected)


def test_golden_control():
    step = torch.tensor([SIGMA, END], dtype=F64)
    result = rf_inversion_edit(lambda x, s: C[None], X[None], step, target=Y[None], eta=0.9, stop=1)
    expected = [0.638976275, 0.801378600, 0.028702069, -0.605665346, -0.617801314, -0.268882232]
    close(result[0, :6], expected, 1e-9)


def test_golden_transport():
    s = Transport().scale(3, 28)
    assert s == pytest.approx(0.071694187, abs=1e-9)
    assert 1 - (1 - s) * (1 - 0.9) == pytest.approx(0.907169419, abs=1e-9)
    assert Transport().scale(1, 28) == pytest.approx(
        0.05 * (1 + math.cos(math.pi / 28 / 0.3)) * (1 / 28) / 0.05
    )
    assert Transport().scale(9, 28) == 0 == Transport().scale(0, 28)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_transport_without_clip_is_control_with_another_eta(eta):
    """eta' = 1 - (1 - s)(1 - eta), step by step."""
    x, y, n = draw(2, 5, 4), draw(2, 5, 4, seed=1), 7
    free = Transport(strength=0.5, until=2.0, clip=1e9)
    result = rf_inversion_edit(wild, x, DOWN, target=y, eta=eta, stop=4, transport=free)
    for i, (a, b) in enumerate(pairwise(DOWN.tolist())):
        g = 1 - (1 - free.scale(i, n)) * (1 - eta * (i < 4))
        v = wild(x, torch.full((2,), a, dtype=F64))
        x = x + (b - a) * (v + g * ((x - y) / a - v))
    close(result, x)


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("guidance", [None, 2.5, torch.tensor([0.5, 3.0])])
def test_transport_clips_every_token(matched, guidance):
    x, y, n = 3 * draw(2, 5, 4), draw(2, 5, 4, seed=1), 7
    mask = (draw(2, 5, 1, seed=2) > 0).to(F64)
    pull = Transport(strength=0.8, until=0.5, clip=2.0, ramp=0.2, matched=matched)
    pair = wild_pair if guidance is not None else wild
    result = rf_inversion_edit(
        pair, x, DOWN, target=y, eta=0.3, stop=3, transport=pull, mask=mask, guidance=guidance
    )
    field = wild if guidance is None else guided(wild_pair, guidance)
    for i, (a, b) in enumerate(pairwise(DOWN.tolist())):
        v = field(x, torch.full((2,), a, dtype=F64))
        d = (x - y) / max(a, 0.01)
        d = d * (2.0 / d.norm(dim=-1, keepdim=True)).clamp(max=1)
        if matched:
            d = d * v.norm(dim=-1, keepdim=True) / d.norm(dim=-1, keepdim=True)
        pulled = v + pull.scale(i, n) * (d - v)
        pulled = pulled + 0.3 * (i < 3) * ((x - y) / a - pulled)
        x = x + (b - a) * (mask * pulled + (1 - mask) * v)
    close(result, x)


def test_guidance_and_decay_and_mask():
    x, y, w = draw(2, 6), draw(2, 6, seed=1), torch.tensor([0.5, 3.0])
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0], dtype=F64)
    result = rf_inversion_edit(
        wild_pair, x, DOWN, target=y, eta=0.8, start=1, stop=5, decay=2.0, guidance=w, mask=mask
    )
    for i, (a, b) in enumerate(pairwise(DOWN.tolist())):
        v = guided(wild_pair, w.double())(x, torch.full((2,), a, dtype=F64))
        eta = 0.8 * (1 - i / 7) ** 2 * (1 <= i < 5)
        x = x + (b - a) * (v + mask * eta * ((x - y) / a - v))
    close(result, x)


def test_a_step_is_one_launch(launches):
    x = draw(2, 5, 4)
    rf_inversion(wild, x, UP)
    rf_inversion_edit(wild_pair, x, DOWN, target=x, guidance=3.0, transport=Transport(until=9.0))
    assert len(launches) == 2 * 7


def test_states_of_the_caller_are_left_alone():
    x, y = draw(2, 6), draw(2, 6, seed=1)
    kept = x.clone(), y.clone()
    rf_inversion(wild, x, UP, noise=y)
    rf_inversion_edit(lambda x, s: x, x, DOWN, target=y)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


@pytest.mark.parametrize("grid", [schedule("linear", 200), schedule("shift", 200, shift=3.0)])
def test_the_sde_keeps_the_marginals(grid):
    """Data N(.7, .5^2), the exact velocity; within 4 standard errors and what a step of 1/200 adds."""
    n = 40000
    x = draw(n, 1, seed=5)
    result = rf_inversion_edit(normal(0.7, 0.5), x, grid, target=x, eta=0, stochastic=True, seeds=1)
    assert abs(result.mean() - 0.7) < 4 * 0.5 / n**0.5 + 2e-3
    assert abs(result.std() - 0.5) < 4 * 0.5 / (2 * n) ** 0.5 + 2e-3
    plain = rf_inversion_edit(normal(0.7, 0.5), x, grid, target=x, eta=0)
    assert abs(torch.corrcoef(torch.cat([result, x], 1).T)[0, 1]) < 0.05  # all noise is new
    assert torch.corrcoef(torch.cat([plain, x], 1).T)[0, 1] > 0.999


def test_the_sde_is_the_one_of_the_paper():
    """x - h(2v + x/(1-sigma)) + sqrt(2 sigma h/(1-sigma)) z; never more noise than the next level."""
    row = module._row(0.6, 0.55, module._noise(0.6, 0.55))
    expected = {"x": 1 - 0.05 / 0.4, "v": -2 * 0.05, "z": math.sqrt(2 * 0.6 / 0.4 * 0.05)}
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-15)
    assert module._noise(0.9, 0.3) == 0.3 and module._noise(1.0, 0.9) == 0 == module._noise(0.2, 0.0)


def test_round_trip_of_rf_solver_is_of_third_order():
    x = torch.linspace(-2, 2, 21, dtype=F64)[:, None]
    errors = {}
    for method, sizes in (("rf-solver", (40, 80)), ("euler", (80, 160))):
        for n in sizes:
            grid = schedule("linear", n)
            noise = invert(golden.velocity, x, grid, method=method)
            errors[method, n] = (sample(golden.velocity, noise, grid, method=method) - x).abs().max().item()
    assert errors["rf-solver", 40] == pytest.approx(1.32e-4, rel=0.01)
    assert abs(math.log2(errors["rf-solver", 40] / errors["rf-solver", 80]) - 3) < 0.15
    assert 0.6 < math.log2(errors["euler", 80] / errors["euler", 160]) < 1.1


def test_refusals():
    x = draw(2, 6)
    with pytest.raises(ValueError, match="rf_inversion: sigmas must rise strictly within"):
        rf_inversion(wild, x, DOWN)
    with pytest.raises(ValueError, match="rf_inversion_edit: sigmas must fall"):
        rf_inversion_edit(wild, x, UP, target=x)
    with pytest.raises(ValueError, match="compat must be one of None, 'diffusers', got 'paper'"):
        rf_inversion(wild, x, UP, compat="paper")
    with pytest.raises(ValueError, match=r"target must broadcast to x \[2, 6\], got \[3\]"):
        rf_inversion_edit(wild, x, DOWN, target=torch.zeros(3))
    with pytest.raises(ValueError, match="a pair \\(uncond, cond\\), since guidance is given, got Tensor"):
        rf_inversion(wild, x, UP, guidance=2.0)
    with pytest.raises(ValueError, match=r"shape of x \[2, 6\], got \[2, 5\]"):
        rf_inversion(lambda x, s: x[:, :5], x, UP)
    with pytest.raises(ValueError, match=r"guidance must be a number or \[2\], got \[3\]"):
        rf_inversion(wild_pair, x, UP, guidance=torch.ones(3))
    with pytest.raises(ValueError, match="eta must be finite, got nan"):
        rf_inversion_edit(wild, x, DOWN, target=x, eta=math.nan)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        Transport(clip=0)
