r"""Stochastic steps, the log-probability of what they did, and the sum of squares every loss is made of.

A stochastic step draws :math:`x' = \mu + s\,z` with :math:`\mu = \sum_k c_k y_k`. Reinforcement learning asks
for the density of the stored, rounded :math:`x'` twice: while sampling (`sde_step`), and later under other
weights (`sde_log_prob`). Both make it of the same sums, so that at the same weights the two agree to the bit
and a ratio of policies starts at 1.

Tensors and row scalars are those of `rfkernels.ops.combine`. Sums, log-probabilities and divergences are
float64, one for each sample. All raise ValueError for tensors that do not fit together.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rfkernels.ops._register import accumulator, expand_rows, sum_to_rows
from rfkernels.ops.combine import combine, moments, stochastic_step

__all__ = [
    "StepCoefs",
    "flow_grpo_coefs",
    "sde_kl",
    "sde_log_prob",
    "sde_step",
    "stack_rows",
    "sum_of_squares",
]

Reduce = Literal["mean", "sum"]
_DIAGONAL = ((1,), (2, 4), (3, 6, 8))  # where `moments` has <o_j, o_j>


def sum_of_squares(tensors: Sequence[Tensor], coefs: Tensor | Sequence) -> Tensor:
    r"""Returns :math:`\sum (\sum_k c_{jk} y_k)^2` over the elements of each sample, float64 `[batch, J]`.

    One launch of `moments`; the gradients of the tensors take one launch of `combine` for up to three of
    them. Every squared loss of a velocity, a noise or a data estimate is such a sum, and differences of
    tensors are never stored.

    Args:
        tensors: one to eight, `[batch, ...]`, contiguous or not.
        coefs: `[J, len(tensors), *rows]`, J up to 3, a tensor or nested numbers and row scalars as
            `stack_rows` takes them. `[len(tensors)]` numbers or row scalars are J = 1, and the result is
            `[batch]`.
    """
    tensors = [t.contiguous() for t in tensors]
    if any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(f"sum_of_squares: expected one shape, got {[list(t.shape) for t in tensors]}")
    single = not isinstance(coefs, Tensor) and not isinstance(coefs[0], (list, tuple))
    if not isinstance(coefs, Tensor):
        rows = [coefs] if single else coefs
        if any(len(row) != len(tensors) for row in rows):
            raise ValueError(
                f"sum_of_squares: expected {len(tensors)} coefficients a row, got {[len(r) for r in rows]}"
            )
        flat = stack_rows([c for row in rows for c in row], tensors[0])
        coefs = flat.view(len(rows), len(tensors), *flat.shape[1:])
    if coefs.ndim < 2 or not 1 <= coefs.shape[0] <= 3 or coefs.shape[1] != len(tensors):
        raise ValueError(
            f"sum_of_squares: coefs must be [1..3, {len(tensors)}, *rows], got {list(coefs.shape)}"
        )
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (coefs, *tensors))
    # Without gradients torch.compile does not take a Function with a setup_context.
    sums = (_SumOfSquares.apply if differentiable else _SumOfSquares.forward)(coefs, *tensors)
    return sums[:, 0] if single else sums


class _SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(coefs, *tensors):
        return moments(list(tensors), coefs)[:, _DIAGONAL[len(coefs) - 1]]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        coefs, *tensors = ctx.saved_tensors
        grad = grad.to(coefs.dtype)
        needed = [k for k in range(len(tensors)) if ctx.needs_input_grad[k + 1]]
        # o_j = sum_l c_jl y_l, so that the gradient of y_k is sum_l (2 sum_j g_j c_jk c_jl) y_l.
        weights = coefs if coefs.ndim > 2 else coefs[..., None]
        scaled = weights * (2 * grad.T).reshape(len(weights), 1, len(grad), *[1] * (weights.ndim - 3))
        grads: list[Tensor | None] = [None] * len(tensors)
        for dtype in dict.fromkeys(tensors[k].dtype for k in needed):
            group = [k for k in needed if tensors[k].dtype == dtype]
            for some in (group[i : i + 3] for i in range(0, len(group), 3)):
                products = torch.stack([(scaled[:, k, None] * weights).sum(0) for k in some])
                for k, g in zip(some, _combine_as(dtype, tensors, products), strict=True):
                    grads[k] = g
        grad_coefs = None
        if ctx.needs_input_grad[0]:
            grad_coefs = _coefs_gradient(grad, coefs, tensors)
        return grad_coefs, *grads


def _combine_as(dtype: torch.dtype, tensors: Sequence[Tensor], coefs: Tensor) -> tuple[Tensor, ...]:
    """`combine` with results of `dtype`: the tensor that comes first decides."""
    first = next(k for k, t in enumerate(tensors) if t.dtype == dtype)
    order = [first, *(k for k in range(len(tensors)) if k != first)]
    return combine([tensors[k] for k in order], coefs[:, order].contiguous())


def _coefs_gradient(grad: Tensor, coefs: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    x, rows = tensors[0], []
    for j, row in enumerate(coefs):
        o = sum(expand_rows(c, x) * t.to(coefs.dtype) for c, t in zip(row, tensors, strict=True))
        o = o * expand_rows(2 * grad[:, j], x)
        rows.append(torch.stack([sum_to_rows(o * t, c) for c, t in zip(row, tensors, strict=True)]))
    return torch.stack(rows)


def stack_rows(values: Sequence[float | Tensor], x: Tensor) -> Tensor:
    """Returns row scalars for `x` as one tensor `[len(values), *rows]`, which `combine` and `moments` take.

    Numbers cost one small copy to the device for all of them together.

    Args:
        values: numbers, or tensors with the leading axes of `x`; those on another device are copied.
    """
    dtype = accumulator(x.dtype)
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=dtype, device=x.device)
    if any(v.ndim > x.ndim for v in tensors):
        raise ValueError(f"stack_rows: a row scalar has more axes than the tensor {list(x.shape)}")
    ndim = max(v.ndim for v in tensors)
    numbers = [float(v) for v in values if not isinstance(v, Tensor)]
    made = iter(torch.tensor(numbers, dtype=dtype, device=x.device).unbind(0) if numbers else ())
    columns = [v if isinstance(v, Tensor) else next(made) for v in values]
    columns = [c.to(x.device, dtype).reshape((*c.shape, *[1] * (ndim - c.ndim))) for c in columns]
    return torch.stack(torch.broadcast_tensors(*columns))


def sample_size(x: Tensor) -> int:
    """Returns how many elements a sample of `x` has; ValueError where it has none, and no mean."""
    size = x.shape[1:].numel()
    if size == 0:
        raise ValueError(f"expected samples with elements, got {list(x.shape)}")
    return size


def sde_step(
    tensors: Sequence[Tensor],
    coefs: Sequence[float | Tensor] | Tensor,
    std: float | Tensor,
    keys: Tensor,
    *,
    reduce: Reduce = "mean",
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`x' = \sum_k c_k y_k + s\,z` with fresh noise, and its log-probability `[batch]`.

    One launch, which never stores the noise and leaves the sums of the log-probability behind (two launches
    where `std` differs within a sample): `sde_log_prob` on the same :math:`x'` has the same bits. Neither
    result has a gradient: a policy is trained through `sde_log_prob`.

    Args:
        tensors: one to seven, `[batch, ...]`; the first gives the dtype of :math:`x'`.
        coefs: one number or row scalar for each tensor, or a tensor `[len(tensors), *rows]`.
        std: :math:`s`, a number or row scalar, of all axes of the tensors if it differs by element.
        keys: `int64[batch, 3]`, see `noise_keys`.
        reduce: see `sde_log_prob`.
        step: `int64[]` on the device, which row of `coefs` and `std`, tensors with an axis of steps before
            the others, to use; it is added to the step of the keys.
    """
    if step is not None:
        coefs, std = (t.index_select(0, step.reshape(1))[0] for t in (coefs, std))
        keys = torch.cat([keys[:, :2], keys[:, 2:] + step], 1)
    _check_reduce(reduce)
    with torch.no_grad():
        tensors = [t.contiguous() for t in tensors]
        rows = stack_rows([*coefs, std], tensors[0])[None]
        if _of_samples(rows[0, -1]):
            x_next, sums = stochastic_step(tensors, rows, keys)
            return x_next, _log_prob(sums[:, 1], rows[0, -1], sample_size(x_next), reduce)
        (x_next,) = combine(tensors, rows, keys=keys)
        return x_next, sde_log_prob(x_next, tensors, coefs, std, reduce=reduce)


