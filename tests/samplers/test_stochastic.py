"""Stochastic methods keep the marginals, and their noise is each sample's own."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rfkernels import samplers
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.samplers import METHODS, init, plan_for, schedule, step
from tests.ops.cases import every_device

F64 = torch.float64
MEAN, STD = 0.7, 0.5  # of the data
COUNT = 20_000
STOCHASTIC = [m for m in METHODS if METHODS[m].stochastic]


def velocity(x, sigma):
    """The exact velocity to normal data."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    mean, variance = (1 - s) * MEAN, ((1 - s) * STD) ** 2 + s**2
    data = MEAN + (1 - s) * STD**2 * (x - mean) / variance
    return s * (x - mean) / variance - data


def marginal(sigma):
    return (1 - sigma) * MEAN, (((1 - sigma) * STD) ** 2 + sigma**2) ** 0.5


@pytest.mark.parametrize("first, last", [(1.0, 0.0), (0.98, 0.02)])
@pytest.mark.parametrize("method, options", [
    ("ddim", {"eta": 0.6}), ("ddim", {"eta": 1.0}), ("euler_sde", {}),
    ("euler_sde", {"diffusion": "rf_inversion"}),
    ("euler_sde", {"diffusion": lambda sigma: sigma}), ("euler_sde", {"final_noise": True}),
    ("overshoot", {"amount": 1.5}), ("dpmpp_2m_sde", {}),
], ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}" for k in v))  # fmt: skip
def test_marginals_are_kept(method, options, first, last):
    """Within four standard errors and the bias of finite steps, at most 0.004 here (half of it at 0.98)."""
    mean, std = marginal(first)
    start = torch.randn(1, COUNT, dtype=F64, generator=torch.Generator().manual_seed(5)) * std + mean
    sigmas = torch.linspace(first, last, 251, dtype=F64)
    x = samplers.sample(velocity, start, sigmas, method=method, seeds=11, options=options)
    mean, std = marginal(last)
    standard = std / COUNT**0.5
    assert x.mean().item() == pytest.approx(mean, abs=4 * standard + 0.004)
    assert x.std().item() == pytest.approx(std, abs=4 * standard / 2**0.5 + 0.004)


def test_a_marginal_that_is_not_kept_is_seen():
    """Adding noise without the way back down, as a churn of variances does, fails the bounds above."""
    mean, std = marginal(0.5)
    x = torch.randn(1, COUNT, dtype=F64) * std + mean + (0.6**2 - 0.5**2) ** 0.5 * torch.randn(1, COUNT)
    assert abs(x.mean().item() - marginal(0.6)[0]) > 0.05


@pytest.mark.parametrize("method", STOCHASTIC)
def test_noise_depends_on_the_seed_alone(method):
    x = torch.randn(3, 5, 7)
    run = lambda x, seeds: samplers.sample(velocity, x, schedule("linear", 5), method=method, seeds=seeds)
    together = run(x, [4, 5, 6])
    assert torch.equal(together, run(x, [4, 5, 6]))
    torch.testing.assert_close(together[1:2], run(x[1:2], [5]), rtol=0, atol=1e-6)
    assert not torch.allclose(together[1], run(x, [4, 9, 6])[1])
    assert torch.equal(together[0], run(x, [4, 9, 6])[0])


@pytest.mark.parametrize("method", STOCHASTIC)
def test_each_step_has_noise_of_its_own_and_none_is_the_initial(method):
    """Noise twice from the same states: the differences are those of the noise."""
    keys = [noise_keys(seed, 1) for seed in (3, 4)]
    seen = [philox_normal((1, 4000), keys[0], dtype=F64) - philox_normal((1, 4000), keys[1], dtype=F64)]
    plan = plan_for(method, torch.linspace(0.9, 0.3, 5, dtype=F64))
    state, twin = (init(plan, torch.zeros(1, 4000, dtype=F64), keys=k) for k in keys)
    while not state.done:
        other = step(replace(state, runtime=twin.runtime), torch.zeros_like(state.x))
        std, state = state.stage.noise["x"], step(state, torch.zeros_like(state.x))
        seen.append((state.x - other.x) / std)
    noise = torch.cat(seen)
    assert (noise.std(1) / 2**0.5 - 1).abs().max() < 0.05
    assert (torch.corrcoef(noise) - torch.eye(5, dtype=F64)).abs().max() < 0.08


