"""What blocks of the embedded model do, in plain torch: what a compiler makes one loop of.

A training step compiled for a CPU is made of this. Functions have the names and arguments of their fused
counterparts in `layers` and `rfkernels.ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "attend",
    "beside",
    "finish",
    "gated_residual_norm_modulate",
    "gelu_linear",
    "norm_modulate",
    "qkv_norm_rope",
]

EPS = 1e-6


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, to: tuple[nn.Module, ...] = ()) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    to: tuple[nn.Module, ...] = (),
) -> tuple[Tensor, Tensor]:
    x = x + gate[:, None] * y
    return x, norm_modulate(x, scale, shift)


def finish(x: Tensor, tokens: Tensor, layer: nn.Module, gate: Tensor) -> Tensor:
    return x + gate[:, None] * layer(tokens)


def gelu_linear(x: Tensor, up: nn.Module) -> Tensor:
    return F.gelu(up(x), approximate="tanh")


def beside(first: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat([first, F.gelu(hidden, approximate="tanh")], -1)


def qkv_norm_rope(
    qkv: list[Tensor], heads: int, *, q_weight: list[Tensor], k_weight: list[Tensor], rotation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, tokens, heads, d]; pairs (2 i, 2 i + 1) of q and k become (i, i + d/2), which attention
    does not see."""
    parts = []
    for x, *gains in zip(qkv, q_weight, k_weight, strict=True):
        *qk, v = x.unflatten(-1, (3, heads, -1)).unbind(2)
        normed = (
            F.rms_norm(t, t.shape[-1:], eps=EPS) * g.to(t.dtype) for t, g in zip(qk, gains, strict=True)
        )
        parts.append((*normed, v))
    q, k, v = (torch.cat(same, 1) for same in zip(*parts, strict=True))
    return _turned(q, rotation), _turned(k, rotation), v


def _turned(x: Tensor, rotation: Tensor) -> Tensor:
    """The tokens that have a row; those behind it by nothing."""
    cos, sin = rotation.to(x.dtype).unbind(-1)
    behind = (0, 0, 0, x.shape[1] - len(rotation))
    cos, sin = F.pad(cos, behind, value=1.0)[:, None], F.pad(sin, behind)[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, key_lengths: Tensor) -> Tensor:
    """By products and a softmax: on a CPU torch's own attention trains slower."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    hidden = torch.arange(k.shape[2], device=k.device) >= key_lengths[:, None]
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias[:, None, None]
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
