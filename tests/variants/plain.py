"""Definitions in plain torch, float64, written from the papers, and tensors to feed them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter at random, of size one through every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=F64)
            p.copy_(noise * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5))
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of `[batch, tokens, width]`, the heads side by side."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def layer_norm(x: Tensor, norm: nn.LayerNorm | None = None, eps: float = 1e-6) -> Tensor:
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
