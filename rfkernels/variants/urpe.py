r"""Universal relative positions: URPE attention (Luo et al., "Your transformer may not be as powerful as you
expect", 2022).

    O = (softmax(q k^T / sqrt(d) + B) * C) v,    B_ij = b[bucket(j - i)], C_ij = c[bucket(j - i)]

Weights of softmax sum to 1, so that attention with B alone maps equal tokens to equal tokens wherever they
stand; with C, which is not normalised again, it does not. Buckets are those of T5 (Raffel et al., 2020). The
released code leaves C at random; here it is 1, plain attention, at initialisation.
"""

import math

import torch
from torch import Tensor, nn

from rfkernels.nn import run_linear
from rfkernels.ops import attention

__all__ = ["URPE", "URPEAttention", "relative_buckets"]


def relative_buckets(distance: Tensor, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Returns the buckets of distances j - i, int64: half of them for j > i.

    Of a half, the first half are one distance each; the others grow with its logarithm up to `max_distance`,
    and the last holds the rest.
    """
    if buckets < 4 or buckets % 4 or max_distance <= buckets // 4:
        raise ValueError(
            f"relative_buckets: buckets, a multiple of 4, and max_distance above a quarter of it required, "
            f"got {buckets}, {max_distance}"
        )
    side, exact = buckets // 2, buckets // 4
    far = distance.abs()
    growth = (far.clamp(min=1).double() / exact).log() / math.log(max_distance / exact) * (side - exact)
    log = (exact + (growth + 1e-9).long()).clamp(max=side - 1)  # powers of two fall on edges
    return torch.where(far < exact, far, log) + side * (distance > 0)


class URPE(nn.Module):
    """The tables of b and c, `[heads, buckets]`, 0 and 1 at initialisation, and the attention with them.

    Args:
        bias: whether there is a B; it is a `[heads, rows, keys]` tensor while the attention runs, C is not.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128, *, bias: bool = True):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.factor = nn.Parameter(torch.ones(heads, buckets))
        self.bias = nn.Parameter(torch.zeros(heads, buckets)) if bias else None
        relative_buckets(torch.zeros(1, dtype=torch.long), buckets, max_distance)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_lengths: Tensor | None = None,
        layout: str = "bhld",
    ) -> Tensor:
        """The attention of q, k, v as in `ops.attention`; keys from `key_lengths` on are padding."""
        axis = 2 if layout == "bhld" else 1
        rows, keys = q.shape[axis], k.shape[axis]
        distance = torch.arange(-rows, keys, device=q.device)
        bucket = relative_buckets(distance, self.buckets, self.max_distance)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        factor, bias = self.factor.to(wide)[:, bucket[1:]], None
        if self.bias is not None:  # row i is the run of `keys` distances from -i on
            bias = self.bias.to(wide)[:, bucket].unfold(1, keys, 1)[:, 1:].flip(1)[None]
        return attention(q, k, v, bias=bias, factor=factor, key_lengths=key_lengths, layout=layout)


class URPEAttention(nn.Module):
    """Self-attention of tokens `[batch, tokens, width]` with URPE, between its two projections."""

    def __init__(self, width: int, heads: int, buckets: int = 32, max_distance: int = 128, bias: bool = True):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"URPEAttention: heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.urpe = URPE(heads, buckets, max_distance, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        q, k, v = run_linear(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return run_linear(self.out, self.urpe(q, k, v, key_lengths=key_lengths, layout="blhd").flatten(2))