def sde_log_prob(
    x_next: Tensor,
    tensors: Sequence[Tensor],
    coefs: Sequence[float | Tensor] | Tensor,
    std: float | Tensor,
    *,
    reduce: Reduce = "mean",
) -> Tensor:
    r"""Returns :math:`\ln N(x';\ \sum_k c_k y_k,\ s^2)`, float64 `[batch]`, with gradients for all tensors.

    .. math:: -\frac{(x'-\mu)^2}{2s^2} - \ln s - \frac12\ln 2\pi

    averaged or summed over the elements of a sample. The average is what Flow-GRPO takes: its ratio of
    policies is the root of the true one, of as high an order as there are elements, which is why it clips at
    1e-4. Elements with `std` 0 are deterministic and count as 0.

    Args:
        x_next: what was sampled, stored.
        tensors, coefs: as in `sde_step`.
        std: as in `sde_step`; has a gradient too.
        reduce: "mean" or "sum".

    Raises:
        ValueError: `reduce` is neither, or there is not one coefficient for each tensor.
    """
    _check_reduce(reduce)
    if len(coefs) != len(tensors):
        raise ValueError(f"sde_log_prob: expected {len(tensors)} coefficients, got {len(coefs)}")
    x, size = tensors[0], sample_size(x_next)
    (std,) = stack_rows([std], x)
    if _of_samples(std):
        rows = stack_rows([*(-c for c in coefs), std.new_ones(())], x)
        return _log_prob(sum_of_squares([*tensors, x_next], rows[None])[:, 0], std, size, reduce)
    inverse, log_std = _inverse_and_log(std)
    rows = stack_rows([*(-c for c in coefs), std.new_ones(()), inverse], x)
    total = sum_of_squares([*tensors, x_next], (rows[:-1] * rows[-1:])[None])[:, 0]
    log_prob = -0.5 * total - log_std.flatten(1).mean(1) * size
    return log_prob / size if reduce == "mean" else log_prob


