r"""Unbiased rounding to a coarser grid, and low-rank changes merged into weights.

Rounding to nearest drops every change of a weight below half a step; stochastic rounding keeps it on average,
so that a small :math:`\Delta W` merged into 16- or 8-bit weights is not lost (Gupta et al., "Deep Learning
with Limited Numerical Precision", ICML 2015).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import accumulator, define, expand_rows, row_scalar
from rfkernels.ops.linear import linear
from rfkernels.ops.noise import philox_words

__all__ = ["merge_low_rank", "round_to", "stochastic_round", "stochastic_round_reference"]


class _Grid(NamedTuple):
    """A step of 2**(e - digits) in [2**e, 2**(e+1)), below 2**least as there; integers have the step 1."""

    name: str
    digits: int
    least: int
    low: float
    high: float

    @property
    def saturates(self) -> bool:
        return self.name not in ("bf16", "f16")


_BF16_MAX = torch.finfo(torch.bfloat16).max
_GRIDS = {
    torch.bfloat16: _Grid("bf16", 7, -126, -_BF16_MAX, _BF16_MAX),
    torch.float16: _Grid("f16", 10, -14, -65504.0, 65504.0),
    torch.float8_e4m3fn: _Grid("e4m3", 3, -6, -448.0, 448.0),
    torch.float8_e5m2: _Grid("e5m2", 2, -14, -57344.0, 57344.0),
    torch.int8: _Grid("int8", 7, 7, -127.0, 127.0),
    torch.uint8: _Grid("uint8", 8, 8, 0.0, 255.0),
}


def stochastic_round(
    x: Tensor, dtype: torch.dtype, *, seed: int, scale: float | Tensor | None = None
) -> Tensor:
    r"""Returns :math:`s \lfloor x / (s c) + u \rfloor` over the grid of `dtype` with step s, as `dtype`.

    :math:`u` is uniform in [0, 1), one of :math:`2^{24}` numbers per element, so that the mean of the result
    is `x / scale`; numbers that `dtype` has stay what they are. u is a function of (seed, position) alone,
    the position counted through x in row-major order: words of Philox that no `philox_normal` uses.

    8-bit results saturate. Beyond the largest number of a 16-bit type the result is that of a cast to
    nearest. A NaN stays one; int8 and uint8 have none, its code is 0, and it shows where the scale of its
    row is made of it: NaN as well, as that of the quantising ops.

    Args:
        x: float32 `[*lead]`; 16 bits are widened, float64 is rounded to float32 first.
        dtype: bfloat16, float16, float8_e4m3fn, float8_e5m2, int8 (-127 .. 127) or uint8. float32 and
            float64: a cast.
        seed: 0 .. 2**63 - 1.
        scale: c, a row scalar as in `rfkernels.ops.solver`: one number, or `[rows, 1]` for `[rows, cols]`.

    Raises:
        ValueError: an x that is not floating, another dtype, a seed out of range, a scale that does not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"stochastic_round: x must be floating, got {x.dtype}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"stochastic_round: seed must be in 0 .. 2**63 - 1, got {seed}")
    if dtype in (torch.float32, torch.float64):
        return _divided(x, scale).to(dtype)
    if dtype not in _GRIDS:
        known = ", ".join(map(str, _GRIDS))
        raise ValueError(f"stochastic_round: dtype must be one of {known}, float32 or float64, got {dtype}")
    x = x.float().contiguous()
    return _stochastic_round(x, None if scale is None else row_scalar(scale, x).float(), dtype, seed)


def stochastic_round_reference(x: Tensor, scale: Tensor | None, dtype: torch.dtype, seed: int) -> Tensor:
    """The definition of `stochastic_round` in plain torch: float64, which holds every sum of float32 x."""
    grid, y = _GRIDS[dtype], _divided(x, scale).double()
    key = torch.tensor([[seed - 2**63, 0, 0]], device=x.device)  # the bit above all seeds of noise
    uniform = (philox_words(x.numel(), key) >> 8).view(x.shape) * 2.0**-24
    exponent = torch.frexp(y).exponent.sub(1).clamp_min(grid.least) - grid.digits
    step = torch.ldexp(torch.ones_like(y), exponent)
    rounded = torch.copysign((y / step + uniform).floor() * step, y)
    beyond = (y < grid.low) | (y > grid.high)
    rounded = torch.where(beyond, y.clamp(grid.low, grid.high) if grid.saturates else y, rounded)
    if not dtype.is_floating_point:
        rounded = rounded.nan_to_num(0.0)
    return rounded.float().to(dtype)


