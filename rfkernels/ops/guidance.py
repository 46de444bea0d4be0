"""Guidance: combine velocities, then step. Row scalars, dtypes and errors as in `rfkernels.ops.solver`."""

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import define, expand_rows, row_scalar, sum_to_rows

__all__ = ["cfg_step", "cfg_step_reference"]


def cfg_step(
    x: Tensor,
    uncond: Tensor,
    cond: Tensor,
    guidance: float | Tensor,
    a: float | Tensor,
    b: float | Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`a\,x + b\,(u + w\,(c - u))`: classifier-free guidance folded into an affine step.

    Ho and Salimans, "Classifier-free diffusion guidance", 2022. Euler's step is `a = 1`,
    `b = sigma' - sigma`; guidance 1 is the conditional velocity, 0 the unconditional one.

    Args:
        x: the state, `[batch, ...]`.
        uncond, cond: the two velocities :math:`u` and :math:`c`, shaped like `x`, of one dtype.
        guidance: :math:`w`, a row scalar.
        a, b: row scalars.
        out: where to write, `x` itself allowed; no gradient then.
    """
    scalars = row_scalar(guidance, x), row_scalar(a, x), row_scalar(b, x)
    return _cfg_step(x, uncond, cond, *scalars, out=out)


def cfg_step_reference(
    x: Tensor, uncond: Tensor, cond: Tensor, guidance: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """The definition of `cfg_step` in plain torch."""
    w, a, b = (expand_rows(s, x) for s in (guidance, a, b))
    return a * x + b * (uncond + w * (cond - uncond))


def _cfg_step_backward(grad, needs, x, uncond, cond, guidance, a, b):
    w, scale = expand_rows(guidance, x), expand_rows(b, x)
    step = grad * scale
    difference = cond.to(grad.dtype) - uncond
    return (
        (grad * expand_rows(a, x)).to(x.dtype) if needs[0] else None,
        (step * (1 - w)).to(uncond.dtype) if needs[1] else None,
        (step * w).to(cond.dtype) if needs[2] else None,
        sum_to_rows(step * difference, guidance) if needs[3] else None,
        sum_to_rows(grad * x, a) if needs[4] else None,
        sum_to_rows(grad * (uncond + w * difference), b) if needs[5] else None,
    )


_cfg_step = define(
    "cfg_step",
    "Tensor x, Tensor uncond, Tensor cond, Tensor guidance, Tensor a, Tensor b",
    _C.cfg_step,
    lambda x, *_: torch.empty_like(x),
    cfg_step_reference,
    _cfg_step_backward,
)
