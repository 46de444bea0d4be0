"""torchdiffeq, the reference of adaptive solvers in torch, agrees."""

import pytest
import torch
from torchdiffeq import odeint

from rfkernels.samplers import sample, schedule
from tests.samplers.golden import velocity


def theirs(x, tolerance):
    calls = []

    def f(sigma, x):
        calls.append(None)
        return velocity(x, sigma.expand(len(x)))

    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return odeint(f, x, ends, method="dopri5", rtol=tolerance, atol=tolerance)[-1], len(calls)


def ours(x, tolerance, control):
    calls = []

    def f(x, sigma):
        calls.append(None)
        return velocity(x, sigma)

    options = dict(rtol=tolerance, atol=tolerance, control=control)
    return sample(f, x, schedule("linear", 1), method="dopri5", options=options), len(calls)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_dopri5_agrees_with_torchdiffeq(tolerance, control):
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    exact, _ = theirs(x, 1e-11)
    (expected, their_calls), (got, our_calls) = theirs(x, tolerance), ours(x, tolerance, control)
    assert (got - exact).abs().max() <= 1.3 * (expected - exact).abs().max()
    if control == "batch":  # a step for each sample runs as long as the hardest needs
        assert abs(our_calls - their_calls) <= 6
