"""Styles that are functions of a picture: pixel art, a sticker's outline, a glow."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["STYLES", "glow", "outline", "over", "pixel"]

INSET = 0.86  # of the edge: room for what is drawn around a picture


def over(front: Tensor, back: Tensor) -> Tensor:
    """`front` on `back`, both RGBA in 0 .. 1, colours premultiplied: front + (1 - alpha of front) back."""
    return front + (1 - front[:, 3:]) * back


def pixel(x: Tensor, cells: int = 16) -> Tensor:
    """[batch, 4, size, size] in -1 .. 1 as `cells` x `cells` squares of mean colour, opaque or gone."""
    c = F.adaptive_avg_pool2d((x + 1) / 2, cells)
    solid = (c[:, 3:] > 0.5).to(c.dtype)
    c = torch.cat([(c[:, :3] / c[:, 3:].clamp(min=1e-6)).clamp(0, 1), torch.ones_like(solid)], 1) * solid
    return 2 * F.interpolate(c, x.shape[-2:], mode="nearest") - 1


def outline(x: Tensor, width: float = 0.03) -> Tensor:
    """A white edge around a picture of -1 .. 1, as wide as a share of its size, then a dark one."""
    c = _inset((x + 1) / 2)
    edge = max(1, round(width * x.shape[-1]))
    white = _grown(c[:, 3:], edge)
    dark = _grown(white, max(1, edge // 2))
    back = torch.cat([white.expand(-1, 3, -1, -1), dark], 1)
    return 2 * over(c, back.clamp(0, 1)) - 1


def glow(x: Tensor, width: float = 0.03, strength: float = 0.9) -> Tensor:
    """A blurred halo around a picture of -1 .. 1 in its own mean colour, made brighter."""
    c = _inset((x + 1) / 2)
    edge = max(1, round(width * x.shape[-1]))
    halo = _grown(c[:, 3:], edge)
    for _ in range(3):  # three boxes are nearly a bell
        halo = F.avg_pool2d(halo, 2 * edge + 1, 1, edge)
    colour = c[:, :3].sum((2, 3)) / c[:, 3:].sum((2, 3)).clamp(min=1e-6)
    bright = (colour / colour.amax(1, keepdim=True).clamp(min=1e-6)).clamp(0, 1)
    colour = torch.cat([bright, torch.ones_like(bright[:, :1])], 1)
    return 2 * over(c, strength * halo * colour[:, :, None, None]) - 1


STYLES: dict[str, Callable[[Tensor], Tensor]] = {"pixel": pixel, "outline": outline, "glow": glow}


def _inset(c: Tensor) -> Tensor:
    """The picture smaller, in the middle of nothing."""
    size = c.shape[-1]
    inner = max(1, round(INSET * size / 2)) * 2
    small = F.interpolate(c, (inner, inner), mode="bilinear", align_corners=False, antialias=True)
    before = (size - inner) // 2
    return F.pad(small.clamp(0, 1), (before, size - inner - before) * 2)


def _grown(alpha: Tensor, pixels: int) -> Tensor:
    """alpha [batch, 1, size, size] dilated by an octagon: squares and crosses in turn."""
    for k in range(pixels):
        if k % 2:
            alpha = F.max_pool2d(alpha, 3, 1, 1)
        else:
            row = F.max_pool2d(alpha, (1, 3), 1, (0, 1))
            alpha = torch.maximum(row, F.max_pool2d(alpha, (3, 1), 1, (1, 0)))
    return alpha
