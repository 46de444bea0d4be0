r"""Methods whose step is the state plus velocities: Runge-Kutta, Adams-Bashforth, Taylor, FireFlow."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from rfkernels.samplers._grid import Grid, Step
from rfkernels.samplers._rows import Form, Row, ratio, where
from rfkernels.samplers.plan import Stage

__all__ = ["adams_bashforth", "fireflow", "runge_kutta", "taylor"]


def runge_kutta(
    c: Sequence[float], a: Sequence[Sequence[float]], b: Sequence[float]
) -> Callable[..., Iterator[Stage]]:
    r"""An explicit method of nodes c, matrix a (row i has i entries) and weights b.

    .. math:: v_i = v(x + h \sum_{j<i} a_{ij} v_j,\; \sigma + c_i h), \qquad x' = x + h \sum_i b_i v_i
    """
    c, a, b = list(c), [list(row) for row in a], list(b)

    def build(grid: Grid, *, final: str = "exact") -> Iterator[Stage]:
        """`final="euler"`: a last step that would evaluate at level 0 is Euler's, as in diffusers."""
        _choice("final", final, ("exact", "euler"))
        for step in grid:
            if final == "euler" and 1 in c and step.last and not np.any(step.end):
                yield from _explicit(step, [0], [[]], [1])
            else:
                yield from _explicit(step, c, a, b)

    return build


def _explicit(step: Step, c: list[float], a: list[list[float]], b: list[float]) -> Iterator[Stage]:
    h, count = step.h, len(c)
    for j in range(count):
        # a node at 1 is the grid's next level to the bit
        sigma = step.end if c[j] == 1 else step.start + c[j] * h
        weights = b if j == count - 1 else a[j + 1]
        base = "start" if j else "x"
        form: Form = {base: 1.0}
        form |= {"v" if k == j else f"k{k}": h * w for k, w in enumerate(weights) if w}
        keeps = {f"k{j}": "v"} | ({} if j else {"start": "x"})
        yield Stage(sigma, {"x": form}, keeps=keeps, step=step.index, ends=j == count - 1)


_RK4 = (
    [0, 1 / 2, 1 / 2, 1],
    [[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
    [1 / 6, 1 / 3, 1 / 3, 1 / 6],
)
_STARTS = {"euler": ([0], [[]], [1]), "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]), "rk4": _RK4}


def adams_bashforth(grid: Grid, *, order: int = 2, start: str = "euler") -> Iterator[Stage]:
    """Variable-step Adams-Bashforth of order 1 to 4: the polynomial through the last velocities, integrated.

    It starts with lower orders, and converges with order 2 then. `start="midpoint"` makes the first step that
    of the midpoint rule (order 3), `start="rk4"` the first `order` - 1 steps those of `rk4` (order 4).
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order of Adams-Bashforth must be 1 to 4, got {order}")
    _choice("start", start, tuple(_STARTS))
    yield from _velocity_multistep(grid, order, _adams_weights, start)


def taylor(grid: Grid, *, order: int = 3) -> Iterator[Stage]:
    r"""Taylor's series :math:`x + \sum_{k<n} h^{k+1}/(k+1)!\,v^{(k)}`, n = 2 to 4, with backward differences.

    The k-th derivative is k! times the divided difference of the last k + 1 velocities, as feature caches
    extrapolate. It is of first order, so every n converges with order 2; n = 2 is `ab2`. Adams-Bashforth of
    order n takes the derivatives at this level of the whole interpolating polynomial instead.
    """
    if order not in (2, 3, 4):
        raise ValueError(f"order of Taylor's series must be 2, 3 or 4, got {order}")
    yield from _velocity_multistep(grid, order, _taylor_weights, "euler")


def _velocity_multistep(
    grid: Grid, order: int, weights: Callable[[Row, list[Row]], list[Row]], start: str
) -> Iterator[Stage]:
    """Steps over this velocity "v" and those before, "v1" the last, "v2" the one before it."""
    for step in grid:
        shift = {"v1": "v", **({"v2": "v1"} if step.age else {}), **({"v3": "v2"} if step.age > 1 else {})}
        if step.age < {"euler": 0, "midpoint": 1, "rk4": order - 1}[start]:
            first, *others = _explicit(step, *_STARTS[start])
            yield replace(first, keeps={**first.keeps, **shift})
            yield from others
            continue
        nodes = [step.before(k) - step.start for k in range(min(order, step.age + 1))]
        form: Form = {"x": 1.0}
        for k, weight in enumerate(_where_moving(step.h, nodes, weights)):
            form[f"v{k}" if k else "v"] = weight
        yield Stage(step.start, {"x": form}, keeps=shift, step=step.index)


def _where_moving(h: Row, nodes: list[Row], weights: Callable[[Row, list[Row]], list[Row]]) -> list[Row]:
    """The weights of the highest order whose nodes are distinct, row by row: levels may have rested."""
    best = [h]
    for count in range(2, len(nodes) + 1):
        good = np.asarray(nodes[count - 1]) != nodes[count - 2]
        with np.errstate(all="ignore"):
            higher = weights(h, nodes[:count])
        for k in range(2, count):
            good = good & (np.asarray(nodes[k - 1]) != nodes[k - 2])
        best = [where(good, w, b) for w, b in zip(higher, [*best, 0.0], strict=True)]
    return best


def _adams_weights(h: Row, nodes: list[Row]) -> list[Row]:
    """Integrals over 0 .. h of the Lagrange polynomials of the nodes."""
    result = []
    for j, node in enumerate(nodes):
        polynomial: list[Row] = [1.0]  # coefficients from the constant up
        for m, other in enumerate(nodes):
            if m != j:
                scale = ratio(1.0, node - other)
                shifted = [0.0, *polynomial]
                polynomial = [
                    (s - other * p) * scale for s, p in zip(shifted, [*polynomial, 0.0], strict=True)
                ]
        result.append(sum(p * h ** (k + 1) / (k + 1) for k, p in enumerate(polynomial)))
    return result


def _taylor_weights(h: Row, nodes: list[Row]) -> list[Row]:
    """sum over k of h^(k+1) / (k+1) times the divided difference of the first k + 1 nodes."""
    result = [0.0 * h for _ in nodes]
    for k in range(len(nodes)):
        for j in range(k + 1):
            scale = h ** (k + 1) / (k + 1)
            for m in range(k + 1):
                if m != j:
                    scale = scale * ratio(1.0, nodes[j] - nodes[m])
            result[j] = result[j] + scale
    return result


def fireflow(grid: Grid) -> Iterator[Stage]:
    """The midpoint rule with the last step's middle velocity on the way to this one's middle.

    Deng et al., "FireFlow", 2024: one evaluation a step and one more at the start, order 2. Between steps "x"
    is the middle of the next one; the state on the grid is "start".
    """
    steps = list(grid)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        half = step.h / 2
        if step.age == 0:
            first = {"x": {"x": 1.0, "v": half}}
            yield Stage(step.start, first, keeps={"start": "x"}, step=step.index, ends=False)
        ahead = 0.0 if following is None or following.age == 0 else following.h / 2
        writes = {"start": {"start": 1.0, "v": step.h}, "x": {"start": 1.0, "v": step.h + ahead}}
        yield Stage(step.start + half, writes, step=step.index, result="start")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
