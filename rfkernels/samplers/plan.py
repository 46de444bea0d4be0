r"""Plans: a sampler as host data, one launch for each evaluation of the velocity.

A method is a list of `Stage`s: an evaluation of the velocity :math:`v(x, \sigma)` and what becomes of it:
linear combinations of the tensors in the sampler's memory, of :math:`v` and of fresh noise. `init` puts all
coefficients on the device at once; `step` makes one stage in one launch of `rfkernels.ops.combine`, guidance
included, and returns a new `State`. Nothing is global and nothing is changed in place, so requests may be
interleaved, and a state may be stepped again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfkernels.ops import combine
from rfkernels.samplers._lowering import Runtime, lower
from rfkernels.samplers._rows import Form, Row, nonzero

if TYPE_CHECKING:
    from rfkernels.samplers.guidance import Guide

__all__ = ["Plan", "Stage", "State", "init", "step"]

Velocity = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Stage:
    """One evaluation of the velocity and the one launch that uses it.

    Coefficients are numbers, or float64 arrays or CPU tensors over the leading axes of the state (`[batch]`,
    `[batch, 1, frames]`). Names are those of the memory; "x" is always the point of the next evaluation, "v"
    the velocity just evaluated, guided where there is guidance.

    Attributes:
        sigma: the noise level of the evaluation.
        writes: {name: {input: coefficient}}, e.g. {"x": {"x": 1, "v": h}, "D": {"x": 1, "v": -sigma}}.
        noise: {name: std} of fresh normal noise added to a result; all of one stage share the same noise.
        keeps: {new name: old name}: references for later stages, without a copy, to what the memory held
            before this stage's launch, or to "v".
        step: the step of the grid that it belongs to.
        ends: whether that step ends here.
        result: the name of the state on the grid when the step ends, where it is not "x".
    """

    sigma: Row
    writes: Mapping[str, Form]
    noise: Mapping[str, Row] = field(default_factory=dict)
    keeps: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    ends: bool = True
    result: str = "x"


@dataclass(frozen=True)
class Plan:
    """The stages of a method along a grid of noise levels.

    `adapted(first, breaks)` is the plan that starts at step `first` and drops what multistep methods remember
    before each step of `breaks`; None for a plan that cannot. `outputs` names what else the memory holds at
    the end.
    """

    name: str
    order: int
    sigmas: tuple[Row, ...]
    stages: tuple[Stage, ...]
    adapted: Callable[[int, frozenset[int]], "Plan"] | None = None
    outputs: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def evaluations(self) -> int:
        return len(self.stages)

    @property
    def stochastic(self) -> bool:
        """Whether any stage draws noise."""
        return any(nonzero(std) for stage in self.stages for std in stage.noise.values())


@dataclass(frozen=True)
class State:
    """Where a sampler is: the point of its next evaluation, and its memory. Never changed; see `step`."""

    index: int
    memory: Mapping[str, Tensor]
    plan: Plan
    runtime: Runtime
    generators: tuple[Tensor, ...] | None = None  # states of torch's, where noise comes from them

    @property
    def x(self) -> Tensor:
        """Where the next velocity is wanted; at the end the result."""
        return self.memory["x"]

    @property
    def done(self) -> bool:
        return self.index >= len(self.plan.stages)

    @property
    def stage(self) -> Stage:
        """The stage that the next velocity is for.

        Raises:
            ValueError: there is none, the plan is done.
        """
        if self.done:
            raise ValueError(f"step: the plan is done after its {len(self.plan.stages)} evaluations")
        return self.plan.stages[self.index]

    @property
    def sigma(self) -> Tensor:
        """The noise level of the next evaluation: `[batch]` or rows, in the dtype and on the device of x."""
        if self.done:
            raise ValueError(f"step: the plan is done after its {len(self.plan.stages)} evaluations")
        return self.runtime.levels[self.index]

    @property
    def velocities(self) -> tuple[str, ...]:
        """What the next evaluation needs, of the tensors that the guide is made of."""
        return self.runtime.stages[self.index].velocities if not self.done else ()


def init(
    plan: Plan,
    x: Tensor,
    *,
    guide: "Guide | float | Tensor | None" = None,
    keys: Tensor | Sequence[torch.Generator] | None = None,
    memory: Mapping[str, Tensor] | None = None,
    preview: bool = False,
) -> State:
    """Returns the state before the first evaluation, with every coefficient on the device of x in one copy.

    Args:
        x: the state at the grid's first level, `[batch, ...]`; it is never written to.
        guide: a guide of `rfkernels.samplers.guidance`, or the scale of `CFG`; velocities are then tuples.
            Steps at which it switches on or off drop the history of multistep methods.
        keys: of stochastic plans: `int64[batch, 3]` of `ops.noise_keys` on the device of x, stage i draws
            with step + 1 + i, so that step itself is free for the initial noise; or one CPU
            `torch.Generator` for each sample, whose states are copied and not moved.
        memory: further tensors that the plan's stages name.
        preview: also write "x0" into the memory at the first stage of each step, the estimate of the data
            x - sigma v.

    Raises:
        ValueError: x, guide or keys that do not fit, a stage with more than eight inputs.
    """
    from rfkernels.samplers.guidance import as_guide

    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x must be [batch, ...] and floating, got {x.dtype} of shape {list(x.shape)}")
    x, memory = x.contiguous(), {name: t.contiguous() for name, t in (memory or {}).items()}
    guide = as_guide(guide, len(x))
    if guide is not None:
        plan = _adapt(plan, guide)
    if plan.stochastic and keys is None:
        raise ValueError(
            f"{plan.name} draws noise: pass seeds= (a number, or one for each sample), to init keys="
        )
    generators = None
    if plan.stochastic and not isinstance(keys, Tensor):
        generators, keys = _generator_states(keys, len(x)), None
    elif plan.stochastic and (keys.shape != (len(x), 3) or keys.dtype != torch.int64):
        raise ValueError(f"keys must be int64[{len(x)}, 3], got {keys.dtype} {list(keys.shape)}")
    runtime = lower(plan, x, guide, keys if plan.stochastic else None, memory, preview)
    return State(0, {"x": x, **memory}, plan, runtime, generators)


def step(state: State, velocity: Velocity) -> State:
    """Returns the state after the stage at hand, in one launch; `state` stays as it is.

    Args:
        velocity: at `(state.x, state.sigma)`, shaped like x; with a guide the tuple of its tensors (uncond,
            cond[, third]), or those of `state.velocities` alone. float64 beside a float64 state, else
            float32, float16 or bfloat16.

    Raises:
        ValueError: the plan is done, or the velocity is of the wrong kind.
    """
    return advance(state, velocity, None)


def advance(state: State, velocity: Velocity, buffers: "Buffers | None") -> State:
    """`step`, writing into `buffers` where they are given: what the old state held may be gone then."""
    state.stage  # noqa: B018 (raises at the end)
    stage = state.runtime.stages[state.index]
    tensors = _checked(velocity, state.x, stage.velocities, state.runtime.guide_velocities)
    values = {**state.memory, **dict(zip(stage.names, tensors, strict=True))}
    generators = state.generators
    if generators is not None and stage.noisy:
        values["noise"], generators = _draw(generators, state.x)
    new: dict[str, Tensor] = {}
    for launch in stage.launches:
        out = None
        if buffers is not None:
            busy = [*(values[name] for name in stage.held), *new.values()]
            out = buffers.take(len(launch.outputs), state.x, busy)
        results = combine(
            [values[name] for name in launch.inputs],
            launch.coefs,
            guide=launch.guide,
            guidance=launch.parameters,
            keys=launch.keys,
            out=out,
        )
        new.update(zip(launch.outputs, results, strict=True))
    new |= {name: values[source] for name, source in stage.keeps}
    new |= {name: new[source] for name, source in stage.aliases}
    memory = {name: new[name] if name in new else values[name] for name in stage.alive}
    return replace(state, index=state.index + 1, memory=memory, generators=generators)


class Buffers:
    """Memory of a loop that keeps no old states: tensors that no later stage reads are written again."""

    def __init__(self) -> None:
        self._owned: dict[int, Tensor] = {}  # by address

    def take(self, count: int, x: Tensor, busy: Sequence[Tensor]) -> list[Tensor]:
        """Tensors to write, none of `busy`: a kept velocity that is a buffer (`lambda x, s: x`) is there."""
        taken = {t.untyped_storage().data_ptr() for t in busy}
        free = [t for address, t in self._owned.items() if address not in taken][:count]
        fresh = [torch.empty_like(x) for _ in range(count - len(free))]
        self._owned |= {t.untyped_storage().data_ptr(): t for t in fresh}
        return free + fresh


def _checked(velocity: Velocity, x: Tensor, wanted: tuple[str, ...], known: int) -> list[Tensor]:
    """The tensors of `wanted` (v alone, or of uncond, cond, third), or a ValueError."""
    several = isinstance(velocity, (tuple, list))
    tensors = list(velocity) if several else [velocity]
    if known and several and len(tensors) == known:
        names = ("uncond", "cond", "third")
        tensors = [tensors[names.index(name)] for name in wanted]
    if len(tensors) != len(wanted) or (several and not known):
        got = f"a sequence of {len(velocity)}" if several else type(velocity).__name__
        kinds = {
            0: "one tensor",
            2: "a pair (uncond, cond), since guidance is given",
            3: "three tensors (uncond, cond, third), since the guide needs them",
        }
        raise ValueError(f"sample: velocity must return {kinds[known]}, got {got}")
    for v in tensors:
        if not isinstance(v, Tensor) or v.shape != x.shape:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"sample: velocity must have the shape of x {list(x.shape)}, got {got}")
        wide = v.dtype == torch.float64
        if not v.is_floating_point() or wide != (x.dtype == torch.float64):
            raise ValueError(
                f"sample: velocity must be floating, and float64 beside a float64 x alone, got {v.dtype} "
                f"beside {x.dtype}"
            )
    return [v.contiguous() for v in tensors]


def _adapt(plan: Plan, guide: "Guide") -> Plan:
    """Without the steps that the guide zeroes; the history ends where it switches."""
    first = guide.zero_steps
    if not 0 <= first < plan.steps:
        raise ValueError(f"zero_steps must leave one of {plan.steps} steps, got {first}")
    kinds = [guide.at(plan.sigmas[i], i, plan.steps).kind for i in range(plan.steps)]
    breaks = frozenset(i for i in range(first + 1, plan.steps) if kinds[i] != kinds[i - 1])
    if not (first or breaks):
        return plan
    if plan.adapted is None:
        raise ValueError(f"{plan.name} cannot drop steps or history as the guide {guide} needs")
    return plan.adapted(first, breaks)


def _generator_states(generators: Sequence[torch.Generator] | None, batch: int) -> tuple[Tensor, ...]:
    generators = list(generators)
    if len(generators) != batch or any(g.device.type != "cpu" for g in generators):
        raise ValueError(f"keys must be one torch.Generator on the CPU for each of {batch} samples")
    return tuple(g.get_state() for g in generators)


def _draw(states: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Normal noise shaped like x, each sample's from its own generator, and the generators' states after."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    noise, after = [torch.empty(0, *x.shape[1:], dtype=dtype)], []
    for state in states:
        generator = torch.Generator().set_state(state)
        noise.append(torch.randn(1, *x.shape[1:], generator=generator, dtype=dtype))
        after.append(generator.get_state())
    return torch.cat(noise).to(x.device), tuple(after)
