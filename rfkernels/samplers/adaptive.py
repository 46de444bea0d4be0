r"""Dormand and Prince's 5(4) pair with error control: as many steps as the tolerance needs.

Every attempt is a plan of six stages, one launch each; the error's norm is one launch and a pass or two of
torch, and then the host waits for one number for each sample: whether to accept, and how far to go next.
Steps are those of SciPy's RK45 (Hairer, Norsett and Wanner, "Solving ODEs I", II.4): a step is accepted if

.. math:: err = RMS\Big(\frac{h\sum_i E_i k_i}{atol + rtol\max(|x|, |x'|)}\Big) < 1

and the next one is :math:`0.9\,err^{-1/5}` times as long, between 0.2 and 10, at most 1 after a rejection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfkernels.ops import combine, moments
from rfkernels.ops._register import accumulator, expand_rows
from rfkernels.samplers._grid import check_grid
from rfkernels.samplers.guidance import Guide
from rfkernels.samplers.plan import Plan, Stage, init, step

__all__ = ["Accepted", "dopri5"]

_C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
_SAFETY, _SMALLEST, _LARGEST = 0.9, 0.2, 10.0

Velocity = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Accepted:
    """What `on_step` sees after an attempt in which any sample moved: from level `sigma` [batch] to x."""

    count: int
    sigma: np.ndarray
    x: Tensor
    start: Tensor
    velocity: Tensor


def dopri5(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    guide: Guide | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    control: str = "sample",
    max_evaluations: int = 10000,
    on_step: Callable[[Accepted], bool | None] = lambda info: None,
) -> Tensor:
    """Returns the state at the last of `sigmas`, from x at the first; those in between do not matter.

    Args:
        velocity, x: as of `sample`; sigma is `[batch]`, a level for each sample.
        guide: without momentum and without what depends on the step's number, as steps are not known; one
            that depends on the noise level needs `control="batch"`.
        control: "sample": errors and steps are each sample's own, so that its result does not depend on the
            batch around it, and the batch runs as long as its hardest sample; "batch": one error, the RMS
            over all samples, and one step for all.
        on_step: returning True ends the run.

    Raises:
        ValueError: tolerances that are not positive, a velocity that is not finite, a step that becomes
            smaller than rounding, more than `max_evaluations`.
    """
    levels = check_grid(sigmas)
    if np.ndim(levels[0]) > 1:
        raise ValueError("dopri5 takes sigmas [steps + 1] or [steps + 1, batch], a level for each sample")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"dopri5: rtol and atol must be positive, got {rtol} and {atol}")
    if control not in ("sample", "batch"):
        raise ValueError(f"dopri5: control must be sample or batch, got {control!r}")
    if guide is not None and (guide.momentum or guide.zero_steps or guide.by_step):
        raise ValueError("dopri5 needs a guide without momentum or a window of steps, and with zero_steps=0")
    if guide is not None and guide.by_level and control == "sample":
        raise ValueError('dopri5: a guide that depends on the level needs control="batch"')
    if control == "batch" and np.ndim(levels[0]):
        raise ValueError('dopri5: levels for each sample need control="sample"')
    run = _Run(velocity, guide, rtol, atol, control == "batch")
    sigma, goal = (np.broadcast_to(np.float64(levels[i]), (len(x),)).copy() for i in (0, -1))
    if len(x) == 0:
        return x.clone()
    k1, h = run.begin(x, sigma, goal)
    state, rejected, count = x, np.zeros(len(x), dtype=bool), 0
    while (sigma != goal).any():
        if run.evaluations + 6 > max_evaluations:
            raise ValueError(
                f"dopri5: more than {max_evaluations} evaluations: raise rtol, atol or the limit"
            )
        h = np.where(np.abs(h) > np.abs(goal - sigma), goal - sigma, h)
        reached = np.where(h == goal - sigma, goal, sigma + h)
        if ((reached == sigma) & (sigma != goal)).any():
            raise ValueError("dopri5: the step fell below rounding: is the velocity finite and smooth?")
        new, k7, error = run.attempt(state, k1, sigma, h)
        norms = run.norm(error, state, new)
        with np.errstate(all="ignore"):
            factors = np.where(norms == 0, _LARGEST, _SAFETY * norms**-0.2)
        factors = np.clip(np.nan_to_num(factors, nan=_SMALLEST), _SMALLEST, _LARGEST)
        accepted = norms < 1
        old = state, k1, sigma
        state, k1 = _select(accepted, new, state), _select(accepted, k7, k1)
        h = h * np.where(accepted & ~rejected, factors, np.minimum(1.0, factors))
        moved, sigma = accepted & (sigma != goal), np.where(accepted, reached, sigma)
        h = np.where(moved & (h == 0), goal - sigma, h)
        rejected = ~accepted
        if moved.any():
            count += 1
            if on_step(Accepted(count - 1, old[2], state, old[0], old[1])):
                break
    return state


class _Run:
    """The evaluations of one run."""

    def __init__(self, velocity: Velocity, guide: Guide | None, rtol: float, atol: float, together: bool):
        self.velocity, self.guide, self.together = velocity, guide, together
        self.rtol, self.atol = rtol, atol
        self.evaluations = 0

    def begin(self, x: Tensor, sigma: np.ndarray, goal: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The first velocity, and SciPy's first step, signed, by one evaluation more."""
        interval = np.abs(goal - sigma)
        k1 = self.evaluate(x, sigma)
        size, speed = self.norm(x, x, x), self.norm(k1, x, x)
        if not (np.isfinite(size).all() and np.isfinite(speed).all()):
            raise ValueError("dopri5: the state or the first velocity is not finite")
        safe = np.where(speed > 0, speed, 1)
        first = np.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / safe)
        first = np.minimum(first, interval)
        sign = np.sign(goal - sigma)
        (there,) = combine([x, k1], _rows([[1.0, first * sign]], x))
        k2 = self.evaluate(there, sigma + first * sign)
        (change,) = combine([x, k1, k2], _rows([[0.0, -1.0, 1.0]], x))
        curve = self.norm(change, x, x) / np.where(first > 0, first, 1)
        steep = np.maximum(speed, curve)
        with np.errstate(divide="ignore"):
            second = np.where(steep <= 1e-15, np.maximum(1e-6, first * 1e-3), (0.01 / steep) ** 0.2)
        return k1, sign * np.minimum(np.minimum(100 * first, second), interval)

    def evaluate(self, x: Tensor, sigma: np.ndarray) -> Tensor:
        return self.play(x, [Stage(sigma, {}, keeps={"k1": "v"})], ("k1",), {})["k1"]

    def attempt(
        self, x: Tensor, k1: Tensor, sigma: np.ndarray, h: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after h, the velocity there, and h sum E k."""
        (second,) = combine([x, k1], _rows([[1.0, h * _A[1][0]]], x))
        stages = []
        for j in range(1, 7):
            weights = _A[j + 1] if j < 6 else _E
            form = {"start": 1.0} if j < 6 else {}
            form |= {"v" if k == j else f"k{k + 1}": h * w for k, w in enumerate(weights)}
            writes, keeps = ({"x": form}, {f"k{j + 1}": "v"}) if j < 6 else ({"error": form}, {"k7": "v"})
            stages.append(Stage(sigma + _C[j] * h, writes, keeps=keeps, ends=j == 6))
        end = self.play(second, stages, ("error", "k7"), {"start": x, "k1": k1})
        return end["x"], end["k7"], end["error"]

    def play(
        self, x: Tensor, stages: list[Stage], outputs: tuple[str, ...], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        plan = Plan("dopri5", 5, (stages[0].sigma, stages[-1].sigma), tuple(stages), outputs=outputs)
        state = init(plan, x, guide=self.guide, memory=memory)
        while not state.done:
            state = step(state, self.velocity(state.x, state.sigma))
            self.evaluations += 1
        return dict(state.memory)

    @torch.no_grad()
    def norm(self, error: Tensor, a: Tensor, b: Tensor) -> np.ndarray:
        """RMS of error / (atol + rtol max(|a|, |b|)), each sample's or that of all; waits."""
        wide = accumulator(a.dtype)
        scaled = error.to(wide) / (self.atol + self.rtol * torch.maximum(a.abs(), b.abs()).to(wide))
        squares = moments([scaled], scaled.new_ones(1, 1))[:, 1].cpu().numpy()
        count = math.prod(a.shape[1:])
        if self.together:
            squares = np.full_like(squares, squares.mean())
        return np.sqrt(squares / max(count, 1))


def _select(accepted: np.ndarray, new: Tensor, old: Tensor) -> Tensor:
    """Row by row; a rejected state may not be finite, so not a linear combination."""
    if accepted.all():
        return new
    if not accepted.any():
        return old
    rows = torch.from_numpy(accepted).to(new.device)
    return torch.where(expand_rows(rows, new), new, old)


def _rows(table: list[list[float | np.ndarray]], x: Tensor) -> Tensor:
    """Coefficients [outputs, columns, batch] on the device of x."""
    rows = np.array([[np.broadcast_to(c, (len(x),)) for c in row] for row in table], dtype=np.float64)
    return torch.from_numpy(rows).to(accumulator(x.dtype)).to(x.device)
