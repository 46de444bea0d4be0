"""The block that the dynamic variants change: that of DiT (Peebles and Xie, 2022), by its checkpoints' names.

    x <- x + g1 Attn(LN(x) (1 + s1) + h1),   x <- x + g2 MLP(LN(x) (1 + s2) + h2)
    h1, s1, g1, h2, s2, g2 = adaLN_modulation(c)

Masks of heads and of groups of hidden channels are arguments, as are keys and values from elsewhere: what a
variant switches off it states in one place, and `compacted` takes the same masks to make the smaller block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.nn.grouped import sliced_attention
from rfkernels.ops.activation import activation
from rfkernels.ops.attention import attention
from rfkernels.ops.norm import gated_residual, norm_modulate

__all__ = ["DiTBlock", "DiTMlp", "SelfAttention", "compacted"]


class SelfAttention(nn.Module):
    """Attention with a fused projection whose rows are those of q, k, v, each head after head."""

    def __init__(self, width: int, heads: int, head_dim: int | None = None):
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"SelfAttention: heads must divide the width, got {heads}, {width}")
        self.heads, self.head_dim = heads, head_dim or width // heads
        self.qkv = nn.Linear(width, 3 * heads * self.head_dim)
        self.proj = nn.Linear(heads * self.head_dim, width)

    def _project(self, x: Tensor, first: int, last: int) -> list[Tensor]:
        rows = slice(first * self.heads * self.head_dim, last * self.heads * self.head_dim)
        whole = (first, last) == (0, 3)
        y = self.qkv(x) if whole else F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return list(y.unflatten(-1, (last - first, self.heads, self.head_dim)).unbind(-3))

    def keys_values(self, x: Tensor) -> list[Tensor]:
        """k, v: `[batch, tokens, heads, head_dim]`, for `kv` of `forward`."""
        return self._project(x, 1, 3)

    def forward(
        self,
        x: Tensor,
        heads: Tensor | None = None,
        *,
        slices: int = 1,
        strided: bool = False,
        kv: list[Tensor] | None = None,
        **keys: Any,
    ) -> Tensor:
        """Attention of x `[batch, tokens, width]`.

        Args:
            heads: a mask `[heads]` or `[batch, heads]` that multiplies each head's output before `proj`.
            slices, strided: groups of tokens that see themselves alone, as of `nn.grouped.sliced_attention`.
            kv: keys and values from elsewhere, `[batch, keys, heads, head_dim]`; x makes queries alone.
            keys: of `ops.attention` (`bias`, `key_lengths`), or of `sliced_attention`.
        """
        q, k, v = self._project(x, 0, 3) if kv is None else (*self._project(x, 0, 1), *kv)
        if slices > 1:
            y = sliced_attention(q, k, v, slices, strided=strided, layout="blhd", **keys)
        else:
            y = attention(q, k, v, layout="blhd", **keys)
        if heads is not None:
            y = y * _per_token(heads, self.heads, "heads").to(y.dtype)
        return self.proj(y.flatten(-2))


class DiTMlp(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        """A mask `groups`, `[G]` or `[batch, G]`, multiplies G equal groups of hidden channels before the
        GELU, which leaves zeros zero."""
        h = self.fc1(x)
        if groups is not None:
            mask = _per_token(groups, groups.shape[-1], "groups")
            h = (h.unflatten(-1, (groups.shape[-1], -1)) * mask.to(h.dtype)).flatten(-2)
        return self.fc2(activation(h, "gelu_tanh"))


class DiTBlock(nn.Module):
    """One block of a DiT.

    Args:
        width, heads: D and H.
        hidden: of the MLP, by default 4 D.
        head_dim: by default D / H; another in a block that `compacted` made.
        eps: of the two norms. diffusers has 1e-5 in the second.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        *,
        head_dim: int | None = None,
        eps: tuple[float, float] = (1e-6, 1e-6),
    ):
        super().__init__()
        self.width, self.eps = width, eps
        self.attn = SelfAttention(width, heads, head_dim)
        self.mlp = DiTMlp(width, hidden or 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    @classmethod
    def from_diffusers(cls, block: nn.Module) -> "DiTBlock":
        """A copy of a `BasicTransformerBlock` of `DiTTransformer2DModel`, for c = `block.norm1.emb(t, y)`."""
        a, ff = block.attn1, block.ff.net
        eps = (block.norm1.norm.eps, block.norm3.eps)
        made = cls(a.to_q.in_features, a.heads, ff[2].in_features, eps=eps).to(a.to_q.weight)
        pairs = [
            (made.attn.proj, a.to_out[0]),
            (made.mlp.fc1, ff[0].proj),
            (made.mlp.fc2, ff[2]),
            (made.adaLN_modulation[1], block.norm1.linear),
        ]
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.load_state_dict(theirs.state_dict())
            for name, parameter in made.attn.qkv.named_parameters():
                parameter.copy_(torch.cat([getattr(part, name) for part in (a.to_q, a.to_k, a.to_v)]))
        return made

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """shift, scale, gate of attention, then of the MLP, each `[batch, width]`."""
        return self.adaLN_modulation(c).chunk(6, -1)

    def keys_values(self, x: Tensor, c: Tensor) -> list[Tensor]:
        """k, v that the attention of x would read."""
        m = self.modulation(c)
        return self.attn.keys_values(norm_modulate(x, m[1], m[0], eps=self.eps[0]))

    def attend(self, x: Tensor, m: tuple[Tensor, ...], **attention: Any) -> Tensor:
        """The first line, with m of `modulation`."""
        y = self.attn(norm_modulate(x, m[1], m[0], eps=self.eps[0]), **attention)
        return gated_residual(x, y, m[2])

    def feed(self, x: Tensor, m: tuple[Tensor, ...], groups: Tensor | None = None) -> Tensor:
        """The second line."""
        y = self.mlp(norm_modulate(x, m[4], m[3], eps=self.eps[1]), groups)
        return gated_residual(x, y, m[5])

    def forward(self, x: Tensor, c: Tensor, *, groups: Tensor | None = None, **attention: Any) -> Tensor:
        """x `[batch, tokens, width]`, c `[batch, width]`; masks and keys as of `SelfAttention`, `DiTMlp`."""
        m = self.modulation(c)
        return self.feed(self.attend(x, m, **attention), m, groups)


def _per_token(mask: Tensor, count: int, name: str) -> Tensor:
    """[count] or [batch, count] -> [.., count, 1] that meets [batch, tokens, count, d]."""
    if mask.ndim not in (1, 2) or mask.shape[-1] != count:
        raise ValueError(f"{name} must be a mask [{count}] or [batch, {count}], got {list(mask.shape)}")
    return (mask[:, None] if mask.ndim == 2 else mask)[..., None]


@torch.no_grad()
def compacted(block: DiTBlock, heads: Tensor, groups: Tensor) -> DiTBlock:
    """The block that computes what `block` does under two masks, without the work that they mask.

    Keeps the rows of q, k and v and the columns of `proj` of the kept heads, the rows of `fc1` and the
    columns of `fc2` of the kept groups; softmax and its scale are per head and stay. Parameters that no mask
    touches are shared with `block`.

    Args:
        heads: bool `[heads]`; groups: bool `[G]`, G dividing the hidden width. Read on the host. At least one
            of each is kept.

    Raises:
        ValueError: masks of another shape or type, or without a kept entry.
    """
    attn, fc1 = block.attn, block.mlp.fc1
    for name, mask, count in (("heads", heads, attn.heads), ("groups", groups, fc1.out_features)):
        fits = mask.dtype == torch.bool and mask.ndim == 1 and len(mask) and count % len(mask) == 0
        if not fits or (name == "heads" and len(mask) != count) or not bool(mask.any()):
            what = f"bool[{count}]" if name == "heads" else f"bool[G], G dividing {count}"
            raise ValueError(f"compacted: {name} must be {what} with one kept, got {mask.tolist()}")
    kept = heads.to(attn.qkv.weight.device).repeat_interleave(attn.head_dim)
    hidden = groups.to(fc1.weight.device).repeat_interleave(fc1.out_features // len(groups))
    state = dict(block.state_dict())
    for name in ("attn.qkv.weight", "attn.qkv.bias"):
        state[name] = state[name][kept.repeat(3)]
    state["attn.proj.weight"] = state["attn.proj.weight"][:, kept]
    for name in ("mlp.fc1.weight", "mlp.fc1.bias"):
        state[name] = state[name][hidden]
    state["mlp.fc2.weight"] = state["mlp.fc2.weight"][:, hidden]
    with torch.device("meta"):
        made = DiTBlock(
            block.width, int(heads.sum()), int(hidden.sum()), head_dim=attn.head_dim, eps=block.eps
        )
    made.load_state_dict(state, assign=True)
    return made.train(block.training).requires_grad_(False)
