r"""What a model is trained on: the noisy state and the target, from the same launch.

A Gaussian path is :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon`. Rectified flow is :math:`\alpha = 1 -
t`, :math:`\sigma = t`, where t is the level sigma. `interpolate` makes the state and the target in one pass
over the data, with the noise drawn inside the kernel, or read, or both (annealed reflow).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from rfkernels.objectives.densities import stream
from rfkernels.ops._register import expand_rows
from rfkernels.ops.combine import combine
from rfkernels.ops.noise import philox_normal
from rfkernels.ops.stochastic import stack_rows

__all__ = [
    "VP",
    "Cosine",
    "Path",
    "RectifiedPath",
    "SubVP",
    "Table",
    "anneal_rate",
    "ddpm_table",
    "interpolate",
    "joint_flip",
    "phased_interpolate",
    "phased_window",
]

_FLIP = 0x666C6970  # "flip"
Target = Literal["velocity", "u", "x0", "eps", "w"]


class Path(Protocol):
    """A Gaussian path: alpha and sigma at t, and their derivatives, all float64 and shaped like t."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RectifiedPath:
    r""":math:`\alpha = 1 - t,\ \sigma = \sigma_m + (1 - \sigma_m)t`; of MDT-dist :math:`\sigma_m` = 1e-5."""

    sigma_min: float = 0.0

    def __post_init__(self):
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"RectifiedPath: sigma_min must be in 0 .. 1, below 1, got {self.sigma_min}")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, self.sigma_min + (1 - self.sigma_min) * t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.full_like(t, 1 - self.sigma_min)


@dataclass(frozen=True)
class VP:
    r""":math:`\alpha = \exp(-t^2(\beta_1 - \beta_0)/4 - t\beta_0/2)`, :math:`\sigma = \sqrt{1 - \alpha^2}`.

    The rate of sigma grows without bound at t = 0; it is taken at t = 1e-5 below that. Song et al.,
    "Score-based generative modeling through stochastic differential equations", 2021.
    """

    beta0: float = 0.1
    beta1: float = 20.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log = self._log(t)
        return log.exp(), (-torch.expm1(2 * log)).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.clamp(min=1e-5)
        alpha, sigma = self(t)
        rate = self._rate(t) * alpha
        return rate, -alpha * rate / sigma

    def _log(self, t: Tensor) -> Tensor:
        return -0.25 * t * t * (self.beta1 - self.beta0) - 0.5 * t * self.beta0

    def _rate(self, t: Tensor) -> Tensor:
        return -0.5 * t * (self.beta1 - self.beta0) - 0.5 * self.beta0


@dataclass(frozen=True)
class SubVP(VP):
    r"""The same alpha, :math:`\sigma = 1 - \alpha^2`."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log = self._log(t)
        return log.exp(), -torch.expm1(2 * log)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._log(t).exp()
        rate = self._rate(t) * alpha
        return rate, -2 * alpha * rate


@dataclass(frozen=True)
class Cosine:
    r""":math:`\alpha = \cos(\pi t/2)`, :math:`\sigma = \sin(\pi t/2)`."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * (math.pi / 2 * t).sin(), math.pi / 2 * (math.pi / 2 * t).cos()


@dataclass(frozen=True)
class Table:
    """A path at integer timesteps: `alphas` and `sigmas`, float64 `[steps]`; t is int64. No velocity."""

    alphas: Tensor
    sigmas: Tensor

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.long()
        return self.alphas.to(t.device)[index], self.sigmas.to(t.device)[index]

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("Table: a path of integer timesteps has no velocity; targets are u, x0, eps and w")


