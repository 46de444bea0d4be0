r"""FlowEdit: from picture to picture without inversion, and what was built on it.

Kulikov et al., "FlowEdit: inversion-free text-based editing using pre-trained flow models", 2024: the edit
:math:`d = z - x` follows the difference of two velocities, :math:`dd/d\sigma = v_{tar}(z_{tar}) -
v_{src}(z_{src})`, at two points that share their noise, :math:`z_{src} = (1-\sigma)x + \sigma n` and
:math:`z_{tar} = z_{src} + d`. The state here is d itself, and `x + d` is made once, at the end: equal
velocities then leave the picture as it is to the bit, and no edit is lost in rounding beside the picture.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rfkernels.editing._launches import Launches, Velocity, evaluate, falling, levels, one_of, weight_of
from rfkernels.editing.transport import coupling_entropy
from rfkernels.ops import combine, linear_combination, noise_keys, philox_normal
from rfkernels.ops._register import accumulator
from rfkernels.samplers import init, plan_for, step
from rfkernels.samplers.methods import method_named

__all__ = ["flow_edit", "pair_velocity", "pyramid_jump"]

_FUSED = ("euler", "ab2")  # methods whose step is the update itself
_TAIL = 2**31  # key step of the tail's noise, which no draw before it has


def pair_velocity(source: Velocity, target: Velocity) -> Velocity:
    """One velocity for `flow_edit` of two: `source` for the first half of a batch, `target` for the second.

    A model that takes both halves in one batch (with its prompts in that order) is faster.
    """

    def velocity(z: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        (z0, z1), (s0, s1) = z.chunk(2), sigma.chunk(2)
        a, b = source(z0, s0), target(z1, s1)
        if isinstance(a, Tensor):
            return torch.cat([a, b])
        return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])

    return velocity


@torch.no_grad()
def flow_edit(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    n_max: int | None = None,
    n_min: int = 0,
    n_avg: int = 1,
    source_guidance: float | Tensor | None = None,
    target_guidance: float | Tensor | None = None,
    target: Velocity | None = None,
    strength: float | None = None,
    reg: float = 0.1,
    method: str = "euler",
    seeds: int | Sequence[int] = 0,
    compat: str | None = None,
) -> Tensor:
    r"""Returns the picture `x` edited from the source prompt to the target prompt.

    Of the N steps of the grid the last `n_max` run. Each draws fresh noise, asks for both velocities in one
    batch and moves d by their difference; with `n_avg` it takes the mean over as many draws. The last `n_min`
    steps are ordinary sampling with the target alone, from :math:`x + d` noised once. An evaluation has one
    launch before it, which writes both points into the model's batch, and one after it, guidance included.

    `strength` is "transport-enhanced" FlowEdit (Lupascu and Stupariu, OT-RF, 2026): with one draw it scales
    the difference, no more. With K draws the factor is :math:`strength(1-\sigma)e^{-H/2}`, H the entropy of
    the optimal coupling of the K noised sources with the K noised targets under squared distances, by
    Sinkhorn in the log domain. Its regularisation is `reg` times the number of elements of a sample: a
    distance grows with that number, and with a fixed one the released code divides 0 by 0. The factor is
    :math:`strength(1-\sigma)K^{-1/2}` while d is 0 and the noise large.

    Args:
        velocity: `velocity(z, sigma)` for `z: [2 batch, ...]`, first the sources then the targets; a tensor
            like z, or with guidance a pair (uncond, cond) of them. See `pair_velocity`.
        x: the picture, `[batch, ...]`, float32 as a rule; left as it is.
        sigmas: falling, strictly, within 0 .. 1.
        n_max: None for all steps; FLUX 24 of 28, SD3 33 of 50.
        source_guidance, target_guidance: both or neither, numbers or `[batch]`; SD3 3.5 and 13.5.
        target: `target(z, sigma)` for the targets alone, `[batch, ...]`; required with `n_min`.
        method: "euler" or "ab2", or another of `sample` for the equation of d, a launch more. Wan-Edit (Li
            et al., FiVE-Bench, 2025) takes "unipc", whose history is then of differences; the noise is fresh
            each step, so the history is noisy.
        seeds: one for all or one for each sample; draw k of all has key step k + 1.
        compat: None, or "wan-edit": the noise level of a step is that of the step before (released code),
            while the model is told its own.

    Raises:
        ValueError: numbers of steps that do not fit the grid, one guidance without the other, `n_min` without
            `target`, a velocity of the wrong kind, an unknown method or `compat`.
    """
    name = "flow_edit"
    grid = falling(name, sigmas)
    count = len(grid) - 1
    n_max = count if n_max is None else n_max
    _check(name, count, n_max, n_min, n_avg, method, compat, target)
    guided = source_guidance is not None
    if guided != (target_guidance is not None):
        raise ValueError(f"{name}: source_guidance and target_guidance go together, got one of them")
    weights = [weight_of(name, w, x) for w in (source_guidance, target_guidance)]
    first, last = count - n_max, count - n_min
    noisy = grid if compat is None else [grid[0], *grid[:-1]]
    span = range(first, last)
    edit = torch.zeros_like(x, memory_format=torch.contiguous_format)
    scale = 1.0 if strength is None or n_avg > 1 else strength
    transport = None if strength is None or n_avg == 1 else (strength, reg)
    run = _Run(name, velocity, x, n_avg, weights[0] is not None, transport, seeds)
    if span and method in _FUSED:
        edit = run.fused(edit, grid, [noisy[i] for i in span], span, weights, scale, method)
    elif span:
        plan = plan_for(method, torch.tensor(grid[first : last + 1], dtype=torch.float64))
        edit = run.planned(edit, plan, noisy[first:last] if compat else None, weights, scale)
    if not n_min:
        one = torch.ones(2, dtype=accumulator(x.dtype), device=x.device)
        return linear_combination([x.contiguous(), edit], one)
    return _tail(name, target, x, edit, grid[last:], weights[1], seeds)


class _Run:
    """The evaluations of an edit: the two points, their velocities, and what a draw counts for."""

    def __init__(self, name, velocity, x, n_avg, guided, transport, seeds):
        self.name, self.velocity, self.x, self.n_avg = name, velocity, x.contiguous(), n_avg
        self.guided, self.transport, self.seeds = guided, transport, seeds

    def fused(self, edit, grid, noisy, span, weights, scale, method) -> Tensor:
        """Euler's and Adams-Bashforth's methods: the update is the step."""
        coefs = _step_rows(grid, span, self.n_avg, _parts(weights), scale, method)
        update = _Update(self.x, coefs)
        prepare = _Prepare(self.x, noisy, self.n_avg, self.seeds)
        sigma = levels([grid[i] for i in span], self.x, 2 * len(self.x))
        for j in range(len(span)):
            moved = edit
            for at, v, factor in self.draws(j, prepare, edit, sigma[j]):
                moved = update(at, moved, v, factor)
            edit = moved
        return edit

    def planned(self, edit, plan, noisy, weights, scale) -> Tensor:
        """Any plan: the update makes the mean difference, the plan's launch the step."""
        coefs = _mean_rows(self.n_avg, _parts(weights), scale)
        update = _Update(self.x, coefs)
        stages = plan.stages
        at_levels = [noisy[s.step] if noisy else s.sigma for s in stages]
        prepare = _Prepare(self.x, at_levels, self.n_avg, self.seeds)
        sigma = levels([s.sigma for s in stages], self.x, 2 * len(self.x))
        state = init(plan, edit)
        for j in range(len(stages)):
            difference = torch.zeros_like(edit)
            for at, v, factor in self.draws(j, prepare, state.x, sigma[j]):
                difference = update(at % self.n_avg, difference, v, factor)
            state = step(state, difference)
        return state.memory[stages[-1].result]

    def draws(self, j: int, prepare: "_Prepare", edit: Tensor, sigma: Tensor):
        """(index, velocities, factor) of the draws of evaluation j."""
        points = factor = None
        first = j * self.n_avg
        if self.transport:
            points = [prepare(first + k, self.x, edit, fresh=True) for k in range(self.n_avg)]
            factor = _factor(points, sigma[: len(self.x)], *self.transport)
        for k in range(self.n_avg):
            z = points[k] if points else prepare(first + k, self.x, edit)
            yield first + k, evaluate(self.name, self.velocity, z, sigma, self.guided), factor


