r"""Learning from rewards and from preferences.

Log-probabilities and sums are float64 `[batch]`, as `ops.sde_log_prob` and `ops.sum_of_squares` give them;
keep them so: Flow-GRPO clips ratios at 1e-4, which float32 barely resolves and bfloat16 does not.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rfkernels.objectives.losses import batch_level, squared_error
from rfkernels.ops.stochastic import sample_size, sum_of_squares

__all__ = [
    "PolicyLoss",
    "dpo_logits",
    "flow_dpo_loss",
    "flow_grpo_loss",
    "flow_rwr_loss",
    "group_advantages",
    "policy_loss",
    "reinflow_loss",
]


class PolicyLoss(NamedTuple):
    """A loss to go down from, and what to watch, without gradients."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approximate_kl: Tensor


def group_advantages(
    rewards: Tensor, group: int, *, global_std: bool = True, clip: float = 5.0, eps: float = 1e-4
) -> Tensor:
    r"""Returns :math:`(r - mean)/(std + eps)`, clipped to :math:`\pm` `clip`, float64, shaped like `rewards`.

    The mean is each group's own; the standard deviation (of the population, as numpy takes it) that of all
    rewards, or of the group. Equal rewards give 0.

    Args:
        rewards: `[groups * group]`, the samples of one prompt next to each other.
        group: samples a prompt; the authors take 24.

    Raises:
        ValueError: rewards that do not divide into groups.
    """
    if group < 1 or rewards.ndim != 1 or len(rewards) % group:
        raise ValueError(f"group_advantages: expected [groups * {group}] rewards, got {list(rewards.shape)}")
    rows = rewards.double().view(-1, group)
    std = rows.std(unbiased=False) if global_std else rows.std(1, unbiased=False, keepdim=True)
    return ((rows - rows.mean(1, keepdim=True)) / (std + eps)).clamp(-clip, clip).view(-1)


def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip: float) -> PolicyLoss:
    r"""Returns :math:`E\max(-A\rho, -A\,clip(\rho, 1 - c, 1 + c))`, :math:`\rho = \exp(\ln p - \ln p_{old})`.

    Proximal policy optimisation (Schulman et al., 2017). `approximate_kl` is the mean of
    :math:`\rho - 1 - \ln\rho`, `clipped` the share of ratios outside.

    Args:
        log_prob: of the policy, with gradients; old_log_prob: at sampling time; advantages: `[batch]`.
        clip: c.

    Raises:
        ValueError: shapes that differ (they would broadcast), or a clip that is not positive.
    """
    shapes = [list(t.shape) for t in (log_prob, old_log_prob, advantages)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise ValueError(f"policy_loss: log-probabilities and advantages must have one shape, got {shapes}")
    if not clip > 0:
        raise ValueError(f"policy_loss: clip must be positive, got {clip}")
    advantages = advantages.detach()
    log_ratio = log_prob - old_log_prob.detach()
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    seen = ratio.detach()
    outside = ((seen - 1).abs() > clip).double().mean()
    return PolicyLoss(loss, seen, outside, (seen - 1 - log_ratio.detach()).mean())


def flow_grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kl: Tensor | None = None,
    *,
    clip: float = 1e-4,
    beta: float = 0.04,
) -> PolicyLoss:
    r"""Returns the loss of Flow-GRPO for one step, `policy_loss` plus :math:`\beta\,E\,KL`.

    Log-probabilities are means over elements (`reduce="mean"`): with sums, `clip` has to grow with their
    number. The authors train 10-step trajectories without the last step (whose noise would stay in the
    sample), with beta .04 (.01 for PickScore). Guidance must be the same in sampling and in training. Liu et
    al., 2025.

    Args:
        kl: `[batch]`, see `ops.sde_kl`.
    """
    result = policy_loss(log_prob, old_log_prob, advantages, clip=clip)
    return result if kl is None else result._replace(loss=result.loss + beta * kl.mean())


