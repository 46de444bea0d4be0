"""Guides in whole runs: what they are where they fade, when they switch, and what they refuse."""

import pytest
import torch

from rfkernels import samplers
from rfkernels.ops import combine
from rfkernels.samplers import (
    APG,
    CFG,
    METHODS,
    CFGZeroStar,
    Interval,
    NormMatched,
    Perpendicular,
    Rescaled,
    SkipLayer,
    init,
    plan_for,
    schedule,
    step,
)
from tests.ops.cases import every_device

F64 = torch.float64
GRID = schedule("shift", 8, shift=2.0)
X = torch.randn(3, 4, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
every_method = pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].adaptive])


def u(x, sigma):
    return torch.sin(3 * x) - sigma.view(-1, 1, 1).to(x.dtype) * x


def c(x, sigma):
    return torch.cos(2 * x) + 0.3 * x


def third(x, sigma):
    return torch.sin(x) * 0.7


def pair(x, sigma):
    return u(x, sigma), c(x, sigma)


def triple(x, sigma):
    return u(x, sigma), c(x, sigma), third(x, sigma)


def run(velocity, guide=None, method="ab2", grid=GRID, x=X, **more):
    return samplers.sample(velocity, x, grid, method=method, guidance=guide, seeds=1, **more)


def guided(kind, parameters, names=pair):
    """The guided velocity by a launch of its own."""
    parameters = torch.tensor(parameters, dtype=F64)

    def velocity(x, sigma):
        tensors = [torch.zeros_like(x), *names(x, sigma)]
        coefs = torch.zeros(1, len(tensors) + 1, dtype=F64)
        coefs[0, -1] = 1
        return combine(tensors, coefs, guide=kind, guidance=parameters)[0]

    return velocity


@every_method
@pytest.mark.parametrize("guide, kind, parameters, names", [
    (CFGZeroStar(2.0, zero_steps=0), "zero_star", (2.0,), pair),
    (APG(2.0, 0.3, 1.5), "apg", (2.0, 0.3, 1.5), pair),
    (Rescaled(2.0, 0.6), "rescale", (2.0, 0.6), pair), (NormMatched(2.0), "token_norm", (2.0,), pair),
    (Perpendicular(2.0, 0.5), "perpendicular", (2.0, 0.5), triple),
    (SkipLayer(2.0, 1.5, window=(-1, 2)), "skip_layer", (2.0, 1.5), triple),
])  # fmt: skip
def test_every_guide_is_folded_into_every_method(method, guide, kind, parameters, names):
    expected = run(guided(kind, parameters, names), method=method)
    torch.testing.assert_close(run(names, guide, method), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("guide", [
    CFG.original(1.5), CFG(torch.tensor(2.5, dtype=F64)), CFG(torch.full((3,), 2.5, dtype=F64)), APG(2.5),
    Rescaled(2.5, phi=0.0), Interval(CFG(2.5), -1.0, 1.0), SkipLayer(2.5, s=0.0, window=(-1, 2)),
], ids=lambda g: type(g).__name__)  # fmt: skip
def test_guides_that_are_cfg(guide):
    names = triple if guide.velocities == 3 else pair
    torch.testing.assert_close(run(names, guide), run(pair, 2.5), rtol=0, atol=1e-12)


def test_zero_star_is_cfg_where_the_scale_is_one():
    same = lambda x, sigma: (c(x, sigma), c(x, sigma))
    star = run(same, CFGZeroStar(3.0, zero_steps=0))
    torch.testing.assert_close(star, run(same, 3.0), rtol=0, atol=1e-7)


@every_device
def test_momentum_is_kept_by_the_same_launch(device):
    """d = c - u + beta d_last, over a whole run of Euler steps."""
    w, eta, r, beta = 2.0, 0.4, 0.8, -0.5
    x, last = X.to(device), torch.zeros_like(X, device=device)
    for start, end in zip(GRID[:-1].tolist(), GRID[1:].tolist(), strict=True):
        sigma = torch.full((3,), start, dtype=F64, device=device)
        a, b = pair(x, sigma)
        last = b - a + beta * last
        dot = lambda p, q: (p * q).sum((1, 2), keepdim=True)
        d = last * (r / dot(last, last).sqrt()).clamp(max=1)
        x = x + (end - start) * (a + w * (d - (1 - eta) * dot(d, b) / dot(b, b) * b))
    result = run(pair, APG(w, eta, r, beta), method="euler", x=X.to(device))
    torch.testing.assert_close(result, x, rtol=0, atol=1e-12)


def test_zero_steps_are_skipped_without_an_evaluation():
    seen = []
    velocity = lambda x, sigma: seen.append(sigma[0].item()) or pair(x, sigma)
    for method in ("euler", "ab2", "dpmpp_2m", "fireflow"):
        seen.clear()
        result = run(velocity, CFGZeroStar(2.0, zero_steps=2), method)
        assert max(seen) < GRID[1] and len(seen) == 6 + METHODS[method].extra
        expected = run(pair, CFGZeroStar(2.0, zero_steps=0), method, grid=GRID[2:])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["ab2", "ab3", "taylor", "dpmpp_2m", "dpmpp_3m", "unipc", "euler"])
