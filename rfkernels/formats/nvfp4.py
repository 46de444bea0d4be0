"""NVFP4 and MXFP8 weights: e2m1 codes in blocks of 16 with e4m3 scales and one float32 number, or e4m3
codes in blocks of 32 with powers of two. Decoded to float32.

Two dialects of NVFP4 share their names: BFL's and ModelOpt's have the even element in the low bits and scales
`[out, in / 16]`; ComfyUI's the even element in the high bits and scales in cuBLAS's blocked order, padded.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rfkernels.formats.container import Checkpoint
from rfkernels.nn import QuantLinear

__all__ = ["blocked", "decode_mxfp8", "decode_nvfp4", "detect", "e2m1", "read", "unblocked"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1(codes: Tensor) -> Tensor:
    """The numbers of four-bit codes: sign, two bits of exponent, one of mantissa."""
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=codes.device)
    return table[codes.long()]


def _tiles(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // 128), -(-columns // 4)


def blocked(scales: Tensor) -> Tensor:
    """A matrix of scales in the order of cuBLAS: tiles of 128 x 4, row r of one at (r % 32) 16 + (r / 32) 4.

    Padded with zeros to whole tiles, `[128 a, 4 b]` in shape.
    """
    (rows, columns), (a, b) = scales.shape, _tiles(*scales.shape)
    padded = scales.new_zeros(128 * a, 4 * b)
    padded[:rows, :columns] = scales
    return padded.view(a, 4, 32, b, 4).permute(0, 3, 2, 1, 4).reshape(128 * a, 4 * b)


def unblocked(stored: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows and columns of a matrix in that order."""
    a, b = _tiles(rows, columns)
    if stored.numel() != 512 * a * b:
        raise ValueError(
            f"nvfp4: blocked scales of {rows} x {columns} are {512 * a * b}, got {stored.numel()}"
        )
    natural = stored.reshape(a, b, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(128 * a, 4 * b)
    return natural[:rows, :columns]


def decode_nvfp4(
    weight: Tensor, scale: Tensor, scale_2: Tensor, *, high_first: bool = False, swizzled: bool = False
) -> Tensor:
    """float32 `[out, in]` of bytes `[out, in / 2]`, block scales (e4m3, or their bytes), and the number."""
    packed = weight.view(torch.uint8)
    low, high = packed & 15, packed >> 4
    codes = torch.stack((high, low) if high_first else (low, high), -1).flatten(1)
    blocks = codes.shape[1] // 16
    scale = scale.view(torch.uint8)
    scale = unblocked(scale, len(codes), blocks) if swizzled else scale.reshape(len(codes), blocks)
    factors = scale.contiguous().view(torch.float8_e4m3fn).float() * scale_2.float()
    return (e2m1(codes).unflatten(1, (blocks, 16)) * factors[..., None]).flatten(1)


def decode_mxfp8(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 `[out, in]` of e4m3 codes and blocked e8m0 scales (bytes: 2^(b - 127))."""
    blocks = weight.shape[1] // 32
    exponents = unblocked(scale.view(torch.uint8), len(weight), blocks).float() - 127
    return (weight.float().unflatten(1, (blocks, 32)) * exponents.exp2()[..., None]).flatten(1)


def detect(checkpoint: Checkpoint) -> bool:
    return any(n.endswith(".weight_scale_2") for n in checkpoint)


def read(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """BFL's and ModelOpt's dialect (ComfyUI's has marks, `rfkernels.formats.comfy`); the scale of tokens is
    of no use here."""
    for layer, names in checkpoint.layers().items():
        if "weight_scale_2" not in names:
            yield from ((n, checkpoint[n]) for n in names.values())
            continue
        unknown = sorted(set(names) - {"weight", "weight_scale", "weight_scale_2", "input_scale", "bias"})
        if unknown:
            raise ValueError(f"nvfp4: {layer} must have weight, scales and bias, got also {unknown}")
        weight, scale, scale_2 = (checkpoint[names[x]] for x in ("weight", "weight_scale", "weight_scale_2"))
        swizzled = scale.shape != (len(weight), weight.shape[1] // 8)  # an option of ModelOpt's export
        yield names["weight"], decode_nvfp4(weight, scale, scale_2, swizzled=swizzled)
        if "bias" in names:
            yield names["bias"], checkpoint[names["bias"]]