def reinflow_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    entropy: Tensor | None = None,
    *,
    clip: float = 0.01,
    entropy_weight: float = 0.03,
    bounds: tuple[float, float] | None = None,
) -> PolicyLoss:
    r"""Returns ReinFlow's policy loss, `policy_loss` less `entropy_weight` times the mean entropy.

    Advantages are brought to mean 0 and standard deviation 1 over the batch. Clip .01 for states, .001 with
    entropy weight 0 for pictures. Zhang et al., "ReinFlow", 2025.

    Args:
        log_prob, old_log_prob: of whole chains, `rfkernels.objectives.chain_log_prob`.
        entropy: `[batch]`, `rfkernels.objectives.chain_entropy`.
        bounds: both log-probabilities are kept within, (-1, 1) in some of the authors' configurations.
            Outside them there is no gradient, and the ratio is no longer that of the chain's densities.

    Raises:
        ValueError: fewer than two samples, whose deviation is not defined, and what `policy_loss` refuses.
    """
    if advantages.numel() < 2:
        raise ValueError(f"reinflow_loss: expected two samples or more, got {advantages.numel()}")
    advantages = advantages.double()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    if bounds is not None:
        log_prob, old_log_prob = log_prob.clamp(*bounds), old_log_prob.clamp(*bounds)
    result = policy_loss(log_prob, old_log_prob, advantages, clip=clip)
    return result if entropy is None else result._replace(loss=result.loss - entropy_weight * entropy.mean())


def dpo_logits(
    chosen: tuple[Tensor, Tensor, Tensor],
    rejected: tuple[Tensor, Tensor, Tensor],
    noise: Tensor,
    sigma: Tensor | None = None,
    *,
    beta: float = 100.0,
    weighting: Literal["constant", "noise"] = "constant",
) -> Tensor:
    r"""Returns the argument z of the sigmoid of `flow_dpo_loss`, float64 `[batch]`; 0 at the reference.

    Raises:
        ValueError: another weighting, or "noise" without levels.
    """
    if weighting not in ("constant", "noise") or (weighting == "noise" and sigma is None):
        raise ValueError(f"dpo_logits: weighting must be constant, or noise with sigma, got {weighting!r}")
    gains = []
    for v, v_ref, x0 in (chosen, rejected):
        ours, reference = sum_of_squares(
            [v, v_ref.detach(), noise, x0], [[1.0, 0.0, -1.0, 1.0], [0.0, 1.0, -1.0, 1.0]]
        ).unbind(1)
        gains.append((ours - reference) / sample_size(noise))
    scale = -beta / 2
    if weighting == "noise":
        scale = scale * (1 - batch_level(sigma, noise)) ** 2
    return scale * (gains[0] - gains[1])


def flow_dpo_loss(
    chosen: tuple[Tensor, Tensor, Tensor],
    rejected: tuple[Tensor, Tensor, Tensor],
    noise: Tensor,
    sigma: Tensor | None = None,
    *,
    beta: float = 100.0,
    weighting: Literal["constant", "noise"] = "constant",
) -> Tensor:
    r"""Returns :math:`-E\ln sigmoid(z)`, float64: preferred samples gain on the reference, others lose.

    .. math::
        z = -\frac\beta2\left[(\|v^w - v_\theta^w\|^2 - \|v^w - v_{ref}^w\|^2)
        - (\|v^l - v_\theta^l\|^2 - \|v^l - v_{ref}^l\|^2)\right]/D

    Errors are means over elements: beta 100 here is 100/D in a form with sums, which saturates the sigmoid
    for a video. Liu et al., "Improving video generation with human feedback", 2025.

    Args:
        chosen, rejected: (v, v_ref, x0) of the preferred sample and of the other: the policy's velocity, the
            reference's and the data, `[batch, ...]`.
        noise: shared by both, as the level is.
        sigma: `[batch]`, for "noise" alone.
        beta: constant, or with weighting "noise" times :math:`(1-\sigma)^2`, which is Diffusion-DPO's
            constant weight of noise predictions.
    """
    logits = dpo_logits(chosen, rejected, noise, sigma, beta=beta, weighting=weighting)
    return softplus(-logits).mean()


def flow_rwr_loss(prediction: Tensor, target: Tensor, rewards: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Returns :math:`E\,e^{(r - \max r)/\tau}\,\|v - target\|^2/D`, float64: reward-weighted regression.

    The largest reward of the batch is taken off, so that nothing overflows; it scales the loss of a batch
    and not where it leads. Equal rewards are flow matching. Liu et al., 2025.

    Args:
        prediction, target: `[batch, ...]`.
        rewards: `[batch]`.
        temperature: :math:`\tau`, positive.

    Raises:
        ValueError: as many rewards as there are not samples, or a temperature that is not positive.
    """
    if rewards.shape != (len(prediction),):
        raise ValueError(f"flow_rwr_loss: expected [{len(prediction)}] rewards, got {list(rewards.shape)}")
    if not temperature > 0:
        raise ValueError(f"flow_rwr_loss: temperature must be positive, got {temperature}")
    rewards = rewards.detach().double()
    weight = ((rewards - rewards.max()) / temperature).exp()
    return squared_error([prediction, target], [1.0, -1.0], weight).mean()
