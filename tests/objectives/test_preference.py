"""Losses of rewards and preferences: identities at the reference, symmetry, gradients."""

import math

import numpy as np
import pytest
import torch

from rfkernels.objectives import (
    dpo_logits,
    flow_dpo_loss,
    flow_grpo_loss,
    flow_rwr_loss,
    group_advantages,
    policy_loss,
    reinflow_loss,
    velocity_loss,
)
from rfkernels.ops import flow_grpo_coefs, noise_keys, sde_kl, sde_log_prob, sde_step
from tests.objectives.problem import F64, LN2, normal

SIGMA = torch.tensor([0.1, 0.6, 1.0], dtype=F64)


def pairs(seed=0, dtype=F64):
    """(chosen, rejected), each (v, v_ref, x0), and the noise."""
    t = [normal(3, 4, 2, seed=seed + s, dtype=dtype) for s in range(7)]
    return (t[0], t[1], t[2]), (t[3], t[4], t[5]), t[6]


def logits_by_hand(chosen, rejected, noise, beta):
    error = lambda v, x0: (noise - x0 - v).square().flatten(1).mean(1)
    gain = lambda v, ref, x0: error(v, x0) - error(ref, x0)
    return -beta / 2 * (gain(*chosen) - gain(*rejected))


def test_dpo_is_its_formula():
    chosen, rejected, noise = pairs()
    expected = logits_by_hand(chosen, rejected, noise, 100.0)
    torch.testing.assert_close(dpo_logits(chosen, rejected, noise), expected, rtol=1e-12, atol=1e-12)
    loss = -torch.nn.functional.logsigmoid(expected).mean()
    torch.testing.assert_close(flow_dpo_loss(chosen, rejected, noise), loss, rtol=1e-12, atol=0)
    weighted = dpo_logits(chosen, rejected, noise, SIGMA, beta=3.0, weighting="noise")
    torch.testing.assert_close(
        weighted, (1 - SIGMA) ** 2 * logits_by_hand(chosen, rejected, noise, 3.0), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_dpo_starts_at_ln_2(dtype):
    (_, ref_w, x0_w), (_, ref_l, x0_l), noise = pairs(dtype=dtype)
    v_w, v_l = ref_w.clone().requires_grad_(), ref_l.clone().requires_grad_()
    loss = flow_dpo_loss((v_w, ref_w, x0_w), (v_l, ref_l, x0_l), noise, beta=100.0)
    assert loss.item() == LN2  # to the bit: both errors are the same sums
    if dtype == F64:
        grads = torch.autograd.grad(loss, (v_w, v_l))
        expected = 100 * 0.5 * (ref_w - (noise - x0_w)) / 8 / 3, -100 * 0.5 * (ref_l - (noise - x0_l)) / 8 / 3
        torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-14)


def test_dpo_turns_its_sign_when_the_pair_is_swapped():
    chosen, rejected, noise = pairs()
    assert torch.equal(dpo_logits(chosen, rejected, noise), -dpo_logits(rejected, chosen, noise))


def test_dpo_of_a_saturated_sigmoid_is_finite():
    chosen, rejected, noise = pairs()
    for a, b in ((chosen, rejected), (rejected, chosen)):
        v = a[0].clone().requires_grad_()
        loss = flow_dpo_loss((v, *a[1:]), b, noise, beta=1e7)
        (grad,) = torch.autograd.grad(loss, v)
        assert loss.isfinite() and grad.isfinite().all()


def test_dpo_gradients_are_exact():
    chosen, rejected, noise = pairs()

    def f(v_w, v_l):
        return flow_dpo_loss(
            (v_w, *chosen[1:]), (v_l, *rejected[1:]), noise, SIGMA, beta=2.0, weighting="noise"
        )

    assert torch.autograd.gradcheck(f, (chosen[0].requires_grad_(), rejected[0].requires_grad_()))


def test_dpo_leaves_the_reference_alone():
    (v, ref, x0), rejected, noise = pairs()
    ref = ref.requires_grad_()
    loss = flow_dpo_loss((v.requires_grad_(), ref, x0), rejected, noise)
    assert torch.autograd.grad(loss, (v, ref), allow_unused=True)[1] is None


def test_rwr_of_equal_rewards_is_flow_matching():
    v, target = normal(3, 4), normal(3, 4, seed=1)
    for reward in (0.0, 700.0, -1e6):
        loss = flow_rwr_loss(v, target, torch.full((3,), reward))
        torch.testing.assert_close(loss, velocity_loss(v, target), rtol=1e-15, atol=0)


def test_rwr_weighs_by_reward_without_overflow():
    v, target = normal(3, 4), normal(3, 4, seed=1)
    rewards = torch.tensor([1000.0, 999.0, 0.0])
    each = velocity_loss(v, target, reduction="none")
    expected = (each * torch.tensor([1.0, math.exp(-1), 0.0], dtype=F64)).mean()
    torch.testing.assert_close(flow_rwr_loss(v, target, rewards), expected)
    cool = (each * torch.tensor([1.0, math.exp(-0.5), math.exp(-500)], dtype=F64)).mean()
    torch.testing.assert_close(flow_rwr_loss(v, target, rewards, temperature=2.0), cool)
    f = lambda v: flow_rwr_loss(v, target, rewards)
    assert torch.autograd.gradcheck(f, v.requires_grad_())


