"""The block of the dynamic variants in plain torch, written from DiT's definition, and seeded tensors."""

import torch
import torch.nn.functional as F

from rfkernels.variants.dit import DiTBlock

TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module, seed=0):
    """Every parameter random, so that no zero hides a fault; float64, without gradients."""
    generator = torch.Generator().manual_seed(seed)
    module.double().requires_grad_(False)
    for p in module.parameters():
        p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def block(width=16, heads=4, hidden=32, seed=0):
    return randomise(DiTBlock(width, heads, hidden, eps=(1e-3, 1e-2)), seed)  # two that differ


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def normed(x, shift, scale, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def attention(b, x, mask=None, heads=None, queries=None):
    """x, mask [tokens, tokens] of what may be seen, heads [H] or [batch, H], queries: other rows that ask."""
    q, k, v = F.linear(x, b.attn.qkv.weight, b.attn.qkv.bias).chunk(3, -1)
    if queries is not None:
        q = F.linear(queries, b.attn.qkv.weight, b.attn.qkv.bias).chunk(3, -1)[0]
    q, k, v = (t.unflatten(-1, (b.attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * b.attn.head_dim**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    y = scores.softmax(-1) @ v
    if heads is not None:
        y = y * heads.to(y.dtype).reshape(-1, b.attn.heads, 1, 1)
    return F.linear(y.transpose(1, 2).flatten(2), b.attn.proj.weight, b.attn.proj.bias)


def mlp(b, x, groups=None):
    h = F.linear(x, b.mlp.fc1.weight, b.mlp.fc1.bias)
    if groups is not None:
        wide = groups.to(h.dtype).repeat_interleave(h.shape[-1] // groups.shape[-1], -1)
        h = h * wide.reshape(-1, 1, h.shape[-1])
    return F.linear(F.gelu(h, approximate="tanh"), b.mlp.fc2.weight, b.mlp.fc2.bias)


def forward(b, x, c, mask=None, heads=None, groups=None, keep=None, kv=None):
    """The block; keep [batch, tokens] of the MLP; kv: tokens whose keys and values are read instead."""
    modulation = b.adaLN_modulation[1]
    m = F.linear(F.silu(c), modulation.weight, modulation.bias).chunk(6, -1)
    inner = normed(x, m[0], m[1], b.eps[0])
    if kv is None:
        y = attention(b, inner, mask, heads)
    else:
        y = attention(b, normed(kv, m[0], m[1], b.eps[0]), mask, heads, queries=inner)
    x = x + m[2][:, None] * y
    y = mlp(b, normed(x, m[3], m[4], b.eps[1]), groups)
    return x + m[5][:, None] * (y if keep is None else y * keep.to(y.dtype)[..., None])
