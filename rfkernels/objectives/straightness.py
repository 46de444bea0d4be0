r"""How straight the trajectories of a flow are.

Straight ones need one step. Both measures are those of one trajectory for each sample; their mean over
samples is the figure in the papers.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rfkernels.ops.stochastic import sample_size, sum_of_squares

__all__ = ["path_straightness", "straightness", "transport_cost"]


def straightness(velocities: Sequence[Tensor], x_first: Tensor, x_last: Tensor, sigmas: Tensor) -> Tensor:
    r"""Returns :math:`S = \int \|(x_0 - x_N) - v\|^2 d\sigma` of an Euler trajectory, float64 `[batch]`.

    For velocities that made the trajectory this is :math:`\sum h_i\|v_i\|^2 - \|x_N - x_0\|^2/\sum h_i`, with
    :math:`h_i = |\sigma_{i+1}-\sigma_i|`: sums that a sampler's callback can collect, no state is kept. Sums
    of squares of the elements, not means; 0 if and only if straight. Liu, Gong and Liu, "Flow straight and
    fast", 2022.

    Args:
        velocities: one for each step, `[batch, ...]`.
        x_first, x_last: where the trajectory began and ended.
        sigmas: the grid, one level more than velocities, falling or rising.

    Raises:
        ValueError: as many levels as velocities do not need, or a grid without length.
    """
    levels = [float(s) for s in sigmas]
    if len(levels) != len(velocities) + 1:
        raise ValueError(
            f"straightness: {len(velocities)} velocities need {len(velocities) + 1} levels, got {len(levels)}"
        )
    lengths = [abs(b - a) for a, b in pairwise(levels)]
    if not sum(lengths) > 0:
        raise ValueError(f"straightness: the grid has no length: {levels}")
    total = sum(h * sum_of_squares([v], [1.0]) for h, v in zip(lengths, velocities, strict=True))
    return total - sum_of_squares([x_last, x_first], [1.0, -1.0]) / sum(lengths)


def path_straightness(states: Sequence[Tensor], sigmas: Tensor) -> Tensor:
    r"""Returns the steps' mean :math:`\|(x_i - x_{i+1})/(\sigma_i - \sigma_{i+1}) - (x_0 - x_N)\|^2/D`.

    rfpp's measure, of the states of any sampler on a grid from 1 to 0, float64 `[batch]`. Lee, Lin and
    Fanti, 2024.

    Args:
        states: :math:`x_0` (noise) to :math:`x_N`.
        sigmas: the grid, as many levels.

    Raises:
        ValueError: fewer than two states, another number of levels, or two equal ones in a row.
    """
    levels = [float(s) for s in sigmas]
    steps = [a - b for a, b in pairwise(levels)]
    if len(states) < 2 or len(levels) != len(states) or 0 in steps:
        raise ValueError(
            f"path_straightness: expected two states or more, a level for each and no two equal in a row, "
            f"got {len(states)} states, levels {levels}"
        )
    first, last = states[0], states[-1]
    terms = [
        sum_of_squares([a, b, first, last], [1 / h, -1 / h, -1.0, 1.0])
        for a, b, h in zip(states, states[1:], steps, strict=False)
    ]
    return torch.stack(terms).mean(0) / sample_size(first)


def transport_cost(x0: Tensor, noise: Tensor) -> Tensor:
    r"""Returns :math:`\|x_0 - \epsilon\|^2` of each pair, float64 `[batch]`: reflow never raises its mean."""
    return sum_of_squares([x0, noise], [1.0, -1.0])
