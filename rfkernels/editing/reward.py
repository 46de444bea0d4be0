r"""Guidance of a flow by the gradient of a reward.

Liu et al., "Improving video generation with human feedback", 2025 (Flow-NRG): for the density
:math:`p(x)e^{w r(x)}` the score gains :math:`w\nabla r`, the velocity :math:`-w\,\sigma/(1-\sigma)\nabla r`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels.editing._launches import Velocity
from rfkernels.ops import combine
from rfkernels.ops._register import accumulator

__all__ = ["reward_guided"]


def reward_guided(
    velocity: Velocity,
    reward: Callable[[Tensor, Tensor], Tensor],
    weight: float,
    *,
    below: float = 0.95,
) -> Velocity:
    r"""A velocity for `sample` and the editors: :math:`v - w\,\sigma/(1-\sigma)\nabla_x r(x, \sigma)`.

    Exact for a reward of noisy states :math:`r(x, \sigma) = \log E[e^{w r(x_0)} | x_\sigma = x]/w`; a reward
    model trained to predict the mean is an approximation. The factor has no bound at sigma 1: above `below`
    the velocity is left as it is. One launch more than `velocity`, a pair of (uncond, cond) included.

    Args:
        velocity: as of `sample`.
        reward: `reward(x, sigma)` with `sigma: [batch]`, one number for each sample; differentiable in x.
        weight: w.
        below: highest noise level that is guided, below 1.

    Raises:
        ValueError: `below` is not within 0 .. 1.
    """
    if not 0 <= below < 1:
        raise ValueError(f"reward_guided: below must be at least 0 and below 1, got {below}")

    def guided(x: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = velocity(x, sigma)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(reward(leaf, sigma.clone()).sum(), leaf)
        parts = [result] if isinstance(result, Tensor) else list(result)
        dtype = accumulator(x.dtype)
        level = sigma.to(dtype)
        off = level > below
        factor = torch.where(off, 0, -weight * level / torch.where(off, 1, 1 - level))
        one = torch.eye(len(parts), dtype=dtype, device=x.device)[..., None].expand(-1, -1, len(x))
        coefs = torch.cat([one, factor.expand(len(parts), 1, -1)], 1)
        parts = [p.to(x.dtype).contiguous() for p in parts]
        outs = combine([*parts, g.contiguous()], coefs)
        return outs[0] if isinstance(result, Tensor) else outs

    return guided
