"""Fewer tokens inside a block or a run of blocks: token merging (ToMe, Bolya et al., 2023) with PYRA's
modulation (Xiong et al., 2024), and back.

    m = keys' mean over heads, normalised; even tokens are sources, odd ones destinations
    best_i = argmax_j <m_i, m_j>, the r sources of the highest scores merge; of equal ones the lowest index
    x_j <- sum of size x over j and its sources / sum of size;  attention adds log size to the scores of a key

A DiT predicts every token: `unmerge` copies a destination back to its sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Merge", "Pyra", "match", "size_bias"]

_ROWS = 1024  # sources whose similarities exist at one time


@dataclass(frozen=True)
class Merge:
    """Which tokens merge. `kept` tokens, in their order, are what is left of the sequence.

    Args:
        kept: int64 `[batch, tokens - r]`, positions in the sequence: take tables of rotation by it.
        source, target: int64 `[batch, r]`, position of a merged token, and index in `kept` of where it went;
            the highest score first.
    """

    kept: Tensor
    source: Tensor
    target: Tensor

    def merge(
        self, x: Tensor, size: Tensor | None = None, pyra: "Pyra | None" = None
    ) -> tuple[Tensor, Tensor]:
        """(tokens `[batch, tokens - r, width]`, their sizes `[batch, tokens - r]`): means weighted by size.

        Args:
            x: `[batch, tokens, width]`. size: how many tokens each is the mean of, by default 1.
            pyra: changes what merges before the sum.
        """
        if x.ndim != 3 or x.shape[1] != self.kept.shape[1] + self.source.shape[1]:
            tokens = self.kept.shape[1] + self.source.shape[1]
            raise ValueError(f"merge: x must be [batch, {tokens}, width], got {list(x.shape)}")
        size = x.new_ones(x.shape[:2]) if size is None else size
        if size.shape != x.shape[:2]:
            raise ValueError(f"merge: size must be {[*x.shape[:2]]}, got {[*size.shape]}")
        x = x * size[..., None]
        moved, kept = _rows(x, self.source), _rows(x, self.kept)
        if pyra is not None:
            moved = pyra(moved, _rows(kept, self.target))
        batch = torch.arange(len(x), device=x.device)[:, None].expand_as(self.target)
        kept = kept.index_put((batch, self.target), moved, accumulate=True)
        total = size.gather(1, self.kept).scatter_add(1, self.target, size.gather(1, self.source))
        return kept / total[..., None], total

    def unmerge(self, y: Tensor) -> Tensor:
        """`[batch, tokens, width]` of y `[batch, tokens - r, width]`: a merged token is its destination."""
        if y.shape[:2] != self.kept.shape:
            raise ValueError(f"unmerge: y must be {[*self.kept.shape]} tokens, got {[*y.shape]}")
        out = y.new_empty(len(y), self.kept.shape[1] + self.source.shape[1], y.shape[2])
        wide = lambda index: index[..., None].expand(-1, -1, y.shape[2])
        out = out.scatter(1, wide(self.kept), y)
        return out.scatter(1, wide(self.source), _rows(y, self.target))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def match(keys: Tensor, r: int, protected: Sequence[int] = ()) -> Merge:
    """The r best pairs of neighbours' classes, even and odd.

    Args:
        keys: `[batch, tokens, heads, d]` of the attention (or `[batch, tokens, d]`).
        protected: positions that merge with nothing, e.g. a class token.

    No similarity matrix of all sources exists, and nothing waits for the device. Raises ValueError for an r
    that the unprotected tokens do not have.
    """
    if keys.ndim not in (3, 4):
        raise ValueError(
            f"match: keys must be [batch, tokens, heads, d] or [batch, tokens, d], got {[*keys.shape]}"
        )
    metric = F.normalize(keys.mean(2) if keys.ndim == 4 else keys, dim=-1)
    tokens, device = metric.shape[1], keys.device
    free = torch.ones(tokens, dtype=torch.bool)
    free[list(protected)] = False
    most = int(free[::2].sum()) if bool(free[1::2].any()) else 0
    if not 0 <= r <= most:
        raise ValueError(f"match: r must be in 0 .. {most} for {tokens} tokens, got {r}")
    if not r:
        none = torch.zeros(len(metric), 0, dtype=torch.int64, device=device)
        return Merge(torch.arange(tokens, device=device).expand(len(metric), -1), none, none)
    free = free.to(device)
    columns = metric[:, 1::2].transpose(1, 2)
    best, score = [], []
    for rows in metric[:, ::2].split(_ROWS, 1):
        similarity = (rows @ columns).masked_fill(~free[1::2], -torch.inf)
        top = similarity.amax(2, keepdim=True)
        best.append((similarity == top).to(torch.uint8).argmax(2))  # of equal ones the first
        score.append(top[..., 0])
    best, score = torch.cat(best, 1), torch.cat(score, 1).masked_fill(~free[::2], -torch.inf)
    chosen = score.argsort(dim=1, descending=True, stable=True)[:, :r]
    source, position = 2 * chosen, 2 * best.gather(1, chosen) + 1
    gone = torch.zeros(len(metric), tokens, dtype=torch.bool, device=device).scatter(1, source, True)
    kept = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, : tokens - r]
    return Merge(kept, source, position - gone.cumsum(1).gather(1, position))


def size_bias(size: Tensor) -> Tensor:
    """log size as `bias` of `ops.attention`, `[batch, 1, 1, keys]`: a merged key counts for its tokens."""
    return size.log()[:, None, None]


class Pyra(nn.Module):
    """PYRA's modulation of the r tokens that merge, in place of s: s + (s * w1) w2.

    M = LN(s + d), w1 = 2 sigmoid(W_a^T M) `[1, width]`, w2 = 2 sigmoid(M W_b^T) - 1 `[r, 1]`; s and d are
    sources and destinations, times their sizes. W_b begins as 0: plain merging. Parameters are named as in
    its files: `pyra_a` `[r, 1]`, `pyra_b` `[1, width]`, `pyra_norm`.
    """

    def __init__(self, width: int, r: int):
        super().__init__()
        self.pyra_a = nn.Parameter(torch.empty(r, 1))
        self.pyra_b = nn.Parameter(torch.zeros(1, width))
        self.pyra_norm = nn.LayerNorm(width)
        nn.init.kaiming_uniform_(self.pyra_a, a=5**0.5)

    def forward(self, source: Tensor, destination: Tensor) -> Tensor:
        """Both `[batch, r, width]`."""
        if source.shape[1] != len(self.pyra_a):
            raise ValueError(f"Pyra: {len(self.pyra_a)} merging tokens required, got {source.shape[1]}")
        m = self.pyra_norm(source + destination)
        w1 = 2 * (self.pyra_a.T @ m).sigmoid()
        w2 = 2 * (m @ self.pyra_b.T).sigmoid() - 1
        return source + source * w1 * w2
