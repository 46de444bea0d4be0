"""The front door: the loop around `step`."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rfkernels.ops import combine, noise_keys
from rfkernels.ops._register import accumulator
from rfkernels.samplers._rows import Row
from rfkernels.samplers.adaptive import Accepted, dopri5
from rfkernels.samplers.guidance import Guide, as_guide
from rfkernels.samplers.methods import method_named, plan_for
from rfkernels.samplers.plan import Buffers, Plan, State, advance, init

__all__ = ["StepInfo", "Velocity", "keys_for", "run_plan", "sample"]

Velocity = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, ...]"]
Callback = Callable[["StepInfo"], "bool | None"]


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees: step `step` of `steps` has gone from noise level `sigma` to the state `x`.

    `x0` is the estimate of the data at the step's first evaluation, x - sigma v with the guided velocity.
    `sigma` is a number, or an array for levels per sample or frame. Of adaptive methods `steps` is 0.
    """

    step: int
    steps: int
    sigma: float | np.ndarray
    x: Tensor
    x0: Tensor


def sample(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    method: str = "euler",
    guidance: float | Tensor | Guide | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    seeds: int | Sequence[int] | Sequence[torch.Generator] | None = None,
    rng: str = "philox",
    options: dict[str, Any] | None = None,
) -> Tensor:
    r"""Returns the state at the last noise level: the solution of :math:`dx/d\sigma = v(x, \sigma)` from `x`.

    In the convention :math:`x_\sigma = (1-\sigma) x_0 + \sigma\epsilon`, :math:`v = \epsilon - x_0`. Every
    evaluation is followed by one launch of `rfkernels.ops.combine`; coefficients are computed in float64 and
    put on the device once. Without `callback`, and without gradients being recorded, the state is updated
    in place in buffers of the loop's own. Nothing here waits for the device (but for adaptive methods):
    whether the result is finite is for the caller to check.

    Args:
        velocity: `velocity(x, sigma)` with `sigma: [batch]` (or rows of `sigmas`) in the dtype of `x`; the
            velocity, shaped like x, of its dtype or 16-bit beside a float32 state. With `guidance` it returns
            the guide's tensors, (uncond, cond) as a rule.
        x: the state at `sigmas[0]`, `[batch, ...]`, float32 as a rule; left as it is.
        sigmas: `[steps + 1]`, strictly decreasing (sampling) or increasing (inversion), see `schedule`; or
            `[steps + 1, *rows]`, levels per sample or frame, which may rest.
        method: a name in `METHODS`.
        guidance: a guide of `rfkernels.samplers.guidance`, or the scale w of uncond + w (cond - uncond), a
            number or a tensor `[batch]`.
        callback: called after each step; returning True ends the loop.
        progress: show a progress bar on a terminal.
        seeds: of stochastic methods: a number, or one for each sample, which then does not depend on the
            batch around it.
        rng: "philox", noise made within the launch, or "torch-cpu", drawn by one `torch.Generator` on the CPU
            for each sample (`seeds` may be such generators), a copy and a pass more.
        options: of the method, see `plan_for`.

    Raises:
        ValueError: an unknown method, noise levels that are not monotone, a velocity of the wrong kind, a
            stochastic method without seeds.
    """
    entry = method_named(method)
    _warn_if_distilled(velocity, guidance)
    if entry.adaptive:
        return _adaptive(velocity, x, sigmas, guidance, callback, progress, options or {})
    plan = plan_for(method, sigmas, **(options or {}))
    keys = keys_for(seeds, rng, x) if plan.stochastic else None
    return run_plan(plan, velocity, x, guidance=guidance, callback=callback, progress=progress, keys=keys)


