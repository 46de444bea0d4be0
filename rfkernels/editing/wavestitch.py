r"""WaveStitch: a long series from one model of short windows that agree where they overlap.

Shankar et al., "WaveStitch: flexible and fast conditional time series generation with diffusion models",
2025, for a rectified flow. All windows are denoised in one batch; every step also descends

.. math:: L = \sum_w |\tilde x_w - \tilde x_{w-1}|^2_{overlap} + \sum m(\hat x_0 - y)^2,

of the next state :math:`\tilde x` and the estimate of the data :math:`\hat x_0 = x - \sigma v`. With the
network's gradient skipped (:math:`\partial\tilde x/\partial x = \partial\hat x_0/\partial x = 1`) its
gradient is in closed form: :math:`2(\tilde x_w - \tilde x_{w-1})` in an overlap, the negative in the
neighbour's, and :math:`2m(\hat x_0 - y)`.

Unlike in the released code, noise enters by its standard deviation (there by its variance), the same where
windows overlap, and a rest of the series has its own window (there it is dropped).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rfkernels.editing._launches import Launches, Velocity, evaluate, falling, levels, like
from rfkernels.editing.windows import cut_windows, join_windows, window_starts
from rfkernels.ops import noise_keys, philox_normal

__all__ = ["stitch_gradient", "stitch_loss", "wave_stitch"]


def stitch_loss(windows: Tensor, starts: Sequence[int]) -> Tensor:
    """The sum of squares of what neighbours disagree by, windows `[batch, windows, ..., size]`."""
    return sum((d.square().sum() for _, d in _disagreements(windows, starts)), windows.new_zeros(()))


def stitch_gradient(windows: Tensor, starts: Sequence[int]) -> Tensor:
    """The gradient of `stitch_loss`, in closed form."""
    g = torch.zeros_like(windows)
    for (a, b, shift), d in _disagreements(windows, starts):
        size = windows.shape[-1]
        g[:, b, ..., : size - shift] += 2 * d
        g[:, a, ..., shift:] -= 2 * d
    return g


def _disagreements(windows: Tensor, starts: Sequence[int]):
    """Runs of neighbours at one distance, ((left, right, distance), right - left in their overlap)."""
    size, i, n = windows.shape[-1], 0, len(starts)
    while i < n - 1:
        shift, j = starts[i + 1] - starts[i], i + 1
        while j < n - 1 and starts[j + 1] - starts[j] == shift:
            j += 1
        if shift < size:
            a, b = slice(i, j), slice(i + 1, j + 1)
            yield (a, b, shift), windows[:, b, ..., : size - shift] - windows[:, a, ..., shift:]
        i = j


def wave_stitch(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    *,
    size: int,
    stride: int,
    observed: Tensor | None = None,
    mask: Tensor | None = None,
    rate: float = 0.1,
    churn: float = 0.0,
    through_network: bool = False,
    seeds: int | Sequence[int] = 0,
) -> Tensor:
    r"""Returns a series `[batch, ..., length]` from noise of that shape.

    A step is one launch for :math:`\tilde x` and what the observed values pull by, and three small ones for
    the overlaps. The noise of the windows is cut from one series, so overlaps start equal.

    Args:
        velocity: `velocity(x, sigma)` of windows `[batch windows, ..., size]`, the windows of a series side
            by side, in order.
        noise: the state at `sigmas[0]`.
        sigmas: falling, strictly, within 0 .. 1.
        size, stride: of windows.
        observed, mask: y, and m that is 1 where it is known; broadcast to `noise`. Known values are in the
            result to the bit.
        rate: lambda, the step of the descent; at most .25, .2 with observed values: beyond, it diverges (the
            curvature of L is up to 8, and 10).
        churn: part of the next level that is fresh noise, 0 .. 1: :math:`\tilde x = (1-\sigma')\hat x_0 +
            \sigma'(\sqrt{1 - churn^2}\,\hat\epsilon + churn\,z)`.
        through_network: the gradient of L by autograd through the velocity, as released; dearer.
        seeds: of the fresh noise.

    Raises:
        ValueError: windows that do not fit the series, one of `observed` and `mask`, a grid that does not
            fall, a velocity of the wrong kind, a churn that is no part.
    """
    name = "wave_stitch"
    grid = falling(name, sigmas)
    if (observed is None) != (mask is None):
        raise ValueError(f"{name}: observed and mask go together, got one of them")
    if not 0 <= churn <= 1:
        raise ValueError(f"{name}: churn must be 0 .. 1, got {churn}")
    most = 0.25 if observed is None else 0.2
    if not 0 <= rate <= most:
        raise ValueError(f"{name}: rate must be 0 .. {most}, got {rate}: it diverges")
    starts = window_starts(noise.shape[-1], size, stride)
    cut = lambda t: cut_windows(t, size, starts).flatten(0, 1).contiguous()
    x, y, m = cut(noise), None, None
    if observed is not None:
        y, m = like(name, "observed", observed, noise), like(name, "mask", mask, noise)
    step = _Step(x, grid, rate, churn, None if y is None else (cut(y), cut(m)), starts, len(noise))
    sigma = levels(grid, x)
    for i in range(len(grid) - 1):
        z = None
        if churn and grid[i + 1]:
            keys = noise_keys(seeds, len(noise), step=i + 1, device=noise.device)
            z = cut(philox_normal(noise.shape, keys, dtype=noise.dtype))
        if through_network:
            x = step.through(i, x, lambda t, i=i: evaluate(name, velocity, t, sigma[i], False)[0], z)
        else:
            with torch.no_grad():
                x = step.skipping(i, x, evaluate(name, velocity, x, sigma[i], False)[0], z)
    series = join_windows(x.unflatten(0, (len(noise), -1)), starts)
    return series if y is None else torch.where(m == 1, y, series)


class _Step:
    """One step of all windows: coefficients of the next state, and of the pull of observed values."""

    def __init__(self, x, grid, rate, churn, observed, starts, batch):
        self.rate, self.starts, self.batch, self.observed = rate, starts, batch, observed
        kept = math.sqrt(1 - churn**2)
        self.levels = grid
        self.rows = []
        for sigma, end in pairwise(grid):
            row = {"x": 1.0, "v": end - sigma, "z": 0.0}
            if churn and end:
                row["x"] = 1 - end + end * kept
                row["v"] = end * kept * (1 - sigma) - sigma * (1 - end)
                row["z"] = end * churn
            self.rows.append(row)
        names = ["x", "v", "n"] + ([] if observed is None else ["y"])
        free = [[{"x": r["x"], "v": r["v"], "n": r["z"]}] * 2 for r in self.rows]
        held = [[a, self._pulled(a, s)] for (a, _), s in zip(free, grid, strict=False)]
        self.launch = Launches(x, names, free, inside=held if observed else None)

    def _pulled(self, row: dict[str, float], sigma: float) -> dict[str, float]:
        """Less 2 rate (x - sigma v - y)."""
        pull = 2 * self.rate
        return {"x": row["x"] - pull, "v": row["v"] + pull * sigma, "n": row["n"], "y": pull}

    def _windows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.batch, -1))

    def skipping(self, i: int, x: Tensor, v: Tensor, z: Tensor | None) -> Tensor:
        others, mask = ([], None) if self.observed is None else ([self.observed[0]], self.observed[1])
        tensors = [x, v, x if z is None else z, *others]
        after, moved = self.launch(i, tensors, mask=mask)
        gradient = stitch_gradient(self._windows(after), self.starts)
        return moved.sub_(gradient.flatten(0, 1), alpha=self.rate)

    def through(self, i: int, x: Tensor, velocity, z: Tensor | None) -> Tensor:
        row = self.rows[i]
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            v = velocity(leaf)
            after = row["x"] * leaf + row["v"] * v
            if z is not None:
                after = after + row["z"] * z
            loss = stitch_loss(self._windows(after), self.starts)
            if self.observed is not None:
                y, m = self.observed
                loss = loss + (m * (leaf - self.levels[i] * v - y).square()).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        return (after - self.rate * gradient).detach()
