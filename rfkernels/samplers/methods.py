r"""Sampling methods as data: an explicit Runge-Kutta table, or an Adams-Bashforth step of two velocities.

A step from :math:`\sigma` by :math:`h` evaluates

.. math:: v_i = v(x + h \sum_{j<i} a_{ij} v_j,\; \sigma + c_i h), \qquad x' = x + h \sum_i b_i v_i

and a multistep method adds velocities of the steps before to the last sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["METHODS", "Method", "method_named", "nfe"]


@dataclass(frozen=True)
class Method:
    """One method: nodes c, matrix a (row i has i entries), weights b; `order` is that of its convergence.

    `multistep` replaces the weights by those of variable-step Adams-Bashforth, over this
    velocity and the last.
    """

    order: int
    c: tuple[float, ...] = (0.0,)
    a: tuple[tuple[float, ...], ...] = ((),)
    b: tuple[float, ...] = (1.0,)
    multistep: bool = False

    @property
    def stages(self) -> int:
        return len(self.c)

    @property
    def terms(self) -> int:
        """The most velocities that one launch combines."""
        return 2 if self.multistep else max(sum(w != 0 for w in row) for row in (*self.a, self.b))

    def weights(self, h: float, previous_h: float | None) -> tuple[float, ...]:
        """What the velocities of the step are multiplied by, with the last step's velocity after them."""
        if not self.multistep or previous_h is None:
            return tuple(h * w for w in self.b)
        half = h / previous_h / 2  # integral of the line through both velocities
        return h * (1 + half), -h * half


METHODS: dict[str, Method] = {
    "euler": Method(1),
    # Explicit midpoint. RF-Solver's second-order Taylor step (Wang et al., 2024) is the same arithmetic.
    "midpoint": Method(2, (0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Method(2, (0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": Method(
        4, (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
    "ab2": Method(2, multistep=True),
}
METHODS["rf-solver"] = METHODS["midpoint"]


def method_named(name: str) -> Method:
    """The method, or a ValueError that lists those there are."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def nfe(method: str, steps: int) -> int:
    """How many times `steps` steps of a method evaluate the velocity."""
    return method_named(method).stages * steps


def stage_sigmas(method: Method, sigmas: Sequence[float]) -> list[float]:
    """The noise levels of all evaluations along a grid, in order."""
    # a node at 1 is the grid's next level to the bit
    return [end if c == 1 else start + c * (end - start) for start, end in pairwise(sigmas) for c in method.c]
