"""Methods have the values and the orders of the golden table, in float64 through the compiled kernels."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rfkernels.samplers import METHODS, init, plan_for, sample, schedule, step
from tests.ops.cases import every_device
from tests.samplers.golden import EXACT, FIRST_LEVEL, LAST_DIGIT, MAX_ERRORS, VALUES, velocity


def column(values, device="cpu"):
    return torch.tensor(list(values), dtype=torch.float64, device=device)[:, None]


SPREAD = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]


@pytest.fixture(scope="module")
def exact():
    """The exact flow of SPREAD, by a fine RK4; one that is too coarse fails the next test."""
    return sample(velocity, SPREAD, schedule("linear", 2048), method="rk4")


@pytest.mark.parametrize(
    "x, sigma, value",
    [
        (0.3, 0.8, -0.121090671755),
        (-1.2, 0.5, 0.704267200535),
        (1.0, 0.1, -1.074270554012),
        (0.0, 1.0, -0.25),
    ],
)
def test_golden_velocity(x, sigma, value):
    v = velocity(column([x]), torch.tensor([sigma], dtype=torch.float64))
    assert v.item() == pytest.approx(value, abs=1e-12)


def test_fine_rk4_is_the_exact_flow(exact):
    printed = dict(zip(SPREAD.flatten().tolist(), exact.flatten().tolist(), strict=True))
    assert {x: printed[x] for x in EXACT} == pytest.approx(EXACT, abs=2e-12)


@every_device
@pytest.mark.parametrize("method, factor", VALUES, ids=str)
def test_method_has_its_values(method, factor, device):
    sigmas = schedule("shift", 16, shift=factor)
    result = sample(velocity, column([-1.0, 0.5], device), sigmas, method=method)
    assert result.flatten().tolist() == pytest.approx(VALUES[method, factor], abs=1.1e-12)


@pytest.mark.parametrize("method", MAX_ERRORS)
def test_method_has_its_errors_and_order(method, exact):
    first, errors = FIRST_LEVEL.get(method, 1.0), []
    if first != 1:
        exact = sample(velocity, SPREAD, torch.cat([torch.tensor([first]), schedule("linear", 2048)[1:]]),
                       method="rk4")  # fmt: skip
    for n in (16, 32, 64, 128, 256):
        sigmas = schedule("linear", n)
        sigmas[0] = first
        errors.append((sample(velocity, SPREAD, sigmas, method=method) - exact).abs().max().item())
    assert errors == pytest.approx(MAX_ERRORS[method], rel=LAST_DIGIT[method])
    order = math.log2(errors[-2] / errors[-1])
    tolerance = 0.25 if method.startswith("dpmpp") else 0.07
    assert order == pytest.approx(METHODS[method].order, abs=tolerance)


@pytest.mark.parametrize("start, orders", [("euler", (2, 2, 2)), ("midpoint", (2, 3, 3)), ("rk4", (2, 3, 4))])
def test_adams_bashforth_has_the_order_of_its_start(start, orders, exact):
    for method, order in zip(("ab2", "ab3", "ab4"), orders, strict=True):
        errors = [
            (sample(velocity, SPREAD, schedule("linear", n), method=method, options={"start": start}) - exact)
            .abs().max().item() for n in (128, 256)
        ]  # fmt: skip
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("method", ["taylor", "ab3", "ab4", "dpmpp_3m", "rf-solver"])
def test_further_methods_are_of_second_order_by_default(method, exact):
    errors = [
        (sample(velocity, SPREAD, schedule("linear", n), method=method) - exact).abs().max().item()
        for n in (64, 128)
    ]
    assert METHODS[method].order == 2
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("method, errors", [
    ("fireflow", (0.0256, 5.9e-3, 1.35e-3, 3.4e-4)), ("midpoint", (7.7e-3, 1.7e-3, 4.0e-4, 9.4e-5)),
])  # fmt: skip
def test_errors_on_a_shifted_grid(method, errors, exact):
    for n, error in zip((16, 32, 64, 128), errors, strict=True):
        result = sample(velocity, SPREAD, schedule("shift", n, shift=3.0), method=method)
        assert (result - exact).abs().max().item() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("kappa, errors, order", [
    (1.0, (1.8e-3, 2.2e-4, 6.0e-5, 1.8e-5, 4.9e-6), 1.9),
    (2.0, (3.0e-3, 3.6e-4, 4.4e-5, 5.5e-6, 6.9e-7), 3.0),
])  # fmt: skip
def test_3m_is_of_third_order_with_kappa_two_and_exact_start_values(kappa, errors, order):
    end = sample(velocity, SPREAD, torch.linspace(0.95, 0.05, 513, dtype=torch.float64), method="rk4")
    found = []
    for n in (32, 64, 128, 256, 512):
        sigmas = torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64)
        start = [SPREAD]
        for a, b in pairwise(sigmas[:3].tolist()):
            fine = torch.linspace(a, b, 5, dtype=torch.float64)
            start.append(sample(velocity, start[-1], fine, method="rk4"))
        state = init(plan_for("dpmpp_3m", sigmas, kappa=kappa), SPREAD)
        while not state.done:
            state = step(state, velocity(state.x, state.sigma))
            if state.index <= 2:  # the estimates of the data then are exact too
                state = replace(state, memory={**state.memory, "x": start[state.index]})
        found.append((state.x - end).abs().max().item())
    assert found == pytest.approx(errors, rel=0.03)
    assert math.log2(found[-2] / found[-1]) == pytest.approx(order, abs=0.1)


def test_compat_of_3m_is_kappa_one():
    sigmas = schedule("linear", 12)
    run = lambda **options: sample(velocity, SPREAD, sigmas, method="dpmpp_3m", options=options)
    assert torch.equal(run(compat="diffusers"), run(kappa=1.0))
    assert (run(kappa=1.0) - run()).abs().max() > 1e-3


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 3), ("heun", 3), ("rk4", 5)])
def test_inversion_round_trip_has_its_order(method, order):
    # Even-order methods gain one order: the leading error cancels between the two directions.
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    errors = []
    for n in (20, 40, 80):
        sigmas = schedule("linear", n)
        noise = sample(velocity, x, sigmas.flip(0), method=method)
        errors.append((sample(velocity, noise, sigmas, method=method) - x).abs().max().item())
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.35 if method == "euler" else 0.15)


@pytest.mark.parametrize(
    "method, errors", [("euler", (0.797, 0.523, 0.282)), ("midpoint", (7.45e-3, 1.02e-3, 1.32e-4))]
)
def test_inversion_round_trip_has_its_errors(method, errors):
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    for n, error in zip((10, 20, 40), errors, strict=True):
        sigmas = schedule("linear", n)
        noise = sample(velocity, x, sigmas.flip(0), method=method)
        back = sample(velocity, noise, sigmas, method=method)
        assert (back - x).abs().max().item() == pytest.approx(error, rel=6e-3)