def _check_reduce(reduce: str) -> None:
    if reduce not in ("mean", "sum"):
        raise ValueError(f'sde_log_prob: reduce must be "mean" or "sum", got {reduce!r}')


def _of_samples(std: Tensor) -> bool:
    return std.ndim < 2 or std.shape[1:].numel() == 1


def _inverse_and_log(std: Tensor) -> tuple[Tensor, Tensor]:
    """1 / s in its dtype, and ln s + 1/2 ln 2 pi in float64; both 0 where s is."""
    moves = std != 0
    safe = torch.where(moves, std, 1)
    log_std = safe.double().abs().log() + 0.5 * math.log(2 * math.pi)
    return torch.where(moves, 1 / safe, 0), torch.where(moves, log_std, 0)


def _log_prob(total: Tensor, std: Tensor, size: int, reduce: Reduce) -> Tensor:
    """Of samples whose squared residuals sum up to `total`, `std` a number or one for each."""
    inverse, log_std = _inverse_and_log(std.reshape(-1).double())
    log_prob = -0.5 * total * inverse.square() - size * log_std
    return log_prob / size if reduce == "mean" else log_prob


def sde_kl(
    v: Tensor, v_ref: Tensor, coef: float | Tensor, std: float | Tensor, *, reduce: Reduce = "mean"
) -> Tensor:
    r"""Returns the divergence of two steps that differ in the velocity alone, float64 `[batch]`.

    .. math:: KL = \frac{(\mu - \mu_{ref})^2}{2 s^2}, \qquad \mu - \mu_{ref} = c_v\,(v - v_{ref})

    The state is not read. With the `std` of a step this is the exact divergence of the two Gaussians; with
    `StepCoefs.scale` instead it is the one in Flow-GRPO's code, which lacks the factor :math:`-d\sigma`.
    Where `std` is 0, so is the result.

    Args:
        v, v_ref: the velocities of the policy and of the reference, `[batch, ...]`.
        coef: :math:`c_v`, a number or row scalar.
        std: a number, `[]` or `[batch]`.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'sde_kl: reduce must be "mean" or "sum", got {reduce!r}')
    (std,) = stack_rows([std], v)
    if std.ndim > 1:
        raise ValueError(f"sde_kl: std must be a number, [] or [batch], got {list(std.shape)}")
    std = std.double()
    total = sum_of_squares([v, v_ref], [coef, -coef])
    kl = torch.where(std == 0, 0, total / (2 * torch.where(std == 0, 1, std) ** 2))
    return kl / sample_size(v) if reduce == "mean" else kl


class StepCoefs(NamedTuple):
    """The scalars of a stochastic step :math:`x' = x_{coef} x + v_{coef} v + std\\,z`, float64."""

    x: Tensor
    v: Tensor
    std: Tensor
    scale: Tensor

    @property
    def coefs(self) -> Tensor:
        """`[2, *rows]`, what `sde_step` and `sde_log_prob` take beside the tensors (x, v)."""
        return torch.stack([self.x, self.v])


def flow_grpo_coefs(
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float = 0.7,
    sigma_max: float | Tensor | None = None,
) -> StepCoefs:
    r"""Returns the scalars of Flow-GRPO's step from sigma to sigma' < sigma, :math:`d = \sigma' - \sigma`.

    .. math::
        s = a\sqrt{\sigma/(1-\sigma^*)}, \quad
        x' = x\left(1 + \frac{s^2}{2\sigma}d\right) + v\left(1 + \frac{s^2(1-\sigma)}{2\sigma}\right)d
        + s\sqrt{-d}\,z

    :math:`\sigma^*` is `sigma`, at sigma = 1 `sigma_max`, which the authors take from the second level of the
    grid. The step keeps the marginals as d goes to 0; noise level 0 is Euler's step. Liu et al.,
    "Flow-GRPO: training flow matching models via online RL", 2025.

    Args:
        sigma, sigma_next: levels, numbers or float64 tensors of one shape: host data as a rule, made once.
        noise_level: :math:`a`.
        sigma_max: required where a level is 1.

    Raises:
        ValueError: levels on the CPU that do not fall, are not in 0 .. 1, or are 1 without a `sigma_max` < 1.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    sigma_next = torch.as_tensor(sigma_next, dtype=torch.float64, device=sigma.device)
    at_one = sigma == 1
    star = sigma if sigma_max is None else torch.where(at_one, sigma_max, sigma)
    if sigma.device.type == "cpu":
        if not ((sigma_next >= 0) & (sigma_next <= sigma) & (sigma <= 1)).all():
            raise ValueError(
                "flow_grpo_coefs: levels must fall within 1 .. 0, "
                f"got {sigma.tolist()} to {sigma_next.tolist()}"
            )
        if not (star < 1).all():
            raise ValueError(f"flow_grpo_coefs: a level of 1 needs sigma_max below 1, got {sigma_max}")
    d = sigma_next - sigma
    half = noise_level**2 / (2 * (1 - star))  # s^2 / (2 sigma), which has a limit at sigma 0
    scale = (2 * half * sigma).sqrt()
    return StepCoefs(1 + half * d, (1 + half * (1 - sigma)) * d, scale * (-d).sqrt(), scale)
