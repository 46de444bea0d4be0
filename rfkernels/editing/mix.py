r"""Between two prompts: the text features of a model interpolated, and pictures drawn with them.

Directions of word features and of their mean are interpolated on the sphere, :math:`(\sin((1-t)\omega) a +
\sin(t\omega) b) / \sin\omega` with the angle omega between them, lengths in a straight line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Features", "features_of", "mixed", "slerp", "with_features"]


@dataclass(frozen=True)
class Features:
    """Text as a model reads it: words [batch, n, width], pooled [batch, width], mask bool[batch, n]."""

    words: Tensor
    pooled: Tensor
    mask: Tensor


class _Given(nn.Module):
    """A text encoder that returns features made before."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, rows: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.features.words, self.features.pooled


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a at t = 0 to b at t = 1 along the last axis; in a straight line where a direction is missing.

    Raises:
        ValueError: shapes that differ, or t outside 0 .. 1.
    """
    if a.shape != b.shape or not 0 <= t <= 1:
        raise ValueError(f"slerp: like shapes and 0 <= t <= 1 are required, got {a.shape}, {b.shape}, {t}")
    if t in (0, 1):
        return (b if t else a).clone()
    u, v = a.double(), b.double()
    m, n = u.norm(dim=-1, keepdim=True), v.norm(dim=-1, keepdim=True)
    straight = (1 - t) * u + t * v
    cosine = (u * v).sum(-1, keepdim=True) / (m * n).clamp(min=1e-30)
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    p, q = ((1 - t) * angle).sin() / sine.clamp(min=1e-12), (t * angle).sin() / sine.clamp(min=1e-12)
    turned = (p * u / m.clamp(min=1e-30) + q * v / n.clamp(min=1e-30)) * ((1 - t) * m + t * n)
    return torch.where((sine < 1e-4) | (m * n == 0), straight, turned).to(a.dtype)


@torch.no_grad()
def features_of(model: nn.Module, prompts: Sequence[str]) -> Features:
    """The features of prompts, padded to one length."""
    text = model.encode(list(prompts))
    words, pooled = model.text(text.rows, text.weights, text.mask)
    return Features(words, pooled, text.mask)


def mixed(a: Features, b: Features, t: float) -> Features:
    """Features between those of a and b, of one length; exactly a at t = 0 and b at t = 1.

    Where only one of them has a word, the other gives the mean of its words: what it says as a whole.
    """
    if t in (0, 1):
        return b if t else a
    both = a.mask | b.mask
    fill = lambda f: torch.where(f.mask[..., None], f.words, f.pooled[:, None].expand_as(f.words))
    words = slerp(fill(a), fill(b), t) * both[..., None]
    return Features(words, slerp(a.pooled, b.pooled, t), both)


def with_features(model: nn.Module, features: Features):
    """A velocity (x, sigma) -> (uncond, cond) of `model` for features instead of prompts.

    The model itself is not changed: a copy of its modules that shares the weights reads them.
    """
    from rfkernels.loras import shared_copy
    from rfkernels.models.text import TextTokens

    nothing = features_of(model, [""] * len(features.words))
    pad = features.words.shape[1] - nothing.words.shape[1]
    grown = lambda x: torch.cat([x, x.new_zeros(len(x), pad, *x.shape[2:])], 1)
    words = torch.cat([grown(nothing.words), features.words])
    mask = torch.cat([grown(nothing.mask), features.mask])
    joined = Features(words, torch.cat([nothing.pooled, features.pooled]), mask)
    reader = shared_copy(model)
    reader.text = _Given(joined)
    unread = torch.zeros(*mask.shape, 1, dtype=torch.int64, device=mask.device)
    none = [[] for _ in range(len(mask))]
    text = TextTokens(unread, unread.float(), mask, none, none)
    return lambda x, sigma: reader.guided(x, sigma, text)
