r"""Exponential multistep methods: DPM-Solver++ and UniPC on the rectified-flow path.

The ODE is linear but for the estimate of the data :math:`D = x - \sigma v`. With
:math:`\lambda = \ln((1-\sigma)/\sigma)`, :math:`h = \lambda' - \lambda`, its exact solution is

.. math:: x' = \frac{\sigma'}{\sigma} x + (1-\sigma') \int_0^h e^{-(h-t)} D(\lambda + t)\, dt

and the methods integrate a polynomial through the last estimates. Constant D: exact,
:math:`x' = (\sigma'/\sigma) x + (1 - \sigma'/\sigma) D`, Euler's step. Steps from level 1 (:math:`\lambda` is
minus infinity there) and to level 0 (plus infinity) are of first order, and so are steps whose history holds
such a level.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from rfkernels.samplers._grid import Grid, Step
from rfkernels.samplers._rows import Form, Row, add, log_snr, neg_log_sigma, phi, ratio, where
from rfkernels.samplers.plan import Stage

__all__ = ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc"]

_LAMBDAS = {"logsnr": log_snr, "neg_log_sigma": neg_log_sigma}


def dpmpp_2m(grid: Grid, *, lambda_: str = "logsnr", lower_order_final: bool = False) -> Iterator[Stage]:
    r"""DPM-Solver++(2M), Lu et al., 2022.

    :math:`x' = (\sigma'/\sigma)x + (1-\sigma'/\sigma)(D + (D - D_{last})/(2r))` with
    :math:`r = h_{last}/h`. `lambda_` says in what r is measured: "logsnr" (diffusers, Wan) or "neg_log_sigma"
    (k-diffusion, Stable Diffusion 3.5, ComfyUI). `lower_order_final` makes the last step one of first order
    wherever it ends.
    """
    check_levels("dpmpp_2m", grid)
    if lambda_ not in _LAMBDAS:
        raise ValueError(f"lambda_ must be one of {', '.join(_LAMBDAS)}, got {lambda_!r}")
    of = _LAMBDAS[lambda_]
    for step in grid:
        second = 0.0 if lower_order_final and step.last else _second_order(step, of)
        data = _data(step)
        form = add((1.0, euler(step)), (gain(step) * second, _difference(data)))
        yield Stage(step.start, {"x": form, "D1": data}, step=step.index)


def dpmpp_3m(
    grid: Grid, *, kappa: float = 2.0, compat: str | None = None, lower_order_final: bool = False
) -> Iterator[Stage]:
    r"""DPM-Solver++(3M): a parabola through the last three estimates of the data.

    `kappa` scales its second difference: 2 makes the method of third order, 1 is what diffusers and Wan
    compute (`compat="diffusers"`), of second order.
    """
    check_levels("dpmpp_3m", grid)
    if compat not in (None, "diffusers"):
        raise ValueError(f"compat must be diffusers, got {compat!r}")
    for step in grid:
        data, low = _data(step), lower_order_final and step.last
        second = 0.0 if low else _second_order(step, log_snr)
        form = add((1.0, euler(step)), (gain(step) * second, _difference(data)))
        if step.age >= 2 and not low:
            good = (_q(step, 1) != 0) & (_q(step, 2) != 0)
            form = _choose(good, _third_order(step, 1.0 if compat else kappa), form)
        keeps = {"D2": "D1"} if step.age else {}
        yield Stage(step.start, {"x": form, "D1": data}, keeps=keeps, step=step.index)


def _third_order(step: Step, kappa: float) -> Form:
    """Lu et al. with inverse ratios q = h / h_before instead of r."""
    q0, q1 = _q(step, 1), _q(step, 2)
    h = _span(step.start, step.end, log_snr)
    first = add((q0, _difference(_data(step))))
    curve = add((1.0, first), (-1.0, {"D1": q1, "D2": -q1}))
    slope = add((1.0, first), (ratio(q1, q0 + q1), curve))
    bend = kappa * ratio(q0 * q1, q0 + q1)
    weight = (1 - step.end) * where(np.isfinite(h), h, 0.0)
    return add((1.0, euler(step)), (weight * phi(2, -h), slope), (weight * phi(3, -h) * bend, curve))


def dpmpp_2m_sde(grid: Grid) -> Iterator[Stage]:
    r"""SDE-DPM-Solver++(2M), which keeps the marginals.

    :math:`x' = (\sigma'/\sigma)e^{-h}x + (1-\sigma')(1-e^{-2h})D^* + \sigma'\sqrt{1-e^{-2h}}\,z` with 2M's
    :math:`D^*` in log-SNR; the step from level 1 is a full re-noise, that to level 0 returns D.
    """
    check_levels("dpmpp_2m_sde", grid, falling=True)
    for step in grid:
        data = _data(step)
        left = decay(step)
        scale = where(np.asarray(step.h) == 0, 1.0, ratio(step.end, step.start)) * left
        weight = (1 - step.end) * (1 - left**2)
        form = add(
            (scale, {"x": 1.0}), (weight, data), (weight * _second_order(step, log_snr), _difference(data))
        )
        noise = {"x": step.end * np.sqrt(1 - left**2)}
        yield Stage(step.start, {"x": form, "D1": data}, noise, step=step.index)


def unipc(grid: Grid, *, order: int = 2, lower_order_final: bool = True) -> Iterator[Stage]:
    r"""UniPC on estimates of the data with :math:`B(h) = e^h - 1` ("bh2"), order 1 to 3. Zhao et al., 2023.

    The corrector of the last step and the predictor of this one are one launch: both are the predicted state
    plus estimates of the data, so the state before it needs no memory. With `lower_order_final` the
    last step is of first order, and the one before it of second at most. A first level of 1 is no history;
    one below it by a hair (1 - 1e-6 in diffusers) is.
    """
    check_levels("unipc", grid)
    if order not in (1, 2, 3):
        raise ValueError(f"order of UniPC must be 1, 2 or 3, got {order}")
    older = {"m0": "D1", "m1": "D2", "m2": "D3"}
    correction: Form = {}
    for step in grid:
        data = _data(step)
        form = euler(step)
        if step.age:
            form = add((1.0, form), (1 - gain(step), _substituted(correction, older, data)))
        left = len(grid.levels) - 1 - step.index if lower_order_final else order
        reached = min(order, left, step.age + 1)
        prediction = _bh2(step, reached, corrects=False)
        form = add((1.0, form), (1.0, _substituted(prediction, {"m1": "D1", "m2": "D2"}, data)))
        correction = add((1.0, _bh2(step, reached, corrects=True)), (-1.0, prediction))
        keeps = {"D2": "D1", "D3": "D2"} if step.age > 1 else {"D2": "D1"} if step.age else {}
        yield Stage(step.start, {"x": form, "D1": data}, keeps=keeps, step=step.index)


def _bh2(step: Step, order: int, corrects: bool) -> Form:
    """What UniPC's predictor or corrector adds to Euler's step.

    In estimates of the data: "m0" at this step's start, "m1" and "m2" before it, "new" at its end.
    """
    weight = gain(step)
    h = _span(step.start, step.end, log_snr)
    form: Form = {"new": weight / 2, "m0": -weight / 2} if corrects else {}
    good = np.isfinite(h) & (np.asarray(h) != 0)
    nodes: list[Row] = []
    for p in range(2, order + 1):
        node = ratio(-_span(step.before(p - 1), step.start, log_snr), h)
        good = good & (node != 0) & (node != (nodes[-1] if nodes else 0.0))
        nodes.append(where(good, node, -float(p)))
        safe = where(good, -h, -1.0)
        at = [*nodes, 1.0] if corrects else nodes
        weights = _unipc_weights(at, safe) if corrects or p > 2 else [0.5]
        names = [f"m{j}" for j in range(1, p)] + (["new"] if corrects else [])
        terms = [
            (weight * rho / r, {name: 1.0, "m0": -1.0})
            for rho, r, name in zip(weights, at, names, strict=True)
        ]
        form = _choose(good, add(*terms), form)
    return form


def _unipc_weights(nodes: list[Row], z: Row) -> list[Row]:
    r"""The rho of :math:`\sum_k \rho_k r_k^{i-1} = i!\,\varphi_{i+1}(z)/\varphi_1(z)`, i from 1 on."""
    nodes = np.broadcast_arrays(*nodes, z)[:-1]
    matrix = np.stack([np.stack([r**i for r in nodes], -1) for i in range(len(nodes))], -2)
    sides = [math.factorial(i) * phi(i + 1, z) / phi(1, z) for i in range(1, len(nodes) + 1)]
    right = np.stack(np.broadcast_arrays(*sides, nodes[0])[:-1], -1)[..., None]
    return list(np.moveaxis(np.linalg.solve(matrix, right)[..., 0], -1, 0))


def euler(step: Step) -> Form:
    """x + h v, which is the first-order exponential step too."""
    return {"x": 1.0, "v": step.h}


def gain(step: Step) -> Row:
    """1 - end/start, the weight of the data in an exponential step; 0 from level 0, where x is the data."""
    return where(np.asarray(step.start) == 0, 0.0, 1 - ratio(step.end, step.start))


def decay(step: Step) -> Row:
    """e^-h with h in log-SNR, on the way down; 0 from level 1 and to level 0."""
    left = ratio((1 - step.start) * step.end, step.start * (1 - step.end))
    return where(np.asarray(step.h) == 0, 1.0, left)


def check_levels(name: str, grid: Grid, falling: bool = False) -> None:
    """Levels of a path from data to noise are in 0 .. 1; noise can be added on the way down alone."""
    levels = np.concatenate([np.ravel(level) for level in grid.levels])
    low, high = levels.min(), levels.max()
    if low < 0 or high > 1:
        raise ValueError(f"{name} needs noise levels in 0 .. 1, got {low:g} .. {high:g}")
    if falling and not grid.falls:
        raise ValueError(f"{name} needs falling noise levels: it cannot invert")


def _data(step: Step) -> Form:
    return {"x": 1.0, "v": -step.start}


def _difference(data: Form) -> Form:
    """D - D_last."""
    return add((1.0, data), (-1.0, {"D1": 1.0}))


def _second_order(step: Step, of: Callable[[Row], Row]) -> Row:
    """1/(2r), the weight of D - D_last; 0 without a history, from level 1 on and to level 0."""
    if step.age == 0:
        return 0.0
    h = _span(step.start, step.end, of)
    return ratio(h, 2 * _span(step.before(1), step.start, of)) if np.ndim(h) or np.isfinite(h) else 0.0


def _q(step: Step, k: int) -> Row:
    """h of this step over that of the k-th before it, 0 where either is infinite or the other rests."""
    h = _span(step.start, step.end, log_snr)
    return ratio(h, _span(step.before(k), step.before(k - 1), log_snr))


def _span(start: Row, end: Row, of: Callable[[Row], Row]) -> Row:
    with np.errstate(invalid="ignore"):
        return where(np.asarray(start) == end, 0.0, of(end) - of(start))


def _choose(good: Row, a: Form, b: Form) -> Form:
    """The form a where `good`, else b."""
    return {name: where(good, a.get(name, 0.0), b.get(name, 0.0)) for name in a.keys() | b.keys()}


def _substituted(form: Form, names: dict[str, str], data: Form) -> Form:
    """The form with memory's names for older estimates and `data` for the one that is in no memory yet."""
    terms = [(value, {names[n]: 1.0} if n in names else data) for n, value in form.items()]
    return add(*terms)
