r"""Which noise levels training visits, how often, and what a loss weighs there.

A density is a frozen record with `transform` (a uniform u to a level, in the form its paper gives), `pdf`,
`cdf` and `sample`. Levels are sigmas: 1 is noise, 0 is data. All arithmetic is float64; `pdf`, `cdf` and
`transform` take tensors of any shape and keep them on their device.

A level is a pure function of the key (seed, sample, step) and its place within the sample, whatever the
batch, and independent of the noise drawn with the same key: `sample` takes a stream of its own.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rfkernels.ops.noise import philox_normal

__all__ = [
    "Bump",
    "CosMap",
    "Density",
    "LogitNormal",
    "Mode",
    "Rescaled",
    "Shifted",
    "UShaped",
    "Uniform",
    "bump_table",
    "diffusers_sigma",
    "loss_weight",
]

_LEVELS = 0x7369676D61  # "sigma"
_BISECTIONS = 60


class Density(ABC):
    """A density of levels: `transform`, `pdf`, `cdf`, and `sample`, by a map of standard normals."""

    def sample(self, keys: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Returns levels, float64 `[batch, *shape]`, on the device of `keys`.

        Args:
            keys: `int64[batch, 3]`, see `rfkernels.ops.noise_keys`.
            shape: more axes: `(frames,)` draws an independent level for each frame (Pusa).
        """
        n = philox_normal((len(keys), math.prod(shape)), stream(keys, _LEVELS))
        return self._from_normal(n.double()).view(len(keys), *shape)

    def _from_normal(self, n: Tensor) -> Tensor:
        return self.transform(torch.special.ndtr(n))

    @abstractmethod
    def transform(self, u: Tensor) -> Tensor:
        """Returns the level that belongs to a uniform number, rising or falling in it."""

    @abstractmethod
    def pdf(self, t: Tensor) -> Tensor:
        """Returns the density at t, 0 outside of 0 .. 1."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """Returns the share of levels up to t."""


def stream(keys: Tensor, tag: int) -> Tensor:
    """Keys of a stream apart from that of the noise: the seed with the bits of `tag` turned."""
    return torch.cat([keys[:, :1] ^ tag, keys[:, 1:]], 1)


@dataclass(frozen=True)
class Uniform(Density):
    """The uniform density on 0 .. 1."""

    def transform(self, u: Tensor) -> Tensor:
        return u

    def pdf(self, t: Tensor) -> Tensor:
        return _inside(t, torch.ones_like(t))

    def cdf(self, t: Tensor) -> Tensor:
        return t.clamp(0, 1)


@dataclass(frozen=True)
class LogitNormal(Density):
    r""":math:`t = sigmoid(m + s n)`, `p = exp(-(logit t - m)^2 / (2 s^2)) / (s sqrt(2 pi) t (1 - t))`.

    Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis" (SD3), 2024.
    """

    m: float = 0.0
    s: float = 1.0

    def __post_init__(self):
        if not self.s > 0:
            raise ValueError(f"LogitNormal: s must be positive, got {self.s}")

    def _from_normal(self, n: Tensor) -> Tensor:
        return torch.sigmoid(self.m + self.s * n)

    def transform(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.m + self.s * torch.special.ndtri(u))

    def pdf(self, t: Tensor) -> Tensor:
        inner = t.clamp(1e-300, 1 - 2**-53)
        z = (torch.logit(inner) - self.m) / self.s
        p = torch.exp(-0.5 * z * z) / (self.s * math.sqrt(2 * math.pi) * inner * (1 - inner))
        return torch.where((t > 0) & (t < 1), p, 0)

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t.clamp(0, 1)) - self.m) / self.s)


@dataclass(frozen=True)
class Mode(Density):
    r""":math:`t = 1 - u - s(\cos^2(\pi u/2) - 1 + u)`: more of the middle for s > 0 (SD3).

    Raises:
        ValueError: s outside -1 .. 2/(pi - 2) = 1.7519, where the map is no longer monotone.
    """

    s: float = 1.29

    def __post_init__(self):
        if not -1 <= self.s <= 2 / (math.pi - 2):
            raise ValueError(f"Mode: s must be in -1 .. 2/(pi - 2) = 1.7519, got {self.s}")

    def transform(self, u: Tensor) -> Tensor:
        return 1 - u - self.s * ((math.pi / 2 * u).cos() ** 2 - 1 + u)

    def pdf(self, t: Tensor) -> Tensor:
        u = _invert(self.transform, t, falling=True)
        return _inside(t, 1 / (1 + self.s - self.s * math.pi / 2 * (math.pi * u).sin()))

    def cdf(self, t: Tensor) -> Tensor:
        return 1 - _invert(self.transform, t, falling=True)


@dataclass(frozen=True)
class CosMap(Density):
    r""":math:`t = 1 - 1/(\tan(\pi u/2) + 1)`, :math:`p = 2/(\pi - 2\pi t + 2\pi t^2)` (SD3)."""

    def transform(self, u: Tensor) -> Tensor:
        s, c = (math.pi / 2 * u).sin(), (math.pi / 2 * u).cos()
        return s / (s + c)  # the same, and finite at u = 1

    def pdf(self, t: Tensor) -> Tensor:
        return _inside(t, _cosmap(t))

    def cdf(self, t: Tensor) -> Tensor:
        t = t.clamp(0, 1)
        return 2 / math.pi * torch.atan2(t, 1 - t)


@dataclass(frozen=True)
class UShaped(Density):
    r""":math:`p = a\cosh(a(t - 1/2)) / (2\sinh(a/2))`: both ends, for training on reflow pairs.

    :math:`t = 1/2 + asinh((2u - 1)\sinh(a/2))/a`. The paper prints :math:`e^{au} + e^{-au}` on 0 .. 1, which
    is meant centred at 1/2. Lee, Lin and Fanti, "Improving the training of rectified flows", 2024.
    """

    a: float = 4.0

    def __post_init__(self):
        if not 0 < self.a <= 100:
            raise ValueError(f"UShaped: a must be in 0 .. 100, above 0, got {self.a}")

    def transform(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def pdf(self, t: Tensor) -> Tensor:
        return _inside(t, self.a * (self.a * (t - 0.5)).cosh() / (2 * math.sinh(self.a / 2)))

    def cdf(self, t: Tensor) -> Tensor:
        return 0.5 + (self.a * (t.clamp(0, 1) - 0.5)).sinh() / (2 * math.sinh(self.a / 2))


@dataclass(frozen=True)
class Bump(Density):
    r""":math:`p \propto \exp(-2(t - 1/2)^2) - \exp(-1/2)`: DiffSynth's and Pusa's weights as a density.

    Drawing from it under no weight is training on uniform levels under these weights, in expectation.
    """

    def transform(self, u: Tensor) -> Tensor:
        return _invert(self.cdf, u, falling=False)

    def pdf(self, t: Tensor) -> Tensor:
        return _inside(t, (torch.exp(-2 * (t - 0.5) ** 2) - math.exp(-0.5)) / _BUMP)

    def cdf(self, t: Tensor) -> Tensor:
        t = t.clamp(0, 1)
        area = math.sqrt(math.pi / 8) * (torch.erf(math.sqrt(2) * (t - 0.5)) + math.erf(math.sqrt(0.5)))
        return ((area - math.exp(-0.5) * t) / _BUMP).clamp(0, 1)


_BUMP = 2 * math.sqrt(math.pi / 8) * math.erf(math.sqrt(0.5)) - math.exp(-0.5)


@dataclass(frozen=True)
class Rescaled(Density):
    """A density on `low .. high` instead of 0 .. 1.

    MDT-dist trains on `Rescaled(LogitNormal(1, 1), 1e-5 + 0.01, 1)`, rfpp on `Rescaled(UShaped(4), 1e-5, 1 -
    1e-5)`, rectified flow (with t = 1 - sigma from 1e-3 on) on `Rescaled(Uniform(), 0, 1 - 1e-3)`.
    """

    density: Density
    low: float
    high: float

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"Rescaled: expected 0 <= low < high <= 1, got {self.low}, {self.high}")

    def _from_normal(self, n: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.density._from_normal(n)

    def transform(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.density.transform(u)

    def pdf(self, t: Tensor) -> Tensor:
        return self.density.pdf((t - self.low) / (self.high - self.low)) / (self.high - self.low)

    def cdf(self, t: Tensor) -> Tensor:
        return self.density.cdf((t - self.low) / (self.high - self.low))


@dataclass(frozen=True)
class Shifted(Density):
    r"""Levels of a density, then shifted: :math:`\sigma' = k\sigma/(1 + (k - 1)\sigma)` (SD3, Wan)."""

    density: Density
    shift: float

    def __post_init__(self):
        if not self.shift > 0:
            raise ValueError(f"Shifted: shift must be positive, got {self.shift}")

    def _from_normal(self, n: Tensor) -> Tensor:
        return _shift(self.density._from_normal(n), self.shift)

    def transform(self, u: Tensor) -> Tensor:
        return _shift(self.density.transform(u), self.shift)

    def pdf(self, t: Tensor) -> Tensor:
        back = _shift(t, 1 / self.shift)
        return self.density.pdf(back) * (1 + (self.shift - 1) * back) ** 2 / self.shift

    def cdf(self, t: Tensor) -> Tensor:
        return self.density.cdf(_shift(t.clamp(0, 1), 1 / self.shift))


def diffusers_sigma(t: Tensor, *, steps: int = 1000, shift: float = 1.0) -> Tensor:
    r"""Returns the level at which the training scripts of diffusers train when they draw `t`.

    They take :math:`\lfloor 1000\,t\rfloor` for the index of a table of levels that falls, so the level is
    about 1 - t: a `logit_mean` above 0 favours little noise there, the opposite of SD3's paper and of
    `LogitNormal` here. The table has the scheduler's shift in it already. Draw `t` from a density, then
    apply this to train as those scripts do.

    Args:
        t: draws in 0 .. 1.
        steps: length of the table.
        shift: the scheduler's static shift.
    """
    index = (t.double() * steps).floor().clamp(0, steps - 1)
    return _shift((steps - index) / steps, shift)


def loss_weight(name: str, sigma: Tensor) -> Tensor:
    r"""Returns the weight of a loss at `sigma`, float64.

    "none" is 1, "sigma_sqrt" :math:`\sigma^{-2}` (from sigma = 1e-3 down it stays 1e6: the smallest level of
    a table of 1000), "cosmap" :math:`2/(\pi(1 - 2\sigma + 2\sigma^2))`, as in diffusers; "bump" is the
    density `Bump`.

    Raises:
        ValueError: another name.
    """
    sigma = sigma.double()
    if name == "none":
        return torch.ones_like(sigma)
    if name == "sigma_sqrt":
        return sigma.clamp(min=1e-3) ** -2
    if name == "cosmap":
        return _cosmap(sigma)
    if name == "bump":
        return Bump().pdf(sigma)
    raise ValueError(f"loss_weight: expected none, sigma_sqrt, cosmap or bump, got {name!r}")


def bump_table(sigmas: Tensor) -> Tensor:
    r"""Returns DiffSynth's weights of the levels of a table, float64, which average 1.

    :math:`\exp(-2(\sigma - 1/2)^2)` less its least value. `loss_weight("bump", ...)` is the limit of many
    uniform levels. In Pusa's code they multiply a loss that is a single number already and have no effect;
    as weights of samples or frames in `rfkernels.objectives.velocity_loss` they have.

    Raises:
        ValueError: fewer than two levels, or levels that all weigh the same.
    """
    y = torch.exp(-2 * (sigmas.double() - 0.5) ** 2)
    y = y - y.min() if y.numel() else y
    if y.numel() < 2 or not y.any():
        raise ValueError(f"bump_table: expected two levels or more of unequal weight, got {sigmas.tolist()}")
    return y * (y.numel() / y.sum())


def _cosmap(t: Tensor) -> Tensor:
    return 2 / (math.pi * (1 - 2 * t + 2 * t * t))


def _shift(t: Tensor, k: float) -> Tensor:
    return k * t / (1 + (k - 1) * t)


def _inside(t: Tensor, p: Tensor) -> Tensor:
    return torch.where((t >= 0) & (t <= 1), p, 0)


def _invert(f, value: Tensor, *, falling: bool) -> Tensor:
    """The u in 0 .. 1 with f(u) = value, by bisection to the last bit."""
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = (f(middle) > value) != falling
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2
