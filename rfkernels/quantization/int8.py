"""Eight-bit weights: int8 and float8_e4m3fn. The formulas are those of `rfkernels.ops.quantize`."""

import torch
from torch import Tensor

from rfkernels.ops.quantize import quantize

__all__ = ["ROTATIONS", "check_finite", "largest_rotation", "quantize_fp8", "quantize_int8"]

ROTATIONS = (256, 64, 16)


def check_finite(weight: Tensor, name: str = "") -> None:
    """Raises ValueError, with the layer's name, for a weight with a NaN or an infinity."""
    bad = sum(int((~rows.isfinite()).sum()) for rows in weight.split(max(1, (1 << 20) // weight.shape[1])))
    if bad:
        raise ValueError(
            f"quantize: the weight of {name or 'a layer'} {tuple(weight.shape)} must be finite, "
            f"got {bad} NaN or infinite numbers"
        )


def largest_rotation(width: int) -> int:
    """The largest of the groups 256, 64, 16 that divides `width`; 0 where none does."""
    return next((g for g in ROTATIONS if width % g == 0), 0)


def quantize_int8(weight: Tensor, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """int8 codes `[out, in]` and float32 scales `[out]`: scale = amax / 127 of a row, after the rotation."""
    return quantize(weight, "int8", rotation=rotation)


def quantize_fp8(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes `[out, in]` and float32 scales `[out]`: amax / 448 of a row.

    `scale`: one float32 number for all rows instead, amax / 448 of the weight; beyond, numbers saturate.
    """
    return quantize(weight, "fp8", tensor_scale=None if scale is None else scale.to(torch.float32))
