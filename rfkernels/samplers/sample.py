"""The one sampling loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from rfkernels.ops import affine_step, cfg_step, linear_combination
from rfkernels.ops._register import accumulator
from rfkernels.samplers.methods import Method, method_named, stage_sigmas

__all__ = ["StepInfo", "Velocity", "sample"]

Velocity = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
_MAX_TENSORS = 8  # of one linear_combination


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees: step `step` of `steps` has gone from noise level `sigma` to the state `x`.

    `x0` is the estimate of the data at the step's start, x - sigma v with the guided velocity.
    """

    step: int
    steps: int
    sigma: float
    x: Tensor
    x0: Tensor


def sample(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    method: str = "euler",
    guidance: float | Tensor | None = None,
    callback: Callable[[StepInfo], bool | None] | None = None,
    progress: bool = False,
) -> Tensor:
    r"""Returns the state at the last noise level: the solution of :math:`dx/d\sigma = v(x, \sigma)` from `x`.

    In the convention :math:`x_\sigma = (1-\sigma) x_0 + \sigma\epsilon`, :math:`v = \epsilon - x_0`. All
    arithmetic on states runs in the kernels of `rfkernels.ops`; coefficients are computed in float64 and
    put on the device once. Without `callback`, and without gradients being recorded, the state is updated
    in place in a buffer of the loop's own. Nothing here waits for the device: whether the result is finite
    is for the caller to check.

    Args:
        velocity: `velocity(x, sigma)` with `sigma: [batch]` in the dtype of `x`; the velocity, shaped like x,
            of its dtype or 16-bit beside a float32 state. With `guidance` it returns (uncond, cond).
        x: the state at `sigmas[0]`, `[batch, ...]`, float32 as a rule; left as it is.
        sigmas: strictly decreasing (sampling) or increasing (inversion), see `schedule`.
        method: a name in `METHODS`.
        guidance: w of the velocity uncond + w (cond - uncond), a number or a tensor `[batch]`; it is folded
            into the coefficients of the steps.
        callback: called after each step; returning True ends the loop.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: an unknown method, noise levels that are not monotone, a velocity of the wrong kind.
    """
    table = method_named(method)
    grid = _check_grid(sigmas)
    if x.ndim < 1:
        raise ValueError(f"sample: x must be [batch, ...], got a tensor of shape {list(x.shape)}")
    levels = torch.tensor(stage_sigmas(table, grid), dtype=x.dtype, device=x.device)
    levels = levels[:, None].expand(-1, len(x)).contiguous()
    steps = _plan(table, grid, x, guidance, with_x0=callback is not None)
    in_place = callback is None and not torch.is_grad_enabled()
    state, buffers, history = x, _Buffers(in_place), ()
    for i, step in enumerate(tqdm(steps, disable=None if progress else True, leave=False, unit="step")):
        seen: list[tuple[Tensor, ...]] = []
        for j, stage in enumerate(step.stages):
            at = buffers.write("stage", stage, state, seen) if j else state
            seen.append(_evaluate(velocity, at, levels[i * table.stages + j], step.guide, guidance))
            seen[-1] = buffers.protect(seen[-1])
        x0 = step.x0(state, seen[:1]) if callback else None
        new = buffers.write("state", step.final, state, [*seen, *history])
        if table.multistep:
            history = seen[:1]
        state = new
        if callback and callback(StepInfo(i, len(steps), grid[i], state, x0)):
            break
    return state


@dataclass(frozen=True)
class _Launch:
    """state + sum_k c_k v_k in one kernel; velocities with coefficient 0 are left out."""

    uses: tuple[int, ...]
    coefs: Tensor  # [1 + tensors, *rows], the first is 1
    guidance: Tensor | None

    def __call__(self, state: Tensor, velocities: Sequence[tuple[Tensor, ...]], out: Tensor | None = None):
        tensors = [t for k in self.uses for t in velocities[k]]
        if len(self.uses) > 1:
            return linear_combination([state, *tensors], self.coefs, out=out)
        if self.guidance is None:
            return affine_step(state, *tensors, self.coefs[0], self.coefs[1], out=out)
        return cfg_step(state, *tensors, self.guidance, self.coefs[0], self.coefs[1], out=out)


@dataclass(frozen=True)
class _Step:
    stages: tuple[_Launch | None, ...]
    final: _Launch
    x0: _Launch | None
    guide: Tensor | None  # [2]: (1 - w, w), where guidance does not fit into the launches