def ddpm_table(kind: Literal["linear", "scaled_linear"] = "scaled_linear", steps: int = 1000) -> Table:
    r"""Returns Stable Diffusion 1.5's path, betas from .00085 to .012.

    "scaled_linear" is the model's own, linear in :math:`\sqrt\beta`. Rectified Diffusion trains and samples
    its model that is not phased with "linear"; store which one with a checkpoint.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("linear", "scaled_linear"):
        raise ValueError(f"ddpm_table: kind must be linear or scaled_linear, got {kind!r}")
    if kind == "linear":
        betas = torch.linspace(0.00085, 0.012, steps, dtype=torch.float64)
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    products = (1 - betas).cumprod(0)
    return Table(products.sqrt(), (1 - products).sqrt())


def interpolate(
    x0: Tensor,
    sigma: float | Tensor,
    noise: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    path: Path | None = None,
    target: Target = "velocity",
    anneal: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Returns the noisy state :math:`\alpha x_0 + \sigma\epsilon` and the model's target there: one launch.

    The targets: "velocity" :math:`\dot\alpha x_0 + \dot\sigma\epsilon`, on rectified flow the same as "u",
    :math:`\epsilon - x_0`; "x0"; "eps"; "w" :math:`\alpha\epsilon - \sigma x_0` (the v of variance-preserving
    models).

    With `noise` the pair (noise, x0) is kept as it is: reflow (Liu et al., "Flow straight and fast", 2022).
    With `noise`, `keys` (others than the noise was drawn with) and `anneal` = r > 0 it is loosened,
    :math:`\epsilon = \sqrt{1-r^2}\,noise + r\,z`, which is normal for every r (Zhu, Liu and Liu, "SlimFlow",
    2024); r = 0 is reflow to the bit.

    Args:
        x0: the data, `[batch, ...]`; gives the dtype of both results.
        sigma: the level (t of another path), a number or row scalar: `[batch]`, or `[batch, 1, frames]` for
            a level a frame.
        noise: shaped like `x0`.
        keys: `int64[batch, 3]` of fresh noise, made in the kernel and never stored.
        path: rectified flow if None.
        anneal: r, see `anneal_rate`.

    Raises:
        ValueError: neither noise nor keys, r outside 0 .. 1, or r without both; an unknown target.
    """
    _check_noise(noise, keys, anneal)
    if target not in ("velocity", "u", "x0", "eps", "w"):
        raise ValueError(f"interpolate: target must be velocity, u, x0, eps or w, got {target!r}")
    path = path or RectifiedPath()
    kind = None if isinstance(path, Table) else torch.float64
    t = torch.as_tensor(sigma, dtype=kind, device=x0.device)
    alpha, scale = path(t)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if target == "velocity":
        data, eps = path.rates(t)
    else:
        data, eps = {"u": (-one, one), "x0": (one, zero), "eps": (zero, one), "w": (-scale, alpha)}[target]
    tensors = [t.contiguous() for t in (x0, noise) if t is not None]
    # What the noise is made of: the tensor, the kernel's, or both.
    mix = [1.0] if noise is None or not anneal else [math.sqrt(1 - anneal**2), anneal]
    rows = [[alpha, *(scale * m for m in mix)], [data, *(eps * m for m in mix)]]
    coefs = stack_rows([c for row in rows for c in row], x0)
    coefs = coefs.view(2, len(mix) + 1, *coefs.shape[1:])
    fresh = keys if noise is None or anneal else None
    return combine(tensors, coefs, keys=fresh)


def _check_noise(noise: Tensor | None, keys: Tensor | None, anneal: float) -> None:
    if noise is None and keys is None:
        raise ValueError("interpolate: expected noise or keys, got neither")
    if not 0 <= anneal <= 1:
        raise ValueError(f"interpolate: anneal must be in 0 .. 1, got {anneal}")
    if anneal and (noise is None or keys is None):
        raise ValueError(f"interpolate: anneal {anneal} needs both noise and keys")
    if not anneal and noise is not None and keys is not None:
        raise ValueError("interpolate: noise and keys together need anneal above 0")


