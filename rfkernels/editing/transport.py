"""Entropic optimal transport between small sets, in the log domain."""

import math

import torch
from torch import Tensor

__all__ = ["coupling_entropy", "sinkhorn"]


def sinkhorn(cost: Tensor, reg: float, iterations: int = 100) -> Tensor:
    r"""Returns log P of the coupling that minimises :math:`<P, C> - reg\,H(P)` with uniform marginals.

    Cuturi, "Sinkhorn distances", 2013, with sums of logarithms: nothing underflows, whatever the cost.

    Args:
        cost: `[..., n, m]`.
        reg: positive; the scale of costs that count as equal.

    Raises:
        ValueError: a `reg` that is not positive.
    """
    if not reg > 0:
        raise ValueError(f"sinkhorn: reg must be positive, got {reg}")
    kernel = -cost.double() / reg
    rows, columns = kernel.shape[-2:]
    g = torch.zeros_like(kernel[..., 0, :])
    for _ in range(iterations):
        f = -math.log(rows) - (kernel + g[..., None, :]).logsumexp(-1)
        g = -math.log(columns) - (kernel + f[..., :, None]).logsumexp(-2)
    return kernel + f[..., :, None] + g[..., None, :]


def coupling_entropy(cost: Tensor, reg: float) -> Tensor:
    r"""The entropy :math:`-\sum P\log P` of the optimal coupling, `[...]`."""
    log_p = sinkhorn(cost, reg)
    return -(log_p.exp() * log_p).sum((-1, -2))
