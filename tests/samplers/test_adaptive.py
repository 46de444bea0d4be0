"""The adaptive method: SciPy's decisions, errors within tolerances, each sample's own steps."""

import pytest
import torch
from scipy.integrate import solve_ivp

from rfkernels.samplers import (
    APG,
    CFG,
    CFGZeroStar,
    Interval,
    SkipLayer,
    nfe,
    plan_for,
    sample,
    schedule,
)
from tests.samplers.golden import EXACT, velocity

F64 = torch.float64
SPREAD = torch.linspace(-2.5, 2.5, 41, dtype=F64)[:, None]
GRID = schedule("linear", 1)


def run(x=SPREAD, v=velocity, sigmas=GRID, guidance=None, callback=None, **options):
    """The result and how often v was called."""
    calls = []
    result = sample(lambda x, sigma: calls.append(sigma) or v(x, sigma), x, sigmas, method="dopri5",
                    guidance=guidance, callback=callback, options=options)  # fmt: skip
    return result, len(calls)


@pytest.fixture(scope="module")
def exact():
    return sample(velocity, SPREAD, schedule("linear", 512), method="rk4")


@pytest.mark.parametrize("tolerance, evaluations, error", [
    (1e-3, 26, 1.4e-2), (1e-5, 56, 1.5e-4), (1e-7, 92, 1.4e-6),
])  # fmt: skip
def test_one_error_for_the_batch_is_scipy(tolerance, evaluations, error, exact):
    result, calls = run(control="batch", rtol=tolerance, atol=tolerance)
    assert calls == evaluations
    assert (result - exact).abs().max().item() == pytest.approx(error, rel=0.05)
    f = lambda t, y: velocity(torch.tensor(y)[:, None], torch.full((41,), t, dtype=F64))[:, 0].numpy()
    scipy = solve_ivp(f, (1, 0), SPREAD[:, 0].numpy(), rtol=tolerance, atol=tolerance, method="RK45")
    assert scipy.nfev == calls
    torch.testing.assert_close(result[:, 0], torch.from_numpy(scipy.y[:, -1].copy()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("x", [-1.0, 0.5])
def test_one_sample_is_scipy(x):
    start = torch.tensor([[x]], dtype=F64)
    result, calls = run(start, rtol=1e-6, atol=1e-6)
    f = lambda t, y: velocity(torch.tensor(y)[:, None], torch.tensor([t], dtype=F64))[:, 0].numpy()
    scipy = solve_ivp(f, (1, 0), [x], rtol=1e-6, atol=1e-6, method="RK45")
    assert calls == scipy.nfev
    assert result.item() == pytest.approx(scipy.y[0, -1], abs=1e-11)
    assert result.item() == pytest.approx(EXACT[x], abs=1e-4)


def test_a_sample_does_not_depend_on_its_batch():
    together, _ = run()
    for i in (0, 17, 33):
        torch.testing.assert_close(together[i : i + 1], run(SPREAD[i : i + 1])[0], rtol=0, atol=1e-13)


def test_control_of_the_batch_depends_on_it():
    together, _ = run(control="batch", rtol=1e-3, atol=1e-3)
    assert (together[:1] - run(SPREAD[:1], control="batch", rtol=1e-3, atol=1e-3)[0]).abs().max() > 1e-6


def test_it_inverts_and_starts_per_sample():
    noise, _ = run(sigmas=GRID.flip(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(noise, rtol=1e-9, atol=1e-9)[0], SPREAD, rtol=0, atol=1e-5)
    x = torch.tensor([[0.5], [0.5]], dtype=F64)
    mixed, _ = run(x, sigmas=torch.tensor([[1.0, 0.5], [0.0, 0.5 - 1e-3]], dtype=F64))
    torch.testing.assert_close(mixed[:1], run(x[:1])[0], rtol=0, atol=1e-13)


def test_a_sample_that_rests_stays():
    x = torch.tensor([[0.5], [-0.3]], dtype=F64)
    result, _ = run(x, sigmas=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64))
    assert result[1].item() == -0.3


@pytest.mark.parametrize("guide", [CFG(3.0), Interval(CFG(1.5), 0.2, 0.8)])
def test_guidance_is_that_of_a_guided_velocity(guide):
    u, c = (lambda x, sigma: velocity(x, sigma)), (lambda x, sigma: torch.sin(3 * x) + velocity(x, sigma))
    control = "batch" if guide.by_level else "sample"
    result, calls = run(v=lambda x, sigma: (u(x, sigma), c(x, sigma)), guidance=guide, control=control)
    fine = sample(lambda x, sigma: (u(x, sigma), c(x, sigma)), SPREAD, schedule("linear", 100), method="rk4",
                  guidance=guide)  # fmt: skip
    assert (result - fine).abs().max() < 0.02 and calls % 6 == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float32_and_16_bit_velocities(dtype):
    rough = lambda x, sigma: velocity(x.double(), sigma.double()).to(dtype)
    result, _ = run(SPREAD.float(), v=rough, rtol=1e-4, atol=1e-4)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), run(rtol=1e-8, atol=1e-8)[0], rtol=0, atol=0.02)


def test_it_is_differentiable():
    x = SPREAD[5:35:10].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(x, rtol=1e-8, atol=1e-8)[0], (x,), atol=1e-4)


def test_callback_sees_accepted_steps_and_stops():
    seen = []
    result, calls = run(callback=seen.append, control="batch", rtol=1e-3, atol=1e-3)
    assert (calls, len(seen)) == (26, 3)  # of four attempts one is rejected
    assert torch.equal(seen[-1].x, result) and seen[0].sigma == 1.0
    v = velocity(SPREAD, torch.ones(41, dtype=F64))
    torch.testing.assert_close(seen[0].x0, SPREAD - v)
    stopped, _ = run(callback=lambda info: info.step == 1, control="batch", rtol=1e-3, atol=1e-3)
    assert torch.equal(stopped, seen[1].x)


def test_an_empty_batch_and_the_callers_state():
    assert run(SPREAD[:0])[0].shape == (0, 1)
    before = SPREAD.clone()
    run(v=lambda x, sigma: x)
    assert torch.equal(SPREAD, before)


@pytest.mark.parametrize("call, message", [
    (lambda: run(rtol=0.0), "rtol and atol must be positive, got 0.0"),
    (lambda: run(control="frame"), "control must be sample or batch, got 'frame'"),
    (lambda: run(tol=1.0), "dopri5 takes rtol, atol, control, max_evaluations, got tol"),
    (lambda: run(max_evaluations=20), "more than 20 evaluations"),
    (lambda: run(v=lambda x, s: x * torch.nan), "the state or the first velocity is not finite"),
    (lambda: run(v=lambda x, s: torch.where(s < 0.5, torch.nan, 0.0)[:, None] + x), "fell below rounding"),
    (lambda: run(v=lambda x, s: (x, x), guidance=APG(2.0, momentum=-0.5)), "without momentum"),
    (lambda: run(v=lambda x, s: (x, x), guidance=CFGZeroStar(2.0)), "zero_steps=0"),
    (lambda: run(v=lambda x, s: (x, x, x), guidance=SkipLayer(2.0)), "a window of steps"),
    (lambda: run(v=lambda x, s: (x, x), guidance=Interval(CFG(2.0), 0.1, 0.9)), "depends on the level needs"),
    (lambda: run(sigmas=torch.ones(2, 41, 1).cumsum(0)), "a level for each sample"),
    (lambda: plan_for("dopri5", GRID), "dopri5 is adaptive and has no plan, call sample"),
    (lambda: nfe("dopri5", 3), "dopri5 is adaptive"),
])  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
