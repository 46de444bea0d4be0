r"""The best places for few Euler steps: Bellman optimal step-size straightening, by dynamic programming.

Nguyen et al., "Bellman Optimal Stepsize Straightening of Flow-Matching Models", 2024, its first phase: follow
the flow with many small steps, price every jump between two of the states visited, and choose the cheapest
chain of jumps.

>>> sigmas = boss_schedule(velocity, noise, 6)        # 100 evaluations once; then sample(..., sigmas) with 6
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rfkernels.ops import affine_step
from rfkernels.samplers.schedules import _require, _whole, given, linear

__all__ = ["boss_schedule", "optimal_grid", "path_cost"]

_TILE = 1 << 16  # columns of a tile: 100 states of float64 are 52 MB


def path_cost(
    states: Tensor, velocities: Tensor, times: Tensor, *, direct: bool = False, tile: int = _TILE
) -> Tensor:
    r"""Returns all costs, :math:`c_{ij} = \mathrm{mean}_m |x_i + (t_j - t_i) v_i - x_j|^2`, i < j.

    float64 `[points, points]` on the device of the states, infinite where i >= j; the squares are summed over
    a sample and averaged over samples. By default from the Gram matrices :math:`XX^T` and :math:`VX^T`,

    .. math:: c_{ij} = |x_i|^2 + |x_j|^2 - 2 x_i x_j + 2\Delta (v_i x_i - v_i x_j) + \Delta^2 |v_i|^2

    of the states less the first one, in float64: two matrix products that read the states once, tile by tile.
    Such a cost is a local one, the jump starts on the path itself.

    Args:
        states: `[points, samples, ...]`.
        velocities: at all states or all but the last, dx/dt in the same time as `times`.
        times: `[points]`, rising or falling strictly.
        direct: form the differences instead, `points` times the reads: where the costs are below about 1e-12
            of the squared length of the path.
        tile: how many numbers of each state are taken at a time.

    Raises:
        ValueError: tensors that do not fit together.
    """
    points = len(states)
    times = _times(times, points).to(states.device)
    fits = velocities.shape[1:] == states.shape[1:] and len(velocities) in (points - 1, points)
    fits = fits and states.ndim >= 2 and states[0].numel() > 0
    _require(
        fits,
        "path_cost: states and velocities must be [points, samples, ...] and [points - 1, samples, ...], "
        f"got {list(states.shape)} and {list(velocities.shape)}",
    )
    _whole("tile", tile)
    x, v = states.flatten(1), velocities[: points - 1].flatten(1)
    squares = _direct(x, v, times, tile) if direct else _gram(x, v, times, tile)
    cost = torch.full((points, points), torch.inf, dtype=torch.float64, device=states.device)
    later = torch.ones_like(cost, dtype=torch.bool).triu(1)
    cost[:-1][later[:-1]] = (squares / states.shape[1])[later[:-1]]
    return cost


def optimal_grid(cost: Tensor, steps: int) -> tuple[list[int], float]:
    r"""Returns the cheapest chain of `steps` jumps from the first point to the last, and its cost.

    Bellman's recursion :math:`f_1(i) = c_{iK}`, :math:`f_k(i) = \min_{i<j<K} c_{ij} + f_{k-1}(j)` with the
    best j kept, the smallest of equals. The chain is the `steps + 1` indices, 0 and the last among them.

    Args:
        cost: `[points, points]`, of which only i < j is looked at; infinity forbids a jump.
        steps: from 1 to points - 1.

    Raises:
        ValueError: a cost that is NaN or negative infinity, too many steps, or no chain that is allowed.
    """
    square = cost.ndim == 2 and cost.shape[0] == cost.shape[1] >= 2
    _require(square, f"optimal_grid: cost must be [points, points] of at least 2, got {list(cost.shape)}")
    points = len(cost)
    _whole("steps", steps)
    _require(
        steps < points, f"optimal_grid: steps must be at most {points - 1} of {points} points, got {steps}"
    )
    c = cost.detach().double().cpu().numpy().copy()
    later = np.triu(np.ones_like(c, dtype=bool), 1)
    bad = later & (np.isnan(c) | np.isneginf(c))
    _require(
        not bad.any(), f"optimal_grid: costs must be numbers or infinity, got {int(bad.sum())} that are not"
    )
    c[~later] = np.inf  # so nothing goes on from the last point
    to_end, choices = c[:, -1].copy(), []
    for _ in range(steps - 1):
        through = c + to_end
        choices.append(through.argmin(1))  # the first of equals
        to_end = through.min(1)
    _require(np.isfinite(to_end[0]), f"optimal_grid: no chain of {steps} jumps has a finite cost")
    chain = [0]
    for choice in reversed(choices):
        chain.append(int(choice[chain[-1]]))
    return [*chain, points - 1], float(to_end[0])


def boss_schedule(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, *, grid: int | Tensor = 100
) -> Tensor:
    """Returns the noise levels `[steps + 1]`, float64, at which Euler's steps follow the flow of `x` best.

    Runs `grid` Euler steps (as many evaluations) and keeps all states and velocities of theirs, each `grid`
    times the memory of x. The levels are among those of the grid. They suit the `velocity` with its guidance,
    and Euler's method.

    Args:
        velocity: `velocity(x, sigma)` as of `sample`, without guidance or with it inside.
        x: noise, `[samples, ...]`: the more samples, the better the average.
        steps: at most as many as the grid has.
        grid: how many uniform steps, or the levels themselves.
    """
    levels = linear(grid) if isinstance(grid, int) else given(grid)
    _require(x.ndim >= 2, f"boss_schedule: x must be [samples, ...], got {list(x.shape)}")
    rows = levels.to(x.device, x.dtype)[:, None].expand(-1, len(x)).contiguous()
    moves = levels.diff().to(x.device, torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        states, velocities = x.new_empty(len(levels), *x.shape), None
        states[0] = x
        for i, move in enumerate(moves):
            v = velocity(states[i], rows[i]).contiguous()
            if velocities is None:
                velocities = v.new_empty(len(moves), *v.shape)
            velocities[i] = v
            affine_step(states[i], v, 1.0, move, out=states[i + 1])
        cost = path_cost(states, velocities, levels)
    chain, _ = optimal_grid(cost, steps)
    return levels[chain]


def _gram(x: Tensor, v: Tensor, times: Tensor, tile: int) -> Tensor:
    points = len(x)
    xx = torch.zeros(points, points, dtype=torch.float64, device=x.device)
    vx = torch.zeros(points - 1, points, dtype=torch.float64, device=x.device)
    vv = torch.zeros(points - 1, dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(tile, 1), v.split(tile, 1), strict=True):
        a, b = a.double(), b.double()
        a = a - a[:1]  # the cost does not change, and the squares that cancel are smaller
        xx.addmm_(a, a.T)
        vx.addmm_(b, a.T)
        vv += b.square().sum(1)
    size, move = xx.diagonal(), times - times[:-1, None]
    squares = size[:-1, None] + size - 2 * xx[:-1]
    squares += 2 * move * (vx.diagonal()[:, None] - vx) + move**2 * vv[:, None]
    return squares.clamp(min=0)


def _direct(x: Tensor, v: Tensor, times: Tensor, tile: int) -> Tensor:
    squares = torch.zeros(len(x) - 1, len(x), dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(tile, 1), v.split(tile, 1), strict=True):
        a, b = a.double(), b.double()
        for i in range(len(x) - 1):
            gap = (a[i] - a[i + 1 :]) + (times[i + 1 :] - times[i])[:, None] * b[i]
            squares[i, i + 1 :] += gap.square().sum(1)
    return squares


def _times(times: Tensor, points: int) -> Tensor:
    times = torch.as_tensor(times, dtype=torch.float64)
    moves = times.diff()
    good = times.shape == (points,) and points >= 2 and bool((moves > 0).all() or (moves < 0).all())
    _require(
        good,
        f"path_cost: times must be [{points}], rising or falling strictly, got {times.tolist()}",
    )
    return times