def _divided(x: Tensor, scale: float | Tensor | None) -> Tensor:
    return x if scale is None else x / expand_rows(row_scalar(scale, x).to(x.dtype), x)


def _kernel(out: Tensor, x: Tensor, scale: Tensor | None, dtype: torch.dtype, seed: int) -> None:
    codes = out if out.dtype in (torch.bfloat16, torch.float16, torch.int8) else out.view(torch.uint8)
    _C.stochastic_round(codes, x, scale, seed, _GRIDS[dtype].name)


_stochastic_round = define(
    "stochastic_round",
    "Tensor x, Tensor? scale, ScalarType dtype, SymInt seed",
    _kernel,
    lambda x, scale, dtype, seed: torch.empty_like(x, dtype=dtype),
    stochastic_round_reference,
)


def round_to(
    x: Tensor,
    dtype: torch.dtype,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    scale: float | Tensor | None = None,
) -> Tensor:
    """`stochastic_round`, or with `rounding="nearest"` to the nearest number, ties to even."""
    if rounding == "stochastic":
        return stochastic_round(x, dtype, seed=seed, scale=scale)
    if rounding != "nearest":
        raise ValueError(f"round_to: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    y = _divided(x, scale)
    if dtype in _GRIDS and _GRIDS[dtype].saturates:
        y = y.clamp(_GRIDS[dtype].low, _GRIDS[dtype].high)
        y = y if dtype.is_floating_point else y.round().nan_to_num(0.0)
    return y.to(dtype)


def merge_low_rank(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float | Tensor | None = None,
    *,
    rounding: str = "nearest",
    seed: int = 0,
) -> Tensor:
    r"""Returns :math:`W + B\,\mathrm{diag}(s)\,A` in the dtype of W: a LoRA merged into its weight.

    One product, summed in float32 (float64 for a float64 weight) and rounded once: to nearest as it is
    written, or stochastically from float32, by which the mean of the result is the sum (Hu et al., "LoRA",
    2021).

    Args:
        weight: W, `[out, in]`, float64, float32, float16 or bfloat16.
        down: A, floating `[rank, in]`.
        up: B, floating `[out, rank]`.
        scale: s, one number or `[rank]`, such as strength times alpha / rank.
        rounding: "nearest" or "stochastic"; of float32 and float64 weights the same.
        seed: of stochastic rounding, as in `stochastic_round`.

    Raises:
        ValueError: tensors that do not fit, a weight of codes, or another rounding.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"merge_low_rank: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise ValueError(
            f"merge_low_rank: weight must be float64, float32, float16 or bfloat16, got {weight.dtype}"
        )
    if down.ndim != 2 or weight.ndim != 2 or tuple(up.shape) != (len(weight), len(down)):
        raise ValueError(_misfit(weight, down, up, scale))
    if down.shape[1] != weight.shape[1]:
        raise ValueError(_misfit(weight, down, up, scale))
    if isinstance(scale, Tensor) and tuple(scale.shape) not in ((), (len(down),)):
        raise ValueError(_misfit(weight, down, up, scale))
    wide = accumulator(weight.dtype)
    columns = up.to(wide)
    if scale is not None:
        columns = columns * (scale.to(wide) if isinstance(scale, Tensor) else scale)
    dtype = weight.dtype if rounding == "nearest" else wide
    total = linear(columns, down.to(wide).T.contiguous(), residual=weight.to(dtype), dtype=dtype)
    return total if total.dtype == weight.dtype else stochastic_round(total, weight.dtype, seed=seed)


def _misfit(weight: Tensor, down: Tensor, up: Tensor, scale: float | Tensor | None) -> str:
    got = (tuple(t.shape) for t in (weight, down, up))
    last = tuple(scale.shape) if isinstance(scale, Tensor) else scale
    return (
        "merge_low_rank: weight [out, in], down [rank, in], up [out, rank] and scale, a number or [rank], "
        "required, got {}, {}, {} and {}".format(*got, last)
    )
