"""The forward pass of the embedded model in plain torch: the definition that `EmojiFlow.predict` is held to.

Rotary pairs are channels (i, i + d/2) of a head, as files have them; `weights` are those of `as_halves`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels.models.blocks import as_halves
from rfkernels.models.emoji import EmojiFlow

EPS = 1e-6


def sinusoid(t: Tensor, width: int) -> Tensor:
    half = width // 2
    angle = 1000 * t.float()[:, None] * torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotated(x: Tensor, grid: int, theta: float = 100.0) -> Tensor:
    """[batch, heads, grid^2 + words, d] with the first grid^2 tokens turned, half of the pairs by the row."""
    pairs = x.shape[-1] // 4
    position = torch.arange(grid).double()[:, None] * theta ** (-torch.arange(pairs).double() / pairs)
    row, column = position[:, None].expand(-1, grid, -1), position[None].expand(grid, -1, -1)
    angle = torch.cat([row, column], -1).flatten(0, 1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[:, :, : grid**2].chunk(2, -1)
    return torch.cat([torch.cat([a * cos - b * sin, a * sin + b * cos], -1), x[:, :, grid**2 :]], 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def heads_of(qkv: Tensor, heads: int, gain_q: Tensor, gain_k: Tensor) -> list[Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return [F.rms_norm(x, x.shape[-1:], eps=EPS) * g for x, g in ((q, gain_q), (k, gain_k))] + [v]


def attend(q: Tensor, k: Tensor, v: Tensor, grid: int, seen: Tensor) -> Tensor:
    q, k = rotated(q, grid), rotated(k, grid)
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def predict(
    model: EmojiFlow, x: Tensor, sigma: Tensor, rows: Tensor, weights: Tensor, mask: Tensor
) -> Tensor:
    """As `EmojiFlow.predict`, differentiable in the model's parameters."""
    c, grid, tokens = model.config, model.grid, model.grid**2
    w = as_halves(dict(model.named_parameters()), c.width, model.head_dim)
    words, pooled = model.text(rows, weights, mask)
    time = model.time(sinusoid(sigma, c.width).to(words.dtype))
    shared = model.modulation(F.silu(time + model.pooled(pooled))).unflatten(-1, (6, -1))
    seen = torch.cat([mask.new_ones(len(mask), tokens), mask], 1)
    streams = {"image": model.image_in(model.patchify(x)), "text": words}
    for i in range(c.double_blocks):
        names = {s: f"double_blocks.{i}.{s}." for s in streams}
        m = {s: (shared + w[n + "offset"]).unbind(1) for s, n in names.items()}
        parts = []
        for s, n in names.items():
            qkv = modulate(streams[s], *m[s][:2]) @ w[n + "qkv.weight"].T
            parts.append(heads_of(qkv, c.heads, w[n + "norm.q"], w[n + "norm.k"]))
        out = attend(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)), grid, seen)
        for (s, n), y in zip(names.items(), (out[:, :tokens], out[:, tokens:]), strict=True):
            h = streams[s] + m[s][2][:, None] * (y @ w[n + "proj.weight"].T)
            hidden = F.gelu(modulate(h, *m[s][3:5]) @ w[n + "up.weight"].T, approximate="tanh")
            streams[s] = h + m[s][5][:, None] * (hidden @ w[n + "down.weight"].T)
    joined = torch.cat([streams["image"], streams["text"]], 1)
    for i in range(c.single_blocks):
        n = f"single_blocks.{i}."
        shift, scale, gate = (shared[:, :3] + w[n + "offset"]).unbind(1)
        both = modulate(joined, shift, scale) @ w[n + "qkv_up.weight"].T
        qkv, hidden = both.split([3 * c.width, c.mlp * c.width], -1)
        y = attend(*heads_of(qkv, c.heads, w[n + "norm.q"], w[n + "norm.k"]), grid, seen)
        both = torch.cat([y, F.gelu(hidden, approximate="tanh")], -1)
        joined = joined + gate[:, None] * (both @ w[n + "proj_down.weight"].T)
    shift, scale = (shared[:, 3:5] + model.out_offset).unbind(1)
    return model.unpatchify(model.out(modulate(joined[:, :tokens], shift, scale)))
