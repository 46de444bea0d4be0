"""Blocks of a small FLUX: joint attention over two streams, then over one, with adaptive modulation.

Image tokens come first, then words. Esser et al., "Scaling Rectified Flow Transformers" (2024); Black Forest
Labs, FLUX.1 (2024).
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models import layers, plain
from rfkernels.models.layers import project

_GAIN = re.compile(r"\.norm\.[qk]$")
_ROWS = re.compile(r"\.(qkv|qkv_up)\.")

__all__ = ["DoubleBlock", "SingleBlock", "as_halves", "as_neighbours", "kit_of", "rope_table", "sinusoid"]


def _beside(first: Tensor, hidden: Tensor) -> Tensor:
    return layers.beside(first, partial(ops.activation, kind="gelu_tanh"), hidden)


PLAIN = SimpleNamespace(**{name: getattr(plain, name) for name in plain.__all__})
FUSED = SimpleNamespace(
    **{name: getattr(layers, name) for name in plain.__all__ if hasattr(layers, name)}
    | {"beside": _beside, "qkv_norm_rope": ops.qkv_norm_rope}
)


def kit_of(x: Tensor) -> SimpleNamespace:
    """What computes for tokens x: the fused ops; plain torch where a gradient is recorded on a CPU, where
    torch.compile makes loops of it."""
    return PLAIN if x.device.type == "cpu" and torch.is_grad_enabled() else FUSED


def sinusoid(t: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, width] cosines and sines of 1000 t at geometric frequencies 1 .. 1e-4."""
    return ops.timestep_embedding(1000 * t.float(), width, dtype=dtype)


def rope_table(grid: int, head_dim: int, theta: float = 100.0) -> Tensor:
    """cos, sin: float32[grid^2, head_dim / 2, 2]; half of the pairs turn by the row, half by the column."""
    ids = torch.cartesian_prod(*[torch.arange(grid, device="cpu")] * 2)
    return ops.rotary_table(ids, (head_dim // 2, head_dim // 2), theta)


def as_neighbours(state: Mapping[str, Tensor], width: int, head_dim: int) -> dict[str, Tensor]:
    """Weights whose rotary pairs are channels (i, i + head_dim / 2) of a head, as files have them, with pairs
    (2 i, 2 i + 1), as the ops take them: rows of queries and keys and their gains change places."""
    return _reordered(state, width, (2, head_dim // 2))


def as_halves(state: Mapping[str, Tensor], width: int, head_dim: int) -> dict[str, Tensor]:
    """The inverse of `as_neighbours`."""
    return _reordered(state, width, (head_dim // 2, 2))


def _reordered(state: Mapping[str, Tensor], width: int, pairs: tuple[int, int]) -> dict[str, Tensor]:
    """All that has a row for each channel, scales of quantised rows too."""
    result = dict(state)
    for name, t in state.items():
        whole = bool(_GAIN.search(name)) and t.shape == (math.prod(pairs),)
        if t.is_meta or not (whole or (_ROWS.search(name) and t.ndim and len(t) >= 3 * width)):
            continue
        rows = slice(None if whole else 2 * width)  # of queries and keys
        result[name] = t.clone()
        result[name][rows] = t[rows].unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)
    return result


class QKNorm(nn.Module):
    """The gains of the RMS norms of queries and keys over head_dim."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.q = nn.Parameter(torch.ones(head_dim))
        self.k = nn.Parameter(torch.ones(head_dim))


class Stream(nn.Module):
    """The weights of one stream (image or text) in a double block."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, mlp * width, bias=False)
        self.down = nn.Linear(mlp * width, width, bias=False)

    def update(
        self, x: Tensor, attention: Tensor, modulation: tuple[Tensor, ...], kit: SimpleNamespace
    ) -> Tensor:
        _, _, gate, shift, scale, gate_mlp = modulation
        y = self.proj(attention)
        x, n = kit.gated_residual_norm_modulate(x, y, gate, scale, shift, to=(self.up,))
        return kit.finish(x, kit.gelu_linear(n, self.up), self.down, gate_mlp)


class DoubleBlock(nn.Module):
    """Image and text tokens with their own weights, joined in attention."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.image = Stream(width, heads, mlp)
        self.text = Stream(width, heads, mlp)

    def forward(
        self, image: Tensor, text: Tensor, modulation: Tensor, rotation: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image [batch, tokens, width], text [batch, words, width], modulation [batch, 6, width]."""
        kit, streams, tokens = kit_of(image), (self.image, self.text), (image, text)
        tables = [(modulation + s.offset).to(image.dtype).unbind(1) for s in streams]
        qkv = [
            project(kit.norm_modulate(x, scale, shift, to=(s.qkv,)), s.qkv)[0]
            for s, x, (shift, scale, *_) in zip(streams, tokens, tables, strict=True)
        ]
        norms = [s.norm for s in streams]
        q, k, v = kit.qkv_norm_rope(
            qkv,
            self.heads,
            q_weight=[n.q for n in norms],
            k_weight=[n.k for n in norms],
            rotation=rotation,
        )
        out = kit.attend(self, q, k, v, key_lengths=lengths).split([image.shape[1], text.shape[1]], 1)
        image, text = (s.update(*args, kit) for s, *args in zip(streams, tokens, out, tables, strict=True))
        return image, text


class SingleBlock(nn.Module):
    """One stream of image then text tokens; attention and MLP in parallel from one projection."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads, self.width = heads, width
        self.offset = nn.Parameter(torch.zeros(3, width))
        self.norm = QKNorm(width // heads)
        self.qkv_up = nn.Linear(width, (3 + mlp) * width, bias=False)
        self.proj_down = nn.Linear((1 + mlp) * width, width, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, rotation: Tensor, lengths: Tensor) -> Tensor:
        """x [batch, tokens + words, width], modulation [batch, 3, width]; the rotation is of image tokens."""
        kit = kit_of(x)
        shift, scale, gate = (modulation + self.offset).to(x.dtype).unbind(1)
        (h,) = project(kit.norm_modulate(x, scale, shift, to=(self.qkv_up,)), self.qkv_up)
        qkv, hidden = h.split([3 * self.width, h.shape[-1] - 3 * self.width], -1)
        q, k, v = kit.qkv_norm_rope(
            [qkv], self.heads, q_weight=[self.norm.q], k_weight=[self.norm.k], rotation=rotation
        )
        out = kit.beside(kit.attend(self, q, k, v, key_lengths=lengths), hidden)
        return kit.finish(x, out, self.proj_down, gate)
