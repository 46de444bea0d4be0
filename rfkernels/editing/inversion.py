r"""Inversion and editing of pictures by a controlled rectified flow, and plain inversion.

RF-Inversion (Rout et al., "Semantic image inversion and editing using rectified stochastic differential
equations", 2024) pulls the flow towards a given end: with remaining time :math:`\tau` and end y, the pull
is :math:`(y - x)/\tau`, the optimal control of :math:`dx = c\,dt` that must end in y. OTIP (Lupascu and
Stupariu, 2025) adds a pull whose size is clipped for each token. All in the convention
:math:`x_\sigma = (1-\sigma)x_0 + \sigma\epsilon`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rfkernels.editing._launches import (
    Launches,
    Velocity,
    evaluate,
    falling,
    finite,
    levels,
    like,
    one_of,
    rising,
    weight_of,
)
from rfkernels.ops import combine, noise_keys
from rfkernels.ops._register import accumulator
from rfkernels.samplers import sample

__all__ = ["Transport", "invert", "rf_inversion", "rf_inversion_edit"]


def invert(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    method: str = "rf-solver",
    guidance: float | Tensor | None = None,
) -> Tensor:
    r"""Returns the noise that the flow carries to the data `x`: `sample` along the grid turned upwards.

    RF-Solver (Wang et al., "Taming rectified flow for inversion and editing", 2024) is the midpoint rule: two
    evaluations a step, an error of a round trip of order 3; Euler's is of order 1. Guidance other than 1
    makes an inversion inexact.

    Args:
        velocity: as of `sample`.
        x: the data, `[batch, ...]`.
        sigmas: the grid of sampling, from 1 down to 0 (or part of it), or the same rising.
        method: a method of `sample`.
        guidance: as of `sample`.

    Raises:
        ValueError: as `sample`.
    """
    grid = torch.as_tensor(sigmas, dtype=torch.float64)
    if grid.ndim == 1 and len(grid) > 1 and grid[0] > grid[-1]:
        grid = grid.flip(0)
    return sample(velocity, x, grid, method=method, guidance=guidance)


@torch.no_grad()
def rf_inversion(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Tensor | None = None,
    gamma: float = 0.5,
    guidance: float | Tensor | None = None,
    seeds: int | Sequence[int] = 0,
    compat: str | None = None,
) -> Tensor:
    r"""Returns structured noise: the end of :math:`dx/d\sigma = v + \gamma((y - x)/(1-\sigma) - v)`.

    gamma 0 is plain inversion by Euler's method, gamma 1 returns y exactly. Each step is one launch; without
    `noise` y is drawn in it and never stored.

    `compat="diffusers"` is the released pipeline: step i of N asks for the velocity, and controls, at
    :math:`i/(N+1)`, but moves by :math:`s_i - s_{i+1}` of the falling grid, so that the velocity belongs to
    another noise level (at 28 steps and 4096 tokens .48 where the state has .24) and gamma 1 misses y.

    Args:
        velocity: `velocity(x, sigma)`, with an empty prompt; (uncond, cond) with `guidance`.
        x: the data, `[batch, ...]`; left as it is.
        sigmas: rising from 0 to 1 (or below), strictly; `schedule(...).flip(0)`.
        noise: y, shaped like `x`; None for normal noise from `seeds`.
        gamma: 0 .. 1.
        guidance: scale of classifier-free guidance, a number or `[batch]`; folded into the launch.
        seeds: one for all or one for each sample.
        compat: None or "diffusers".

    Raises:
        ValueError: a grid that does not rise within 0 .. 1, a velocity of the wrong kind, another `compat`.
    """
    name = "rf_inversion"
    grid = rising(name, sigmas)
    one_of(name, "compat", compat, (None, "diffusers"))
    finite(name, "gamma", gamma)
    steps, at = [], grid[:-1]
    for i, (sigma, end) in enumerate(pairwise(grid)):
        h, left = end - sigma, 1 - sigma
        if compat:
            n = len(grid) - 1
            h, left = grid[n - i] - grid[n - i - 1], 1 - i / (n + 1)
        pull = gamma * (h / left)
        steps.append([{"x": 1 - pull, "v": h * (1 - gamma), "y": pull, "z": pull}])
    if compat:
        at = [i / len(grid) for i in range(len(grid) - 1)]
    weight = weight_of(name, guidance, x)
    given = noise is not None
    steps = [[{k: c for k, c in row.items() if k != ("z" if given else "y")} for row in s] for s in steps]
    names = ["x", "v", *(["y"] if given else [])]
    launch = Launches(x, names, steps, weight=weight, noise=None if given else "fixed")
    others = [like(name, "noise", noise, x)] if given else []
    keys = None if given else noise_keys(seeds, len(x), device=x.device)
    sigma, x, out = levels(at, x), x.contiguous(), None
    for i in range(len(steps)):
        v = evaluate(name, velocity, x, sigma[i], guidance is not None)
        (x,) = out = launch(i, [x, *v, *others], keys=keys, out=out)
    return x


@dataclass(frozen=True)
class Transport:
    r"""OTIP's pull towards the data: :math:`v \mathrel{+}= s(d\min(1, r/|d|) - v)`, :math:`d = (x-y)/\sigma`.

    Norms are of a token, the last axis: states are `[batch, tokens, channels]`. Of step i of N, with
    `p = i / N`: :math:`s = strength (1 + \cos(\pi\min(p / until, 1)))/2`, times `p / ramp` while `p < ramp`.
    With no clip it is RF-Inversion with :math:`\eta' = 1 - (1-s)(1-\eta)`. `matched` gives d the norm of v
    (`respect_prompt_guidance` in the released code); `floor` is the least sigma to divide by.
    """

    strength: float = 0.1
    until: float = 0.3
    clip: float = 10.0
    ramp: float = 0.05
    floor: float = 0.01
    matched: bool = False

    def __post_init__(self) -> None:
        for field in ("until", "clip", "floor"):
            value = getattr(self, field)
            if not value > 0:
                raise ValueError(f"Transport: {field} must be positive, got {value}")

    def scale(self, step: int, steps: int) -> float:
        """s of a step."""
        part = step / steps
        s = self.strength * (1 + math.cos(math.pi * min(part / self.until, 1))) / 2
        return s * part / self.ramp if part < self.ramp else s


@torch.no_grad()
def rf_inversion_edit(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    target: Tensor,
    eta: float = 0.9,
    start: int = 0,
    stop: int | None = None,
    decay: float | None = None,
    transport: Transport | None = None,
    mask: Tensor | None = None,
    guidance: float | Tensor | None = None,
    stochastic: bool = False,
    seeds: int | Sequence[int] = 0,
) -> Tensor:
    r"""Returns data near `target` that follow the prompt: :math:`dx/d\sigma = v + \eta((x - y)/\sigma - v)`.

    Euler's step from sigma to sigma' is one launch, :math:`x' = (1 - \eta\rho)x + (\sigma'-\sigma)(1-\eta)v +
    \eta\rho y` with :math:`\rho = 1 - \sigma'/\sigma \le 1`: nothing divides by 0, and eta 1 up to the end
    returns y to the bit. A matched transport with guidance takes two.

    `stochastic` follows the SDE of the same marginals with :math:`g^2 = 2\sigma/(1-\sigma)`: a step h adds
    :math:`s z` and moves by :math:`-hv - s^2(x + (1-\sigma)v)/(2\sigma)` with
    :math:`s = \min(\sigma', g\sqrt{h})`; without the bound the drift is that of the paper,
    :math:`-2v - x/(1-\sigma)`. The bound (never more noise than the next level has) keeps coarse grids
    stable; the steps from sigma 1 and to 0 are deterministic.

    Args:
        velocity: `velocity(x, sigma)`; (uncond, cond) with `guidance`.
        x: the state at `sigmas[0]`, as `rf_inversion` returns it; left as it is.
        sigmas: falling, strictly, within 0 .. 1.
        target: y, the data, broadcast to `x`.
        eta: strength of the control in steps `start` <= i < `stop`; above 1 overshoots.
        start, stop: `stop` None is a quarter of the steps (7 of 28), at least one.
        decay: p of :math:`\eta_i = \eta(1 - i/N)^p`, None for no decay.
        transport: OTIP's pull, applied before the control.
        mask: 1 where control and transport act, 0 where the flow is free; broadcast to `x`.
        guidance: scale of classifier-free guidance, a number or `[batch]`.
        stochastic, seeds: the SDE, and the seeds of its noise.

    Raises:
        ValueError: a grid that does not fall within 0 .. 1, a velocity of the wrong kind, eta not finite.
    """
    name = "rf_inversion_edit"
    grid = falling(name, sigmas)
    count = len(grid) - 1
    stop = max(1, count // 4) if stop is None else stop
    finite(name, "eta", eta)
    etas = [eta * ((1 - i / count) ** decay if decay else 1) * (start <= i < stop) for i in range(count)]
    noisy = [_noise(a, b) if stochastic else 0.0 for a, b in pairwise(grid)]
    weight = weight_of(name, guidance, x)
    spans = list(zip(grid, grid[1:], noisy, strict=False))
    free = [[_row(*span)] for span in spans]
    held = [[_row(*span, eta=eta)] for span, eta in zip(spans, etas, strict=True)]
    rows = (held, None) if mask is None else (free, held)
    noise = "moving" if stochastic else None
    plain = Launches(x, ["x", "v", "y"], rows[0], inside=rows[1], weight=weight, noise=noise)
    scales = [transport.scale(i, count) if transport else 0.0 for i in range(count)]
    pull = _Pull(x, spans, etas, scales, transport, weight, mask is not None, noise) if any(scales) else None
    y = like(name, "target", target, x)
    mask = None if mask is None else like(name, "mask", mask, x)
    keys = noise_keys(seeds, len(x), step=1, device=x.device) if stochastic else None
    sigma, x, out = levels(grid, x), x.contiguous(), None
    for i in range(count):
        v = evaluate(name, velocity, x, sigma[i], guidance is not None)
        if scales[i]:
            out = pull(i, x, v, y, mask, keys, out)
        else:
            out = plain(i, [x, *v, y], mask=mask, keys=keys, out=out)
        (x,) = out
    return x


def _row(sigma: float, end: float, noise: float, eta: float = 0.0) -> dict[str, float]:
    """The step of the velocity v + eta ((x - y) / sigma - v), to the noise `noise` of the level `end`."""
    a, b = 1.0, end - sigma
    if noise:
        pull = noise * noise / (2 * sigma)  # g^2 h / 2 sigma
        a, b = 1 - pull, b - pull * (1 - sigma)
    row = {"x": a + eta * (b / sigma), "v": (1 - eta) * b, "y": -eta * (b / sigma)}
    return row | {"z": noise} if noise else row


def _noise(sigma: float, end: float) -> float:
    """The noise of a step of the SDE with g^2 = 2 sigma / (1 - sigma); none from sigma 1 or to 0."""
    if sigma == 1:
        return 0.0
    return min(end, math.sqrt(2 * sigma / (1 - sigma) * (sigma - end)))


class _Pull:
    """Steps with a transport: the guide's result takes the place of the velocity."""

    def __init__(self, x, spans, etas, scales, transport, weight, masked, noise):
        self.split = transport.matched and weight is not None  # norms of the guided velocity
        if self.split:
            self.ones = torch.stack([1 - weight, weight]).to(x.device, accumulator(x.dtype))
            weight = None
        free = [[_row(*span)] for span in spans]
        held = []
        for span, eta, s in zip(spans, etas, scales, strict=True):
            row = _row(*span, eta=eta)
            row["g"] = row.pop("v")
            if weight is not None:  # the guide sees u: what it leaves of w (c - u)
                row["v"], row["u"] = row["g"] * (1 - s), -row["g"] * (1 - s)
            held.append([row])
        self.guided = weight is not None
        rows = (free, held) if masked else (held, None)
        self.launch = Launches(
            x,
            ["x", "u", "y", "c"] if self.guided else ["x", "v", "y"],
            rows[0],
            inside=rows[1],
            weight=weight,
            guide="transport_matched" if transport.matched else "transport",
            guidance=[
                [s, 1 / max(span[0], transport.floor), transport.clip]
                for s, span in zip(scales, spans, strict=True)
            ],
            noise=noise,
        )

    def __call__(self, i, x, v, y, mask, keys, out):
        if self.split:
            v = combine(v, self.ones[None])
        tensors = [x, v[0], y, v[1]] if self.guided else [x, v[0], y]
        return self.launch(i, tensors, mask=mask, keys=keys, out=out)