def run_plan(
    plan: Plan,
    velocity: Velocity,
    x: Tensor,
    *,
    guidance: float | Tensor | Guide | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    keys: Tensor | Sequence[torch.Generator] | None = None,
    memory: dict[str, Tensor] | None = None,
) -> Tensor:
    """Returns the result of a plan, see `sample` and `init`."""
    state = init(plan, x, guide=guidance, keys=keys, memory=memory, preview=callback is not None)
    buffers = Buffers() if callback is None and not torch.is_grad_enabled() else None
    hidden = None if progress else True
    with tqdm(total=plan.steps, disable=hidden, leave=False, unit="step", initial=_first(state)) as bar:
        while not state.done:
            stage = state.stage
            state = advance(state, velocity(state.x, state.sigma), buffers)
            if not stage.ends:
                continue
            bar.update()
            if callback and callback(_info(state, stage.step, stage.result)):
                return state.memory[stage.result]
    return state.memory[state.plan.stages[-1].result]


def _adaptive(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    guidance: float | Tensor | Guide | None,
    callback: Callback | None,
    progress: bool,
    options: dict[str, Any],
) -> Tensor:
    taken = {
        name: options[name] for name in ("rtol", "atol", "control", "max_evaluations") if name in options
    }
    if len(taken) < len(options):
        unknown = ", ".join(sorted(options.keys() - taken.keys()))
        raise ValueError(f"dopri5 takes rtol, atol, control, max_evaluations, got {unknown}")
    if x.ndim < 1:
        raise ValueError(f"x must be [batch, ...], got {list(x.shape)}")
    together = options.get("control") == "batch"
    with tqdm(disable=None if progress else True, leave=False, unit="step") as bar:

        def on_step(info: Accepted) -> bool | None:
            bar.update()
            if callback is None:
                return None
            levels = torch.from_numpy(-info.sigma).to(accumulator(x.dtype)).to(x.device)
            coefs = torch.stack([torch.ones_like(levels), levels])[None]
            (x0,) = combine([info.start, info.velocity], coefs)
            sigma = float(info.sigma[0]) if together else info.sigma
            return callback(StepInfo(info.count, 0, sigma, info.x, x0))

        guide = as_guide(guidance, len(x))
        return dopri5(velocity, x, sigmas, guide=guide, on_step=on_step, **taken)


def keys_for(
    seeds: int | Sequence[int] | Sequence[torch.Generator] | None, rng: str, x: Tensor
) -> Tensor | list[torch.Generator] | None:
    """The `keys` of `init` for `seeds`.

    Raises:
        ValueError: an unknown rng, or seeds that are not 0 .. 2**63 - 1, one or as many as samples.
    """
    if rng not in ("philox", "torch-cpu"):
        raise ValueError(f"rng must be philox or torch-cpu, got {rng!r}")
    if seeds is None:
        return None
    listed = [seeds] if isinstance(seeds, int) else list(seeds)
    if any(isinstance(s, torch.Generator) for s in listed):
        if rng != "torch-cpu":
            raise ValueError('seeds that are generators need rng="torch-cpu"')
        return listed
    keys = noise_keys(seeds if isinstance(seeds, int) else listed, len(x), device=x.device)
    if rng == "philox":
        return keys
    if isinstance(seeds, int):
        listed = [seeds + i for i in range(len(x))]
    return [torch.Generator().manual_seed(seed) for seed in listed]


def _first(state: State) -> int:
    return state.plan.stages[0].step


def _info(state: State, step: int, result: str) -> StepInfo:
    sigma: Row = state.plan.sigmas[step]
    return StepInfo(step, state.plan.steps, sigma, state.memory[result], state.memory["x0"])


def _warn_if_distilled(velocity: Velocity, guidance: float | Tensor | Guide | None) -> None:
    scale = getattr(guidance, "w", guidance)
    if getattr(velocity, "guidance_distilled", False) and isinstance(scale, (int, float)) and scale > 1:
        warnings.warn(
            f"the model is distilled with guidance and takes its scale as an input: guidance {scale} comes "
            "on top of it and doubles the work",
            stacklevel=3,
        )