class _Prepare:
    """The two points of an evaluation in one launch, side by side in the model's batch."""

    def __init__(self, x: Tensor, sigmas: Sequence[float], n_avg: int, seeds: int | Sequence[int]):
        rows = [[{"x": 1 - s, "z": s}, {"x": 1 - s, "d": 1.0, "z": s}] for s in sigmas for _ in range(n_avg)]
        self.launch = Launches(x, ["x", "d"], rows, noise="moving")
        self.keys = noise_keys(seeds, len(x), step=1, device=x.device)  # 0 may have drawn the picture itself
        self.buffer: Tensor | None = None

    def __call__(self, at: int, x: Tensor, edit: Tensor, fresh: bool = False) -> Tensor:
        if fresh or self.buffer is None:
            self.buffer = x.new_empty((2 * len(x), *x.shape[1:]))
        self.launch(at, [x, edit], keys=self.keys, out=self.buffer.chunk(2))
        return self.buffer


def _parts(weights: Sequence[Tensor | None]) -> Tensor:
    """v_tar - v_src of c_tar, c_src, u_tar, u_src, or of v_tar, v_src: float64 `[tensors, *rows]`."""
    if weights[0] is None:
        return torch.tensor([1.0, -1.0], dtype=torch.float64)
    source, target = torch.broadcast_tensors(*weights)
    return torch.stack([target, -source, 1 - target, source - 1])


