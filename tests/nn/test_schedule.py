"""Factors that change apart over time: one stack of columns, mixed per step, and merged weights are one."""

import torch

from rfkernels.adapters.timestep import rank_mask
from rfkernels.nn import LoRALinear, mixed_coefficients, mixed_factors
from tests.adapters.layers import close, layer, randn


def test_mixed_experts():
    """TD-LoRA: B(t) diag(m) A(t), A and B mixed apart, is one stack with coefficients per time."""
    base, x = layer(10, 12), randn(3, 5, 12, seed=1)
    downs, ups = [randn(3, 12, seed=i) for i in range(2)], [randn(10, 3, seed=i + 9) for i in range(4)]
    a, b = randn(3, 2, seed=7).softmax(-1), randn(3, 4, seed=8).softmax(-1)
    mask = rank_mask(torch.tensor([0.1, 0.5, 0.9]), 3, 1)
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