def anneal_rate(
    step: int, steps: int, schedule: Literal["linear", "exponential", "cosine"] = "linear"
) -> float:
    r"""Returns SlimFlow's r at an iteration: from 1, independent noise, down to 0, the pairs as they are.

    With k = `step`, W = `steps`: linear :math:`1 - \min(1, k/W)` (the authors' README has W = 300000),
    exponential :math:`e^{-k/W}` (never 0, so below 1e-7 it is set to 0: r must get there), cosine a half
    cosine over W. Give the iteration of the whole run when a run resumes.

    Raises:
        ValueError: another schedule, a negative step, or `steps` that is not positive.
    """
    if step < 0 or steps <= 0:
        raise ValueError(f"anneal_rate: expected step >= 0 and steps > 0, got {step}, {steps}")
    progress = min(1.0, step / steps)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "exponential":
        rate = math.exp(-step / steps)
        return rate if rate >= 1e-7 else 0.0
    raise ValueError(f"anneal_rate: schedule must be linear, exponential or cosine, got {schedule!r}")


def joint_flip(x0: Tensor, noise: Tensor, keys: Tensor, *, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Returns both tensors of each pair mirrored along `dim`, with probability 1/2, or neither.

    Mirroring the data alone breaks the pairing that reflow lives on. The choice is one of each sample's key,
    on a stream of its own.
    """
    coin = philox_normal((len(keys), 1), stream(keys, _FLIP))
    mirror = expand_rows(coin[:, 0] < 0, x0)
    return torch.where(mirror, x0.flip(dim), x0), torch.where(mirror, noise.flip(dim), noise)


def phased_window(
    index: int, *, steps: int = 40, phases: int = 4, train_steps: int = 1000
) -> tuple[int, int]:
    """Returns the timesteps (start, end) of the window that DDIM step `index` lies in, start the noisier.

    With the defaults, Rectified Diffusion's, windows start at 249, 499, 749 and 999 and end where the next
    one starts, the last at 0.

    Raises:
        ValueError: steps that do not divide into phases, or an index outside of them.
    """
    if phases < 1 or steps % phases or train_steps < steps or not 0 <= index < steps:
        raise ValueError(
            "phased_window: expected phases that divide steps and 0 <= index < steps, "
            f"got index {index}, steps {steps}, phases {phases}, train_steps {train_steps}"
        )
    ratio, size = train_steps // steps, steps // phases
    first = index // size * size
    return (first + size) * ratio - 1, max(first * ratio - 1, 0)


def phased_interpolate(
    x_start: Tensor,
    x_end: Tensor,
    start: tuple[Tensor, Tensor],
    tau: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    r"""Returns the state :math:`x_\tau` inside a window and the window's constant noise: one launch.

    Of a first-order path :math:`x/\alpha` is linear in :math:`n = \sigma/\alpha`, with the noise prediction
    as its slope, :math:`\epsilon^* = (x_e/\alpha_e - x_s/\alpha_s)/(n_e - n_s)`. At tau = end the state is
    `x_end`. A prediction at tau arrives at the end by `affine_step(x, eps, a, b)` with :math:`a =
    \alpha_e/\alpha_\tau`, :math:`b = \sigma_e - \alpha_e\sigma_\tau/\alpha_\tau`; train it with
    `elementwise_huber`. Wang et al., "Rectified Diffusion", 2024.

    Args:
        x_start, x_end: where a teacher's window began and ended, `[batch, ...]`.
        start, tau, end: (alpha, sigma) of the three times, row scalars, float64, as a `Path` gives them.

    Raises:
        ValueError: levels on the CPU with alpha 0, or a window without length.
    """
    (a_s, s_s), (a_t, s_t), (a_e, s_e) = start, tau, end
    n_s, n_t, n_e = s_s / a_s, s_t / a_t, s_e / a_e
    if n_s.device.type == "cpu" and not ((n_e != n_s) & (a_s * a_t * a_e != 0)).all():
        raise ValueError("phased_interpolate: start and end must differ and no alpha may be 0")
    part = (n_t - n_s) / (n_e - n_s)
    slope = 1 / (n_e - n_s)
    coefs = stack_rows([a_t * (1 - part) / a_s, a_t * part / a_e, -slope / a_s, slope / a_e], x_start)
    return combine([x_start, x_end], coefs.view(2, 2, *coefs.shape[1:]))
