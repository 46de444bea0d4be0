r"""Guides: how the velocities that a model returns become one, inside the launch of the step.

With u the unconditional (or negative) velocity and c the conditional one; formulas are those of
`rfkernels.ops.combine`. A guide is given to `sample` or `init`; the model then returns the tuple (u, c), or
(u, c, third). `w` is a number, or a tensor `[batch]` on the device of the state.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rfkernels.ops import GUIDES
from rfkernels.samplers._rows import Row

__all__ = [
    "APG",
    "CFG",
    "CFGZeroStar",
    "Guide",
    "Interval",
    "NormMatched",
    "Perpendicular",
    "Rescaled",
    "SkipLayer",
    "Use",
    "as_guide",
]

Scale = float | Tensor


@dataclass(frozen=True)
class Use:
    """What a guide does at one evaluation: `kind` of `ops.GUIDES` with its parameters, None: c alone."""

    kind: str | None
    parameters: tuple[Scale, ...] = ()


class Guide(ABC):
    """What guides have in common.

    Attributes:
        velocities: how many tensors the model returns.
        zero_steps: the first steps, in which the velocity is 0: they are skipped, without an evaluation.
        momentum: of the direction c - u, see `APG`.
        by_step, by_level: whether it depends on the step's number, or on the noise level.
    """

    velocities: int = 2
    zero_steps: int = 0
    momentum: float = 0.0
    by_step: bool = False
    by_level: bool = False

    @abstractmethod
    def at(self, sigma: Row, step: int, steps: int) -> Use:
        """What happens at noise level sigma in step `step` of `steps`."""


@dataclass(frozen=True)
class CFG(Guide):
    r"""Classifier-free guidance, :math:`u + w(c - u)`: 1 is c, 0 is u. Ho and Salimans, 2022."""

    w: Scale

    @classmethod
    def original(cls, w: Scale) -> "CFG":
        r"""The paper's form :math:`c + w(c - u)`, one more than the usual scale."""
        return cls(w + 1)

    def at(self, sigma, step, steps):
        return Use("cfg", (self.w,))


@dataclass(frozen=True)
class CFGZeroStar(Guide):
    r"""CFG-Zero*, :math:`\rho u + w(c - \rho u)` with :math:`\rho = <c,u>/<u,u>`. Fan et al., 2025.

    `zero_steps` first steps have velocity 0 (zero-init): they are left out, the state waits.
    """

    w: Scale
    zero_steps: int = 1

    def at(self, sigma, step, steps):
        return Use("zero_star", (self.w,))


@dataclass(frozen=True)
class APG(Guide):
    r"""Adaptive projected guidance. Sadat et al., "Eliminating oversaturation", 2024.

    :math:`u + w\min(1, r/|d|)(d_\perp + \eta d_\parallel)`, split along c, where d is
    :math:`c - u + \beta d_{last}`, `momentum` :math:`\beta` (usually negative). The paper has it on data
    predictions, here it is on velocities: r is on their scale.
    """

    w: Scale
    eta: float = 1.0
    r: float = math.inf
    momentum: float = 0.0

    def __post_init__(self):
        if not self.r > 0:
            raise ValueError(f"APG: r must be above 0, got {self.r}")

    def at(self, sigma, step, steps):
        return Use("apg", (self.w, self.eta, min(self.r, 1e30)))


@dataclass(frozen=True)
class Rescaled(Guide):
    r"""CFG, its deviation pulled towards that of c by :math:`\phi`. Lin et al., 2024, section 3.4."""

    w: Scale
    phi: float = 0.7

    def at(self, sigma, step, steps):
        return Use("rescale", (self.w, self.phi))


@dataclass(frozen=True)
class NormMatched(Guide):
    """CFG, every row along the last axis (a token) given the norm of c's, as Qwen-Image does."""

    w: Scale

    def at(self, sigma, step, steps):
        return Use("token_norm", (self.w,))


@dataclass(frozen=True)
class Perpendicular(Guide):
    r"""Perp-Neg, :math:`u + w(p - n q_\perp)`, :math:`p = c - u`, :math:`q = third - u`. Armandpour, 2023.

    Third is the velocity of the negative prompt, u that of the empty one; products are of each sample.
    """

    w: Scale
    n: float = 1.0
    velocities = 3

    def at(self, sigma, step, steps):
        return Use("perpendicular", (self.w, self.n))


@dataclass(frozen=True)
class SkipLayer(Guide):
    """CFG + s (c - third), third: c with layers skipped (Stable Diffusion 3.5 medium: 7, 8 and 9).

    `window`: (first, last) as fractions of the steps; it is on in step i where first < i/steps < last.
    Outside of it plain CFG, and the third velocity is not needed.
    """

    w: Scale
    s: float = 2.5
    window: tuple[float, float] = (0.01, 0.2)
    velocities = 3
    by_step = True

    def at(self, sigma, step, steps):
        if self.window[0] * steps < step < self.window[1] * steps:
            return Use("skip_layer", (self.w, self.s))
        return Use("cfg", (self.w,))


@dataclass(frozen=True)
class Interval(Guide):
    """`guide` where low < sigma <= high, elsewhere c alone. Kynkaanniemi et al., 2024.

    Of levels per sample or frame the highest counts.
    """

    guide: Guide
    low: float = 0.0
    high: float = 1.0
    by_level = True

    @property
    def velocities(self) -> int:
        return self.guide.velocities

    @property
    def zero_steps(self) -> int:
        return self.guide.zero_steps

    @property
    def momentum(self) -> float:
        return self.guide.momentum

    @property
    def by_step(self) -> bool:
        return self.guide.by_step

    def at(self, sigma, step, steps):
        return self.guide.at(sigma, step, steps) if self.low < _highest(sigma) <= self.high else Use(None)


def as_guide(guidance: "Guide | float | Tensor | None", batch: int) -> Guide | None:
    """The guide itself, `CFG` of a number or a tensor, or None.

    Raises:
        ValueError: a scale that is neither a number nor `[batch]`.
    """
    if guidance is None:
        return None
    guide = guidance if isinstance(guidance, Guide) else CFG(guidance)
    scale = getattr(guide.guide if isinstance(guide, Interval) else guide, "w", 0.0)
    if isinstance(scale, Tensor) and scale.shape not in (torch.Size([]), torch.Size([batch])):
        raise ValueError(f"sample: guidance must be a number or [{batch}], got {list(scale.shape)}")
    if not isinstance(scale, (int, float, Tensor)) or (isinstance(scale, float) and not math.isfinite(scale)):
        raise ValueError(f"sample: guidance must be a finite number or [{batch}], got {scale!r}")
    return guide


def third_of(kind: str | None) -> bool:
    """Whether a guide of `ops.GUIDES` takes a third tensor."""
    return kind is not None and GUIDES[kind][0] == 3


def _highest(sigma: Row) -> float:
    return float(sigma.max()) if hasattr(sigma, "max") else float(sigma)
