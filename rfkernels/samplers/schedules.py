r"""Schedules: the noise levels :math:`\sigma_0 = 1 > \dots > \sigma_N = 0` that a sampler visits.

All are float64 tensors on the CPU, `[steps + 1]`, with the 0 at the end; the maps (`time_shift` and the like)
take and give levels of any shape. What each published model uses is in `model_schedules`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rfkernels.samplers._beta import beta_quantile

__all__ = [
    "SCHEDULES",
    "beta",
    "cosine",
    "double_shift",
    "dynamic",
    "dynamic_mu",
    "exponential",
    "given",
    "invert",
    "karras",
    "linear",
    "linear_mu",
    "linear_quadratic",
    "rectified_flow_times",
    "rfpp",
    "schedule",
    "shift",
    "stretch_to_terminal",
    "time_shift",
    "time_shift_exponential",
    "time_shift_linear",
    "timesteps_for",
]

_TIMESTEPS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "int64": torch.int64,
    "bfloat16": torch.bfloat16,
}


def schedule(name: str, steps: int, **parameters: float | int | str | None) -> Tensor:
    """The noise levels of schedule `name`, a key of `SCHEDULES`; a parameter that is None is not given.

    `schedule("shift", 8, shift=3.0)` is `shift(8, 3.0)`: the parameters are those of the function of that
    name, except that the one of `shift` is called `shift`.

    Raises:
        ValueError: an unknown name, fewer than one step, or a parameter that the schedule does not take.
    """
    _require(name in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    make, needed, optional = SCHEDULES[name]
    chosen = {key: value for key, value in parameters.items() if value is not None}
    for key, value in chosen.items():
        _require(key in (*needed, *optional), f"schedule {name!r} takes no {key}, got {value}")
    for key in needed:
        _require(key in chosen, f"schedule {name!r} needs {key}=, got none")
    return make(steps, *(chosen.pop(key) for key in needed), **chosen)


def linear(steps: int) -> Tensor:
    r"""Uniform: :math:`\sigma_i = 1 - i/N`."""
    _whole("steps", steps)
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def shift(steps: int, factor: float, *, compat: str | None = None) -> Tensor:
    r"""Uniform, shifted towards noise by `time_shift`: k = 3 at 1024 x 1024 of SD3, 5 of Wan.

    The shift is applied once. With `compat="diffusers"` it is `double_shift`, whose last step goes nowhere.
    """
    _require(compat in (None, "diffusers"), f"compat must be None or 'diffusers', got {compat!r}")
    if compat:
        return double_shift(steps, factor)
    return time_shift(linear(steps), factor)


def double_shift(steps: int, factor: float, train_timesteps: int = 1000) -> Tensor:
    r"""The grid of diffusers' flow schedulers where nobody passes sigmas: for parity, not for use.

    :math:`s(\mathrm{linspace}(1, s(1/T), N)), 0` with the shift s applied to its smallest level twice. At N =
    4 and k = 3 it is 1, .858, .602, .0089, 0: the last evaluation moves the state by less than one percent of
    the path. SD3.5's own code has the same grid.
    """
    _whole("steps", steps)
    _whole("train_timesteps", train_timesteps)
    lowest = time_shift(torch.tensor(1 / train_timesteps, dtype=torch.float64), factor).item()
    return _ended(time_shift(torch.linspace(1, lowest, steps, dtype=torch.float64), factor))


def dynamic(steps: int, tokens: int) -> Tensor:
    r"""FLUX.1-dev: shifted by :math:`k = e^\mu` with mu from the number of image tokens, see `dynamic_mu`."""
    return shift(steps, math.exp(dynamic_mu(tokens)))


def dynamic_mu(tokens: int) -> float:
    """The line through (256, 0.5) and (4096, 1.15): `tokens` = height/16 * width/16 in pixels."""
    return linear_mu(tokens, (256, 0.5), (4096, 1.15))


def linear_mu(tokens: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """mu on the line through two points (tokens, mu); it goes on beyond both."""
    _whole("tokens", tokens)
    return low[1] + (high[1] - low[1]) * (tokens - low[0]) / (high[0] - low[0])


def karras(steps: int, *, sigma_max: float = 1.0, sigma_min: float | None = None, rho: float = 7.0) -> Tensor:
    r"""Uniform in :math:`\sigma^{1/\rho}` from `sigma_max` to `sigma_min`, then 0.

    Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, equation 5. By
    default `sigma_min` is 1/N, the last level of the uniform grid. Dense near `sigma_min`: made for levels up
    to 80, not 1.
    """
    high, low = _ends(steps, sigma_max, sigma_min)
    _positive("rho", rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return _respaced((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, high, low)


def exponential(steps: int, *, sigma_max: float = 1.0, sigma_min: float | None = None) -> Tensor:
    r"""Uniform in :math:`\ln\sigma` from `sigma_max` to `sigma_min` (1/N by default), then 0."""
    high, low = _ends(steps, sigma_max, sigma_min)
    levels = torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()
    return _respaced(levels, high, low)


def beta(
    steps: int,
    *,
    sigma_max: float = 1.0,
    sigma_min: float | None = None,
    alpha: float = 0.6,
    beta: float = 0.6,
) -> Tensor:
    r"""Quantiles of Beta(alpha, beta), uniform ones, between `sigma_max` and `sigma_min`, then 0.

    Lee et al., "Beta sampling is all you need", 2024: dense at both ends. `sigma_min` is 1/N by default.
    """
    high, low = _ends(steps, sigma_max, sigma_min)
    _positive("alpha", alpha)
    _positive("beta", beta)
    levels = beta_quantile(1 - torch.linspace(0, 1, steps, dtype=torch.float64), alpha, beta)
    return _respaced(low + levels * (high - low), high, low)


def cosine(steps: int) -> Tensor:
    r""":math:`\sigma = \sin a / (\sin a + \cos a)` with :math:`a = \frac{\pi}{2}(1 - i/N)`.

    The levels of the variance-preserving cosine path :math:`\cos a\,x_0 + \sin a\,\epsilon` brought to the
    straight one by :math:`\sigma/(\alpha + \sigma)`; also the quantiles of SD3's CosMap density (Esser et
    al., 2024).
    """
    angle = linear(steps) * (math.pi / 2)
    levels = angle.sin() / (angle.sin() + angle.cos())
    levels[0] = 1  # to the bit
    return levels


def linear_quadratic(steps: int, *, threshold: float = 0.025, linear_steps: int | None = None) -> Tensor:
    r""":math:`1 - \sigma_i = \tau i/L + q\max(i - L, 0)^2` with :math:`q = (L - \tau N)/(L (N - L)^2)`.

    Of Movie Gen (Polyak et al., 2024) and Mochi 1. The first L steps (N // 2 by default) go linearly
    down to :math:`1 - \tau`, the rest along the parabola that continues them to 0.

    Raises:
        ValueError: levels that do not fall, as where the line alone overshoots 0.
    """
    _whole("steps", steps)
    lines = max(steps // 2, 1) if linear_steps is None else linear_steps
    _whole("linear_steps", lines)
    _require(lines <= steps, f"linear_steps must be at most steps {steps}, got {lines}")
    _require(0 < threshold < 1, f"threshold must be between 0 and 1, got {threshold}")
    if lines == steps:
        return linear(steps)
    i = torch.arange(steps + 1, dtype=torch.float64)
    curve = (lines - threshold * steps) / (lines * (steps - lines) ** 2)
    levels = 1 - threshold * i / lines - curve * (i - lines).clamp(min=0) ** 2
    levels[-1] = 0  # to the bit
    _require(
        bool((levels.diff() < 0).all()),
        f"linear_steps must leave levels that fall: {lines} of {steps} with threshold {threshold} do not",
    )
    return levels


def rfpp(steps: int, *, start: float = 1e-5) -> Tensor:
    """1 - `start`, 1 - 1/N, ..., 0: the grid of 2-RF++'s code (Lee et al., 2024), which scales the noise too.

    Its state at the first level is `(1 - start)` times the noise. Inversion starts at 0.001 there.
    """
    levels = linear(steps)
    _require(0 <= start < 1 / steps, f"start must be at least 0 and less than 1/steps, got {start}")
    levels[0] -= start
    return levels


def rectified_flow_times(sigmas: Tensor, *, start: float = 1e-3, scale: float = 999.0) -> Tensor:
    r""":math:`s\,(\epsilon + (1 - \epsilon)(1 - \sigma))`: what RectifiedFlow's code tells the model.

    Liu et al., 2022. It steps by 1/N but asks at these times, so that its Euler steps go a thousandth too
    far. To have its numbers sample along `linear` and tell the model these times of the levels.
    """
    _require(0 <= start < 1, f"start must be at least 0 and less than 1, got {start}")
    return scale * (start + (1 - start) * (1 - torch.as_tensor(sigmas, dtype=torch.float64)))


def given(sigmas: Sequence[float] | Tensor) -> Tensor:
    """Levels of one's own, checked: falling strictly within [0, 1]; a 0 is added where it is missing."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").clone()
    _require(levels.ndim == 1 and len(levels) >= 1, f"sigmas must be [steps], got {list(levels.shape)}")
    inside = bool(((levels >= 0) & (levels <= 1)).all()) and levels[0] > 0
    _require(inside, f"sigmas must lie within 0 and 1, got {levels.tolist()}")
    _require(bool((levels.diff() < 0).all()), f"sigmas must fall strictly, got {levels.tolist()}")
    return levels if levels[-1] == 0 else _ended(levels)


def time_shift(sigma: Tensor, factor: float) -> Tensor:
    r""":math:`k\sigma / (1 + (k - 1)\sigma)`, which adds :math:`\ln k` to the logit of sigma. 0 and 1 stay.

    Esser et al., "Scaling rectified flow transformers" (SD3), 2024: from n to m tokens
    :math:`k = \sqrt{m/n}`. Shifts compose: by k, then by l is by k l.
    """
    _positive("shift", factor)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return torch.where(sigma == 1, 1.0, factor * sigma / (1 + (factor - 1) * sigma))


def time_shift_exponential(sigma: Tensor, mu: float, power: float = 1.0) -> Tensor:
    r""":math:`e^\mu / (e^\mu + (1/\sigma - 1)^s)`, `time_shift` by :math:`e^\mu` if s = 1. 0 and 1 stay."""
    _require(math.isfinite(mu), f"mu must be a finite number, got {mu}")
    return time_shift_linear(sigma, math.exp(mu), power)


def time_shift_linear(sigma: Tensor, mu: float, power: float = 1.0) -> Tensor:
    r""":math:`\mu / (\mu + (1/\sigma - 1)^s)`, `time_shift` by mu if s = 1 (CogView4). 0 and 1 stay."""
    _positive("mu", mu)
    _positive("power", power)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return mu / (mu + (1 / sigma - 1) ** power)


def stretch_to_terminal(sigma: Tensor, terminal: float) -> Tensor:
    r""":math:`1 - (1 - \sigma)(1 - T)/(1 - \sigma_{last})`: levels `[steps]`, without the 0, that end at T.

    To the bit. The first level stays if it is 1. A single level at 1 has no room to stretch and is returned
    as it is (diffusers divides by zero there).
    """
    _require(0 <= terminal < 1, f"terminal must be at least 0 and less than 1, got {terminal}")
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    _require(sigma.ndim == 1 and len(sigma) >= 1, f"sigma must be [steps], got {list(sigma.shape)}")
    if sigma[-1] == 1:
        return sigma.clone()
    stretched = 1 - (1 - sigma) * ((1 - terminal) / (1 - sigma[-1]))
    stretched[-1] = terminal
    return stretched


def invert(sigmas: Tensor) -> Tensor:
    """1 - sigma: the times t of models that call data 1 and noise 0 (Mochi, diffusers' `invert_sigmas`)."""
    return 1 - torch.as_tensor(sigmas, dtype=torch.float64)


def timesteps_for(sigmas: Tensor, kind: str = "float32", train_timesteps: int = 1000) -> Tensor:
    """What the network is told: `train_timesteps * sigma`, as `float64`, `float32`, `int64` or `bfloat16`.

    `int64` cuts the fraction off, as Wan's, Pusa's and CogView4's code does; `bfloat16` rounds: whole numbers
    above 256 are not all there, and of 100 steps at shift 5 only 89 stay distinct. Results differ by about
    1e-3.
    """
    _require(kind in _TIMESTEPS, f"kind must be one of {', '.join(_TIMESTEPS)}, got {kind!r}")
    _whole("train_timesteps", train_timesteps)
    return (torch.as_tensor(sigmas, dtype=torch.float64) * train_timesteps).to(_TIMESTEPS[kind])


# Name: the function, the parameters that it needs (in its order), those that it may have.
SCHEDULES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...]]] = {
    "linear": (linear, (), ()),
    "shift": (shift, ("shift",), ("compat",)),
    "dynamic": (dynamic, ("tokens",), ()),
    "karras": (karras, (), ("sigma_max", "sigma_min", "rho")),
    "exponential": (exponential, (), ("sigma_max", "sigma_min")),
    "beta": (beta, (), ("sigma_max", "sigma_min", "alpha", "beta")),
    "cosine": (cosine, (), ()),
    "linear_quadratic": (linear_quadratic, (), ("threshold", "linear_steps")),
}


def _ends(steps: int, high: float, low: float | None) -> tuple[float, float]:
    _whole("steps", steps)
    low = high / steps if low is None else low
    good = all(isinstance(s, (int, float)) for s in (high, low)) and 0 < low <= high <= 1
    good = good and (low < high or steps == 1)
    _require(good, f"required 0 < sigma_min < sigma_max <= 1, got {low} and {high}")
    return high, low


def _respaced(levels: Tensor, high: float, low: float) -> Tensor:
    """The ends to the bit, then 0; one step starts at the high end."""
    levels[-1] = low
    levels[0] = high
    return _ended(levels)


def _ended(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def _whole(name: str, value: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(good, f"{name} must be a whole number of at least 1, got {value}")


def _positive(name: str, value: float) -> None:
    good = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    _require(good, f"{name} must be a positive number, got {value}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