def test_advantages_are_those_of_groups():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 16.0])
    r = rewards.numpy().reshape(2, 3)
    away = r - r.mean(1, keepdims=True)
    expected = (away / (r.std() + 1e-4)).reshape(-1)
    np.testing.assert_allclose(group_advantages(rewards, 3).numpy(), expected, rtol=1e-6)
    own = (away / (r.std(1, keepdims=True) + 1e-4)).reshape(-1)
    np.testing.assert_allclose(group_advantages(rewards, 3, global_std=False).numpy(), own, rtol=1e-6)
    assert not group_advantages(torch.full((6,), 4.0), 3).any()
    assert float(group_advantages(torch.tensor([0.0] * 99 + [1.0]), 100).max()) == 5.0


def test_ratio_is_one_at_the_policy_that_sampled():
    x, v = normal(4, 30, dtype=torch.float32), normal(4, 30, seed=1, dtype=torch.float32)
    c = flow_grpo_coefs(0.6, 0.45)
    x_next, old = sde_step([x, v], c.coefs.float(), c.std.float(), noise_keys(0, 4))
    v = v.requires_grad_()
    new = sde_log_prob(x_next, [x, v], c.coefs.float(), c.std.float())
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=F64)
    result = flow_grpo_loss(new, old, advantages)
    assert torch.equal(result.ratio, torch.ones(4, dtype=F64))
    assert (
        result.loss.item() == float(-advantages.mean()) and result.clipped == 0 and result.approximate_kl == 0
    )
    # at ratio 1 the gradient is the policy gradient
    (grad,) = torch.autograd.grad(result.loss, v, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantages * new).mean(), v)
    assert torch.equal(grad, expected)


def test_clipped_ratios_have_no_gradient():
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=F64, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)
    result = policy_loss(new, torch.zeros(4, dtype=F64), advantages, clip=0.2)
    (grad,) = torch.autograd.grad(result.loss, new)
    assert (grad == 0).tolist() == [True, False, False, True]
    expected = -(1.2 + math.exp(-0.5) - math.exp(0.5) - 0.8) / 4
    assert result.loss.item() == pytest.approx(expected) and result.clipped == 1
    ratios = np.exp([0.5, -0.5])
    assert float(result.approximate_kl) == pytest.approx(np.mean(ratios - 1 - np.log(ratios)))


def test_the_kl_pulls_to_the_reference():
    x, v, ref = (normal(4, 30, seed=s) for s in range(3))
    c = flow_grpo_coefs(0.6, 0.45)
    x_next, old = sde_step([x, v], c.coefs, c.std, noise_keys(0, 4))
    v = v.requires_grad_()
    new = sde_log_prob(x_next, [x, v], c.coefs, c.std)
    kl = sde_kl(v, ref, c.v, c.scale)
    loss = flow_grpo_loss(new, old, torch.zeros(4, dtype=F64), kl, beta=0.5).loss
    torch.testing.assert_close(loss, 0.5 * kl.mean())
    (grad,) = torch.autograd.grad(loss, v)
    assert ((grad * (v - ref)).sum(1) > 0).all()


def test_reinflow_loss():
    new = torch.tensor([0.001, -2.0, 0.5], dtype=F64, requires_grad=True)
    old, advantages = torch.zeros(3, dtype=F64), torch.tensor([1.0, 2.0, 6.0])
    a = advantages.double()
    a = (a - a.mean()) / (a.std() + 1e-8)
    plain = policy_loss(new, old, a, clip=0.01).loss
    entropy = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    loss = reinflow_loss(new, old, advantages, entropy).loss
    torch.testing.assert_close(loss, plain - 0.03 * 2.0)
    bounded = reinflow_loss(new, old, advantages, bounds=(-1.0, 1.0))
    assert bounded.ratio[1].item() == math.exp(-1)
    assert not torch.autograd.grad(bounded.loss, new)[0][1]


def test_refusals():
    chosen, rejected, noise = pairs()
    row, v = torch.zeros(3, dtype=F64), normal(3, 4)
    for call, message in [
        (lambda: dpo_logits(chosen, rejected, noise, weighting="noise"), "noise with sigma"),
        (lambda: dpo_logits(chosen, rejected, noise, weighting="snr"), "got 'snr'"),
        (lambda: group_advantages(row, 2), r"expected \[groups \* 2\] rewards, got \[3\]"),
        (lambda: policy_loss(row, row, row[:, None], clip=0.1), "must have one shape"),
        (lambda: policy_loss(row, row, row, clip=0.0), "clip must be positive"),
        (lambda: flow_rwr_loss(v, v, row[:2]), r"expected \[3\] rewards, got \[2\]"),
        (lambda: flow_rwr_loss(v, v, row, temperature=0.0), "temperature must be positive"),
        (lambda: reinflow_loss(row[:1], row[:1], row[:1]), "two samples or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
