r"""The noise levels of published models, as data: `MODEL_SCHEDULES`, and `model_schedule` which makes them.

Every model takes a grid, shifts it (`time_shift`) by a factor k that may depend on the number of image tokens
and of steps, and may stretch it. An exponential time shift by mu is one by :math:`k = e^\mu`, a linear one by
:math:`k = \mu`.

The numbers are those of the models' own code and of diffusers' pipelines (0.42).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rfkernels.samplers.schedules import (
    _ended,
    _require,
    _whole,
    double_shift,
    dynamic_mu,
    linear,
    linear_mu,
    linear_quadratic,
    stretch_to_terminal,
    time_shift,
)

__all__ = [
    "MODEL_SCHEDULES",
    "ModelSchedule",
    "cogview4_mu",
    "flux2_mu",
    "image_tokens",
    "ltx_mu",
    "model_schedule",
    "qwen_image_mu",
]


@dataclass(frozen=True)
class ModelSchedule:
    """How a model's levels are made, and what it is usually run with.

    `factor` is k, or makes it of (tokens, steps). `grid` is the grid before the shift: `uniform` 1, ..., 1/N,
    0; `unipc` .999 (1 - i/N), 0 (of Wan's and HiDream's code); `linear_quadratic`. `compat` is what
    diffusers' pipeline makes instead where that differs: `double_shift`, `unipc` (its own levels of that
    name) or `integer` (whole timesteps from 1000 to 1).
    `pixels` and `frames` are the size of a token. `timesteps` is a kind of `timesteps_for`.
    """

    steps: int
    factor: float | Callable[[int, int], float] = 1.0
    terminal: float | None = None
    grid: str = "uniform"
    compat: str | None = None
    timesteps: str = "float32"
    pixels: int = 16
    frames: int = 1
    guidance: float | None = None


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's empirical mu: above 4300 tokens a line in them, else between two such lines by the steps.

    It jumps: at 50 steps from 2.0447 at 4300 tokens to 1.1847 at 4301, where the dependence on the steps ends
    too. A sweep of sizes across 1049 x 1049 pixels shows the step.
    """
    _whole("tokens", tokens)
    _whole("steps", steps)
    at_200 = 1.6927e-4 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-5 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


def qwen_image_mu(tokens: int) -> float:
    """The line through (256, 0.5) and (8192, 0.9)."""
    return linear_mu(tokens, (256, 0.5), (8192, 0.9))


def ltx_mu(tokens: int) -> float:
    """LTX-Video: the line through (1024, 0.95) and (4096, 2.05)."""
    return linear_mu(tokens, (1024, 0.95), (4096, 2.05))


def cogview4_mu(tokens: int) -> float:
    """0.75 sqrt(tokens / 256) + 0.25, for a linear time shift."""
    _whole("tokens", tokens)
    return 0.75 * math.sqrt(tokens / 256) + 0.25


_HIDREAM_FULL = math.exp(1.15)  # mu of 4096 tokens at every size; the 3.0 of its configuration is not used
_WAN = {"grid": "unipc", "compat": "unipc", "timesteps": "int64", "frames": 4}

MODEL_SCHEDULES: dict[str, ModelSchedule] = {
    "flux.1-dev": ModelSchedule(28, lambda tokens, steps: math.exp(dynamic_mu(tokens)), guidance=3.5),
    "flux.1-schnell": ModelSchedule(4),
    "flux.2": ModelSchedule(50, lambda tokens, steps: math.exp(flux2_mu(tokens, steps)), guidance=4.0),
    "sd3-medium": ModelSchedule(28, 3.0, compat="double_shift", guidance=7.0),
    "sd3.5-large": ModelSchedule(40, 3.0, compat="double_shift", guidance=4.5),
    "sd3.5-medium": ModelSchedule(50, 3.0, compat="double_shift", guidance=5.0),
    "sd3.5-large-turbo": ModelSchedule(4, 3.0, compat="double_shift", guidance=1.0),
    "cogview4": ModelSchedule(
        50, lambda tokens, steps: cogview4_mu(tokens), compat="integer", timesteps="int64", guidance=5.0
    ),
    "qwen-image": ModelSchedule(
        50, lambda tokens, steps: math.exp(qwen_image_mu(tokens)), terminal=0.02, guidance=4.0
    ),
    "qwen-image-lightning": ModelSchedule(8, 3.0, guidance=1.0),
    "ltx-video": ModelSchedule(
        50, lambda tokens, steps: math.exp(ltx_mu(tokens)), terminal=0.1, pixels=32, frames=8, guidance=3.0
    ),
    "wan2.1-t2v": ModelSchedule(50, 5.0, guidance=5.0, **_WAN),
    "wan2.1-i2v-480p": ModelSchedule(40, 3.0, guidance=5.0, **_WAN),
    "wan2.1-i2v-720p": ModelSchedule(40, 5.0, guidance=5.0, **_WAN),
    "wan2.1-flf2v": ModelSchedule(50, 16.0, guidance=5.0, **_WAN),
    "wan2.1-vace": ModelSchedule(50, 16.0, guidance=5.0, **_WAN),
    "wan2.2-t2v-a14b": ModelSchedule(40, 12.0, **_WAN),
    "wan2.2-i2v-a14b": ModelSchedule(40, 5.0, **_WAN),
    "wan2.2-ti2v-5b": ModelSchedule(50, 5.0, pixels=32, guidance=5.0, **_WAN),
    "hidream-i1-full": ModelSchedule(50, _HIDREAM_FULL, grid="unipc", guidance=5.0),
    "hidream-i1-dev": ModelSchedule(28, 6.0, compat="double_shift", guidance=0.0),
    "hidream-i1-fast": ModelSchedule(16, 3.0, compat="double_shift", guidance=0.0),
    "z-image-turbo": ModelSchedule(8, 3.0, guidance=0.0),
    "mochi-1": ModelSchedule(64, grid="linear_quadratic", guidance=4.5),
}