def _step_rows(grid, span, n_avg, parts, scale, method) -> Tensor:
    """d += h (v_tar - v_src), and for a history the mean difference of the step as a second result."""
    outputs, differences = (2 if method == "ab2" else 1), slice(1, 1 + len(parts))
    coefs = parts.new_zeros(len(span) * n_avg, outputs, len(parts) + outputs, *parts.shape[1:])
    coefs[:, 0, 0] = 1
    for at in range(len(coefs)):
        (j, k), i = divmod(at, n_avg), span[at // n_avg]
        h, half = grid[i + 1] - grid[i], 0.0
        if outputs == 2:  # Adams-Bashforth over this difference and the last
            half = h / (grid[i] - grid[i - 1]) / 2 if j else 0.0
            coefs[at, 1, differences] = parts * (scale / n_avg)
            coefs[at, int(k > 0), -1] = 1.0 if k else -h * half
        coefs[at, 0, differences] = parts * (scale * h * (1 + half) / n_avg)
    return coefs


def _mean_rows(n_avg: int, parts: Tensor, scale: float) -> Tensor:
    """The mean difference, summed up draw by draw."""
    coefs = parts.new_zeros(n_avg, 1, 1 + len(parts), *parts.shape[1:])
    coefs[:, 0, 0], coefs[:, 0, 1:] = 1, parts * (scale / n_avg)
    return coefs


class _Update:
    """One launch with the velocities of a pair, guidance of both in the coefficients.

    Terms cancel in pairs, from left to right: equal velocities add 0 to a d of 0, to the bit.
    """

    def __init__(self, x: Tensor, coefs: Tensor):
        self.coefs = coefs.to(accumulator(x.dtype)).to(x.device)
        self.differences = slice(1, coefs.shape[2] - (coefs.shape[1] - 1))
        self.history: Tensor | None = None

    def __call__(self, at: int, edit: Tensor, v: Sequence[Tensor], factor: Tensor | None) -> Tensor:
        tensors = [edit, *(half for pair in reversed(v) for half in reversed(pair.chunk(2)))]
        coefs = self.coefs[at]
        if factor is not None:
            coefs = coefs.reshape(*coefs.shape[:2], -1) * torch.ones_like(factor)
            coefs[:, self.differences] *= factor
        if len(coefs) == 1:
            return combine(tensors, coefs)[0]
        history = edit if self.history is None else self.history
        edit, self.history = combine([*tensors, history], coefs)
        return edit


def _factor(points: Sequence[Tensor], sigma: Tensor, strength: float, reg: float) -> Tensor:
    """strength (1 - sigma) exp(-H / 2) of every sample, `[batch]`."""
    z = torch.stack(points).flatten(2)  # [draws, 2 batch, elements]
    source, target = (t.transpose(0, 1).to(accumulator(z.dtype)) for t in z.chunk(2, 1))
    entropy = coupling_entropy(torch.cdist(source, target).square(), reg * z.shape[-1])
    return (strength * (1 - sigma) * (-entropy / 2).exp()).to(source.dtype)


def _tail(name, target, x, edit, grid, weight, seeds) -> Tensor:
    """Ordinary sampling of the target from x + d, noised once."""
    s = grid[0]
    keys = noise_keys(seeds, len(x), step=_TAIL, device=x.device)
    start = Launches(x, ["x", "d"], [[{"x": 1 - s, "d": 1.0, "z": s}]], noise="fixed")
    (z,) = start(0, [x.contiguous(), edit], keys=keys)
    rows = [[{"x": 1.0, "v": end - sigma}] for sigma, end in pairwise(grid)]
    launch, sigma = Launches(x, ["x", "v"], rows, weight=weight), levels(grid, x)
    for i in range(len(rows)):
        v = evaluate(name, target, z, sigma[i], weight is not None)
        (z,) = launch(i, [z, *v], out=[z])
    return z


def _check(name, count, n_max, n_min, n_avg, method, compat, target) -> None:
    if not 0 <= n_min <= n_max <= count:
        raise ValueError(f"{name}: 0 <= n_min <= n_max <= {count} steps is required, got {n_min}, {n_max}")
    if n_avg < 1:
        raise ValueError(f"{name}: n_avg must be at least 1, got {n_avg}")
    if n_min and target is None:
        raise ValueError(f"{name}: n_min {n_min} needs target=, the velocity of the targets alone")
    known = method_named(method)
    if known.adaptive or known.stochastic:
        raise ValueError(f"{name}: method must have a grid and draw no noise, got {method!r}")
    one_of(name, "compat", compat, (None, "wan-edit"))


@torch.no_grad()
def pyramid_jump(
    x: Tensor, sigma: float, *, end: float | None = None, seeds: int | Sequence[int] = 0, step: int = 0
) -> tuple[Tensor, float]:
    r"""Returns a state at twice the resolution, and its noise level: a jump between stages of a pyramid.

    Nearest-neighbour upsampling of :math:`(1-\sigma)x_0 + \sigma n` copies each n into a block of 2 x 2, a
    covariance :math:`\sigma^2 J` (J of ones). With :math:`a = (1-\sigma')/(1-\sigma)` the sum
    :math:`a\,up(x) + b z` has the signal of level sigma', and its noise is white if z has the covariance
    :math:`(\sigma'^2 I - a^2\sigma^2 J)/b^2` in each block: variance 1 for :math:`b^2 = \sigma'^2 -
    a^2\sigma^2`, and :math:`\gamma = -a^2\sigma^2/b^2` between pixels. It exists while
    :math:`\gamma \ge -1/3`, that is :math:`\sigma' \ge 2\sigma/(1+\sigma)`, where it is cheapest: the jump of
    Pyramid Flow (Jin et al., 2024), which Pyramid-Edit (Li et al., FiVE-Bench, 2025) makes between stages.

    Args:
        x: `[batch, ..., height, width]`.
        sigma: its level, below 1.
        end: sigma', at most 1; None for the lowest that there is.
        seeds, step: of the noise.

    Raises:
        ValueError: levels for which there is no such noise.
    """
    name = "pyramid_jump"
    least = 2 * sigma / (1 + sigma)
    end = least if end is None else end
    if not (0 <= sigma < 1 and least <= end <= 1):
        raise ValueError(
            f"{name}: 0 <= sigma < 1 and 2 sigma / (1 + sigma) <= end <= 1 are required, got {sigma}, {end}"
        )
    a = (1 - end) / (1 - sigma)
    common = math.sqrt(max(end**2 - 4 * (a * sigma) ** 2, 0.0))  # of the mean of a block
    big = _upsampled(x)
    keys = noise_keys(seeds, len(x), step=step, device=x.device)
    z = philox_normal(big.shape, keys, dtype=big.dtype)
    mean = _upsampled(z.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3)))
    launch = Launches(big, ["x", "m"], [[{"x": a, "m": common - end, "z": end}]], noise="fixed")
    return launch(0, [big, mean], keys=keys)[0], end


def _upsampled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2).contiguous()
