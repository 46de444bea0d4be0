r"""Quantiles of the beta distribution in float64, which torch does not have.

The distribution function is the series (DLMF 8.17.8)

.. math:: I_x(a, b) = \frac{x^a (1-x)^b}{a B(a, b)} \sum_{n\ge 0} x^n \prod_{m<n} \frac{a+b+m}{a+1+m}

whose terms are positive, summed for :math:`x \le 1/2`; the other half is :math:`I_x(a,b) = 1 - I_{1-x}(b,a)`.
"""

import math

import torch
from torch import Tensor

__all__ = ["beta_distribution", "beta_quantile"]

_HALVINGS = 80  # of an interval of 1/2: below the spacing of float64 above 1e-8
_MOST_TERMS = 10_000


def beta_distribution(x: Tensor, a: float, b: float) -> Tensor:
    """I_x(a, b) for x in [0, 1], float64."""
    lower = x <= 0.5
    return torch.where(lower, _lower(x.clamp(max=0.5), a, b), 1 - _lower((1 - x).clamp(max=0.5), b, a))


def beta_quantile(p: Tensor, a: float, b: float) -> Tensor:
    """The x in [0, 1] with I_x(a, b) = p, float64, by bisection in the half where the series is good."""
    lower = p <= _lower(torch.tensor(0.5, dtype=torch.float64), a, b)
    return torch.where(lower, _bisect(p, a, b), 1 - _bisect(1 - p, b, a))


def _bisect(p: Tensor, a: float, b: float) -> Tensor:
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = _lower(middle, a, b) >= p
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(p <= 0, 0.0, high)


def _lower(x: Tensor, a: float, b: float) -> Tensor:
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    term = torch.ones_like(x)
    total = term.clone()
    for n in range(_MOST_TERMS):
        term = term * x * ((a + b + n) / (a + 1 + n))
        total += term
        if not (term > 1e-17 * total).any():
            break
    return total * torch.exp(a * x.log() + b * torch.log1p(-x) - log_beta) / a
