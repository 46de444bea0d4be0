r"""Solver steps: move a state along its trajectory.

Row scalars (`a`, `b`, `dt`, the rows of `coefs`) are numbers or tensors on the device of the state:
float64 for a float64 state, otherwise float32. Their axes are the leading axes of the state, each as
long as the state's or 1: `[]` for all, `[batch]` per sample, `[batch, 1, frames]` per frame of a video
`[batch, channels, frames, height, width]`, `[batch, tokens]` per token of `[batch, tokens, channels]`.
They may change from step to step without a synchronisation, a new graph or a new compilation.

The state is float64, float32, float16 or bfloat16 and contiguous; velocities have its dtype, or are
float16 or bfloat16 beside a float32 state. Arithmetic is in float32 (float64 for a float64 state) and
rounds once, at the end. All raise ValueError for tensors that do not fit together.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import define, expand_rows, row_scalar, sum_to_rows

__all__ = [
    "affine_step",
    "affine_step_reference",
    "linear_combination",
    "linear_combination_reference",
    "taylor_step",
    "taylor_step_reference",
]


def affine_step(
    x: Tensor, v: Tensor, a: float | Tensor, b: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    r"""Returns :math:`a\,x + b\,v`, one step of Euler's method, DDIM or any affine prediction type.

    Euler from sigma to sigma' is `a = 1`, `b = sigma' - sigma`; for a path
    :math:`\alpha x_0 + \sigma\epsilon` and a noise prediction `a = alpha'/alpha`,
    `b = sigma' - alpha' sigma/alpha`.

    Args:
        x: the state, `[batch, ...]`.
        v: the prediction, shaped like `x`.
        a, b: row scalars.
        out: where to write, `x` itself allowed; no gradient then.
    """
    return _affine_step(x, v, row_scalar(a, x), row_scalar(b, x), out=out)


def affine_step_reference(x: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The definition of `affine_step` in plain torch."""
    return expand_rows(a, x) * x + expand_rows(b, x) * v


def _affine_step_backward(grad, needs, x, v, a, b):
    return (
        (grad * expand_rows(a, x)).to(x.dtype) if needs[0] else None,
        (grad * expand_rows(b, x)).to(v.dtype) if needs[1] else None,
        sum_to_rows(grad * x, a) if needs[2] else None,
        sum_to_rows(grad * v, b) if needs[3] else None,
    )


_affine_step = define(
    "affine_step",
    "Tensor x, Tensor v, Tensor a, Tensor b",
    _C.affine_step,
    lambda x, v, a, b: torch.empty_like(x),
    affine_step_reference,
    _affine_step_backward,
)


def linear_combination(
    tensors: Sequence[Tensor], coefs: Sequence[float] | Tensor, *, out: Tensor | None = None
) -> Tensor:
    r"""Returns :math:`\sum_k c_k y_k` for one to eight tensors, summed from left to right.

    The step of every Runge-Kutta, Adams and exponential multistep method, in one pass over memory.

    Args:
        tensors: :math:`y_0, \dots`, of one shape; the result has the dtype of the first,
            the others share one.
        coefs: one number per tensor, or a tensor `[len(tensors), *rows]` of row scalars.
        out: where to write, one of `tensors` allowed; no gradient then.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("linear_combination: expected 1..8 tensors, got 0")
    if isinstance(coefs, Tensor):
        return _linear_combination(tensors, coefs, out=out)
    return _linear_combination(tensors, row_scalar(list(coefs), tensors[0]), out=out)


def linear_combination_reference(tensors: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """The definition of `linear_combination` in plain torch."""
    terms = [expand_rows(c, y) * y for c, y in zip(coefs.unbind(0), tensors, strict=True)]
    return sum(terms[1:], terms[0]).to(tensors[0].dtype)


def _linear_combination_backward(grad, needs, coefs, *tensors):
    rows = coefs.unbind(0)
    # A list of tensors needs its gradients as a whole.
    grads = [(grad * expand_rows(c, y)).to(y.dtype) for c, y in zip(rows, tensors, strict=True)]
    sums = [sum_to_rows(grad * y, c) for c, y in zip(rows, tensors, strict=True)] if needs[1] else None
    return grads, torch.stack(sums) if sums else None


_linear_combination = define(
    "linear_combination",
    "Tensor[] tensors, Tensor coefs",
    _C.linear_combination,
    lambda tensors, coefs: torch.empty_like(tensors[0]),
    linear_combination_reference,
    _linear_combination_backward,
    saves=lambda out, tensors, coefs: (coefs, *tensors),
)


def taylor_step(x: Tensor, derivatives: Tensor, dt: float | Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Returns `x` moved along its Taylor series, :math:`x + \sum_{k=1}^K \frac{dt^k}{k!} d_k`.

    Exact for trajectories that are polynomials of degree K in t; order 1 is Euler's method.

    Args:
        x: the state, `[batch, ...]`.
        derivatives: :math:`d_1, \dots, d_K`, stacked: `[order, *x.shape]`, order 1 to 4.
        dt: the step, a row scalar.
        out: where to write, `x` itself allowed; no gradient then.
    """
    return _taylor_step(x, derivatives, row_scalar(dt, x), out=out)


def taylor_step_reference(x: Tensor, derivatives: Tensor, dt: Tensor) -> Tensor:
    """The definition of `taylor_step` in plain torch."""
    return (x + (_taylor_weights(derivatives, dt) * derivatives).sum(0)).to(x.dtype)


def _taylor_weights(derivatives: Tensor, dt: Tensor) -> Tensor:
    """dt^k / k!, shaped to multiply `derivatives`."""
    weights = [dt**k / math.factorial(k) for k in range(1, len(derivatives) + 1)]
    return torch.stack([expand_rows(w, derivatives[0]) for w in weights])


def _taylor_step_backward(grad, needs, x, derivatives, dt):
    grad_derivatives = grad_dt = None
    if needs[1]:
        grad_derivatives = (_taylor_weights(derivatives, dt) * grad).to(derivatives.dtype)
    if needs[2]:  # the derivative of the series in dt is the series of the derivative
        weights = torch.cat(
            [torch.ones_like(_taylor_weights(derivatives[:1], dt)), _taylor_weights(derivatives, dt)]
        )
        velocity = (weights[:-1] * derivatives).sum(0)
        grad_dt = sum_to_rows(grad * velocity, dt)
    return grad, grad_derivatives, grad_dt


_taylor_step = define(
    "taylor_step",
    "Tensor x, Tensor derivatives, Tensor dt",
    _C.taylor_step,
    lambda x, derivatives, dt: torch.empty_like(x),
    taylor_step_reference,
    _taylor_step_backward,
)
