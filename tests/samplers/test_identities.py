"""Methods that are one another, and problems that they solve exactly, float64."""

import numpy as np
import pytest
import torch

from rfkernels import samplers
from rfkernels.samplers import METHODS, plan_for, schedule
from rfkernels.samplers._grid import Grid
from rfkernels.samplers.exponential import _bh2
from tests.samplers.golden import velocity

F64 = torch.float64
X = torch.linspace(-2.5, 2.5, 11, dtype=F64)[:, None]
GRIDS = {"linear": schedule("linear", 9), "shift": schedule("shift", 9, shift=3.0)}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
DETERMINISTIC = [m for m in METHODS if not METHODS[m].stochastic and not METHODS[m].adaptive and m != "rfpp"]
EXPONENTIAL = [m for m in METHODS if m.startswith("dpmpp") or m == "unipc"]


def sample(v, x, grid, method, **options):
    return samplers.sample(v, x, grid, method=method, seeds=3, options=options)


@every_grid
@pytest.mark.parametrize("a, b, options", [
    ("rf-solver", "midpoint", {}), ("ddim", "euler", {}), ("taylor", "ab2", {"order": 2}),
    ("overshoot", "euler", {"amount": 0.0}), ("euler_sde", "euler", {"noise_level": 0.0}),
    ("ab3", "euler", {"order": 1}), ("dpmpp_2m", "euler", None),
])  # fmt: skip
def test_methods_that_are_the_same(a, b, options, grid):
    if options is None:  # first-order DPM-Solver++: its first step
        grid, options = grid[[0, -1]], {}
    difference = sample(velocity, X, grid, a, **options) - sample(velocity, X, grid, b)
    assert difference.abs().max() <= 1e-14


@pytest.mark.parametrize("sigmas", [GRIDS["linear"], GRIDS["shift"], torch.linspace(0.9, 0.1, 8, dtype=F64)])
def test_unip_2_is_2m_in_log_snr(sigmas):
    stages = plan_for("dpmpp_2m", sigmas).stages
    seen = 0
    for part in Grid(tuple(sigmas.tolist())):
        reached = min(2, part.age + 1)
        predictor = _bh2(part, reached, corrects=False)  # beside x + h v, which both have
        older = stages[part.index].writes["x"].get("D1", 0.0)
        assert predictor.get("m1", 0.0) == pytest.approx(older, abs=1e-14)
        assert predictor.get("m0", 0.0) == pytest.approx(-older, abs=1e-14)
        seen += older != 0
    assert seen >= 6


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("rising", [False, True])
def test_a_constant_velocity_is_solved_exactly(method, rising):
    v = torch.randn(11, 1, dtype=F64)
    for grid in GRIDS.values():
        grid = grid.flip(0) if rising else grid
        result = sample(lambda x, sigma: v, X, grid, method)
        expected = X + (grid[-1] - grid[0]) * v
        tolerance = 1e-10 if method in EXPONENTIAL else 1e-13
        if method in EXPONENTIAL and rising:  # D = x - sigma v is constant along the way here too
            tolerance = 1e-9
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", [*EXPONENTIAL, "ddim", "lcm", "overshoot"])
def test_a_constant_estimate_of_the_data_is_reached_exactly(method):
    data = torch.randn(11, 1, dtype=F64)
    for grid in GRIDS.values():
        result = sample(lambda x, sigma: (x - data) / sigma[:, None], X, grid, method)
        torch.testing.assert_close(result, data, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method, polynomial", [
    ("euler", (1, 1)), ("midpoint", (1, 1, 1 / 2)), ("heun", (1, 1, 1 / 2)), ("ralston", (1, 1, 1 / 2)),
    ("rk4", (1, 1, 1 / 2, 1 / 6, 1 / 24)),
])  # fmt: skip
def test_a_linear_field_gives_the_matrix_polynomial(method, polynomial):
    b = torch.randn(6, 6, dtype=F64, generator=torch.manual_seed(2))
    x = torch.randn(3, 6, dtype=F64)
    result = sample(lambda x, sigma: x @ b.T, x, torch.tensor([0.7, 0.4], dtype=F64), method)
    power, expected = torch.eye(6, dtype=F64), torch.zeros(6, 6, dtype=F64)
    for weight in polynomial:
        expected, power = expected + weight * power, -0.3 * power @ b
    torch.testing.assert_close(result, x @ expected.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_integrates_polynomials_on_any_grid(order):
    """A velocity that is a polynomial of degree order - 1 in sigma alone, with exact start values."""
    sigmas = torch.tensor([1.0, 0.83, 0.71, 0.4, 0.22, 0.0], dtype=F64)
    v = lambda x, sigma: (order * sigma ** (order - 1))[:, None] * torch.ones_like(x)
    result = sample(v, X, sigmas, f"ab{order}", start="rk4")
    torch.testing.assert_close(result, X - 1, rtol=0, atol=1e-13)


def test_taylor_takes_first_differences_where_adams_bashforth_takes_the_polynomial():
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7], dtype=F64)
    h, v, v1, v2 = -0.1, *torch.randn(3, dtype=F64)
    d1, d2 = (v - v1) / h, (v - 2 * v1 + v2) / h**2
    form = plan_for("taylor", sigmas).stages[2].writes["x"]
    step_of = form["v"] * v + form["v1"] * v1 + form["v2"] * v2
    torch.testing.assert_close(step_of, h * v + h**2 / 2 * d1 + h**3 / 6 * d2)


@pytest.mark.parametrize(
    "method", ["ab2", "ab3", "ab4", "taylor", "dpmpp_2m", "dpmpp_3m", "unipc", "dpmpp_2m_sde"]
)
def test_coefficients_are_finite_on_every_grid(method):
    grids = [*GRIDS.values(), schedule("linear", 1), torch.tensor([1.0, 1 - 1e-9, 1e-9, 0.0], dtype=F64)]
    for grid in grids:
        for stage in plan_for(method, grid).stages:
            forms = [v for form in stage.writes.values() for v in form.values()]
            assert np.isfinite([*forms, *stage.noise.values()]).all()


@pytest.mark.parametrize("method", ["heun", "rk4"])
def test_a_final_euler_step_spares_the_evaluation_at_zero(method):
    seen = []
    v = lambda x, sigma: seen.append(sigma[0].item()) or velocity(x, sigma)
    grid = GRIDS["linear"]
    result = sample(v, X, grid, method, final="euler")
    assert 0.0 not in seen and len(seen) == METHODS[method].evaluations * 8 + 1
    before = sample(velocity, X, grid[:-1], method)
    assert torch.equal(result, sample(velocity, before, grid[-2:], "euler"))


@pytest.mark.parametrize("method", ["dpmpp_2m", "dpmpp_3m"])
def test_lower_order_final_is_an_euler_step(method):
    grid = torch.linspace(0.9, 0.2, 6, dtype=F64)
    before = sample(velocity, X, grid[:-1], method)
    result = sample(velocity, X, grid, method, lower_order_final=True)
    torch.testing.assert_close(result, sample(velocity, before, grid[-2:], "euler"), rtol=0, atol=1e-14)
    assert (result - sample(velocity, X, grid, method)).abs().max() > 1e-5