def test_full_re_noise_keeps_the_marginals_of_a_point_and_narrows_those_of_others():
    sigmas = torch.linspace(1, 0.3, 8, dtype=F64)
    x = torch.randn(1, COUNT, dtype=F64)
    point = samplers.sample(lambda x, sigma: (x - MEAN) / sigma[:, None], x, sigmas, method="lcm", seeds=1)
    assert point.mean().item() == pytest.approx(0.7 * MEAN, abs=4 * 0.3 / COUNT**0.5)
    assert point.std().item() == pytest.approx(0.3, abs=4 * 0.3 / (2 * COUNT) ** 0.5)
    variance = 1.0  # the data's estimate is linear in x
    for start, end in pairwise(sigmas.tolist()):
        slope = (1 - start) * STD**2 / marginal(start)[1] ** 2
        variance = ((1 - end) * slope) ** 2 * variance + end**2
    result = samplers.sample(velocity, x, sigmas, method="lcm", seeds=1).std().item()
    assert result == pytest.approx(variance**0.5, abs=4 * (variance / COUNT / 2) ** 0.5)
    assert result < marginal(0.3)[1] - 0.05


def test_flow_grpo_divides_by_the_second_level_at_one():
    stages = plan_for("euler_sde", schedule("linear", 4)).stages
    assert stages[0].noise["x"] == pytest.approx(0.7 * (1 / (1 - 0.75)) ** 0.5 * 0.25**0.5)
    assert stages[1].noise["x"] == pytest.approx(0.7 * (0.75 / 0.25) ** 0.5 * 0.25**0.5)
    assert not stages[3].noise
    last = plan_for("euler_sde", schedule("linear", 4), final_noise=True).stages[3]
    assert last.noise["x"] == pytest.approx(0.7 * (0.25 / 0.75) ** 0.5 * 0.25**0.5)


def test_rf_inversion_begins_without_noise_and_drifts_to_the_data():
    first, second, *_ = plan_for("euler_sde", schedule("linear", 4), diffusion="rf_inversion").stages
    assert not first.noise and first.writes["x"] == {"x": 1.0, "v": -0.25}
    # drift -2v - x / (1 - sigma) towards the data, noise sqrt(2 sigma h / (1 - sigma))
    assert second.writes["x"]["v"] == pytest.approx(-0.25 * 2)
    assert second.writes["x"]["x"] == pytest.approx(1 - 0.25 / (1 - 0.75))
    assert second.noise["x"] == pytest.approx((2 * 0.75 / 0.25 * 0.25) ** 0.5)


