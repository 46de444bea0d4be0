r"""Losses of a velocity, a noise or a data estimate.

The squared ones are made of `ops.sum_of_squares`: one pass over the tensors forward, whose differences are
never stored, and one launch backward. Sums are float64; a loss comes back in float32 (float64 for float64
predictions), as one number, or with `reduction="none"` one for each sample.

Weights are one for each sample, `[batch]`, or row scalars within it: `[batch, 1, frames]` weighs the frames
of a video. They multiply squares before these are averaged, so that they have the effect they say they have.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rfkernels.ops._register import accumulator
from rfkernels.ops.solver import affine_step, linear_combination
from rfkernels.ops.stochastic import sample_size, stack_rows, sum_of_squares

__all__ = [
    "elementwise_huber",
    "lpips_huber",
    "noise_loss_in_data_space",
    "one_step_loss",
    "pseudo_huber",
    "squared_error",
    "velocity_loss",
]

Reduction = Literal["mean", "none"]


def reduce_samples(losses: Tensor, like: Tensor, reduction: Reduction) -> Tensor:
    """The mean of per-sample losses, or they themselves, in the dtype of `like`'s arithmetic."""
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    if reduction == "mean" and not len(losses):
        raise ValueError("a batch without samples has no mean loss")
    return (losses.mean() if reduction == "mean" else losses).to(accumulator(like.dtype))


def squared_error(
    tensors: Sequence[Tensor],
    coefs: Sequence[float | Tensor],
    weight: Tensor | None = None,
) -> Tensor:
    r"""Returns the mean square of :math:`\sum_k c_k y_k` of each sample, float64 `[batch]`, weighted.

    Any squared objective without its target in memory: `squared_error([v, noise, x0], [1, -1, 1])` is that of
    the velocity.

    Args:
        tensors: one to eight, `[batch, ...]`.
        coefs: a number or row scalar for each.
        weight: not negative; a row scalar.
    """
    size = sample_size(tensors[0])
    if weight is None or weight.ndim <= 1:
        losses = sum_of_squares(tensors, list(coefs)) / size
        return losses if weight is None else losses * weight.double()
    root = weight.double().sqrt()
    rows = stack_rows([*coefs, root], tensors[0])
    return sum_of_squares(tensors, list(rows[:-1] * rows[-1])) / size


