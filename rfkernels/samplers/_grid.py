"""The grid of noise levels that a method builds its stages along."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfkernels.samplers._rows import Row

__all__ = ["Grid", "Step", "check_grid"]


@dataclass(frozen=True)
class Grid:
    """Levels, the first step to make, and the steps that begin without a history."""

    levels: tuple[Row, ...]
    first: int = 0
    breaks: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator["Step"]:
        age = 0
        for index in range(self.first, len(self.levels) - 1):
            age = 0 if index in self.breaks or index == self.first else age + 1
            yield Step(self, index, age)

    @property
    def falls(self) -> bool:
        return bool(np.all(np.asarray(self.levels[-1]) <= self.levels[0]))


@dataclass(frozen=True)
class Step:
    """Step `index`, with the levels of the `age` steps before it that its history holds."""

    grid: Grid
    index: int
    age: int

    @property
    def start(self) -> Row:
        return self.grid.levels[self.index]

    @property
    def end(self) -> Row:
        return self.grid.levels[self.index + 1]

    @property
    def h(self) -> Row:
        return self.end - self.start

    @property
    def last(self) -> bool:
        return self.index == len(self.grid.levels) - 2

    def before(self, steps: int) -> Row:
        """The level `steps` steps before this one's start."""
        return self.grid.levels[self.index - steps]


def check_grid(sigmas: Tensor | Sequence[float]) -> tuple[Row, ...]:
    """The levels as numbers, or as arrays for `[steps + 1, *rows]`.

    Raises:
        ValueError: not `[steps + 1, ...]` with at least one step, not finite, or not monotone: numbers
            strictly, rows so that each falls or rises or rests, all in one direction.
    """
    table = torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu().numpy()
    if table.ndim < 1 or len(table) < 2 or table.size == 0:
        raise ValueError(
            f"sample: sigmas must be [steps + 1] with at least one step, got {list(table.shape)}"
        )
    steps = np.diff(table, axis=0)
    moves = steps.reshape(len(steps), -1)
    monotone = (moves <= 0).all() or (moves >= 0).all()
    if not (np.isfinite(table).all() and monotone and (moves != 0).any(axis=1).all()):
        shown = table.tolist() if table.size <= 64 else list(table.shape)
        raise ValueError(f"sample: sigmas must be finite and strictly monotone, got {shown}")
    return tuple(table.tolist()) if table.ndim == 1 else tuple(table)
