r"""Other Gaussian paths :math:`x = \alpha x_0 + \sigma\epsilon` and what models predict on them.

Every such path is the rectified flow's up to its time and a scale: :math:`z = x/(\alpha+\sigma)` at the level
:math:`s = \sigma/(\alpha+\sigma)` lies on :math:`(1-s)x_0 + s\epsilon`, and Euler's step of z is DDIM's of x.
So one set of methods samples them all, see `as_velocity`.

Predictions: "eps" (the noise), "x0" (the data), "u" :math:`\epsilon - x_0` (rectified flow), "w"
:math:`\alpha\epsilon - \sigma x_0` ("v-prediction" of VP models), "score" :math:`-\epsilon/\sigma`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rfkernels.ops import affine_step, linear_combination
from rfkernels.ops._register import accumulator

__all__ = ["PATHS", "PREDICTIONS", "Path", "as_velocity", "conversion", "convert", "step_coefficients"]

PREDICTIONS = ("eps", "x0", "u", "w", "score")
_EDGE = 1e-5  # how near a level comes to one where the prediction says nothing
_BETA_0, _BETA_1 = 0.1, 20.0

Number = TypeVar("Number", float, Tensor)
Model = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Path:
    r"""A path by :math:`\alpha(t)` and :math:`\sigma(t)`, t from 0 (data) to 1 (noise), float64.

    `time_of` gives t for :math:`\sigma/\alpha`, which may be infinite.
    """

    name: str
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    time_of: Callable[[Tensor], Tensor]

    def level(self, t: Tensor | float) -> Tensor:
        r"""The level :math:`s = \sigma/(\alpha+\sigma)` of the rectified flow at t: grids for `sample`."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.sigma(t) / (self.alpha(t) + self.sigma(t))

    def scale(self, t: Tensor | float) -> Tensor:
        r""":math:`\alpha + \sigma`, what the sampler's state is multiplied by to be the model's."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.alpha(t) + self.sigma(t)


def _vp_alpha(t: Tensor) -> Tensor:
    return torch.exp(-(t**2) * (_BETA_1 - _BETA_0) / 4 - t * _BETA_0 / 2)


def _vp_time(alpha: Tensor) -> Tensor:
    """The t of an alpha: the root of a parabola in t."""
    half, span = _BETA_0 / 2, _BETA_1 - _BETA_0
    return ((half**2 - span * alpha.log()).sqrt() - half) * 2 / span


PATHS: dict[str, Path] = {
    "rf": Path("rf", lambda t: 1 - t, lambda t: t + 0, lambda r: 1 / (1 + 1 / r)),
    # Song et al., 2021, with beta from 0.1 to 20
    "vp": Path(
        "vp",
        _vp_alpha,
        lambda t: (1 - _vp_alpha(t) ** 2).sqrt(),
        lambda r: _vp_time((1 + r**2).rsqrt()),
    ),
    "sub_vp": Path(
        "sub_vp",
        _vp_alpha,
        lambda t: 1 - _vp_alpha(t) ** 2,
        lambda r: _vp_time(2 / (r + (r**2 + 4).sqrt())),
    ),
    "cosine": Path(
        "cosine",
        lambda t: torch.sin(math.pi / 2 * (1 - t)),  # the cosine, 0 at 1 to the bit
        lambda t: torch.sin(math.pi / 2 * t),
        lambda r: torch.atan(r) * (2 / math.pi),
    ),
}


def conversion(have: str, want: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    r"""Returns (a, b) of want = a x + b have, at x = alpha x0 + sigma eps.

    Args:
        have, want: of `PREDICTIONS`.
        alpha, sigma: numbers, or float64 tensors of one shape, which are not checked for zeros.

    Raises:
        ValueError: an unknown prediction, or a number by which the conversion divides is 0: the noise says
            nothing about the data at alpha = 0, nor the data about the noise at sigma = 0.
    """
    for name in (have, want):
        if name not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {name!r}")
    if have == want:
        return alpha * 0, alpha * 0 + 1
    if have == "x0":
        data, noise = (sigma * 0, sigma * 0 + 1), None
    elif have in ("eps", "score"):
        scale = sigma * 0 + 1 if have == "eps" else -sigma
        data, noise = None, (sigma * 0, scale)
    elif have == "u":
        total = alpha + sigma
        data, noise = (1 / total, -sigma / total), (1 / total, alpha / total)
    else:
        total = alpha * alpha + sigma * sigma
        data, noise = (alpha / total, -sigma / total), (sigma / total, alpha / total)
    if want in ("x0", "u", "w") and data is None:
        _divides(alpha, have, want, "alpha")
        data = (1 / alpha, -sigma * noise[1] / alpha)
    if want in ("eps", "u", "w", "score") and noise is None:
        _divides(sigma, have, want, "sigma")
        noise = (1 / sigma, -alpha / sigma)
    if want == "x0":
        return data
    if want == "eps":
        return noise
    if want == "score":
        _divides(sigma, have, want, "sigma")
        return -noise[0] / sigma, -noise[1] / sigma
    p, q = (1, 1) if want == "u" else (alpha, sigma)
    return p * noise[0] - q * data[0], p * noise[1] - q * data[1]


def convert(x: Tensor, prediction: Tensor, have: str, want: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns what `prediction`, of kind `have`, says about `want`, in one pass; see `conversion`.

    Args:
        x: the state on the path, `[batch, ...]`.
        alpha, sigma: row scalars of x, tensors.
    """
    a, b = (c.to(accumulator(x.dtype)) for c in conversion(have, want, alpha.double(), sigma.double()))
    return affine_step(x, prediction, a, b)


