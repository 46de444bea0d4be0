"""A clean source beside the noisy state: models that read both along one axis and answer for the state."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["beside"]

Velocity = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, ...]"]


def beside(velocity: Velocity, source: Tensor, *, dim: int, negate: bool = False) -> Velocity:
    r"""Returns the velocity of x alone, :math:`\pm v([x; y], \sigma)` cut to the part of x, y the source.

    The source is clean at every step and is never stepped: frames of a video (ReCamMaster, dim 2 of `[batch,
    channels, frames, height, width]`), or the right half of a picture (HiDream-E1, dim -1).

    Args:
        velocity: of the joint state; a tensor, or a tuple for guidance.
        source: `[batch or 1, ...]`, like x but for the length of `dim`.
        dim: the axis.
        negate: the model answers with -v, as HiDream does.

    Raises:
        ValueError: a source that does not fit beside x.
    """

    def alone(x: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, ...]:
        axis = dim % x.ndim
        y = source.to(x.dtype)
        y = y.expand(len(x), *y.shape[1:]) if len(y) == 1 else y
        if axis == 0 or y.ndim != x.ndim or _without(y, axis) != _without(x, axis):
            raise ValueError(
                f"beside: source must be like x {list(x.shape)} but for the length of dim {dim}, not that of "
                f"the batch, got {list(source.shape)}"
            )
        cut = lambda v: _cut(v, axis, x.shape[axis], negate)
        v = velocity(torch.cat([x, y], axis), sigma)
        return cut(v) if isinstance(v, Tensor) else tuple(cut(part) for part in v)

    return alone


def _without(t: Tensor, axis: int) -> tuple[int, ...]:
    return (*t.shape[:axis], *t.shape[axis + 1 :])


def _cut(v: Tensor, axis: int, length: int, negate: bool) -> Tensor:
    v = v.narrow(axis, 0, length)
    return -v if negate else v.contiguous()
