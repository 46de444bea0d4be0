"""Schedules by name, and the maps that they are made of."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from rfkernels.samplers import SCHEDULES, schedule, schedules
from rfkernels.samplers._beta import beta_distribution, beta_quantile
from rfkernels.samplers.schedules import dynamic_mu

F64 = torch.float64

# FLUX.1-dev (specs of the model): steps, tokens, noise levels.
FLUX = [
    (4, 4096, [1, 0.904531, 0.759511, 0.512844, 0]),
    (8, 1024, [1, 0.929295, 0.849235, 0.757831, 0.652489, 0.529758, 0.384945, 0.2115, 0]),
]


def test_linear_is_uniform():
    assert schedule("linear", 4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_static_shift_is_applied_once():
    # diffusers' default grid would give 1, .85769, .60215, .00893, 0: its last call is wasted.
    assert schedule("shift", 4, shift=3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)


def test_shifts_compose():
    once = schedule("shift", 10, shift=6.0)
    first = schedule("shift", 10, shift=2.0)
    torch.testing.assert_close(3 * first / (1 + 2 * first), once)
    inside = slice(1, -1)
    logit = torch.logit(schedule("linear", 10)[inside]) + math.log(6)
    torch.testing.assert_close(torch.logit(once[inside]), logit)


@pytest.mark.parametrize("steps, tokens, levels", FLUX)
def test_dynamic_shift_is_that_of_flux(steps, tokens, levels):
    assert schedule("dynamic", steps, tokens=tokens).tolist() == pytest.approx(levels, abs=6e-7)


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (1024, 0.63), (4096, 1.15), (6144, 1.496666667)])
def test_dynamic_mu_is_that_of_flux(tokens, mu):
    assert dynamic_mu(tokens) == pytest.approx(mu, abs=1e-9)


EVERY = [
    ("linear", {}),
    ("shift", {"shift": 0.2}),
    ("shift", {"shift": 12.0}),
    ("shift", {"shift": 3.0, "compat": "diffusers"}),
    ("dynamic", {"tokens": 4096}),
    ("karras", {}),
    ("karras", {"sigma_min": 0.0005, "rho": 3.0}),
    ("exponential", {}),
    ("exponential", {"sigma_min": 0.0005}),
    ("beta", {}),
    ("beta", {"alpha": 2.0, "beta": 0.5, "sigma_min": 0.0005}),
    ("cosine", {}),
    ("linear_quadratic", {}),
    ("linear_quadratic", {"threshold": 0.0005, "linear_steps": 1}),
]


def test_every_schedule_is_tested():
    assert {name for name, _ in EVERY} == set(SCHEDULES)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("name, parameters", EVERY)
def test_every_schedule_falls_from_one_to_zero(name, parameters, steps):
    sigmas = schedule(name, steps, **parameters)
    assert sigmas.dtype == torch.float64 and len(sigmas) == steps + 1
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


# diffusers' levels of a static shift of 3 at N = 8, from 1 to .002994.
RESPACED = {
    "karras": [1, 0.555413, 0.292276, 0.144143, 0.065655, 0.027069, 0.009813, 0.002994],
    "exponential": [1, 0.435978, 0.190077, 0.082869, 0.036129, 0.015752, 0.006867, 0.002994],
    "beta": [1, 0.929071, 0.783798, 0.599772, 0.403222, 0.219196, 0.073923, 0.002994],
}


@pytest.mark.parametrize("name", RESPACED)
def test_respaced_levels_are_those_of_the_table(name):
    low = schedules.time_shift(torch.tensor(0.001), 3.0).item()
    sigmas = schedule(name, 8, sigma_min=low)
    assert sigmas.tolist() == pytest.approx([*RESPACED[name], 0], abs=6e-7)
    assert sigmas[-2] == low
    assert schedule(name, 5)[-2] == 0.2  # by default the last level of the uniform grid


def test_double_shift_is_that_of_diffusers():
    expected = [1, 0.85769, 0.60215, 0.00893, 0]
    assert schedules.double_shift(4, 3.0).tolist() == pytest.approx(expected, abs=6e-6)
    assert torch.equal(schedule("shift", 4, shift=3.0, compat="diffusers"), schedules.double_shift(4, 3.0))
    assert schedules.double_shift(1, 3.0).tolist() == [1, 0]


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (1.0, 1.0), (0.5, 0.5), (2.0, 5.0), (30.0, 50.0), (5.0, 0.3)])
def test_beta_quantiles_are_those_of_scipy(a, b):
    p = torch.linspace(0, 1, 501, dtype=F64)
    x = beta_quantile(p, a, b)
    np.testing.assert_allclose(x, scipy.stats.beta.ppf(p.numpy(), a, b), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(beta_distribution(p, a, b), scipy.stats.beta.cdf(p.numpy(), a, b), atol=1e-13)
    assert x[0] == 0 and x[-1] == 1


def test_cosine_is_the_cosine_path_brought_to_the_straight_one():
    u = torch.linspace(1, 0, 12, dtype=F64)[1:-1]
    alpha, sigma = torch.cos(math.pi * u / 2), torch.sin(math.pi * u / 2)
    torch.testing.assert_close(schedule("cosine", 11)[1:-1], sigma / (alpha + sigma))
    quantiles = [0.136728736, 0.5, 0.863271264]  # of CosMap at .1, .5, .9
    assert schedule("cosine", 10)[[9, 5, 1]].tolist() == pytest.approx(quantiles, abs=1e-9)


@pytest.mark.parametrize("mu", [-1.0, 0.5, 2.0])
def test_exponential_time_shift_is_a_shift(mu):
    sigma = torch.linspace(1, 0, 9, dtype=F64)
    shifted = schedules.time_shift_exponential(sigma, mu)
    torch.testing.assert_close(shifted, schedules.time_shift(sigma, math.exp(mu)), rtol=1e-14, atol=1e-15)
    linear = schedules.time_shift_linear(sigma, math.exp(mu))
    assert torch.equal(shifted, linear) and shifted[0] == 1 and shifted[-1] == 0
    steep = schedules.time_shift_exponential(sigma, mu, 2.0)[4].item()
    assert steep == pytest.approx(math.exp(mu) / (math.exp(mu) + 1)) and steep == shifted[4]


@pytest.mark.parametrize("terminal", [0.0, 0.02, 0.1])
def test_stretch_ends_at_its_level_exactly(terminal):
    sigma = schedule("dynamic", 8, tokens=4096)[:-1]
    stretched = schedules.stretch_to_terminal(sigma, terminal)
    assert stretched[0] == 1 and stretched[-1] == terminal
    torch.testing.assert_close((1 - stretched) / (1 - stretched[-1]), (1 - sigma) / (1 - sigma[-1]))
    assert schedules.stretch_to_terminal(torch.ones(1), terminal).tolist() == [1.0]


def test_linear_quadratic_bends_once_and_smoothly():
    sigmas = schedule("linear_quadratic", 64)
    assert sigmas[32].item() == pytest.approx(1 - 0.025, abs=1e-15)
    steps = -sigmas.diff()
    torch.testing.assert_close(steps[:32], torch.full((32,), 0.025 / 32, dtype=F64))
    bends = steps[32:].diff()
    torch.testing.assert_close(bends, bends[:1].expand(31))
    assert schedule("linear_quadratic", 5, linear_steps=5).tolist() == schedule("linear", 5).tolist()


def test_grid_of_2rfpp_starts_a_hair_below_one():
    assert schedules.rfpp(4).tolist() == [1 - 1e-5, 0.75, 0.5, 0.25, 0]
    assert schedules.rfpp(1, start=0.0).tolist() == [1, 0]


def test_times_of_rectified_flows_code():
    steps, start = 5, 1e-3
    expected = [999 * (i / steps * (1 - start) + start) for i in range(steps)]
    times = schedules.rectified_flow_times(schedule("linear", steps)[:-1])
    assert times.tolist() == pytest.approx(expected, abs=1e-12)
    assert schedules.rectified_flow_times(torch.tensor([0.0]), scale=1.0).item() == 1


def test_given_levels_are_checked_and_end_at_zero():
    assert schedules.given([0.9, 0.4]).tolist() == [0.9, 0.4, 0]
    assert schedules.given(torch.tensor([1.0, 0.5, 0.0])).tolist() == [1, 0.5, 0]


def test_invert_gives_times_that_rise():
    assert schedules.invert(schedule("linear", 4)).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_timesteps_are_cut_or_rounded():
    sigmas = torch.tensor([1.0, 0.9999, 0.2577, 0.0], dtype=F64)
    assert schedules.timesteps_for(sigmas, "float64").tolist() == pytest.approx([1000, 999.9, 257.7, 0])
    assert schedules.timesteps_for(sigmas).dtype == torch.float32
    assert schedules.timesteps_for(sigmas, "int64").tolist() == [1000, 999, 257, 0]
    assert schedules.timesteps_for(sigmas, "bfloat16").tolist() == [1000, 1000, 258, 0]
    assert schedules.timesteps_for(sigmas, "int64", train_timesteps=100).tolist() == [100, 99, 25, 0]


@pytest.mark.parametrize("steps, distinct", [(10, 10), (30, 30), (50, 50), (100, 89)])
def test_bfloat16_timesteps_run_together(steps, distinct):
    timesteps = schedules.timesteps_for(schedule("shift", steps, shift=5.0)[:-1], "bfloat16")
    assert len(timesteps.unique()) == distinct


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedule("kl", 4), "schedule must be one of linear, shift, dynamic, karras, .*, got 'kl'"),
        (lambda: schedule("linear", 0), "steps must be a whole number of at least 1, got 0"),
        (lambda: schedule("linear", 2.5), "steps must be a whole number of at least 1, got 2.5"),
        (lambda: schedule("shift", 4), "'shift' needs shift=, got none"),
        (lambda: schedule("shift", 4, shift=0.0), "shift must be a positive number, got 0.0"),
        (lambda: schedule("shift", 4, shift=math.nan), "shift must be a positive number, got nan"),
        (lambda: schedule("shift", 4, shift=3.0, compat="k"), "compat must be None or 'diffusers', got 'k'"),
        (lambda: schedule("linear", 4, shift=3.0), "'linear' takes no shift, got 3.0"),
        (lambda: schedule("shift", 4, shift=3.0, tokens=16), "'shift' takes no tokens, got 16"),
        (lambda: schedule("dynamic", 4, tokens=0), "tokens must be a whole number of at least 1, got 0"),
        (lambda: schedule("karras", 4, sigma_min=0.0), "0 < sigma_min < sigma_max <= 1, got 0.0 and 1.0"),
        (lambda: schedule("karras", 4, sigma_max=2.0), "sigma_max <= 1, got 0.5 and 2.0"),
        (lambda: schedule("exponential", 2, sigma_min=1.0), "sigma_min < sigma_max <= 1, got 1.0 and 1.0"),
        (lambda: schedule("karras", 4, rho=-7.0), "rho must be a positive number, got -7.0"),
        (lambda: schedule("beta", 4, alpha=0.0), "alpha must be a positive number, got 0.0"),
        (lambda: schedule("linear_quadratic", 4, threshold=1.0), "threshold must be between 0 and 1, got 1"),
        (lambda: schedule("linear_quadratic", 4, linear_steps=5), "linear_steps must be at most steps 4"),
        (lambda: schedule("linear_quadratic", 8, threshold=0.5, linear_steps=1), "levels that fall: 1 of 8"),
        (lambda: schedules.rfpp(4, start=0.25), "start must be at least 0 and less than 1/steps, got 0.25"),
        (lambda: schedules.rectified_flow_times(torch.ones(1), start=1.0), "start must be at least 0 and"),
        (lambda: schedules.given([0.5, 0.5]), "sigmas must fall strictly"),
        (lambda: schedules.given([1.5, 0.5]), "sigmas must lie within 0 and 1"),
        (lambda: schedules.given([math.nan]), "sigmas must lie within 0 and 1"),
        (lambda: schedules.given([0.0]), "sigmas must lie within 0 and 1"),
        (lambda: schedules.given([]), r"sigmas must be \[steps\], got \[0\]"),
        (lambda: schedules.stretch_to_terminal(torch.ones(2), 1.0), "terminal must be at least 0 and less"),
        (lambda: schedules.time_shift_exponential(torch.ones(2), math.inf), "mu must be a finite number"),
        (lambda: schedules.time_shift_linear(torch.ones(2), -1.0), "mu must be a positive number, got -1.0"),
        (lambda: schedules.timesteps_for(torch.ones(2), "int8"), "kind must be one of float64, float32"),
    ],
)  # fmt: skip
def test_schedule_refuses(call, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        call()
