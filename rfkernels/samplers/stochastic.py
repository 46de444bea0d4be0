r"""Methods that draw noise, and one that uses its first noise again.

`ddim`, `euler_sde`, `overshoot` and `dpmpp_2m_sde` keep the marginals as steps become short. `lcm` does not:
its states vary less than they should, since it takes the mean of the data for the data.

With :math:`D = x - \sigma v` and :math:`\hat\epsilon = x + (1-\sigma)v`.
"""

from collections.abc import Callable, Iterator

import numpy as np

from rfkernels.samplers._grid import Grid, Step
from rfkernels.samplers._rows import Form, Row, add, ratio, where
from rfkernels.samplers.exponential import check_levels, decay, euler
from rfkernels.samplers.plan import Stage

__all__ = ["ddim", "euler_sde", "lcm", "overshoot", "rfpp"]


def ddim(grid: Grid, *, eta: float = 0.0, relative_to: str = "posterior") -> Iterator[Stage]:
    r"""DDIM, :math:`x' = (1-\sigma')D + \sqrt{\sigma'^2-s^2}\,\hat\epsilon + s z`. Song et al., 2021.

    Args:
        eta: from 0 (Euler) to 1, s as a part of what `relative_to` says.
        relative_to: "posterior", :math:`\sigma'\sqrt{1-e^{-2h}}` with h in log-SNR: ancestral sampling at 1;
            "level", :math:`\sigma'`: full re-noise at 1, as `lcm`, with its loss of variance.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in 0 .. 1, got {eta}")
    if relative_to not in ("posterior", "level"):
        raise ValueError(f"ddim: relative_to must be posterior or level, got {relative_to!r}")
    check_levels("ddim", grid, falling=eta > 0)
    for step in grid:
        if eta == 0:
            yield Stage(step.start, {"x": euler(step)}, step=step.index)
            continue
        part = eta * (np.sqrt(1 - decay(step) ** 2) if relative_to == "posterior" else 1.0)
        form = add((1 - step.end, _data(step)), (step.end * np.sqrt(1 - part**2), _noise(step)))
        yield _stage(step, form, part * step.end)


def lcm(grid: Grid) -> Iterator[Stage]:
    r"""Full re-noise, :math:`x' = (1-\sigma')D + \sigma' z`: consistency models, LCM, HiDream "flash"."""
    check_levels("lcm", grid, falling=True)
    for step in grid:
        yield _stage(step, add((1 - step.end, _data(step))), step.end)


def euler_sde(
    grid: Grid,
    *,
    diffusion: str | Callable[[float], float] = "flow_grpo",
    noise_level: float = 0.7,
    final_noise: bool = False,
) -> Iterator[Stage]:
    r"""Euler-Maruyama, :math:`x' = x + hv - \frac{g^2|h|}{2\sigma}\hat\epsilon + g\sqrt{|h|}\,z`.

    Any :math:`g(\sigma)` keeps the marginals as h goes to 0.

    Args:
        diffusion: "flow_grpo", :math:`g^2 = a^2\sigma/(1-\sigma)` with a = `noise_level`, at level 1 with the
            second level in the divisor (Liu et al., 2025); "rf_inversion", :math:`g^2 = 2\sigma/(1-\sigma)`,
            the step from level 1 without noise (Rout et al., 2024); or g, called with each level.
        noise_level: of "flow_grpo".
        final_noise: Flow-GRPO's code adds noise in the last step to level 0 too; here it is Euler's.
    """
    check_levels("euler_sde", grid, falling=True)
    if not callable(diffusion) and diffusion not in ("flow_grpo", "rf_inversion"):
        raise ValueError(f"diffusion must be flow_grpo, rf_inversion or a function, got {diffusion!r}")
    for step in grid:
        if callable(diffusion):
            squared = _applied(diffusion, step.start) ** 2
        elif diffusion == "flow_grpo":
            second = grid.levels[grid.first + 1]
            below = where(np.asarray(step.start) == 1, second, step.start)
            squared = noise_level**2 * ratio(step.start, 1 - below)
        else:
            squared = 2 * ratio(step.start, 1 - step.start)
        if not final_noise:
            squared = where(np.asarray(step.end) == 0, 0.0, squared)
        form = add((1.0, euler(step)), (squared * step.h * ratio(0.5, step.start), _noise(step)))
        yield _stage(step, form, np.sqrt(squared * -step.h))


def overshoot(grid: Grid, *, amount: float = 0.5) -> Iterator[Stage]:
    r"""Euler past the level by `amount` of the step, then noise back up to it.

    :math:`x' = k(x + (\sigma_o - \sigma)v) + \sqrt{\sigma'^2 - k^2\sigma_o^2}\,z` with
    :math:`\sigma_o = \max(0, \sigma' - c|h|)`, :math:`k = (1-\sigma')/(1-\sigma_o)`; 0 is Euler. Hu et al.,
    "AMO sampler", 2024.
    """
    if not amount >= 0:
        raise ValueError(f"overshoot: amount must be at least 0, got {amount}")
    check_levels("overshoot", grid, falling=True)
    for step in grid:
        past = np.maximum(0.0, step.end + amount * step.h)
        k = where(np.asarray(step.h) == 0, 1.0, ratio(1 - step.end, 1 - past))
        form = add((k, {"x": 1.0, "v": past - step.start}))
        yield _stage(step, form, np.sqrt(np.maximum(0.0, step.end**2 - (k * past) ** 2)))


def rfpp(grid: Grid) -> Iterator[Stage]:
    r"""The "new" update of 2-RF++, :math:`x' = (1-\sigma')D + \sigma' z_1` with the first noise :math:`z_1`.

    Euler's step where trajectories are straight. The grid starts at level 1 (or 1 - 1e-5, as in the paper's
    code), where the state is the noise. Lee et al., 2024.
    """
    check_levels("rfpp", grid, falling=True)
    first = grid.levels[grid.first]
    if np.min(first) < 1 - 1e-4:
        raise ValueError(f"rfpp re-uses the initial noise: the first level must be 1, got {np.min(first):g}")
    for step in grid:
        base = "z1" if step.index > grid.first else "x"
        form = add((1 - step.end, _data(step)), (step.end, {base: 1.0}))
        keeps = {} if step.index > grid.first else {"z1": "x"}
        yield Stage(step.start, {"x": form}, keeps=keeps, step=step.index)


def _stage(step: Step, form: Form, std: Row) -> Stage:
    """The stage; where a level rests the state does too."""
    rests = np.asarray(step.h) == 0
    if rests.any():
        form = {name: where(rests, 1.0 if name == "x" else 0.0, value) for name, value in form.items()}
        std = where(rests, 0.0, std)
    return Stage(step.start, {"x": form}, {"x": std} if np.any(std) else {}, step=step.index)


def _data(step: Step) -> Form:
    return {"x": 1.0, "v": -step.start}


def _noise(step: Step) -> Form:
    return {"x": 1.0, "v": 1 - step.start}


def _applied(g: Callable[[float], float], sigma: Row) -> Row:
    if np.ndim(sigma) == 0:
        return float(g(float(sigma)))
    return np.array([float(g(float(s))) for s in np.ravel(sigma)]).reshape(np.shape(sigma))
