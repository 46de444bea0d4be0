"""How straight trajectories are: identities, exact cases, and a known figure."""

import pytest
import torch

from rfkernels.objectives import path_straightness, straightness, transport_cost
from rfkernels.samplers import schedule
from tests.objectives.problem import F64, mixture_velocity, normal


def euler(velocity, x, sigmas):
    states, velocities = [x], []
    for s, after in zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False):
        velocities.append(velocity(x, torch.full((len(x),), s, dtype=F64)))
        x = x + (after - s) * velocities[-1]
        states.append(x)
    return states, velocities


GRIDS = {
    "linear": schedule("linear", 7),
    "shift": schedule("shift", 7, shift=3.0),
    "up": schedule("linear", 5).flip(0),
    "part": torch.tensor([0.9, 0.5, 0.2]),
}


@pytest.mark.parametrize("sigmas", GRIDS.values(), ids=GRIDS)
def test_sums_are_the_integral(sigmas):
    sigmas = sigmas.double()
    curved = lambda x, s: torch.sin(3 * x) - s[:, None] * x
    states, velocities = euler(curved, normal(4, 6), sigmas)
    length = (sigmas[-1] - sigmas[0]).abs()
    mean = (states[-1] - states[0]) / (sigmas[-1] - sigmas[0])
    direct = sum(
        (b - a).abs() * (v - mean).square().sum(1)
        for a, b, v in zip(sigmas, sigmas[1:], velocities, strict=False)
    )
    result = straightness(velocities, states[0], states[-1], sigmas)
    torch.testing.assert_close(result, direct, rtol=1e-12, atol=1e-12)
    assert (result > 0.1 * length).all()


def test_straight_is_zero():
    noise, x0 = normal(4, 6), normal(4, 6, seed=1)
    states, velocities = euler(lambda x, s: noise - x0, noise, schedule("shift", 9, shift=3.0))
    grid = schedule("shift", 9, shift=3.0)
    assert straightness(velocities, states[0], states[-1], grid).abs().max() < 1e-12
    assert path_straightness(states, grid).max() < 1e-24


def test_path_straightness_is_its_formula():
    grid = schedule("linear", 5)
    states, velocities = euler(mixture_velocity, normal(4, 6), grid)
    way = states[0] - states[-1]
    expected = torch.stack([(v - way).square().mean(1) for v in velocities]).mean(0)
    torch.testing.assert_close(path_straightness(states, grid), expected, rtol=1e-12, atol=1e-14)
    # of Euler on a uniform grid both measures are one
    S = straightness(velocities, states[0], states[-1], grid)
    torch.testing.assert_close(S / 6, expected, rtol=1e-12, atol=1e-14)


def test_the_mixtures_first_flow():
    grid = schedule("linear", 100)
    states, velocities = euler(mixture_velocity, normal(2000, 1), grid)
    S = straightness(velocities, states[0], states[-1], grid)
    assert abs(float(S.mean()) - 0.574) < 4 * float(S.std()) / 2000**0.5 + 5e-3


def test_transport_cost():
    x0, noise = normal(4, 6), normal(4, 6, seed=1)
    torch.testing.assert_close(transport_cost(x0, noise), (x0 - noise).square().sum(1))


def test_refusals():
    x = normal(2, 3)
    for call, message in [
        (lambda: straightness([x, x], x, x, [1.0, 0.0]), "2 velocities need 3 levels, got 2"),
        (lambda: straightness([x], x, x, [0.5, 0.5]), "no length"),
        (lambda: path_straightness([x], [1.0]), "two states or more"),
        (lambda: path_straightness([x, x], [0.5, 0.5]), "no two equal"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
