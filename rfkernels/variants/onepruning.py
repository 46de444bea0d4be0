r"""Heads and hidden channels that matter least, found in one shot: OPTIN (Khaki and Plataniotis, 2024).

Every unit is switched off once on calibration data, and matters by what that does to all that follows:

    I(unit of layer l) = sum_{l' > l} |G_l' - G_l'^masked|^2 + lambda E(out, out^masked)

G is the Gram matrix of K sampled tokens' features, each of length 1. E is the KL divergence of logits at
temperature 4, or for a flow, whose units live along a sampling trajectory, the squared error of the velocity.
Under a budget of multiply-accumulates the units of the largest sum are kept: all heads cost the same, and all
groups of channels, so the best of each kind are taken and every split between the two is tried. Scores have
no factor that depends on a unit's place (the published code has).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.variants.dit import DiTBlock, compacted

__all__ = [
    "choose_units",
    "gram_distance",
    "logit_error",
    "prune",
    "trajectory_importance",
    "unit_macs",
    "velocity_error",
]


def gram_distance(x: Tensor, y: Tensor) -> Tensor:
    """|G(x) - G(y)|^2, G of rows of length 1: `[..]` of `[.., rows, width]`. Blind to rotations of features
    and to the rows' lengths; 0 of equal ones."""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return (x @ x.mT - y @ y.mT).square().sum((-1, -2))


def velocity_error(x: Tensor, y: Tensor) -> Tensor:
    """The mean square of x - y."""
    return (x - y).square().mean()


def logit_error(x: Tensor, y: Tensor, temperature: float = 4.0) -> Tensor:
    """KL(softmax(x / T) | softmax(y / T)) of `[.., classes]`, a mean over samples and tokens."""
    p, q = ((t / temperature).log_softmax(-1) for t in (x, y))
    return (p.exp() * (p - q)).sum(-1).mean()


@torch.no_grad()
def trajectory_importance(
    blocks: Sequence[DiTBlock],
    x: Tensor,
    c: Tensor,
    head: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    groups: int | None = None,
    rows: int = 768,
    weight: float = 1.0,
    error: Callable[[Tensor, Tensor], Tensor] = velocity_error,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Importance of every head `[L, H]` and every group of hidden channels `[L, groups]`.

    For a flow let the batch be states of its trajectories at several times, with c of those times.

    Args:
        x: what the blocks read, `[batch, tokens, width]`; c: `[batch, width]`.
        head: from what they write, `[batch, tokens, width]`, and c to the output; by default nothing.
        groups: into which the hidden channels are cut, by default H; as many as channels: each is one.
        rows: K, the tokens of the batch that are compared, drawn once.
        weight: lambda. error: `velocity_error` or `logit_error`.
    """
    head = head or (lambda x, c: x)
    groups = groups or blocks[0].attn.heads
    picked = torch.randperm(x.shape[0] * x.shape[1], generator=generator)[:rows].to(x.device)
    sampled = lambda t: t.flatten(-3, -2)[..., picked, :]
    states = [x]
    for block in blocks:
        states.append(block(states[-1], c))
    out = head(states[-1], c)
    found = []
    for kind, count in (("heads", blocks[0].attn.heads), ("groups", groups)):
        scores = x.new_zeros(len(blocks), count)
        for layer in range(len(blocks)):
            for unit in range(count):
                mask = torch.ones(count, dtype=torch.bool, device=x.device)
                mask[unit] = False
                y = blocks[layer](states[layer], c, **{kind: mask})
                for later in range(layer + 1, len(blocks)):
                    y = blocks[later](y, c)
                    scores[layer, unit] += gram_distance(sampled(states[later + 1]), sampled(y))
                scores[layer, unit] += weight * error(out, head(y, c))
        found.append(scores)
    return found[0], found[1]


def unit_macs(block: DiTBlock, tokens: int, groups: int) -> tuple[int, int]:
    """Multiply-accumulates of one head, 4 s D d + 2 s^2 d, and of one group of n channels, 2 s D n."""
    d, n = block.attn.head_dim, block.mlp.fc1.out_features // groups
    return 4 * tokens * block.width * d + 2 * tokens**2 * d, 2 * tokens * block.width * n


def choose_units(
    heads: Tensor, groups: Tensor, costs: tuple[int, int], budget: float
) -> tuple[Tensor, Tensor]:
    """Masks bool `[L, H]`, `[L, groups]` of the largest sum of importance that costs at most `budget`.

    Every layer keeps its best head and its best group: a block needs one of each.

    Args:
        heads, groups: of `trajectory_importance`, finite, not negative; costs: of one of each, `unit_macs`.

    Raises:
        ValueError: other scores, or a budget that those do not fit into.
    """
    scores = [t.detach().double().cpu() for t in (heads, groups)]
    if any(t.ndim != 2 or not bool((t.isfinite() & (t >= 0)).all()) for t in scores):
        raise ValueError("choose_units: finite importance [layers, units] of 0 or more required")
    least = len(heads) * sum(costs)
    if min(costs) <= 0 or budget < least:
        raise ValueError(
            f"choose_units: positive costs and a budget of {least} or more required, got {costs}, {budget}"
        )
    ranked, sums = [], []
    for t in scores:
        first = torch.zeros_like(t, dtype=torch.bool).scatter(1, t.argmax(1, keepdim=True), True)
        order = t.masked_fill(first, torch.inf).flatten().argsort(descending=True, stable=True)
        ranked.append(order)
        sums.append(torch.cat([torch.zeros(1, dtype=torch.float64), t.flatten()[order].cumsum(0)]))
    best, split = -1.0, (0, 0)
    for count in range(len(heads), heads.numel() + 1):
        rest = min(int((budget - count * costs[0]) // costs[1]), groups.numel())
        if rest < len(groups):
            break
        total = float(sums[0][count] + sums[1][rest])
        if total > best:
            best, split = total, (count, rest)
    masks = [
        torch.zeros(t.numel(), dtype=torch.bool).scatter(0, order[:count], True).view_as(t)
        for t, order, count in zip(scores, ranked, split, strict=True)
    ]
    return masks[0], masks[1]


def prune(blocks: Sequence[DiTBlock], heads: Tensor, groups: Tensor) -> nn.ModuleList:
    """The smaller blocks of masks from `choose_units`."""
    return nn.ModuleList(compacted(b, h, g) for b, h, g in zip(blocks, heads, groups, strict=True))
