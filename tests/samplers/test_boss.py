"""Costs of jumps, the dynamic programme over them, and what both give on a flow whose answer is known."""

import itertools
import math

import pytest
import torch

from rfkernels.samplers import sample, schedule
from rfkernels.samplers.boss import boss_schedule, optimal_grid, path_cost
from tests.samplers.golden import velocity

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cost_by_definition(states, velocities, times):
    n = len(states)
    cost = torch.full((n, n), math.inf, dtype=F64)
    for i, j in itertools.combinations(range(n), 2):
        gap = states[i] + (times[j] - times[i]) * velocities[i] - states[j]
        cost[i, j] = gap.square().flatten(1).sum(1).mean()
    return cost


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("tile", [1 << 16, 7])
@pytest.mark.parametrize("falling", [False, True])
def test_cost_is_its_definition(direct, tile, falling):
    times = torch.linspace(0, 1, 9, dtype=F64) ** 2
    times = times.flip(0) if falling else times
    states, velocities = draw(9, 5, 2, 3), draw(8, 5, 2, 3, seed=1)
    expected = cost_by_definition(states, velocities, times)
    result = path_cost(states, velocities, times, direct=direct, tile=tile)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    more = path_cost(states, torch.cat([velocities, velocities[:1]]), times, direct=direct)
    torch.testing.assert_close(more, expected, rtol=1e-12, atol=0)


def test_gram_form_subtracts_the_first_state():
    # Without that the squares of 1e6 would leave errors of 1e-4.
    times = torch.linspace(1, 0, 11, dtype=F64)
    states = 1e6 + draw(11, 2, 4)
    velocities = draw(10, 2, 4, seed=1)
    gram, direct = (path_cost(states, velocities, times, direct=d) for d in (False, True))
    torch.testing.assert_close(gram, direct, rtol=1e-12, atol=1e-12)


def test_cost_of_16_bit_states_is_summed_in_float64():
    states, velocities = draw(4, 3, 100).bfloat16(), draw(3, 3, 100, seed=1).bfloat16()
    times = torch.linspace(1, 0, 4, dtype=F64)
    expected = cost_by_definition(states.double(), velocities.double(), times)
    torch.testing.assert_close(path_cost(states, velocities, times), expected, rtol=1e-12, atol=0)


def best_by_trying(cost, steps):
    last = len(cost) - 1
    chains = ([0, *inner, last] for inner in itertools.combinations(range(1, last), steps - 1))
    price = lambda chain: sum(cost[a, b].item() for a, b in itertools.pairwise(chain))
    return min((price(chain), chain) for chain in chains)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("seed", range(4))
def test_programme_is_the_best_of_all_chains(steps, seed):
    cost = draw(11, 11, seed=seed).abs()
    total, chain = best_by_trying(cost, steps)
    found, value = optimal_grid(cost, steps)
    assert found == chain and value == pytest.approx(total, abs=1e-14)


def test_ties_go_to_the_smallest_index():
    assert optimal_grid(torch.zeros(6, 6, dtype=F64), 3) == ([0, 1, 2, 5], 0.0)


def test_infinite_costs_forbid_jumps():
    cost = torch.ones(5, 5, dtype=F64)
    cost[0, 1] = cost[0, 2] = math.inf
    assert optimal_grid(cost, 2) == ([0, 3, 4], 2.0)
    with pytest.raises(ValueError, match="no chain of 4 jumps has a finite cost"):
        optimal_grid(cost, 4)


def test_costs_below_the_diagonal_are_not_looked_at():
    cost = torch.ones(4, 4, dtype=F64)
    cost[2, 1], cost[1, 1] = -100.0, math.nan
    assert optimal_grid(cost, 2) == ([0, 1, 3], 2.0)


def test_straight_flow_has_no_cost():
    noise, data = draw(3, 4), draw(3, 4, seed=1)
    times = torch.linspace(1, 0, 9, dtype=F64)
    states = torch.stack([(1 - t) * data + t * noise for t in times])
    cost = path_cost(states, (noise - data).expand(8, -1, -1), times)
    assert cost[:-1].triu(1).nan_to_num(posinf=0).max() < 1e-14


def toy(steps):
    """Levels and mean square error against 100 steps, for BOSS and for uniform steps, on 400 quantiles."""
    p = (torch.arange(400, dtype=F64) + 0.5) / 400
    x = torch.special.ndtri(p)[:, None]
    sigmas = boss_schedule(velocity, x, steps)
    target = sample(velocity, x, schedule("linear", 100))
    errors = [
        (sample(velocity, x, s) - target).square().mean().item() for s in (sigmas, schedule("linear", steps))
    ]
    return sigmas, errors


@pytest.mark.parametrize(
    "steps, times, ratio",
    [(2, [0, 0.49, 1], 0.32635 / 0.32952), (4, [0, 0.28, 0.49, 0.72, 1], 0.0744 / 0.08157), (8, None, 0.912)],
)
def test_toy_has_its_levels_and_gain(steps, times, ratio):
    # The table is of 400 random samples, so of its errors only the ratio can be expected of 400 quantiles.
    sigmas, (best, uniform) = toy(steps)
    assert sigmas.dtype == F64 and sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    if times:
        assert (1 - sigmas).tolist() == pytest.approx(times, abs=0.011)
    assert best / uniform == pytest.approx(ratio, abs=0.015) and best <= uniform


def test_schedule_on_a_grid_of_ones_own():
    x = draw(8, 1)
    levels = schedule("shift", 12, shift=3.0)
    chosen = boss_schedule(velocity, x, 3, grid=levels)
    assert len(chosen) == 4 and set(chosen.tolist()) <= set(levels.tolist())
    assert torch.equal(boss_schedule(velocity, x, 12, grid=levels), levels)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: optimal_grid(torch.ones(3, 3), 3), "steps must be at most 2 of 3 points, got 3"),
        (lambda: optimal_grid(torch.ones(3, 3), 0), "steps must be a whole number of at least 1, got 0"),
        (lambda: optimal_grid(torch.full((3, 3), math.nan), 1), "numbers or infinity, got 3 that are not"),
        (lambda: optimal_grid(torch.full((3, 3), -math.inf), 1), "numbers or infinity, got 3 that are not"),
        (lambda: optimal_grid(torch.ones(3, 2), 1), r"cost must be \[points, points\] .*got \[3, 2\]"),
        (lambda: path_cost(draw(3, 2, 4), draw(3, 2, 5), torch.arange(3.0)), r"\[3, 2, 4\] and \[3, 2, 5\]"),
        (lambda: path_cost(draw(4, 2, 4), draw(2, 2, 4), torch.arange(4.0)), r"\[4, 2, 4\] and \[2, 2, 4\]"),
        (lambda: path_cost(draw(3, 2), draw(3, 2), torch.tensor([0.0, 1, 1])), "rising or falling strictly"),
        (lambda: boss_schedule(velocity, draw(3, 1), 9, grid=8), "steps must be at most 8 of 9 points"),
        (lambda: boss_schedule(velocity, draw(3), 2), r"x must be \[samples, \.\.\.\], got \[3\]"),
    ],
)  # fmt: skip
def test_boss_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_velocities_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="costs must be numbers or infinity"):
        boss_schedule(lambda x, sigma: x * math.nan, draw(3, 1), 2, grid=4)
