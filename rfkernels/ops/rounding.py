r"""Unbiased rounding to a coarser grid.

Rounding to nearest drops every change of a weight below half a step; stochastic rounding keeps it on average,
so that a small :math:`\Delta W` merged into 16- or 8-bit weights is not lost (Gupta et al., 2015).
"""

import torch
from torch import Tensor

from rfkernels.ops.noise import noise_keys, philox_normal

__all__ = ["round_to", "stochastic_round"]

_GRIDS = {  # digits after the leading one, least exponent, range where it is not that of a cast
    torch.bfloat16: (7, -126, None),
    torch.float16: (10, -14, None),
    torch.float8_e4m3fn: (3, -6, (-448.0, 448.0)),
    torch.float8_e5m2: (2, -14, (-57344.0, 57344.0)),
    torch.int8: (None, 0, (-127.0, 127.0)),
    torch.uint8: (None, 0, (0.0, 255.0)),
}


def stochastic_round(x: Tensor, dtype: torch.dtype, *, seed: int, scale: Tensor | None = None) -> Tensor:
    r"""Returns :math:`s \lfloor x / (s c) + u \rfloor` over the grid of `dtype` with step s, as `dtype`.

    :math:`u` is uniform in [0, 1) per element, so that the mean of the result is `x / scale`; numbers that
    `dtype` has stay what they are. u is a function of (seed, position) alone: the distribution function of
    `philox_normal`. 8-bit results saturate; beyond the range of a 16-bit type the result is that of a cast.

    Args:
        x: floating, any shape.
        dtype: bfloat16, float16, float8_e4m3fn, float8_e5m2, int8 (-127 .. 127) or uint8. float32 and
            float64: a cast.
        seed: 0 .. 2**63 - 1.
        scale: c, broadcasts against x: codes of `x / scale`.
    """
    if not x.is_floating_point():
        raise ValueError(f"stochastic_round: x must be floating, got {x.dtype}")
    y = x if x.dtype == torch.float64 else x.float()
    if scale is not None:
        y = y / scale.to(y.dtype)
    if dtype in (torch.float32, torch.float64):
        return y.to(dtype)
    if dtype not in _GRIDS:
        known = ", ".join(map(str, _GRIDS))
        raise ValueError(f"stochastic_round: dtype must be one of {known}, float32 or float64, got {dtype}")
    digits, least, limits = _GRIDS[dtype]
    noise = philox_normal((1, max(y.numel(), 1)), noise_keys(seed, 1, device=y.device))
    uniform = torch.special.ndtr(noise)[0, : y.numel()].view(y.shape)
    step = None
    if digits is not None:
        exponent = torch.frexp(y).exponent.sub_(1).clamp_(min=least).sub_(digits)
        step = torch.ldexp(torch.ones_like(y), exponent)
        y = y / step
    below = y.floor()
    y = below + (uniform < y - below)  # floor(y + u) with 1 - u for u, without rounding the sum
    if step is not None:
        y = y * step
    return (y if limits is None else y.clamp(*limits)).to(dtype)


def round_to(
    x: Tensor, dtype: torch.dtype, *, rounding: str = "nearest", seed: int = 0, scale: Tensor | None = None
) -> Tensor:
    """`stochastic_round`, or with `rounding="nearest"` to the nearest number, ties to even."""
    if rounding == "stochastic":
        return stochastic_round(x, dtype, seed=seed, scale=scale)
    if rounding != "nearest":
        raise ValueError(f"round_to: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    y = x if scale is None else x / scale.to(x.dtype)
    limits = _GRIDS[dtype][2] if dtype in _GRIDS else None
    if limits is not None:
        y = y.clamp(*limits)
        y = y if dtype.is_floating_point else y.round()
    return y.to(dtype)