def model_schedule(
    model: str,
    steps: int | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int = 1,
    tokens: int | None = None,
    grid: str | None = None,
    compat: str | None = None,
) -> Tensor:
    """The noise levels `[steps + 1]`, float64, that a published model is run with.

    Args:
        model: a key of `MODEL_SCHEDULES`.
        steps: those usual for the model if None.
        height, width, frames: of the picture or film in pixels; needed, or `tokens`, where the shift depends
            on the size.
        tokens: the number of image tokens, instead of the size.
        grid: another one than the model's: `uniform` is what Wan's DPM-Solver++ uses.
        compat: "diffusers" for the levels of diffusers' pipeline, with the shift of SD3's applied twice.

    Raises:
        ValueError: an unknown model, or a size that is needed and missing.
    """
    _require(model in MODEL_SCHEDULES, f"model must be one of {', '.join(MODEL_SCHEDULES)}, got {model!r}")
    _require(grid in (None, *_GRIDS), f"grid must be one of {', '.join(_GRIDS)}, got {grid!r}")
    _require(compat in (None, "diffusers"), f"compat must be None or 'diffusers', got {compat!r}")
    entry = MODEL_SCHEDULES[model]
    steps = entry.steps if steps is None else steps
    _whole("steps", steps)
    factor = entry.factor
    if callable(factor):
        if tokens is None:
            needed = height is not None and width is not None
            _require(
                needed, f"model {model!r} needs height= and width=, or tokens=, got {height} and {width}"
            )
            tokens = image_tokens(model, height, width, frames)
        factor = factor(tokens, steps)
    if compat and entry.compat == "double_shift":
        return double_shift(steps, factor)
    make = _COMPAT[entry.compat] if compat and entry.compat else _GRIDS[grid or entry.grid]
    levels = time_shift(make(steps)[:-1], factor)
    if compat and entry.compat == "unipc":
        levels[0] -= 1e-6  # its log-SNR is finite then
    if entry.terminal is not None:
        levels = stretch_to_terminal(levels, entry.terminal)
    return _ended(levels)


def image_tokens(model: str, height: int, width: int, frames: int = 1) -> int:
    """How many tokens a picture, or a film of `frames`, has in `model`; sizes are rounded down to whole
    tokens.
    """
    entry = MODEL_SCHEDULES[model]
    for name, value, least in (
        ("height", height, entry.pixels),
        ("width", width, entry.pixels),
        ("frames", frames, 1),
    ):
        _whole(name, value)
        _require(value >= least, f"{name} must be at least {least} for {model!r}, got {value}")
    return (height // entry.pixels) * (width // entry.pixels) * ((frames - 1) // entry.frames + 1)


def _unipc(steps: int) -> Tensor:
    return 0.999 * linear(steps)


def _diffusers_unipc(steps: int) -> Tensor:
    return torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)


def _integer(steps: int) -> Tensor:
    return _ended(torch.linspace(1000, 1, steps, dtype=torch.float64).to(torch.int64) / 1000)


_GRIDS = {"uniform": linear, "unipc": _unipc, "linear_quadratic": linear_quadratic}
_COMPAT = {"unipc": _diffusers_unipc, "integer": _integer}