def step_coefficients(
    prediction: str, alpha: float, sigma: float, next_alpha: float, next_sigma: float
) -> tuple[float, float]:
    r"""Returns (a, b) of the first-order step :math:`x' = a x + b\,prediction` to (alpha', sigma').

    DDIM's on every path, Euler's on the rectified flow: :math:`x' = \alpha' x_0 + \sigma'\epsilon`.

    Raises:
        ValueError: a prediction that says nothing here ("eps" and "score" at alpha 0, "x0" at sigma 0).
    """
    data = conversion(prediction, "x0", alpha, sigma)
    noise = conversion(prediction, "eps", alpha, sigma)
    return next_alpha * data[0] + next_sigma * noise[0], next_alpha * data[1] + next_sigma * noise[1]


def as_velocity(
    model: Model,
    *,
    prediction: str = "eps",
    path: str = "vp",
    time: Callable[[Tensor], Tensor] = lambda t: t,
) -> Model:
    r"""Returns the velocity of the rectified flow that a model of another path or prediction stands for.

    The sampler's state is :math:`z = x/(\alpha+\sigma)`: noise of unit variance at level 1, data at 0. Levels
    beyond the path's last (t = 1; 0.9934 for "vp") are taken for it, and levels at which the prediction says
    nothing ("eps" and "score" at 1, "x0" at 0) are evaluated 1e-5 away.

    Args:
        model: `model(x, t)`, t `[batch]`; a tensor or the tuple of a guide.
        prediction: of `PREDICTIONS`.
        path: of `PATHS`.
        time: what the model is given for t, e.g. `lambda t: 1000 * t`.

    Raises:
        ValueError: an unknown prediction or path.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    chosen = PATHS[path]
    top = float(chosen.level(1.0))
    low, high = (
        (_EDGE if prediction == "x0" else 0.0),
        top - (_EDGE if prediction in ("eps", "score") and top == 1 else 0.0),
    )

    def velocity(z: Tensor, level: Tensor) -> Tensor | tuple[Tensor, ...]:
        s = level.double().clamp(low, high)
        t = chosen.time_of(s / (1 - s)).clamp(max=1.0)
        alpha, sigma = chosen.alpha(t), chosen.sigma(t)
        wide = accumulator(z.dtype)
        x = z if path == "rf" else linear_combination([z], (alpha + sigma).to(wide)[None])
        result = model(x, time(t.to(z.dtype)))
        if prediction == "u":
            return result
        a, b = (c.to(wide) for c in conversion(prediction, "u", alpha, sigma))
        if isinstance(result, Tensor):
            return affine_step(x, result.contiguous(), a, b)
        return tuple(affine_step(x, p.contiguous(), a, b) for p in result)

    return velocity


def _divides(divisor: float | Tensor, have: str, want: str, name: str) -> None:
    if not isinstance(divisor, Tensor) and divisor == 0:
        raise ValueError(f"{have} says nothing about {want} where {name} is 0")
