"""Methods have the values and the orders of the golden table, in float64 through the compiled kernels."""

import math

import pytest
import torch

from rfkernels.samplers import METHODS, sample, schedule
from tests.ops.cases import every_device
from tests.samplers.golden import EXACT, LAST_DIGIT, MAX_ERRORS, VALUES, velocity


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
    errors = [
        (sample(velocity, SPREAD, schedule("linear", n), method=method) - exact).abs().max().item()
        for n in (16, 32, 64, 128, 256)
    ]
    assert errors == pytest.approx(MAX_ERRORS[method], rel=LAST_DIGIT[method])
    order = math.log2(errors[-2] / errors[-1])
    assert order == pytest.approx(METHODS[method].order, abs=0.07)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 3), ("heun", 3), ("rk4", 5)])
def test_inversion_round_trip_has_its_order(method, order):
    # Even-order methods gain one order: the leading error cancels between the two directions.
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    errors = []
    for n in (20, 40, 80):
        sigmas = schedule("linear", n)
        noise = sample(velocity, x, sigmas.flip(0), method=method)
        errors.append((sample(velocity, noise, sigmas, method=method) - x).abs().max().item())
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.35)


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