class _Buffers:
    """The loop's own memory: one tensor for the state, one for the stages in between."""

    def __init__(self, in_place: bool):
        self.in_place = in_place
        self.tensors: dict[str, Tensor] = {}

    def write(
        self, name: str, launch: _Launch, state: Tensor, velocities: Sequence[tuple[Tensor, ...]]
    ) -> Tensor:
        result = launch(state, velocities, out=self.tensors.get(name))
        if self.in_place:
            self.tensors[name] = result
        return result

    def protect(self, velocity: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A velocity that lives in one of the buffers (`lambda x, sigma: x`) would be overwritten."""
        ours = {t.untyped_storage().data_ptr() for t in self.tensors.values()}
        return tuple(v.clone() if v.untyped_storage().data_ptr() in ours else v for v in velocity)


def _evaluate(velocity, at, sigma, guide, guidance) -> tuple[Tensor, ...]:
    result = velocity(at, sigma)
    pair = isinstance(result, (tuple, list))
    if pair != (guidance is not None) or (pair and len(result) != 2):
        wanted = "one tensor" if guidance is None else "a pair (uncond, cond), since guidance is given"
        got = f"a sequence of {len(result)}" if pair else type(result).__name__
        raise ValueError(f"sample: velocity must return {wanted}, got {got}")
    result = tuple(result) if pair else (result,)
    for v in result:
        if not isinstance(v, Tensor) or v.shape != at.shape:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"sample: velocity must have the shape of x {list(at.shape)}, got {got}")
    result = tuple(v.contiguous() for v in result)
    return result if guide is None else (linear_combination(result, guide.to(accumulator(result[0].dtype))),)


def _plan(
    table: Method, grid: list[float], x: Tensor, guidance: float | Tensor | None, with_x0: bool
) -> list[_Step]:
    """The launches of every step, their coefficients on the device of x."""
    factors = w = guide = None
    if guidance is not None:
        w = torch.as_tensor(guidance, dtype=accumulator(x.dtype), device=x.device)
        if w.shape not in (torch.Size([]), x.shape[:1]):
            raise ValueError(f"sample: guidance must be a number or [{len(x)}], got {list(w.shape)}")
        factors = torch.stack([1 - w, w])
        if 1 + 2 * table.terms > _MAX_TENSORS:
            factors, guide, w = None, factors, None
    rows: list[tuple[float, ...]] = []
    for i, (start, end) in enumerate(pairwise(grid)):
        h, previous = end - start, grid[i] - grid[i - 1] if i else None
        rows += [tuple(h * weight for weight in row) for row in table.a[1:]]
        rows += [table.weights(h, previous), (-start,)]
    launches = iter(_launches(rows, x, factors, w))
    steps = []
    for _ in grid[1:]:
        stages = (None, *[next(launches) for _ in table.a[1:]])
        final, x0 = next(launches), next(launches)
        steps.append(_Step(stages, final, x0 if with_x0 else None, guide))
    return steps


def _launches(
    rows: list[tuple[float, ...]], x: Tensor, factors: Tensor | None, w: Tensor | None
) -> list[_Launch]:
    """One launch per row of velocity coefficients; all coefficients go to the device in one copy."""
    uses = [tuple(k for k, c in enumerate(row) if c != 0) or (0,) for row in rows]
    used = [[1.0, *(row[k] for k in use)] for row, use in zip(rows, uses, strict=True)]
    flat = torch.tensor([c for row in used for c in row], dtype=accumulator(x.dtype), device=x.device)
    coefs = list(flat.split([len(row) for row in used]))
    if factors is not None:
        coefs = [c if len(c) == 2 else _with_guidance(c, factors) for c in coefs]
    return [_Launch(use, c, w) for use, c in zip(uses, coefs, strict=True)]


def _with_guidance(coefs: Tensor, factors: Tensor) -> Tensor:
    """(1, c_1, ...) for guided velocities -> (1, c_1 (1 - w), c_1 w, ...) for pairs; factors: [2, *rows]."""
    rows = factors.shape[1:]
    pairs = coefs[1:].reshape(-1, 1, *[1] * len(rows)) * factors
    return torch.cat([coefs[:1].reshape(1, *[1] * len(rows)).expand(1, *rows), pairs.flatten(0, 1)])


def _check_grid(sigmas: Tensor) -> list[float]:
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sample: sigmas must be [steps + 1] with at least one step, got {list(sigmas.shape)}"
        )
    steps = sigmas.diff()
    if not (sigmas.isfinite().all() and ((steps < 0).all() or (steps > 0).all())):
        raise ValueError(f"sample: sigmas must be finite and strictly monotone, got {sigmas.tolist()}")
    return sigmas.tolist()
