r"""Measurements of pictures by rows and by columns, :math:`Y = A_h X A_w^T`, as their small factors.

A picture `[..., height, width]` of 512 x 512 has an operator of 262144 x 262144; its factors are 512 x 512,
and so are the two decompositions that give every power and inverse of :math:`A A^T`.
"""

import math

import torch
from torch import Tensor

__all__ = ["Factors", "box", "crop", "gaussian_blur", "measure", "pooling"]


def pooling(size: int, factor: int) -> Tensor:
    r"""Means of `factor` neighbours, float64 `[size / factor, size]`: super-resolution by `factor`.

    Raises:
        ValueError: a size that the factor does not divide.
    """
    if factor < 1 or size % factor:
        raise ValueError(f"pooling: factor must divide size, got {factor} and {size}")
    eye = torch.eye(size // factor, dtype=torch.float64)
    return eye.repeat_interleave(factor, 1) / factor


def gaussian_blur(size: int, kernel: int, sigma: float) -> Tensor:
    """A blur with weights exp(-d^2 / (2 sigma^2)) over `kernel` pixels, float64 `[size, size]`.

    An even kernel becomes the next odd one, as in the released code (50: 51). Weights are of a whole kernel:
    beyond the border there are zeros.

    Raises:
        ValueError: a kernel below 1, or a sigma that is not positive.
    """
    if kernel < 1 or not sigma > 0:
        raise ValueError(f"gaussian_blur: kernel >= 1 and sigma > 0 are required, got {kernel} and {sigma}")
    reach = kernel // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    place = torch.arange(size)
    distance = place[None] - place[:, None] + reach
    inside = (distance >= 0) & (distance <= 2 * reach)
    return torch.where(inside, weights[distance.clamp(0, 2 * reach)], 0.0)


def crop(size: int, start: int, stop: int) -> Tensor:
    """The pixels `start` to `stop`, float64 `[stop - start, size]`: a box that is known, outpainting.

    Raises:
        ValueError: a range that is empty or leaves 0 .. size.
    """
    if not 0 <= start < stop <= size:
        raise ValueError(f"crop: 0 <= start < stop <= {size} is required, got {start} and {stop}")
    return torch.eye(size, dtype=torch.float64)[start:stop]


def box(height: int, width: int, top: int, left: int, bottom: int, right: int) -> Tensor:
    """A mask `[height, width]` that is 0 in a box and 1 around it: inpainting, for `Keep`.

    Raises:
        ValueError: a box that is empty or leaves the picture.
    """
    rows, columns = crop(height, top, bottom).sum(0), crop(width, left, right).sum(0)
    return 1 - rows[:, None] * columns


def measure(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r""":math:`A_h X A_w^T` of the last two axes, in the dtype of x."""
    return rows.to(x) @ x @ columns.to(x).T


class Factors:
    """The singular value decompositions of both factors, on the device of x.

    Raises:
        ValueError: factors that do not fit the last two axes of x.
    """

    def __init__(self, rows: Tensor, columns: Tensor, x: Tensor):
        if (rows.shape[-1:], columns.shape[-1:]) != (x.shape[-2:-1], x.shape[-1:]) or rows.ndim != 2:
            raise ValueError(
                f"Separable: rows and columns must be [*, {x.shape[-2]}] and [*, {x.shape[-1]}], "
                f"got {list(rows.shape)} and {list(columns.shape)}"
            )
        parts = [torch.linalg.svd(a.double().cpu(), full_matrices=False) for a in (rows, columns)]
        (self.u_h, s_h, self.v_h), (self.u_w, s_w, self.v_w) = parts
        self.values = s_h[:, None] * s_w
        self.x = x
        # to the coordinates of the decomposition and back: what a step multiplies by
        self.to_h, self.to_w = (s[:, None] * v for (_, s, v) in parts)
        self.to_h, self.to_w, self.v_h, self.v_w = (
            t.to(x.device, x.dtype) for t in (self.to_h, self.to_w, self.v_h, self.v_w)
        )

    def along(self, x: Tensor) -> Tensor:
        r""":math:`U_h^T(A_h X A_w^T)U_w`."""
        return self.to_h @ x @ self.to_w.T

    def measured(self, y: Tensor) -> Tensor:
        r""":math:`U_h^T Y U_w`."""
        expected = (len(self.u_h), len(self.u_w))
        if y.shape[-2:] != expected:
            raise ValueError(
                f"Separable: target must be [..., {expected[0]}, {expected[1]}], got {list(y.shape)}"
            )
        u_h, u_w = (u.to(self.x.device, self.x.dtype) for u in (self.u_h, self.u_w))
        return u_h.T @ y.to(self.x) @ u_w

    def back(self, coordinates: Tensor) -> Tensor:
        r""":math:`V_h C V_w^T`."""
        return self.v_h.T @ coordinates @ self.v_w

    def gains(self, pull: float, steps: float) -> Tensor:
        r""":math:`(1 - (1 - c\lambda^2)^n)/\lambda`, :math:`c = pull/\lambda_{max}^2`; 0 where lambda is."""
        top = self.values.max()
        part = pull * (self.values / top) ** 2  # c lambda^2, 0 .. 2
        if math.isinf(steps):
            done = torch.where((part > 1e-24) & (part < 2), 1.0, 0.0)
        else:
            done = 1 - (1 - part) ** steps
            small = part < 0.5  # without cancellation
            done = torch.where(small, -torch.expm1(steps * torch.log1p(-part.clamp(max=0.5))), done)
        seen = self.values > top * 1e-14
        gains = torch.where(seen, done / torch.where(seen, self.values, 1), 0.0)
        return gains.to(self.x.device, self.x.dtype)
