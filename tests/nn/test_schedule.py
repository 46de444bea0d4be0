"""Coefficients over time: the three ways of running experts per time are one."""

import pytest
import torch

from rfkernels.nn import LoRALinear, interval_coefficients, mixed_coefficients, mixed_factors, rank_mask
from tests.adapters.layers import close, layer, randn

BOUNDS = torch.tensor([0.0, 0.25, 0.5, 1.0])


def test_intervals_are_closed_on_the_left():
    times = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.999, 1.0, -0.1, 1.1])
    experts = interval_coefficients(times, BOUNDS, 2)
    assert experts.shape == (9, 6)
    assert (experts.sum(1) == 2).all()
    assert experts[:, ::2].argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 2, 0, 2]
    assert torch.equal(interval_coefficients(times[3], BOUNDS, 2), experts[3])
    assert torch.equal(interval_coefficients(times, torch.tensor([0.0, 1.0]), 3), torch.ones(9, 3))  # LoRA


def test_rank_mask():
    t = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.99, 1.0])
    assert rank_mask(t, 9).sum(1).tolist() == [9, 7, 7, 5, 1, 1]
    assert rank_mask(t, 9, least=3, power=2.0).sum(1).tolist() == [9, 6, 6, 4, 3, 3]
    assert torch.equal(rank_mask(t[3], 9), torch.tensor([1.0] * 5 + [0] * 4))
    with pytest.raises(ValueError, match=r"least must be 0 \.\. rank = 4, got 5"):
        rank_mask(t, 4, least=5)


def test_mixed_experts():
    """TD-LoRA: B(t) diag(m) A(t), A and B mixed apart, is one stack with coefficients per time."""
    base, x = layer(10, 12), randn(3, 5, 12, seed=1)
    downs, ups = [randn(3, 12, seed=i) for i in range(2)], [randn(10, 3, seed=i + 9) for i in range(4)]
    a, b = randn(3, 2, seed=7).softmax(-1), randn(3, 4, seed=8).softmax(-1)
    mask = rank_mask(torch.tensor([0.1, 0.5, 0.9]), 3).double()
    module = LoRALinear(base, [24])
    module.load(0, mixed_factors(downs, ups, 0.5))
    module.write(torch.ones(1), mixed_coefficients(a, b, mask))
    y = module(x)
    for i in range(3):
        down = sum(w * d for w, d in zip(a[i], downs, strict=True))
        up = sum(w * u for w, u in zip(b[i], ups, strict=True))
        weight = base.weight + 0.5 * up @ torch.diag(mask[i]) @ down
        close(y[i], x[i] @ weight.T + base.bias)
        module.write(coefficient=mixed_coefficients(a[i], b[i], mask[i]))
        close(module(x)[i], y[i])


def test_scales_of_intervals():
    """TimeStep Master: the finest expert, and coarser ones times a gate."""
    base, x, t = layer(10, 12), randn(2, 12, seed=1), torch.tensor(0.6)
    core, context = [randn(2, 12, seed=i) for i in range(3)], randn(2, 12, seed=5)
    ups = [randn(10, 2, seed=i + 20) for i in range(4)]
    module = LoRALinear(base, [8])
    stack = mixed_factors([torch.cat([*core, context])], [torch.cat(ups, 1)])
    module.load(0, stack)
    gate = 0.3 * interval_coefficients(t, torch.tensor([0.0, 1.0]), 2).double()
    module.write(torch.ones(1), torch.cat((interval_coefficients(t, BOUNDS, 2), gate), -1).double())
    close(module(x), base(x) + x @ core[2].T @ ups[2].T + 0.3 * x @ context.T @ ups[3].T)
