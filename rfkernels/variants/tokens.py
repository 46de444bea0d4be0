"""Some tokens of a sequence: which, and how their rows are taken out and put back.

The selected rows of a sample come first; a sample with fewer than there is room for is filled up with others,
which `put` leaves as they are. So shapes depend on `room` alone: with a fixed one nothing
waits for the device and one captured graph serves every selection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Selection", "best_tokens", "select"]


@dataclass(frozen=True)
class Selection:
    """index: int64 `[batch, room]`, distinct within a sample; valid: bool, like it, or None where all are."""

    index: Tensor
    valid: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """The rows `[batch, room, ..]` of x `[batch, tokens, ..]`."""
        return x.gather(1, self._rows(x))

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """x with new rows; those that are not valid, and those that are not selected, keep their bits."""
        if self.valid is not None:
            rows = torch.where(self.valid.view(*self.valid.shape, *[1] * (x.ndim - 2)), rows, self.take(x))
        return x.scatter(1, self._rows(x), rows)

    @property
    def lengths(self) -> Tensor:
        """How many rows of each sample are valid: int64 `[batch]`."""
        if self.valid is None:
            return torch.full((len(self.index),), self.index.shape[1], device=self.index.device)
        return self.valid.sum(1)

    def _rows(self, x: Tensor) -> Tensor:
        return self.index.view(*self.index.shape, *[1] * (x.ndim - 2)).expand(*self.index.shape, *x.shape[2:])


def select(keep: Tensor, room: int | None = None, scores: Tensor | None = None) -> Selection:
    """The tokens of a mask `keep`, bool `[batch, tokens]`.

    Args:
        room: rows of each sample in the result. Absent: the largest count of a sample, at least 1, which
            waits for the device. A sample with more keeps its `room` best.
        scores: like keep, which are the best; absent: the first ones.

    Raises:
        ValueError: `keep` that is no such mask, or a room outside 1 .. tokens.
    """
    if keep.dtype != torch.bool or keep.ndim != 2 or not keep.shape[1]:
        raise ValueError(f"select: keep must be bool[batch, tokens], got {keep.dtype} {list(keep.shape)}")
    if scores is not None and scores.shape != keep.shape:
        raise ValueError(f"select: scores must be {list(keep.shape)}, got {list(scores.shape)}")
    if room is None:
        room = max(1, int(keep.sum(1).max())) if len(keep) else 1
    if not 1 <= room <= keep.shape[1]:
        raise ValueError(f"select: room must be in 1 .. {keep.shape[1]}, got {room}")
    order = keep.to(torch.uint8) if scores is None else scores.detach().masked_fill(~keep, -torch.inf)
    index = order.argsort(dim=1, descending=True, stable=True)[:, :room]
    return Selection(index, keep.gather(1, index))


def best_tokens(scores: Tensor, count: int) -> Selection:
    """The `count` tokens of the highest scores `[batch, tokens]`, in their order; of equal ones the first.

    Raises:
        ValueError: a count outside 1 .. tokens.
    """
    if scores.ndim != 2 or not 1 <= count <= scores.shape[1]:
        raise ValueError(f"best_tokens: count must be in 1 .. tokens, got {count}, {list(scores.shape)}")
    index = scores.detach().argsort(dim=1, descending=True, stable=True)[:, :count]
    return Selection(index.sort(1).values)
