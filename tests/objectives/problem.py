"""Problems with exact answers: a mixture of two Gaussians in one dimension, and one Gaussian."""

import math

import torch
from torch import Tensor

from rfkernels.ops import noise_keys, philox_normal

F64 = torch.float64
WEIGHTS, MEANS, STDS = [0.3, 0.7], [-1.5, 1.0], [0.4, 0.6]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return philox_normal(shape, noise_keys(seed, shape[0]), dtype=dtype)


def mixture_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact velocity of the mixture; sigma is `[batch]`."""
    w, m, s = (torch.tensor(v, dtype=F64) for v in (WEIGHTS, MEANS, STDS))
    dtype, sigma = x.dtype, sigma.double().view(-1, *[1] * x.ndim)
    a, x = 1 - sigma, x[..., None].double()
    variance = a**2 * s**2 + sigma**2
    away = x - a * m
    share = torch.softmax(w.log() - variance.log() / 2 - away**2 / (2 * variance), -1)
    velocity = (share * (sigma * away / variance - m - a * s**2 * away / variance)).sum(-1)
    return velocity.to(dtype)


def mixture_samples(count: int, seed: int) -> Tensor:
    n = normal(count, 2, seed=seed)
    first = torch.special.ndtr(n[:, 1]) < WEIGHTS[0]
    return torch.where(first, MEANS[0] + STDS[0] * n[:, 0], MEANS[1] + STDS[1] * n[:, 0])[:, None]


class Gaussian:
    """Data N(m, s^2): velocity, flow to the data, average velocity; sigma broadcasts against x."""

    def __init__(self, m: float = 0.7, s: float = 0.5):
        self.m, self.s = m, s

    def std(self, sigma: Tensor) -> Tensor:
        return ((1 - sigma) ** 2 * self.s**2 + sigma**2).sqrt()

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        a = 1 - sigma
        return (sigma - a * self.s**2) / self.std(sigma) ** 2 * (x - a * self.m) - self.m

    def flow(self, x: Tensor, sigma: Tensor, to: Tensor | float = 0.0) -> Tensor:
        to = torch.as_tensor(to, dtype=F64)
        return (1 - to) * self.m + self.std(to) / self.std(sigma) * (x - (1 - sigma) * self.m)

    def average(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (x - self.flow(x, sigma)) / sigma

    def denoiser(self, x: Tensor, level: Tensor) -> Tensor:
        """E[x0 | x0 + level * noise], EDM's parametrisation."""
        level = level.view(-1, *[1] * (x.ndim - 1))
        return (x * self.s**2 + self.m * level**2) / (self.s**2 + level**2)


def column(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def integrate(f, low: float, high: float, count: int = 10_001) -> float:
    """Midpoint rule."""
    edges = torch.linspace(low, high, count, dtype=F64)
    return float(f((edges[1:] + edges[:-1]) / 2).sum() * (high - low) / (count - 1))


LN2 = math.log(2)
