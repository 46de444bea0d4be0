"""The loop: guidance, callbacks, memory, gradients, and what it refuses."""

import importlib

import pytest
import torch

from rfkernels import samplers
from rfkernels.samplers import METHODS, StepInfo, nfe, schedule
from tests.ops.cases import every_device

plans = importlib.import_module("rfkernels.samplers.plan")
F64 = torch.float64


def uncond(x, sigma):
    return torch.sin(3 * x) - sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype) * x


def cond(x, sigma):
    return torch.cos(2 * x) + 0.3 * x


def pair(x, sigma):
    return uncond(x, sigma), cond(x, sigma)


def sample(velocity, x, sigmas, **options):
    return samplers.sample(velocity, x, sigmas, **({"seeds": 7} | options))


every_method = pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].adaptive])


@every_device
@every_method
@pytest.mark.parametrize("per_sample", [False, True])
def test_guidance_is_folded_into_every_method(method, per_sample, device):
    x = torch.randn(3, 4, 5, dtype=F64, device=device)
    w = torch.tensor([0.0, 1.5, 4.0], dtype=F64, device=device) if per_sample else 2.5
    column = w[:, None, None] if per_sample else w

    def guided(x, sigma):
        u, c = pair(x, sigma)
        return u + column * (c - u)

    sigmas = schedule("shift", 6, shift=2.0)
    expected = sample(guided, x, sigmas, method=method)
    torch.testing.assert_close(
        sample(pair, x, sigmas, method=method, guidance=w), expected, rtol=0, atol=1e-12
    )


@every_method
@pytest.mark.parametrize("guided", [False, True])
def test_an_evaluation_is_followed_by_one_launch(method, guided, monkeypatch):
    calls = []
    combine = plans.combine
    monkeypatch.setattr(plans, "combine", lambda *a, **k: calls.append(a) or combine(*a, **k))
    sample(pair if guided else cond, torch.randn(2, 8), schedule("linear", 5), method=method,
           guidance=3.0 if guided else None)  # fmt: skip
    assert len(calls) == nfe(method, 5)


@every_method
def test_velocity_is_evaluated_as_often_as_nfe_says(method):
    seen = []

    def velocity(x, sigma):
        assert sigma.shape == (2,) and sigma.dtype == x.dtype and (sigma == sigma[0]).all()
        seen.append(sigma[0].item())
        return cond(x, sigma)

    sample(velocity, torch.randn(2, 3, dtype=F64), schedule("linear", 4), method=method)
    assert len(seen) == nfe(method, 4)
    assert seen[0] == 1 and seen == sorted(seen, reverse=True)


@every_device
@every_method
def test_16_bit_velocities_move_a_float32_state(method, device):
    x = torch.randn(2, 64, device=device)
    sigmas = schedule("linear", 16)
    exact = sample(pair, x.double(), sigmas, method=method, guidance=2.0)

    def rough(x, sigma):
        return tuple(v.bfloat16() for v in pair(x, sigma))

    result = sample(rough, x, sigmas, method=method, guidance=2.0)
    assert result.dtype == torch.float32
    alone = sample(lambda x, sigma: cond(x, sigma).half(), x, sigmas, method=method)
    assert alone.dtype == torch.float32 and not torch.equal(alone, alone.half().float())
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=0.1)
    assert not torch.equal(result, result.bfloat16().float())  # the state keeps more than 16 bits


@every_method
@pytest.mark.parametrize("grad", [False, True])
def test_the_callers_state_stays_and_aliases_are_safe(method, grad):
    x = torch.randn(3, 4, dtype=F64)
    before = x.clone()
    with torch.set_grad_enabled(grad):
        expected = sample(lambda x, sigma: x * 1.0, x, schedule("linear", 5), method=method)
        aliased = sample(lambda x, sigma: x, x, schedule("linear", 5), method=method)
    assert torch.equal(x, before)
    assert torch.equal(expected, aliased)


@every_method
def test_memory_is_reused_without_gradients(method):
    outs = []

    def velocity(x, sigma):
        outs.append(x.data_ptr())
        return cond(x, sigma)

    with torch.no_grad():
        sample(velocity, torch.randn(2, 4), schedule("linear", 6), method=method)
    assert len(set(outs)) <= 3  # the caller's state, ours, the stages'


@every_method
def test_sampling_is_differentiable(method):
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    f = lambda x: sample(pair, x, schedule("linear", 3), method=method, guidance=1.7)
    assert torch.autograd.gradcheck(f, (x,))


@every_method
def test_callback_sees_every_step_and_the_data_estimate(method):
    x = torch.randn(2, 5, dtype=F64)
    sigmas, seen = schedule("shift", 4, shift=3.0), []
    result = sample(pair, x, sigmas, method=method, guidance=2.0, callback=seen.append)
    assert [i.step for i in seen] == [0, 1, 2, 3] and all(isinstance(i, StepInfo) for i in seen)
    assert [i.sigma for i in seen] == sigmas[:-1].tolist() and seen[0].steps == 4
    assert torch.equal(seen[-1].x, result) and not torch.equal(seen[0].x, seen[1].x)
    if method == "fireflow":  # whose first evaluation of a step is in its middle
        return
    for info, start in zip(seen, [x, *(i.x for i in seen)], strict=False):
        u, c = pair(start, torch.full((2,), info.sigma, dtype=F64))
        torch.testing.assert_close(info.x0, start - info.sigma * (u + 2.0 * (c - u)))


def test_callback_works_on_an_inversion_grid():
    seen = []
    x = torch.randn(2, 5, dtype=F64)
    sample(cond, x, schedule("linear", 3).flip(0), callback=seen.append)
    assert torch.equal(seen[0].x0, x)  # at sigma 0 the state is the data


def test_callback_stops_early():
    sigmas = schedule("linear", 10)
    x = torch.randn(2, 5, dtype=F64)
    stopped = sample(cond, x, sigmas, callback=lambda info: info.step == 3)
    assert torch.equal(stopped, sample(cond, x, sigmas[:5]))


def test_progress_is_silent_off_a_terminal(capsys):
    sample(cond, torch.randn(2, 5), schedule("linear", 3), progress=True)
    assert capsys.readouterr() == ("", "")


def test_an_empty_batch_stays_empty():
    assert sample(cond, torch.randn(0, 5), schedule("linear", 3), method="heun").shape == (0, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "dpm"}, r"method must be one of euler, .*, got 'dpm'"),
        ({"sigmas": torch.tensor([1.0])}, "at least one step"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.5, 0.0])}, "strictly monotone"),
        ({"sigmas": torch.tensor([1.0, torch.nan, 0.0])}, "finite and strictly monotone"),
        ({"x": torch.tensor(1.0)}, r"x must be \[batch, \.\.\.\]"),
        ({"velocity": pair}, "velocity must return one tensor, got a sequence of 2"),
        ({"guidance": 2.0}, r"must return a pair \(uncond, cond\), since guidance is given, got Tensor"),
        ({"velocity": pair, "guidance": torch.ones(3)}, r"guidance must be a number or \[2\], got \[3\]"),
        ({"velocity": lambda x, s: x[:, :2]}, r"shape of x \[2, 5\], got \[2, 2\]"),
        ({"velocity": lambda x, s: x.double()}, "float64 beside a float64 x alone, got torch.float64"),
    ],
)
def test_sample_refuses(change, message):
    good = {"velocity": cond, "x": torch.randn(2, 5), "sigmas": schedule("linear", 3)}
    with pytest.raises(ValueError, match=message):
        sample(**(good | change))
