"""The noise levels of a diffusers configuration, and plans for models whose time runs the other way."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rfkernels.samplers import Plan
from rfkernels.samplers.schedules import (
    beta,
    exponential,
    karras,
    linear,
    stretch_to_terminal,
    time_shift,
    time_shift_exponential,
    time_shift_linear,
)

__all__ = ["base_levels", "plan_in_time", "shaped_levels"]


def base_levels(
    steps: int,
    sigmas: Sequence[float] | Tensor | None,
    sigma_max: float = 1.0,
    sigma_min: float | None = None,
) -> Tensor:
    """Levels before the shift, without the 0: those given, or N uniform ones towards 0, or to `sigma_min`."""
    if sigmas is None:
        uniform = linear(steps)[:-1]
        if sigma_min is None:
            return sigma_max * uniform
        return torch.linspace(sigma_max, sigma_min, steps, dtype=torch.float64)
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.ndim == 1 and len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    if levels.ndim != 1 or len(levels) < 1 or not ((levels > 0) & (levels <= 1)).all():
        raise ValueError(f"set_timesteps: levels must lie above 0 and up to 1, got {levels.tolist()}")
    return levels


def shaped_levels(base: Tensor, config: Mapping[str, Any], shift: float, mu: float | None) -> Tensor:
    """Shifted, stretched and spaced again, in this order, as a scheduler's configuration says."""
    if not config["use_dynamic_shifting"]:
        levels = time_shift(base, shift)
    elif mu is None:
        raise ValueError("set_timesteps: mu must be given where use_dynamic_shifting is True, got None")
    else:
        move = time_shift_exponential if config["time_shift_type"] == "exponential" else time_shift_linear
        levels = move(base, float(mu))
    if config["shift_terminal"]:
        levels = stretch_to_terminal(levels, config["shift_terminal"])
    ends = {"sigma_max": levels[0].item(), "sigma_min": levels[-1].item()}
    for name, make in (("karras", karras), ("exponential", exponential), ("beta", beta)):
        if config[f"use_{name}_sigmas"]:
            levels = make(len(levels), **ends)[:-1]
    return levels


def plan_in_time(plan: Plan) -> Plan:
    """The plan for velocities dx/dt with t = 1 - sigma: the coefficients of velocities change their signs.

    So every method works on such models, those too that need the estimate of the data.
    """
    turned, stages = {"v"}, []  # names of the memory that hold velocities as they came
    for stage in plan.stages:
        writes = {
            name: {k: -c if k in turned else c for k, c in form.items()}
            for name, form in stage.writes.items()
        }
        stages.append(replace(stage, writes=writes))
        kept = {name: source in turned for name, source in stage.keeps.items()}
        turned = {n for n in turned if n not in stage.writes and kept.get(n, True)} | {
            n for n in kept if kept[n]
        }
    return replace(plan, stages=tuple(stages), adapted=None)
