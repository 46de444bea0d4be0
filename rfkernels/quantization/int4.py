"""Four-bit weights in groups along the inputs (GPTQ, Frantar et al., 2022; AWQ, Lin et al., 2023)."""

import torch
from torch import Tensor

from rfkernels.ops.linear import pack_int4

__all__ = ["ZEROS", "quantize_int4"]

ZEROS = ("none", "integer", "float")
_NARROWEST = 0.7  # of the range, in a search


def quantize_int4(
    weight: Tensor,
    group: int = 64,
    zero: str = "none",
    scale_dtype: torch.dtype = torch.float32,
    search: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of `linear_w4a16`, from the range lo .. hi of each group.

    "none": s = max(-lo, hi) / 7, q = 8 + round(w / s), codes 1 .. 15.
    "integer": s = (hi - lo) / 15 of the range widened to hold 0, z = round(-lo / s), q = z + round(w / s).
    "float": s = (hi - lo) / 15, z = lo + 8 s, q = 8 + round((w - z) / s).

    Codes are made with s and z as they are stored, rounded to `scale_dtype`.

    Args:
        weight: floating `[out, in]`.
        group: inputs that share a scale; 0: one scale per row, `[out]`.
        search: of how many ranges, from all down to 0.7 of it, each group takes the one with the least
            squared error; 1 takes all of it.

    Returns:
        uint8 `[out, in / 2]`, scales `[out, groups]`, zeros `[out, groups]`: None, uint8 or like the scales.

    Raises:
        ValueError: a group that does not divide the inputs, an unknown `zero`.
    """
    if zero not in ZEROS:
        raise ValueError(f"quantize_int4: zero must be one of {', '.join(ZEROS)}, got {zero!r}")
    width = group or weight.shape[-1]
    if weight.ndim != 2 or weight.shape[1] % width or width % 2:
        raise ValueError(
            f"quantize_int4: even groups must divide [out, in], got {group} of {tuple(weight.shape)}"
        )
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, width))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best, least = None, None
    for part in torch.linspace(1, _NARROWEST, search).tolist():
        found = _encode(w, low * part, high * part, zero, scale_dtype)
        if search > 1:
            error = (_decode(*found) - w).square().sum(-1, keepdim=True)
            if best is not None:
                better = error < least
                found = [
                    None if a is None else torch.where(better, a, b) for a, b in zip(found, best, strict=True)
                ]
                error = torch.minimum(error, least)
            least = error
        best = found
    codes, scale, zeros = best
    scale = scale.squeeze(-1) if group else scale.flatten()
    return pack_int4(codes.flatten(-2)), scale, None if zeros is None else zeros.squeeze(-1)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as stored; 1 where that is 0: its codes are 0 then."""
    scale = scale.to(dtype)
    return torch.where(scale == 0, 1, scale)


def _encode(w: Tensor, low: Tensor, high: Tensor, zero: str, dtype: torch.dtype):
    if zero == "none":
        scale = _stored(torch.maximum(-low, high) / 7, dtype)
        codes = (w / scale.to(w.dtype)).round().clamp(-7, 7) + 8
        return codes.to(torch.uint8), scale, None
    if zero == "integer":
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = _stored((high - low) / 15, dtype)
        zeros = (-low / scale.to(w.dtype)).round().clamp(0, 15)
        codes = ((w / scale.to(w.dtype)).round() + zeros).clamp(0, 15)
        return codes.to(torch.uint8), scale, zeros.to(torch.uint8)
    scale = _stored((high - low) / 15, dtype)
    zeros = torch.where(high == low, low, low + 8 * scale.to(w.dtype)).to(dtype)
    codes = ((w - zeros.to(w.dtype)) / scale.to(w.dtype)).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8), scale, zeros


def _decode(codes: Tensor, scale: Tensor, zeros: Tensor | None) -> Tensor:
    wide = torch.float32 if scale.dtype != torch.float64 else torch.float64
    integer = zeros is not None and not zeros.is_floating_point()
    numbers = (codes.to(wide) - (zeros.to(wide) if integer else 8)) * scale.to(wide)
    return numbers if zeros is None or integer else numbers + zeros.to(wide)
