"""ReinFlow's chain: its density, its bounds, and a ratio that starts at 1."""

import math
from itertools import pairwise

import pytest
import torch

from rfkernels.objectives import (
    chain_entropy,
    chain_log_prob,
    exploration_high,
    noise_std,
    policy_loss,
    rollout,
)
from rfkernels.ops import noise_keys, philox_normal
from tests.objectives.problem import F64, normal


class Policy(torch.nn.Module):
    def __init__(self, size=6, dtype=F64):
        super().__init__()
        torch.manual_seed(0)
        self.v = torch.nn.Linear(size + 1, size, dtype=dtype)
        self.noise = torch.nn.Linear(size + 1, size, dtype=dtype)
        self.seen = []

    def forward(self, x, sigma, k):
        self.seen.append((k, float(sigma[0])))
        h = torch.cat([x, sigma[:, None]], 1)
        return self.v(h), noise_std(self.noise(h), 0.1, 0.24)


FREE = {"clip_mean": None, "clip_noise": None, "clip_action": None}


def expected_log_prob(policy, states, clip_mean):
    size, steps = states[0][0].numel(), len(states) - 1
    total = -0.5 * states[0].double().square().sum(1) - size / 2 * math.log(2 * math.pi)
    for k in range(steps):
        v, std = policy(states[k], torch.full((len(states[k]),), 1 - k / steps, dtype=states[k].dtype), k)
        mean = states[k] - v / steps
        if clip_mean is not None:
            mean = mean.clamp(-clip_mean, clip_mean)
        total = total + torch.distributions.Normal(mean.double(), std.double()).log_prob(states[k + 1]).sum(1)
    return total


def test_noise_stays_within_its_bounds():
    raw = torch.tensor([-1e6, -1.0, 0.0, 1.0, 1e6], dtype=F64)
    std = noise_std(raw, 0.1, 0.24)
    assert float(std[0]) == pytest.approx(0.1, rel=1e-15) and float(std[-1]) == pytest.approx(0.24, rel=1e-15)
    log = (std.log() - math.log(0.1)) / math.log(2.4)  # linear in tanh
    torch.testing.assert_close(log, (raw.tanh() + 1) / 2)
    variance = torch.exp(math.log(0.01) + (math.log(0.24**2) - math.log(0.01)) * (raw.tanh() + 1) / 2)
    torch.testing.assert_close(std, variance.sqrt())
    assert torch.autograd.gradcheck(lambda r: noise_std(r, 0.1, 0.24), raw[1:4].requires_grad_())


def test_exploration_decays():
    high = lambda p: exploration_high(p, 0.1, 0.24)
    assert high(0.0) == high(0.2) == 0.24 and high(0.35) == pytest.approx(0.24)
    assert high(1.0) == pytest.approx(0.3 * 0.1 + 0.7 * 0.24)
    assert high(0.675) == pytest.approx((0.24 + high(1.0)) / 2)
    falls = [high(p / 100) for p in range(101)]
    assert all(b <= a for a, b in pairwise(falls))


@pytest.mark.parametrize("clip_mean", [None, 0.3])
def test_log_prob_is_that_of_the_chain(clip_mean):
    policy = Policy()
    options = {**FREE, "clip_mean": clip_mean}
    chain = rollout(policy, noise_keys(0, 5), (5, 6), 4, dtype=F64, **options)
    assert len(chain.states) == 5 and chain.log_prob.shape == (5,) and not chain.log_prob.requires_grad
    expected = expected_log_prob(policy, chain.states, clip_mean)
    torch.testing.assert_close(chain.log_prob, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_ratio_starts_at_one(dtype):
    policy, keys = Policy(dtype=dtype), noise_keys(1, 8)
    chain = rollout(policy, keys, (8, 6), 4, dtype=dtype)
    sampled, policy.seen = policy.seen[:4], []
    again = chain_log_prob(policy, chain.states)
    assert policy.seen == sampled == [(k, 1 - k / 4) for k in range(4)]  # the same levels both times
    assert torch.equal(again, chain.log_prob)
    advantages = torch.linspace(-1, 1, 8, dtype=F64)
    result = policy_loss(again, chain.log_prob, advantages, clip=0.01)
    assert torch.equal(result.ratio, torch.ones(8, dtype=F64))
    result.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in policy.parameters())


def test_states_are_cut_where_asked():
    wild = lambda x, sigma, k: (50 * x, torch.full_like(x, 2.0))
    chain = rollout(wild, noise_keys(0, 200), (200, 3), 2, clip_mean=0.5, clip_noise=0.25, clip_action=0.75)
    assert all(s.abs().max() <= 0.5 + 2 * 0.25 for s in chain.states[1:])
    assert chain.states[-1].abs().max() == 0.75 and chain.states[1].abs().max() > 0.9
    assert torch.equal(chain.states[0], philox_normal((200, 3), noise_keys(0, 200)))


def test_chain_is_the_samplers_own():
    policy, keys = Policy(), noise_keys(3, 8)
    chain = rollout(policy, keys, (8, 6), 4, dtype=F64)
    alone = rollout(policy, keys[2:3], (1, 6), 4, dtype=F64)
    for a, b in zip(alone.states, chain.states, strict=True):
        torch.testing.assert_close(a, b[2:3], rtol=0, atol=1e-14)
    assert not torch.equal(chain.states[1], rollout(policy, keys + 100, (8, 6), 4, dtype=F64).states[1])


def test_normalisations():
    policy = Policy()
    states = rollout(policy, noise_keys(0, 5), (5, 6), 4, dtype=F64).states
    plain = chain_log_prob(policy, states)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    close(chain_log_prob(policy, states, per_step=True), plain / 5)
    close(chain_log_prob(policy, states, per_step=True, per_element=True), plain / 30)
    start = -0.5 * states[0].square().sum(1) - 3 * math.log(2 * math.pi)
    without = chain_log_prob(policy, states, initial=False)
    torch.testing.assert_close(without + start, plain, rtol=1e-13, atol=0)
    close(chain_log_prob(policy, states, initial=False, per_step=True), without / 4)
    rolled = rollout(policy, noise_keys(0, 5), (5, 6), 4, dtype=F64, per_step=True, per_element=True)
    assert torch.equal(rolled.log_prob, plain / 5 / 6)


def test_gradients_are_exact():
    states = [normal(2, 3, seed=s) / 2 for s in range(3)]

    def f(weight, raw):
        policy = lambda x, sigma, k: (x @ weight, noise_std(raw.expand(2, 3), 0.3, 0.6))
        return chain_log_prob(policy, states)

    weight, raw = normal(3, 3, seed=5).requires_grad_(), normal(3, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(f, (weight, raw))


def test_entropy():
    stds = [normal(4, 6, seed=s).abs() + 0.1 for s in range(3)]
    normals = [torch.distributions.Normal(torch.zeros_like(s), s).entropy().sum(1) for s in stds]
    first = torch.distributions.Normal(torch.zeros(4, 6, dtype=F64), 1.0).entropy().sum(1)
    torch.testing.assert_close(chain_entropy(stds), (sum(normals) + first) / 4)
    torch.testing.assert_close(chain_entropy(stds, initial=False, per_element=True), sum(normals) / 3 / 6)


def test_refusals():
    for call, message in [
        (lambda: noise_std(torch.zeros(2), 0.3, 0.2), "0 < low <= high"),
        (lambda: exploration_high(1.5, 0.1, 0.2), "got 1.5"),
        (lambda: chain_log_prob(Policy(), [normal(2, 6)]), "two states or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