@every_device
def test_noise_of_torch_generators(device):
    x = torch.randn(2, 6, dtype=F64, device=device)
    sigmas = torch.tensor([1.0, 0.6, 0.3], dtype=F64)
    result = samplers.sample(velocity, x, sigmas, method="lcm", seeds=[8, 9], rng="torch-cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    for start, end in [(1.0, 0.6), (0.6, 0.3)]:
        z = torch.cat([torch.randn(1, 6, dtype=F64, generator=g) for g in generators]).to(device)
        data = x - start * velocity(x, torch.full((2,), start, dtype=F64, device=device))
        x = (1 - end) * data + end * z
    torch.testing.assert_close(result, x, rtol=0, atol=1e-14)


def test_generators_are_copied_and_may_have_drawn_before():
    x = torch.randn(2, 6)
    generators = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    torch.randn(3, generator=generators[1])
    run = lambda: samplers.sample(velocity, x, schedule("linear", 3), method="lcm", seeds=generators,
                                  rng="torch-cpu")  # fmt: skip
    first = run()
    assert torch.equal(first, run())
    same = samplers.sample(velocity, x, schedule("linear", 3), method="lcm", seeds=[1, 1], rng="torch-cpu")
    assert torch.equal(first[0], same[0]) and not torch.equal(first[1], same[1])


def test_ddim_by_the_level_is_a_full_re_noise_at_one():
    x = torch.randn(2, 5, dtype=F64)
    run = lambda method, options: samplers.sample(velocity, x, schedule("linear", 4), method=method, seeds=2,
                                                  options=options)  # fmt: skip
    full = run("ddim", {"eta": 1.0, "relative_to": "level"})
    torch.testing.assert_close(full, run("lcm", {}), rtol=0, atol=1e-14)
    half = plan_for("ddim", torch.tensor([0.8, 0.6]), eta=0.5, relative_to="level").stages[0]
    assert half.noise["x"] == pytest.approx(0.3)


def test_rfpp_is_euler_on_straight_trajectories_alone():
    noise = torch.randn(4, 3, dtype=F64)
    v = torch.randn(4, 3, dtype=F64)
    straight = lambda x, sigma: v
    run = lambda f, method: samplers.sample(f, noise, schedule("shift", 6, shift=2.0), method=method)
    data = noise - v
    torch.testing.assert_close(run(straight, "rfpp"), data, rtol=0, atol=1e-14)
    assert (run(velocity, "rfpp") - run(velocity, "euler")).abs().max() > 0.01


def test_rfpp_uses_the_initial_noise():
    noise = torch.randn(4, 3, dtype=F64)
    x = noise
    for start, end in [(1.0, 0.5), (0.5, 0.25)]:
        data = x - start * velocity(x, torch.full((4,), start, dtype=F64))
        x = (1 - end) * data + end * noise
    result = samplers.sample(velocity, noise, torch.tensor([1.0, 0.5, 0.25]), method="rfpp")
    torch.testing.assert_close(result, x, rtol=0, atol=1e-14)


GOOD = {
    "velocity": velocity,
    "x": torch.randn(2, 3),
    "sigmas": schedule("linear", 3),
    "method": "lcm",
    "seeds": 1,
}


@pytest.mark.parametrize("change, message", [
    ({"seeds": None}, r"lcm draws noise: pass seeds= \(a number, or one for each sample\)"),
    ({"seeds": -1}, r"seed must be in 0 \.\. 2\*\*63 - 1, got -1"),
    ({"seeds": 2**63}, r"seed must be in 0 \.\. 2\*\*63 - 1"),
    ({"seeds": [1, 2, 3]}, "expected one seed or 2 seeds, got 3"),
    ({"rng": "cuda"}, "rng must be philox or torch-cpu, got 'cuda'"),
    ({"seeds": [torch.Generator()] * 2}, "generators need rng="),
    ({"seeds": [torch.Generator()], "rng": "torch-cpu"}, "one torch.Generator on the CPU for each of 2"),
    ({"sigmas": schedule("linear", 3).flip(0)}, "lcm needs falling noise levels: it cannot invert"),
    ({"sigmas": torch.tensor([2.0, 1.0])}, r"lcm needs noise levels in 0 \.\. 1, got 1 \.\. 2"),
    ({"method": "ddim", "options": {"eta": 1.5}}, r"eta must be in 0 \.\. 1, got 1.5"),
    ({"method": "overshoot", "options": {"amount": -1}}, "amount must be at least 0, got -1"),
    ({"method": "euler_sde", "options": {"diffusion": "vp"}}, "rf_inversion or a function, got .vp."),
    ({"method": "rfpp", "sigmas": torch.tensor([0.9, 0.5])}, "the first level must be 1, got 0.9"),
    ({"options": {"eta": 1.0}}, "lcm takes no options, got eta"),
    ({"method": "ddim", "options": {"nu": 1.0}}, "ddim takes eta, relative_to, got nu"),
])  # fmt: skip
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        samplers.sample(**(GOOD | change))
