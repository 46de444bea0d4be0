r"""Targets that come from a teacher, or from the student's own average velocity.

All velocities are those of the sigma convention, :math:`v = \epsilon - x_0`, whatever the paper's. A function
that gives a target runs its models without gradients. A model is called as `model(x, sigma)` with sigma
`[batch]` in the arithmetic's dtype of x (float32, float64 for float64).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rfkernels.objectives.densities import stream
from rfkernels.objectives.losses import Reduction, batch_level, reduce_samples, squared_error
from rfkernels.ops._register import accumulator
from rfkernels.ops.noise import philox_normal, philox_words
from rfkernels.ops.solver import linear_combination
from rfkernels.ops.stochastic import stack_rows, sum_of_squares
from rfkernels.samplers import sample

__all__ = [
    "consistency_matching_loss",
    "distill_sigma",
    "guided_point",
    "guided_target",
    "matching_target",
    "reflow_pairs",
    "shortcut_steps",
    "shortcut_target",
    "straightening_target",
    "velocity_distillation_loss",
]

Model = Callable[[Tensor, Tensor], Tensor]
_STEPS = 0x73686F7274  # "short"
_TIMES = 0x64697374  # "dist"


def combined(tensors: Sequence[Tensor], coefs: Sequence[float | Tensor]) -> Tensor:
    """One launch, whatever dtypes the tensors after the first have."""
    tensors = [t.contiguous() for t in tensors]
    if len({t.dtype for t in tensors[1:]}) > 1:
        tensors = [tensors[0], *(t.to(tensors[0].dtype) for t in tensors[1:])]
    return linear_combination(tensors, stack_rows(list(coefs), tensors[0]))


def level_of(sigma: Tensor, x: Tensor) -> Tensor:
    """A level as models take it: `[batch]`, in the dtype of x's arithmetic."""
    return batch_level(sigma, x).to(accumulator(x.dtype))


def reflow_pairs(
    velocity: Model,
    keys: Tensor,
    shape: Sequence[int],
    sigmas: Tensor,
    *,
    method: str = "heun",
    guidance=None,
) -> tuple[Tensor, Tensor]:
    """Returns (x0, noise): fresh noise and where the model's flow takes it, pairs for `interpolate`.

    The noise is `philox_normal(shape, keys)`, so that a data set of pairs needs to store x0 and keys alone.
    Use the averaged (EMA) weights. Liu, Gong and Liu, "Flow straight and fast", 2022.

    Args:
        velocity, sigmas, method, guidance: as in `rfkernels.samplers.sample`.
        keys: `int64[batch, 3]`; shape: `[batch, ...]`.
    """
    noise = philox_normal(shape, keys)
    with torch.no_grad():
        return sample(velocity, noise, sigmas, method=method, guidance=guidance), noise


def distill_sigma(kind: Literal["t0", "t1", "k"], keys: Tensor, *, k: int = 1, eps: float = 1e-3) -> Tensor:
    r"""Returns the levels at which rectified flow distils, float64 `[batch]`.

    With t = 1 - sigma from `eps` on: "t0" is the noise end, t = eps, for `one_step_loss`; "t1" the data end,
    t = 1, for the way back; "k" draws :math:`t = (i/k)(1 - eps) + eps`, i = 0 .. k - 1, for `velocity_loss`
    on pairs.

    Raises:
        ValueError: another kind, k < 1, or eps outside 0 .. 1.
    """
    if k < 1 or not 0 <= eps < 1:
        raise ValueError(f"distill_sigma: expected k >= 1 and eps in 0 .. 1, got {k}, {eps}")
    if kind == "t1":
        return torch.zeros(len(keys), dtype=torch.float64, device=keys.device)
    if kind == "t0":
        return torch.full((len(keys),), 1 - eps, dtype=torch.float64, device=keys.device)
    if kind == "k":
        i = philox_words(1, stream(keys, _TIMES))[:, 0].double() / 2**32 * k
        return 1 - (i.floor() / k * (1 - eps) + eps)
    raise ValueError(f"distill_sigma: kind must be t0, t1 or k, got {kind!r}")


