r"""Schedules: the noise levels :math:`\sigma_0 = 1 > \dots > \sigma_N = 0` that a sampler visits.

All are float64 tensors on the CPU, `[steps + 1]`, made from the uniform grid by a time shift.
"""

import math

import torch
from torch import Tensor

__all__ = ["SCHEDULES", "dynamic", "dynamic_mu", "linear", "schedule", "shift"]

SCHEDULES = ("linear", "shift", "dynamic")


def schedule(name: str, steps: int, *, shift: float | None = None, tokens: int | None = None) -> Tensor:
    """The noise levels of schedule `name`: `linear`, `shift` (needs `shift`) or `dynamic` (needs `tokens`).

    Raises:
        ValueError: an unknown name, fewer than one step, or a parameter that the schedule does not take.
    """
    _require(name in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    takes = {"linear": None, "shift": "shift", "dynamic": "tokens"}[name]
    for parameter, value in (("shift", shift), ("tokens", tokens)):
        if parameter == takes:
            _require(value is not None, f"schedule {name!r} needs {parameter}=, got none")
        else:
            _require(value is None, f"schedule {name!r} takes no {parameter}, got {value}")
    if name == "linear":
        return linear(steps)
    return globals()["shift"](steps, shift) if name == "shift" else dynamic(steps, tokens)


def linear(steps: int) -> Tensor:
    r"""Uniform: :math:`\sigma_i = 1 - i/N`."""
    _require(
        isinstance(steps, int) and steps >= 1, f"steps must be a whole number of at least 1, got {steps}"
    )
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def shift(steps: int, factor: float) -> Tensor:
    r"""Uniform, shifted towards noise: :math:`\sigma \mapsto k\sigma / (1 + (k - 1)\sigma)`.

    Esser et al., "Scaling rectified flow transformers" (SD3), 2024: k = 3 at 1024 x 1024. The ends stay at
    1 and 0 and the shift is applied once (diffusers' default grid applies it twice to its smallest level).
    """
    good = isinstance(factor, (int, float)) and math.isfinite(factor) and factor > 0
    _require(good, f"shift must be a positive number, got {factor}")
    sigma = linear(steps)
    shifted = factor * sigma / (1 + (factor - 1) * sigma)
    shifted[0] = 1  # to the bit
    return shifted


def dynamic(steps: int, tokens: int) -> Tensor:
    r"""FLUX.1-dev: shifted by :math:`k = e^\mu` with mu from the number of image tokens, see `dynamic_mu`."""
    return shift(steps, math.exp(dynamic_mu(tokens)))


def dynamic_mu(tokens: int) -> float:
    """The line through (256, 0.5) and (4096, 1.15): `tokens` = height/16 * width/16 in pixels."""
    good = isinstance(tokens, int) and tokens >= 1
    _require(good, f"tokens must be a whole number of at least 1, got {tokens}")
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
