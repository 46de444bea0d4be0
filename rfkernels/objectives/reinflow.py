r"""ReinFlow: a flow policy whose K Euler steps are made stochastic by a learned noise.

.. math:: x_{k+1} = clip(x_k - v(x_k, \sigma_k)/K,\ \pm m) + s_k \odot z, \quad \sigma_k = 1 - k/K

Actions are small, some ten numbers, the batch is thousands of them. The velocity is that of the sigma
convention (ReinFlow's own runs the other way round). Levels are :math:`1 - k/K` in sampling and in the
log-probability, in whose mismatch the published code for rectified flows had a ratio that is not 1 before
any update. Zhang et al., "ReinFlow: fine-tuning flow matching policy with online reinforcement learning",
2025.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels.ops.noise import philox_normal
from rfkernels.ops.solver import affine_step
from rfkernels.ops.stochastic import sample_size, sde_log_prob, stack_rows, sum_of_squares

__all__ = ["Chain", "chain_entropy", "chain_log_prob", "exploration_high", "noise_std", "rollout"]

# (x, sigma [batch], k) to the velocity and the standard deviation, both shaped like x.
NoisyPolicy = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Chain(NamedTuple):
    """K + 1 states, the last of which is the action, and their log-probability, float64 `[batch]`."""

    states: tuple[Tensor, ...]
    log_prob: Tensor


def noise_std(raw: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    r"""Returns the standard deviation :math:`\exp(\ln low + (\ln high - \ln low)(\tanh(raw) + 1)/2)`.

    Within low .. high whatever the noise network says: .10 .. .24 for hopper, .08 .. .16 for ant and
    humanoid.

    Args:
        raw: the network's output.
        low, high: positive, low not above high; `high` as `exploration_high` lets it decay.

    Raises:
        ValueError: numbers that are not 0 < low <= high.
    """
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and not 0 < low <= high:
        raise ValueError(f"noise_std: expected 0 < low <= high, got {low}, {high}")
    low, high = (torch.as_tensor(b, dtype=raw.dtype, device=raw.device) for b in (low, high))
    return low * (high / low) ** ((raw.tanh() + 1) / 2)


def exploration_high(progress: float, low: float, high: float, *, hold: float = 0.35) -> float:
    r"""Returns the upper bound of the noise at a share of the training: held, then a half cosine down.

    It ends at :math:`.3\,low + .7\,high`.

    Raises:
        ValueError: progress outside 0 .. 1, or hold outside 0 .. 1, 1 excluded.
    """
    if not 0 <= progress <= 1 or not 0 <= hold < 1:
        raise ValueError(f"exploration_high: expected progress and hold in 0 .. 1, got {progress}, {hold}")
    end = 0.3 * low + 0.7 * high
    part = max(0.0, (progress - hold) / (1 - hold))
    return end + (high - end) * 0.5 * (1 + math.cos(math.pi * part))


def rollout(
    policy: NoisyPolicy,
    keys: Tensor,
    shape: Sequence[int],
    steps: int = 4,
    *,
    clip_mean: float | None = 1.0,
    clip_noise: float | None = 3.0,
    clip_action: float | None = 1.0,
    per_step: bool = False,
    per_element: bool = False,
    initial: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Chain:
    r"""Returns a chain of `steps` noisy Euler steps from normal noise. No gradients.

    Its log-probability is `chain_log_prob` of the same states with the same options, equal to the bit as
    long as the policy is. The noise cut at `clip_noise` deviations and the action at `clip_action` make the
    density an approximation, as the authors have it.

    Args:
        policy: takes (x, sigma `[batch]`, k) and returns the velocity and the standard deviation.
        keys: `int64[batch, 3]`; step s of the chain draws with step + s + 1 of its key.
        shape: `[batch, ...]`.
        clip_mean, clip_noise, clip_action: None does not cut.
        per_step, per_element, initial: see `chain_log_prob`.
        dtype: of the states.
    """
    with torch.no_grad():
        states = [philox_normal(shape, keys, dtype=dtype)]
        for k in range(steps):
            mean, std = _transition(policy, states[-1], k, steps, clip_mean)
            moved = torch.cat([keys[:, :2], keys[:, 2:] + (k + 1)], 1)
            z = philox_normal(shape, moved, dtype=dtype)
            x = mean + std * (z if clip_noise is None else z.clamp(-clip_noise, clip_noise))
            if k == steps - 1 and clip_action is not None:
                x = x.clamp(-clip_action, clip_action)
            states.append(x)
        log_prob = chain_log_prob(
            policy,
            states,
            clip_mean=clip_mean,
            per_step=per_step,
            per_element=per_element,
            initial=initial,
        )
    return Chain(tuple(states), log_prob)


def chain_log_prob(
    policy: NoisyPolicy,
    states: Sequence[Tensor],
    *,
    clip_mean: float | None = 1.0,
    per_step: bool = False,
    per_element: bool = False,
    initial: bool = True,
) -> Tensor:
    r"""Returns :math:`\ln N(x_0; 0, 1) + \sum_k \ln N(x_{k+1}; \mu_k, s_k^2)`, float64 `[batch]`.

    With gradients.

    Args:
        states: K + 1 of them, see `rollout`.
        clip_mean: as in the rollout; where it cuts, the velocity has no gradient.
        per_step: divided by the number of terms, K + 1 (K without the first).
        per_element: divided by the number of elements of an action.
        initial: with the first term.

    Raises:
        ValueError: fewer than two states.
    """
    if len(states) < 2:
        raise ValueError(f"chain_log_prob: expected two states or more, got {len(states)}")
    steps, size = len(states) - 1, sample_size(states[0])
    total = 0
    if initial:
        total = -0.5 * (sum_of_squares([states[0]], [1.0]) + size * math.log(2 * math.pi))
    for k, (x, x_next) in enumerate(pairwise(states)):
        mean, std = _transition(policy, x, k, steps, clip_mean)
        total = total + sde_log_prob(x_next, [mean], [1.0], std, reduce="sum")
    if per_step:
        total = total / (steps + initial)
    return total / size if per_element else total


def chain_entropy(stds: Sequence[Tensor], *, initial: bool = True, per_element: bool = False) -> Tensor:
    r"""Returns the entropy of a chain over its number of terms, float64 `[batch]`.

    Args:
        stds: the standard deviations of the K steps, shaped like the states.
        initial: the first state, standard normal, counts.
    """
    constant = 0.5 * math.log(2 * math.pi * math.e)
    size = sample_size(stds[0])
    total = sum((s.double().log() + constant).flatten(1).sum(1) for s in stds)
    total = (total + size * constant * initial) / (len(stds) + initial)
    return total / size if per_element else total


def _transition(
    policy: NoisyPolicy, x: Tensor, k: int, steps: int, clip_mean: float | None
) -> tuple[Tensor, Tensor]:
    sigma = torch.full((len(x),), 1 - k / steps, dtype=x.dtype, device=x.device)
    v, std = policy(x, sigma, k)
    step = stack_rows([1.0, -1 / steps], x)
    mean = affine_step(x, v.contiguous(), step[0], step[1])
    if clip_mean is not None:
        mean = mean.clamp(-clip_mean, clip_mean)
    return mean, std.expand(x.shape).contiguous()