def test_history_is_dropped_where_guidance_switches(method):
    """The run falls into runs of their own: without, with, and without guidance."""
    low, high = GRID[5].item(), GRID[2].item()
    result = run(pair, Interval(CFG(3.0), low, high), method)
    x = run(c, None, method, grid=GRID[:3])
    x = run(pair, 3.0, method, grid=GRID[2:6], x=x)
    expected = run(c, None, method, grid=GRID[5:], x=x)
    if method == "unipc":  # whose parts each end with a step of first order by default
        parts = {"lower_order_final": False}
        x = run(c, None, method, grid=GRID[:3], options=parts)
        x = run(pair, 3.0, method, grid=GRID[2:6], x=x, options=parts)
        expected = run(c, None, method, grid=GRID[5:], x=x)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_fireflow_is_guided_by_the_level_of_its_evaluations():
    seen = []
    velocity = lambda x, sigma: seen.append(sigma[0].item()) or pair(x, sigma)
    run(velocity, Interval(CFG(3.0), 0.3, 0.8), "fireflow")
    assert len(seen) == 8 + 3  # a new start where it switches on, and off


def test_outside_the_interval_one_velocity_is_enough():
    plan = plan_for("euler", GRID)
    state, whole = (init(plan, X, guide=Interval(CFG(3.0), 0.2, 0.8)) for _ in range(2))
    seen = []
    while not state.done:
        seen.append(state.velocities)
        velocities = pair(state.x, state.sigma)
        whole = step(whole, velocities)
        state = step(state, velocities[1] if state.velocities == ("cond",) else velocities)
    assert torch.equal(state.x, whole.x)
    assert ("cond",) in seen and ("uncond", "cond") in seen


def test_skip_layer_is_on_in_its_window():
    plan = plan_for("euler", schedule("linear", 20))
    state, on = init(plan, X, guide=SkipLayer(3.0)), []
    while not state.done:
        if len(state.velocities) == 3:
            on.append(state.index)
            state = step(state, triple(state.x, state.sigma))
        else:
            state = step(state, pair(state.x, state.sigma))
    assert on == [1, 2, 3]  # of 20 steps, .01 < i/20 < .2


def test_models_that_are_distilled_say_so():
    velocity = lambda x, sigma: pair(x, sigma)
    velocity.guidance_distilled = True
    with pytest.warns(UserWarning, match="distilled with guidance .* guidance 3.5 comes on top of it"):
        run(velocity, 3.5)
    run(velocity, 1.0)


@pytest.mark.parametrize("guide, velocity, message", [
    (CFG(2.0), c, r"must return a pair \(uncond, cond\), since guidance is given, got Tensor"),
    (CFG(2.0), triple, r"must return a pair \(uncond, cond\), since guidance is given, got a sequence of 3"),
    (Perpendicular(2.0), pair, r"must return three tensors \(uncond, cond, third\), .* got a sequence of 2"),
    (CFG(torch.ones(2)), pair, r"guidance must be a number or \[3\], got \[2\]"),
    (float("nan"), pair, "guidance must be a finite number"),
    ("strong", pair, "guidance must be a finite number .* got 'strong'"),
    (CFGZeroStar(2.0, zero_steps=8), pair, "zero_steps must leave one of 8 steps, got 8"),
    (CFGZeroStar(2.0, zero_steps=-1), pair, "zero_steps must leave one of 8 steps, got -1"),
])  # fmt: skip
def test_refuses(guide, velocity, message):
    with pytest.raises(ValueError, match=message):
        run(velocity, guide)


def test_apg_refuses_a_radius_of_nothing():
    with pytest.raises(ValueError, match="r must be above 0, got 0"):
        APG(2.0, r=0.0)
