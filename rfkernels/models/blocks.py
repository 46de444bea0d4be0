"""Blocks of a small FLUX: joint attention over two streams, then over one, with adaptive modulation.

Esser et al., "Scaling Rectified Flow Transformers" (2024); Black Forest Labs, FLUX.1 (2024).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DoubleBlock", "SingleBlock", "attend", "modulate", "rope_table", "sinusoid"]

EPS = 1e-6


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[batch, width] cosines and sines of 1000 t at geometric frequencies 1 .. 1e-4, float32."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angle = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def rope_table(grid: int, head_dim: int, theta: float = 100.0) -> tuple[Tensor, Tensor]:
    """cos, sin: float32[grid^2, head_dim / 2]; half of the pairs turn with the row, half with the column."""
    pairs = head_dim // 4
    frequency = theta ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    position = torch.arange(grid, dtype=torch.float64, device="cpu")
    row = (position[:, None] * frequency)[:, None].expand(grid, grid, pairs)
    column = (position[:, None] * frequency)[None].expand(grid, grid, pairs)
    angle = torch.cat([row, column], -1).reshape(grid * grid, 2 * pairs)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + d/2}) of [..., tokens, d]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for [batch, heads, tokens, d]; bias [batch, 1, 1, tokens], 0 or -inf.

    Plain products while gradients are recorded on a CPU, where they train faster than the fused kernel.
    """
    if torch.is_grad_enabled() and q.device.type == "cpu":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias.to(q.dtype)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x) (1 + scale) + shift with x [batch, tokens, width] and shift, scale [batch, width]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


class QKNorm(nn.Module):
    """RMS norm of queries and keys over head_dim, each with a learned gain."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.q = nn.Parameter(torch.ones(head_dim))
        self.k = nn.Parameter(torch.ones(head_dim))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        shape = q.shape[-1:]
        q, k = (
            F.rms_norm(q, shape, eps=EPS) * self.q.to(q.dtype),
            F.rms_norm(k, shape, eps=EPS) * self.k.to(k.dtype),
        )
        return q, k


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, tokens, 3 width] -> q, k, v: [batch, heads, tokens, head_dim]."""
    batch, tokens, _ = qkv.shape
    return qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] -> [batch, tokens, width]."""
    return x.transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """The weights of one stream (image or text) in a double block."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.offset = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, mlp * width, bias=False)
        self.down = nn.Linear(mlp * width, width, bias=False)

    def project(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.qkv(modulate(x, m[:, 0], m[:, 1])), self.heads)
        return *self.norm(q, k), v

    def update(self, x: Tensor, attention: Tensor, m: Tensor) -> Tensor:
        x = x + m[:, 2, None] * self.proj(join_heads(attention))
        h = F.gelu(self.up(modulate(x, m[:, 3], m[:, 4])), approximate="tanh")
        return x + m[:, 5, None] * self.down(h)


class DoubleBlock(nn.Module):
    """Image and text tokens with their own weights, joined in attention."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.image = Stream(width, heads, mlp)
        self.text = Stream(width, heads, mlp)

    def forward(
        self, image: Tensor, text: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image [batch, tokens, width], text [batch, words, width], modulation [batch, 6 + 6, width]."""
        m_image = (modulation[:, :6] + self.image.offset).to(image.dtype)
        m_text = (modulation[:, 6:] + self.text.offset).to(text.dtype)
        q, k, v = self.image.project(image, m_image)
        q_text, k_text, v_text = self.text.project(text, m_text)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (torch.cat(pair, 2) for pair in ((q, q_text), (k, k_text), (v, v_text)))
        out = attend(q, k, v, bias)
        tokens = image.shape[1]
        return (
            self.image.update(image, out[:, :, :tokens], m_image),
            self.text.update(text, out[:, :, tokens:], m_text),
        )


class SingleBlock(nn.Module):
    """One stream of image then text tokens; attention and MLP in parallel from one projection."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads, self.width = heads, width
        self.offset = nn.Parameter(torch.zeros(3, width))
        self.norm = QKNorm(width // heads)
        self.qkv_up = nn.Linear(width, (3 + mlp) * width, bias=False)
        self.proj_down = nn.Linear((1 + mlp) * width, width, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """x [batch, tokens + words, width], modulation [batch, 3, width]; rope covers the image tokens."""
        m = (modulation + self.offset).to(x.dtype)
        h = self.qkv_up(modulate(x, m[:, 0], m[:, 1]))
        q, k, v = split_heads(h[..., : 3 * self.width], self.heads)
        q, k = self.norm(q, k)
        tokens = rope[0].shape[0]
        q = torch.cat([rotate(q[:, :, :tokens], *rope), q[:, :, tokens:]], 2)
        k = torch.cat([rotate(k[:, :, :tokens], *rope), k[:, :, tokens:]], 2)
        hidden = F.gelu(h[..., 3 * self.width :], approximate="tanh")
        return x + m[:, 2, None] * self.proj_down(torch.cat([join_heads(attend(q, k, v, bias)), hidden], -1))
