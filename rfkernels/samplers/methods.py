r"""Sampling methods as data, and the plans that they make of a grid of noise levels.

With :math:`h = \sigma' - \sigma` the signed step, :math:`D = x - \sigma v` the estimate of the data,
:math:`\hat\epsilon = x + (1-\sigma)v` that of the noise.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rfkernels.samplers._grid import Grid, check_grid
from rfkernels.samplers.exponential import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, unipc
from rfkernels.samplers.linear_methods import adams_bashforth, fireflow, runge_kutta, taylor
from rfkernels.samplers.plan import Plan, Stage
from rfkernels.samplers.stochastic import ddim, euler_sde, lcm, overshoot, rfpp

__all__ = ["METHODS", "Method", "method_named", "nfe", "plan_for"]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        order: of its convergence on smooth velocities; of stochastic methods the weak order.
        build: `build(grid, **options)`, its stages; None for adaptive methods, which `sample` runs alone.
        evaluations: of the velocity in a step.
        extra: evaluations that a run has beyond those.
        stochastic: whether it draws noise with its default options.
        options: defaults that differ from those of `build`.
    """

    order: int
    build: Callable[..., Iterable[Stage]] | None
    evaluations: int = 1
    extra: int = 0
    stochastic: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def adaptive(self) -> bool:
        return self.build is None

    @property
    def network_options(self) -> dict[str, Any]:
        """Options that suit networks, which were never trained at level 0: no evaluation is there."""
        takes = {} if self.build is None else inspect.signature(self.build).parameters
        return {"final": "euler"} if "final" in takes else {}


_MIDPOINT = runge_kutta((0, 1 / 2), ((), (1 / 2,)), (0, 1))

METHODS: dict[str, Method] = {
    "euler": Method(1, runge_kutta((0,), ((),), (1,))),
    # Explicit midpoint. RF-Solver's second-order Taylor step (Wang et al., 2024) is the same arithmetic.
    "midpoint": Method(2, _MIDPOINT, 2),
    "rf-solver": Method(2, _MIDPOINT, 2),
    "heun": Method(2, runge_kutta((0, 1), ((), (1,)), (1 / 2, 1 / 2)), 2),
    "ralston": Method(2, runge_kutta((0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4)), 2),
    "rk4": Method(
        4,
        runge_kutta(
            (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        ),
        4,
    ),
    "ab2": Method(2, adams_bashforth, options={"order": 2}),
    # Of order 3 and 4 with their starts "midpoint" and "rk4", which cost evaluations.
    "ab3": Method(2, adams_bashforth, options={"order": 3}),
    "ab4": Method(2, adams_bashforth, options={"order": 4}),
    "taylor": Method(2, taylor),
    "fireflow": Method(2, fireflow, extra=1),
    "dpmpp_2m": Method(2, dpmpp_2m),
    "dpmpp_2m_neglog": Method(2, dpmpp_2m, options={"lambda_": "neg_log_sigma"}),
    "dpmpp_3m": Method(2, dpmpp_3m),  # 3 with exact start values; the first step is of first order
    "dpmpp_2m_sde": Method(1, dpmpp_2m_sde, stochastic=True),
    "unipc": Method(2, unipc),
    "ddim": Method(1, ddim),
    "lcm": Method(1, lcm, stochastic=True),
    "euler_sde": Method(1, euler_sde, stochastic=True),
    "overshoot": Method(1, overshoot, stochastic=True),
    "rfpp": Method(1, rfpp),  # where trajectories are straight; else the noise is not that of the state
    "dopri5": Method(5, None, 6),
}


def method_named(name: str) -> Method:
    """The method, or a ValueError that lists those there are."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def nfe(method: str, steps: int) -> int:
    """How many times `steps` steps of a method evaluate the velocity, with its default options.

    Raises:
        ValueError: an unknown method, or an adaptive one, which decides while it runs.
    """
    entry = method_named(method)
    if entry.adaptive:
        raise ValueError(f"nfe: {method} is adaptive, how often it evaluates depends on the velocity")
    return entry.evaluations * steps + entry.extra


def plan_for(method: str, sigmas: Tensor | Sequence[float], **options: Any) -> Plan:
    """Returns the plan of a method in `METHODS` along `sigmas`, `[steps + 1]` or `[steps + 1, *rows]`.

    Levels per sample (`[steps + 1, batch]`) or frame (`[steps + 1, batch, 1, frames]`) may rest: where a
    level does not move the state stays. `options` are those of the method's builder, see docs/samplers.md.

    Raises:
        ValueError: an unknown method or option, an option out of its range, levels that are not monotone.
    """
    entry = method_named(method)
    levels = check_grid(sigmas)
    if entry.build is None:
        raise ValueError(f"plan_for: {method} is adaptive and has no plan, call sample")
    check_options(method, entry.build, options)
    chosen = {**entry.options, **options}

    def make(first: int, breaks: frozenset[int]) -> Plan:
        stages = tuple(entry.build(Grid(levels, first, breaks), **chosen))
        return Plan(method, entry.order, levels, stages, make)

    return make(0, frozenset())


def check_options(method: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises a ValueError for options that are not keywords of `build`."""
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := options.keys() - set(known):
        takes = f"takes {', '.join(known)}" if known else "takes no options"
        raise ValueError(f"{method} {takes}, got {', '.join(sorted(unknown))}")
