"""One run of a plan behind a scheduler whose caller holds the state between the steps."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rfkernels.integrations._levels import plan_in_time
from rfkernels.ops import affine_step, linear_combination, noise_keys
from rfkernels.samplers import Plan, State, init, step

__all__ = ["Generators", "Run", "remaining"]

Generators = torch.Generator | Sequence[torch.Generator] | None


class Run:
    """Steps along a plan. The state stays exact while the caller hands back what it was given.

    Args:
        plan: of the evaluations that are left.
        inverted: velocities are dx/dt with t = 1 - sigma.
        rounding: take the caller's state, in the velocity's dtype, at every step, as diffusers does.
    """

    def __init__(self, plan: Plan, *, inverted: bool, rounding: bool) -> None:
        self.plan = plan_in_time(plan) if inverted else plan
        self.sign = -1 if inverted else 1
        self.rounding = rounding
        self._state: State | None = None
        self._exact: Tensor | None = None
        self._given: tuple[Tensor, int | None] | None = None

    def planned(self, velocity: Tensor, sample: Tensor, generator: Generators) -> Tensor:
        """The next stage of the plan; the point of the next evaluation, at the end the result."""
        x = self._current(sample, velocity)
        if self._state is None:
            keys = _keys(generator, x) if self.plan.stochastic else None
            self._state = init(self.plan, x, keys=keys)
        state = self._state
        if state.x is not x:
            state = replace(state, memory={**state.memory, "x": x})
        self._state = state = step(state, velocity)
        ended = state.memory[self.plan.stages[-1].result] if state.done else state.x
        return self._hand_back(ended, velocity.dtype)

    def renoised(self, velocity: Tensor, sample: Tensor, noise: Tensor, sigma: float, after: float) -> Tensor:
        """(1 - s') (x - s v) + s' noise in one launch."""
        x = self._current(sample, velocity)
        coefs = [1 - after, -self.sign * (1 - after) * sigma, after]
        tensors = [x, velocity.contiguous(), noise.to(x.dtype).contiguous()]
        return self._hand_back(linear_combination(tensors, coefs), velocity.dtype)

    def per_token(self, velocity: Tensor, sample: Tensor, sigma: Tensor, levels: Tensor) -> Tensor:
        """x + (s - s') v, s: `[batch, tokens]`, s' the next of `levels` below; not rounded at the end."""
        x = self._current(sample, velocity)
        sigma, levels = sigma.to(x.device, x.dtype), levels.to(x.device, x.dtype)[:, None, None]
        below = torch.where(levels < sigma - 1e-6, levels, 0).amax(0)
        return self._hand_back(affine_step(x, velocity.contiguous(), 1.0, sigma - below), x.dtype)

    def _current(self, sample: Tensor, velocity: Tensor) -> Tensor:
        """The exact state if the caller hands back what it was given, untouched; else the sample."""
        if self._given is not None and not self.rounding:
            given, version = self._given
            if sample is given and (given is self._exact or version == _version(sample) is not None):
                return self._exact
        wide = sample.dtype == velocity.dtype == torch.float64
        return sample.to(torch.float64 if wide else torch.float32).contiguous()

    def _hand_back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        result = x.to(dtype)
        self._exact, self._given = x, (result, _version(result))
        return result


def remaining(plan: Plan, index: int) -> Plan:
    """The plan from evaluation `index` on, without a history.

    Raises:
        ValueError: a step does not begin there, or the method cannot.
    """
    stages = plan.stages
    begins = 0 <= index < len(stages) and (index == 0 or stages[index - 1].ends)
    if not begins:
        raise ValueError(
            f"step: must begin with the first evaluation of a step, got {index} of {len(stages)} timesteps"
        )
    if index == 0:
        return plan
    rest = None if plan.adapted is None else plan.adapted(stages[index].step, frozenset())
    if rest is None or len(rest.stages) != len(stages) - index:
        raise ValueError(f"step: {plan.name} cannot begin in the middle, got timestep {index}")
    return rest


def _keys(generator: Generators, x: Tensor) -> Tensor:
    """Keys of the noise: a seed for each sample, drawn from its generator, from the one or from torch's."""
    several = list(generator) if isinstance(generator, Sequence) else [generator] * len(x)
    if len(several) != len(x):
        raise ValueError(f"generator must be one, or one for each of {len(x)} samples, got {len(several)}")
    devices = ["cpu" if g is None else g.device for g in several]
    seeds = [
        torch.randint(2**63 - 1, (), generator=g, device=d).item()
        for g, d in zip(several, devices, strict=True)
    ]
    return noise_keys(seeds, len(x), device=x.device)


def _version(x: Tensor) -> int | None:
    """How often it was written to; None where torch does not count."""
    return None if x.is_inference() else x._version
