"""Weights into any storage format, by pieces of rows: arguments of `rfkernels.nn.QuantLinear`."""

from typing import Any

import torch
from torch import Tensor

from rfkernels.ops.quantize import rotate
from rfkernels.quantization.int4 import quantize_int4
from rfkernels.quantization.int8 import (
    ROTATIONS,
    check_finite,
    largest_rotation,
    quantize_fp8,
    quantize_int8,
)
from rfkernels.quantization.svdq import quantize_svdq

__all__ = ["FORMATS", "quantize_weight"]

_CHUNK = 1 << 19  # numbers of a weight that are quantised at a time


def quantize_weight(weight: Tensor, format: str, name: str = "", **options: Any) -> dict[str, Any]:
    """The tensors and settings of `QuantLinear(format, **these)`; `options` and errors are those of
    `QuantLinear.from_linear`, `name` is the layer's in errors."""
    if format not in FORMATS:
        raise ValueError(f"quantize: the format must be one of {', '.join(FORMATS)}, got {format!r}")
    check_finite(weight, name)
    return _QUANTISERS[format](weight, **options)


def _by_rows(weight: Tensor, encode) -> tuple[Tensor | None, ...]:
    """`encode` of pieces of rows, joined: tensors or None."""
    pieces = [encode(rows) for rows in weight.split(max(1, _CHUNK // weight.shape[1]))]
    return tuple(None if parts[0] is None else _joined(parts) for parts in zip(*pieces, strict=True))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    dtype = parts[0].dtype
    if dtype == torch.float8_e4m3fn:
        return torch.cat([p.view(torch.uint8) for p in parts]).view(dtype)
    return torch.cat(parts)


def _rotation(weight: Tensor, rotation: int | None) -> int:
    width = weight.shape[1]
    rotation = largest_rotation(width) if rotation is None else rotation
    if rotation not in ROTATIONS or width % rotation:
        raise ValueError(
            f"quantize: a rotation of {ROTATIONS} must divide the inputs of {tuple(weight.shape)}"
        )
    return rotation


def _int8(weight: Tensor) -> dict:
    codes, scale = _by_rows(weight, quantize_int8)
    return {"weight": codes, "weight_scale": scale}


def _int8_convrot(weight: Tensor, rotation: int | None = None) -> dict:
    rotation = _rotation(weight, rotation)
    codes, scale = _by_rows(weight, lambda rows: quantize_int8(rows, rotation))
    return {"weight": codes, "weight_scale": scale, "rotation": rotation}


def _fp8(weight: Tensor, scale: str = "row", quantize_input: bool = False) -> dict:
    if scale not in ("row", "tensor"):
        raise ValueError(f"quantize: scale of fp8 must be 'row' or 'tensor', got {scale!r}")
    if scale == "row":
        codes, scales = _by_rows(weight, quantize_fp8)
    else:
        low, high = weight.aminmax()
        scales = (torch.maximum(-low, high).float() / 448).clamp_min(1e-12)
        (codes,) = _by_rows(weight, lambda rows: quantize_fp8(rows, scales)[:1])
    return {"weight": codes, "weight_scale": scales, "quantize_input": quantize_input}


def _w4a16(weight: Tensor, group: int = 64, zero: str = "float", search: int = 1) -> dict:
    codes, scale, zeros = _by_rows(
        weight, lambda rows: quantize_int4(rows, group, zero, weight.dtype, search)
    )
    return {"weight": codes, "weight_scale": scale, "weight_zero": zeros}


def _w4a8(weight: Tensor, group: int = 64, rotation: int | None = None, search: int = 1) -> dict:
    rotation = _rotation(weight, rotation)
    dtype = weight.dtype if group else torch.float32
    turned = lambda rows: rotate(rows.to(torch.promote_types(rows.dtype, torch.float32)), rotation)
    codes, scale, _ = _by_rows(weight, lambda rows: quantize_int4(turned(rows), group, "none", dtype, search))
    return {"weight": codes, "weight_scale": scale, "rotation": rotation}


def _svdq_int4(weight: Tensor, quantize_input: bool = True, **options: Any) -> dict:
    return {**quantize_svdq(weight, **options), "quantize_input": quantize_input}


_QUANTISERS = {
    "int8": _int8,
    "int8-convrot": _int8_convrot,
    "fp8": _fp8,
    "w4a16": _w4a16,
    "w4a8": _w4a8,
    "svdq-int4": _svdq_int4,
}
FORMATS = tuple(_QUANTISERS)
