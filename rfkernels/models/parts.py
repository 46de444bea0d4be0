"""Modules that hold the weights of blocks under the names of diffusers; what computes is in `layers`."""

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import embed_time

__all__ = [
    "MLP",
    "AdaNorm",
    "Attention",
    "FeedForward",
    "SwiGLU",
    "TimeTextEmbedding",
    "latents_of",
    "patches_of",
    "thousand",
]


class AdaNorm(nn.Module):
    """The layer that makes `chunks` vectors of modulation from a condition."""

    def __init__(self, width: int, chunks: int, condition: int | None = None, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(condition or width, chunks * width, bias=bias)


class Attention(nn.Module):
    """Projections and norms of an attention: of one stream, or of two with `added`, the second one's width.

    Args:
        norm: of queries and keys: "head", "width" (over all heads) or None.
        out: whether there is an output projection; `added_out`: of the second stream.
        context: the width that keys and values are made from, in a cross-attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        added: int | None = None,
        norm: str | None = "head",
        eps: float = 1e-6,
        bias: bool = True,
        out_bias: bool | None = None,
        out: bool = True,
        added_out: bool = True,
        context: int | None = None,
    ):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        kv_inner = inner if kv_heads is None else kv_heads * head_dim
        out_bias = bias if out_bias is None else out_bias
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k = nn.Linear(context or width, kv_inner, bias=bias)
        self.to_v = nn.Linear(context or width, kv_inner, bias=bias)
        sizes = {"head": (head_dim, head_dim), "width": (inner, kv_inner), None: None}[norm]
        self.norm_q, self.norm_k = _norms(sizes, eps)
        if out:
            self.to_out = nn.ModuleList([nn.Linear(inner, width, bias=out_bias), nn.Identity()])
        if added:
            self.add_q_proj = nn.Linear(added, inner, bias=bias)
            self.add_k_proj = nn.Linear(added, inner, bias=bias)
            self.add_v_proj = nn.Linear(added, inner, bias=bias)
            self.norm_added_q, self.norm_added_k = _norms(sizes, eps)
            if added_out:
                self.to_add_out = nn.Linear(inner, added, bias=out_bias)


def _norms(sizes: tuple[int, int] | None, eps: float) -> tuple[nn.Module | None, nn.Module | None]:
    return (None, None) if sizes is None else tuple(nn.RMSNorm(size, eps=eps) for size in sizes)


class _Projected(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)


class FeedForward(nn.Module):
    """diffusers' FeedForward with a GELU: `net.0.proj`, `net.2`."""

    def __init__(self, width: int, hidden: int | None = None, out: int | None = None):
        super().__init__()
        hidden = hidden or 4 * width
        self.net = nn.ModuleList([_Projected(width, hidden), nn.Identity(), nn.Linear(hidden, out or width)])


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) * w3 x)` without biases, as in HiDream and Z-Image."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)


class MLP(nn.Module):
    """`linear_2(silu(linear_1 x))`: an embedding of sinusoids or of a pooled text."""

    def __init__(self, width_in: int, width: int, bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(ops.silu(self.linear_1(x)))


class TimeTextEmbedding(nn.Module):
    """The condition of FLUX.1 and SD3: time, guidance of a distilled model, pooled text, in one sum."""

    def __init__(self, width: int, pooled: int, guidance: bool = False):
        super().__init__()
        self.timestep_embedder = MLP(256, width)
        self.guidance_embedder = MLP(256, width) if guidance else None
        self.text_embedder = MLP(pooled, width)

    def forward(self, t: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """t and guidance `[batch]` as sinusoids take them, pooled `[batch, pooled]` -> `[batch, width]`."""
        if (guidance is None) != (self.guidance_embedder is None):
            has = "no" if self.guidance_embedder is None else "an"
            raise ValueError(
                f"guidance: the model has {has} embedding of it, got {'none' if guidance is None else 'one'}"
            )
        temb = embed_time(self.timestep_embedder, t, pooled.dtype)
        if guidance is not None:
            temb = temb + embed_time(self.guidance_embedder, guidance, pooled.dtype)
        return temb + self.text_embedder(pooled)


def thousand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """1000 t with both roundings to `dtype`, as diffusers' FLUX has them."""
    return t.to(dtype) * 1000


def patches_of(latents: Tensor, patch: int = 2) -> Tensor:
    """`[B, C, H, W]` to `[B, H/p W/p, p p C]`, the channels fastest (HiDream, Lumina 2, Z-Image)."""
    b, c, h, w = latents.shape
    if h % patch or w % patch:
        raise ValueError(f"patches: height and width must be multiples of {patch}, got {h} x {w}")
    grid = latents.view(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), -1)


def latents_of(tokens: Tensor, rows: int, columns: int, patch: int = 2) -> Tensor:
    """The inverse of `patches_of`: `[B, rows columns, p p C]` to `[B, C, rows p, columns p]`."""
    grid = tokens.view(len(tokens), rows, columns, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * patch, columns * patch)