def velocity_loss(
    prediction: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Returns :math:`E\,w\,\|v - target\|^2/D`, the flow-matching and the reflow loss.

    Liu, Gong and Liu, "Flow straight and fast", 2022; Lipman et al., "Flow matching for generative
    modeling", 2022.

    Args:
        prediction, target: `[batch, ...]`; `rfkernels.objectives.interpolate` makes the target.
        weight: see above; `rfkernels.objectives.loss_weight` has the usual ones.
        reduction: "mean" over the batch, or "none".
    """
    return reduce_samples(squared_error([prediction, target], [1.0, -1.0], weight), prediction, reduction)


def pseudo_huber(
    prediction: Tensor,
    target: Tensor,
    *,
    c: float | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Returns :math:`E\,w\,(\sqrt{\|d\|^2 + c^2} - c)/D` with one norm for each sample.

    Lee, Lin and Fanti, "Improving the training of rectified flows", 2024. Their c is 0.00054 D, with D
    itself and not its root; the sums are float64, where float16 would overflow.

    Args:
        c: positive; 0.00054 D if None.
        weight: `[batch]`.

    Raises:
        ValueError: c that is not positive, or a weight with more axes.
    """
    size = sample_size(prediction)
    c = 0.00054 * size if c is None else c
    if not c > 0:
        raise ValueError(f"pseudo_huber: c must be positive, got {c}")
    if weight is not None and weight.ndim > 1:
        raise ValueError(f"pseudo_huber: weight must be [batch], got {list(weight.shape)}")
    total = sum_of_squares([prediction, target], [1.0, -1.0])
    losses = _huber(total, c) / size
    return reduce_samples(losses if weight is None else losses * weight.double(), prediction, reduction)


def _huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c, without its cancellation."""
    return square / ((square + c * c).sqrt() + c)


def elementwise_huber(
    tensors: Sequence[Tensor],
    coefs: Sequence[float | Tensor],
    *,
    c: float = 1e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Returns the mean of :math:`\sqrt{d^2 + c^2} - c` over elements, :math:`d = \sum_k c_k y_k`.

    Args:
        tensors, coefs: as in `squared_error`; the first tensor gives the dtype of d.
        c: positive.

    Raises:
        ValueError: c that is not positive.
    """
    if not c > 0:
        raise ValueError(f"elementwise_huber: c must be positive, got {c}")
    d = linear_combination([t.contiguous() for t in tensors], stack_rows(list(coefs), tensors[0]))
    losses = _huber(d.to(accumulator(d.dtype)).square(), c).flatten(1).mean(1)
    return reduce_samples(losses, d, reduction)


def noise_loss_in_data_space(
    eps: Tensor,
    x: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    c: float = 1e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Returns the element-wise pseudo-Huber loss of :math:`(x - \sigma\epsilon)/\alpha - x_0`.

    Rectified Diffusion (Wang et al., 2024) predicts noise and compares data: the code; the paper's text has a
    squared error of the noise.

    Args:
        eps: the predicted noise; x: the state, which gives the arithmetic; x0: the data; `[batch, ...]`.
        alpha, sigma: of the path, row scalars; alpha is nowhere 0.

    Raises:
        ValueError: alpha on the CPU that is 0 somewhere.
    """
    if alpha.device.type == "cpu" and not (alpha != 0).all():
        raise ValueError("noise_loss_in_data_space: alpha 0 leaves no data estimate of a noise prediction")
    alpha, sigma = alpha.double(), sigma.double()
    tensors, coefs = [x, eps, x0], [1 / alpha, -sigma / alpha, -1.0]
    if eps.dtype != x0.dtype:
        tensors = [x, eps.to(x.dtype), x0.to(x.dtype)]
    return elementwise_huber(tensors, coefs, c=c, reduction=reduction)


def lpips_huber(
    v: Tensor,
    x: Tensor,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor],
    *,
    c: float | None = None,
    divide_by_sigma: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Returns :math:`(1-\sigma)\,Huber(v, \epsilon - x_0) + P(x_0, x - \sigma v)`, P a perceptual distance.

    Lee, Lin and Fanti, 2024, with LPIPS on pictures brought to 224 pixels and to 0 .. 1; that is the caller's
    `perceptual`, so that no network comes with this library.

    Args:
        v: the prediction at the state `x`; x0, noise: its pair; `[batch, ...]`.
        sigma: `[batch]`.
        perceptual: takes the data and the estimate, returns `[batch]`, or `[batch, 1, 1, 1]` as LPIPS does.
        c: see `pseudo_huber`.
        divide_by_sigma: P is divided by sigma (their configuration F), at least 1e-5.

    Raises:
        ValueError: a distance that is not one number a sample.
    """
    size = sample_size(v)
    c = 0.00054 * size if c is None else c
    sigma = sigma.double()
    huber = _huber(sum_of_squares([v, noise, x0], [1.0, -1.0, 1.0]), c) / size
    minus = stack_rows([-sigma], x)[0]
    distance = perceptual(x0, affine_step(x, v.contiguous(), 1.0, minus))
    if distance.numel() != len(x):
        raise ValueError(f"lpips_huber: expected one distance a sample, got {list(distance.shape)}")
    distance = distance.reshape(-1).double()
    if divide_by_sigma:
        distance = distance / sigma.clamp(min=1e-5)
    return reduce_samples((1 - sigma) * huber + distance, v, reduction)


def one_step_loss(
    v: Tensor, noise: Tensor, x0: Tensor, *, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Returns :math:`E\,w\,\|(\epsilon - v) - x_0\|^2/D`: distillation of pairs into one step.

    Liu et al., "InstaFlow", 2023, and the pair term of SlimFlow. v is the velocity at (noise, 1), or at the
    level the model knows that is nearest to it, see `distill_sigma`.
    """
    losses = squared_error([v, noise, x0], [-1.0, 1.0, -1.0], weight)
    return reduce_samples(losses, v, reduction)


def batch_level(value: float | Tensor, x: Tensor) -> Tensor:
    """A level as float64 `[batch]` on the device of `x`."""
    level = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    if level.ndim > 1 or level.numel() not in (1, len(x)):
        raise ValueError(f"a level must be a number or [{len(x)}], got {list(level.shape)}")
    return level.expand(len(x))
