"""Velocities with exact answers, float64."""

import torch
from torch import Tensor

F64 = torch.float64


def column(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def normal(mean: float | Tensor, std: float | Tensor):
    """The velocity of a rectified flow to independent N(mean, std^2)."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        s = column(sigma, x)
        a = 1 - s
        centred = (x - a * mean) / (a**2 * std**2 + s**2)
        return s * centred - (mean + a * std**2 * centred)

    return velocity


def wild(x: Tensor, sigma: Tensor) -> Tensor:
    """No flow in particular."""
    return torch.sin(3 * x) + column(sigma, x) * x.flip(-1) - 0.3


def wild_pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(2 * x) - column(sigma, x), wild(x, sigma)


def guided(pair, w):
    """The velocity that guidance makes of a pair."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        u, c = pair(x, sigma)
        weight = w.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(w, Tensor) else w
        return u + weight * (c - u)

    return velocity


# Inputs of golden values: i = 0 .. 7, one sample of 8 numbers; sigma .6 -> .45.
_i = torch.arange(8, dtype=F64)
X, U, C = torch.sin(_i + 1), torch.cos(0.7 * _i + 0.3), torch.cos(0.7 * _i + 0.5) + 0.1 * _i / 8
Y, Z = torch.sin(2 * _i) / 2, torch.cos(3 * _i)
MASK = (_i % 2 == 0).to(F64)
SIGMA, END = 0.6, 0.45


def close(result: Tensor, expected, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=result.dtype).expand(result.shape)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
