r"""Coefficients of adapters that depend on the time of a flow, `0 <= t <= 1`.

An adapter with experts per time is one stack of factors whose columns are weighted anew at every step:
`Delta W(t) = s B diag(c(t)) A`. `c(t)` is `[R]`, or `[batch, R]` for times of shape `[batch]`;
`LoRALinear.write` takes it on the device, so that one captured graph serves all steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels.adapters.base import Factors

__all__ = ["interval_coefficients", "mixed_coefficients", "mixed_factors", "rank_mask"]


def interval_coefficients(t: Tensor, bounds: Tensor, rank: int) -> Tensor:
    """One expert of `rank` per interval of time: ones in the columns of the interval of t, `[*t, J rank]`.

    Intervals `bounds[j] <= t < bounds[j + 1]`, the last one closed; times outside belong to the nearest.
    Several scales of intervals (TSM, TimeStep Master) are several calls side by side, the coarser ones times
    their gates.

    Args:
        t: `[]` or `[batch]`.
        bounds: `[J + 1]`, increasing.
    """
    inner = bounds[1:-1].to(t.device, t.dtype).contiguous()
    index = torch.searchsorted(inner, t.contiguous(), right=True)
    experts = torch.arange(len(bounds) - 1, device=t.device)
    return (index[..., None] == experts).to(torch.float32).repeat_interleave(rank, -1)


def rank_mask(t: Tensor, rank: int, *, least: int = 1, power: float = 1.0) -> Tensor:
    """Fewer columns at more noise (T-LoRA): ones in the first least + floor((rank - least) (1 - t)^power)."""
    if not 0 <= least <= rank:
        raise ValueError(f"rank_mask: least must be 0 .. rank = {rank}, got {least}")
    kept = least + ((rank - least) * (1 - t.clamp(0, 1)) ** power).floor()
    return (torch.arange(rank, device=t.device) < kept[..., None]).to(torch.float32)


def mixed_factors(downs: Sequence[Tensor], ups: Sequence[Tensor], scale: float = 1.0) -> Factors:
    r"""The stack of :math:`\Delta W = s \sum_{ij} b_j a_i\, B_j\, \mathrm{diag}(m)\, A_i` (TD-LoRA).

    Args:
        downs: the A_i, `[r, in]`; one that is shared, or several.
        ups: the B_j, `[out, r]`.

    `mixed_coefficients` weights its `len(downs) len(ups) r` columns.
    """
    down = torch.cat([a for a in downs for _ in ups])
    return Factors(down, torch.cat(list(ups) * len(downs), 1), scale)


def mixed_coefficients(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a_i b_j m_r in the order of `mixed_factors`: a `[*, I]`, b `[*, J]`, mask `[*, r]` to `[*, I J r]`."""
    return (a[..., :, None, None] * b[..., None, :, None] * mask[..., None, None, :]).flatten(-3)