def guided_point(noise: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    r"""Returns :math:`x_\sigma = \epsilon - (1-\sigma)\,v`, where one step with `v` leads: SlimFlow's point.

    As the authors run it v is the student's velocity at the noise, without gradient; with the teacher's it is
    the paper's version. sigma is drawn from .2 .. .8. Zhu, Liu and Liu, "SlimFlow", 2024.
    """
    sigma = batch_level(sigma, noise)
    return combined([noise, v.detach()], [1.0, sigma - 1])


def guided_target(v: Tensor, v_teacher: Tensor, sigma: Tensor) -> Tensor:
    r"""Returns :math:`(1-\sigma)\,v + \sigma\,v_T(x_\sigma, \sigma)`: the average velocity of both parts.

    The target of the student's velocity at the noise; `v` as in `guided_point`. No gradient.
    """
    sigma = batch_level(sigma, v)
    with torch.no_grad():
        return combined([v, v_teacher], [1 - sigma, sigma])


def matching_target(
    student: Model,
    v_teacher: Tensor,
    x: Tensor,
    sigma: Tensor,
    *,
    mode: Literal["discrete", "continuous"] = "discrete",
    delta: float = 0.01,
    d_norm: bool = False,
    u: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`v_T - \sigma D`, the target of MDT's velocity matching, without gradient.

    The student's u is the average velocity from x to the data, :math:`x_0 = x - \sigma u`, for which
    :math:`u = v - \sigma\,du/d\sigma` along the teacher's flow. D is that derivative: "continuous" a
    Jacobian-vector product along :math:`(v_T, 1)`, "discrete"
    :math:`(u(x, \sigma) - u(x - \delta v_T, \sigma - \delta))/\delta`. MDT-dist, 2025.

    Args:
        v_teacher: guided as usual; the authors' weights 40 and 100 are guidance 41 and 101 here.
        sigma: `[batch]`; from sigma_m + delta on for "discrete", see `rfkernels.objectives.Rescaled`.
        d_norm: D is divided by :math:`\|D\| + 0.1`, the norm of a whole sample. The correction then is at
            most 1 for all elements together, next to nothing for a large latent, and the identity no longer
            holds.
        u: the student's output at (x, sigma) if it is known ("discrete").

    Raises:
        ValueError: another mode, or delta that is not positive.
    """
    if mode not in ("discrete", "continuous") or not delta > 0:
        raise ValueError(
            f"matching_target: expected mode discrete or continuous and delta > 0, got {mode!r}, {delta}"
        )
    t = level_of(sigma, x)
    v = v_teacher.detach()
    if mode == "continuous":
        with torch.no_grad():
            _, derivative = torch.func.jvp(student, (x, t), (v.to(x.dtype), torch.ones_like(t)))
        parts, signs = [derivative.detach()], [1.0]
    else:
        with torch.no_grad():
            u = student(x, t) if u is None else u.detach()
            parts, signs = [u, student(combined([x, v], [1.0, -delta]), t - delta)], [1 / delta, -1 / delta]
    with torch.no_grad():
        scale = -batch_level(sigma, x)
        if d_norm:
            scale = scale / (sum_of_squares(parts, signs).sqrt() + 0.1)
        return combined([v, *parts], [1.0, *(s * scale for s in signs)])


def consistency_matching_loss(
    student: Model,
    v_teacher: Tensor,
    x: Tensor,
    sigma: Tensor,
    sigma_target: Tensor,
    *,
    delta: float = 0.01,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Returns MDT's "cm" variant: two states of one teacher step are sent to one lower level and compared.

    :math:`\|[x - (\sigma-\sigma^*)u(x,\sigma)] - [x_p - (\sigma_p-\sigma^*)u(x_p,\sigma_p)]\|^2/D` with
    :math:`x_p = x - \delta v_T`, :math:`\sigma_p = \sigma - \delta`, the second without gradient.

    Args:
        sigma_target: :math:`\sigma^*`, `[batch]`, not above :math:`\sigma - \delta`.
    """
    t, goal = level_of(sigma, x), batch_level(sigma_target, x)
    far = batch_level(sigma, x) - goal
    with torch.no_grad():
        x_p = combined([x, v_teacher.detach()], [1.0, -delta])
        u_p = student(x_p, t - delta)
    tensors = [x, student(x, t), x_p, u_p]
    losses = squared_error(tensors, [1.0, -far, -1.0, far - delta])
    return reduce_samples(losses, x, reduction)


def velocity_distillation_loss(
    u_noise: Tensor, u: Tensor, v_target: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""Returns :math:`\|u - v_{target}\|^2/D` with gradient :math:`2(u - v_{target})/D` for `u_noise`.

    MDT's velocity distillation: `u_noise` is the student's output at fresh noise :math:`\epsilon'` and sigma
    1, so that :math:`x_f = \epsilon' - u_{noise}` is its one-step sample; `u` and `v_target`
    (`matching_target`) are both taken at :math:`x_f` noised again, with the level and the noise of the
    matching term. Descent moves :math:`x_f` along :math:`u - v_{target}`, a difference of scores in which
    the student is its own critic.
    """
    tensors = [u_noise, u_noise.detach(), u.detach(), v_target.detach()]
    return reduce_samples(squared_error(tensors, [1.0, -1.0, 1.0, -1.0]), u_noise, reduction)


def shortcut_steps(keys: Tensor, halvings: int, *, fraction: float = 0.25) -> Tensor:
    r"""Returns the step sizes d that a shortcut model trains with, float64 `[batch]`.

    With probability `fraction` :math:`d = 2^{-i}`, i uniform in 0 .. halvings - 1, for `shortcut_target`;
    else 0, plain flow matching. The published code calls the number of halvings `max_denoising_steps`.

    Raises:
        ValueError: no halvings, or a fraction outside 0 .. 1.
    """
    if halvings < 1 or not 0 <= fraction <= 1:
        raise ValueError(
            f"shortcut_steps: expected halvings >= 1, fraction in 0 .. 1, got {halvings}, {fraction}"
        )
    chosen, size = (philox_words(2, stream(keys, _STEPS)).double() / 2**32).unbind(1)
    return torch.where(chosen < fraction, 2.0 ** -(size * halvings).floor(), 0)


def shortcut_target(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    d: Tensor,
    flow: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`\frac12[v(x,\sigma,\frac d2) + v(x - \frac d2 v, \sigma - \frac d2, \frac d2)]`.

    Two half steps in one: what a step of size d says. Where d is 0 it is the model's own velocity, no target:
    give `flow` for those samples. Frans et al., "One step diffusion via shortcut models", 2024.

    Args:
        velocity: takes (x, sigma `[batch]`, step size `[batch]`).
        sigma, d: `[batch]`; :math:`\sigma - d` not below 0.
        flow: the flow-matching target, taken where d is 0.
    """
    t, half = level_of(sigma, x), batch_level(d, x) / 2
    size = half.to(t.dtype)
    with torch.no_grad():
        first = velocity(x, t, size)
        second = velocity(combined([x, first], [1.0, -half]), t - size, size)
        if flow is None:
            return combined([first, second], [0.5, 0.5])
        two = 0.5 * (half > 0)
        return combined([first, second, flow], [two, two, 1 - 2 * two])


def straightening_target(
    x: Tensor, x_next: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
) -> Tensor:
    r"""Returns :math:`(x' - x)/(\sigma' - \sigma)`: the velocity that goes between two states in one step.

    BOSS fine-tunes at the start of each of its steps towards it, with states of the teacher's fine
    trajectory at the times its programme chose. Nguyen, Nguyen and Nguyen, "Bellman optimal stepsize
    straightening of flow-matching models", 2024.

    Args:
        sigma, sigma_next: levels, numbers or row scalars.

    Raises:
        ValueError: levels, numbers or on the CPU, that are the same.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
    h = torch.as_tensor(sigma_next, dtype=torch.float64, device=x.device) - sigma
    if h.device.type == "cpu" and not (h != 0).all():
        raise ValueError(f"straightening_target: the levels must differ, got {sigma.tolist()} twice")
    return combined([x_next, x], [1 / h, -1 / h])
