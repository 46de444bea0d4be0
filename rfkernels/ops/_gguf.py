"""Blocks of GGUF files (llama.cpp, stable-diffusion.cpp): their sizes, and their numbers in plain torch.

A decoder takes blocks as bytes `[blocks, bytes]` and gives float32 `[blocks, numbers]`; sums are in the order
of the gguf package, so that the bits are its.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCKS", "Block", "block_of", "dequantize_gguf_reference"]

_NL = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)


def _half(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.float16).float()


def _int8(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.int8).float()


def _nibbles(q: Tensor) -> Tensor:
    """Low ones of all bytes, then high ones."""
    return torch.cat((q & 15, q >> 4), -1)


def _bits(b: Tensor, width: int, count: int) -> Tensor:
    """Fields of `width` bits: [..., count, n] of bytes [..., n], the lowest first."""
    shifts = torch.arange(count) * width
    return (b.int()[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _fifth(qh: Tensor) -> Tensor:
    """The 32 bits of four bytes, times 16."""
    return _bits(qh[..., None], 1, 8).flatten(-3) << 4


def _q4_0(b):
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b):
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).float() + _half(b[:, 2:4])


def _q5_0(b):
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth(b[:, 2:6])).float() - 16)


def _q5_1(b):
    return _half(b[:, :2]) * (_nibbles(b[:, 8:]) | _fifth(b[:, 4:8])).float() + _half(b[:, 2:4])


def _q8_0(b):
    return _half(b[:, :2]) * _int8(b[:, 2:])


def _two_bits(qs: Tensor) -> Tensor:
    """Q2_K and Q3_K: two halves of 32 bytes, four fields in each byte: [blocks, 8, 32]."""
    return _bits(qs.unflatten(-1, (2, 32)), 2, 4).flatten(1, 2)


def _q2_k(b):
    scales, d, dmin = b[:, :16], _half(b[:, 80:82]), _half(b[:, 82:84])
    q = _two_bits(b[:, 16:80]).reshape(-1, 16, 16).float()
    return ((d * (scales & 15).float())[..., None] * q - (dmin * (scales >> 4).float())[..., None]).flatten(1)


def _q3_k(b):
    low = _nibbles(b[:, 96:104]).int()
    high = _bits(b[:, 104:108], 2, 4).flatten(1)
    scales = ((low | (high << 4)) - 32).float()
    missing = 1 - _bits(b[:, :32], 1, 8)
    q = (_two_bits(b[:, 32:96]) - 4 * missing).reshape(-1, 16, 16).float()
    return ((_half(b[:, 108:110]) * scales)[..., None] * q).flatten(1)


def _scales_k(s: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and minima of six bits in twelve bytes."""
    first, second, third = s.int().unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), -1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), -1)
    return scales.float(), minima.float()


def _k(b: Tensor, q: Tensor) -> Tensor:
    scales, minima = _scales_k(b[:, 4:16])
    d, dmin = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima
    return (d[..., None] * q.float() - dmin[..., None]).flatten(1)


def _q4_k(b):
    return _k(b, _bits(b[:, 16:].unflatten(-1, (4, 32)), 4, 2).flatten(1, 2))


def _q5_k(b):
    q = _bits(b[:, 48:].unflatten(-1, (4, 32)), 4, 2).flatten(1, 2)
    return _k(b, q | (_bits(b[:, 16:48], 1, 8) << 4))


def _q6_k(b):
    low, high = b[:, :128].unflatten(-1, (2, 2, 32)), b[:, 128:192].unflatten(-1, (2, 32))
    q = torch.cat((low & 15, low >> 4), 2).int() | (_bits(high, 2, 4) << 4)
    scales = _half(b[:, 208:210]) * _int8(b[:, 192:208])
    return (scales[..., None] * (q.reshape(-1, 16, 16).float() - 32)).flatten(1)


def _iq4_nl(b):
    return _half(b[:, :2]) * _NL[_nibbles(b[:, 2:]).long()]


def _iq4_xs(b):
    low = _bits(b[:, 4:8], 4, 2).transpose(1, 2).flatten(1)
    high = _bits(b[:, 2:4], 2, 4).transpose(1, 2).flatten(1)
    scales = _half(b[:, :2]) * ((low | (high << 4)) - 32).float()
    return (scales[..., None] * _NL[_nibbles(b[:, 8:].unflatten(-1, (8, 16))).long()]).flatten(1)


class Block(NamedTuple):
    numbers: int
    bytes: int
    decode: Callable[[Tensor], Tensor]


BLOCKS = {
    "Q4_0": Block(32, 18, _q4_0),
    "Q4_1": Block(32, 20, _q4_1),
    "Q5_0": Block(32, 22, _q5_0),
    "Q5_1": Block(32, 24, _q5_1),
    "Q8_0": Block(32, 34, _q8_0),
    "Q2_K": Block(256, 84, _q2_k),
    "Q3_K": Block(256, 110, _q3_k),
    "Q4_K": Block(256, 144, _q4_k),
    "Q5_K": Block(256, 176, _q5_k),
    "Q6_K": Block(256, 210, _q6_k),
    "IQ4_NL": Block(32, 18, _iq4_nl),
    "IQ4_XS": Block(256, 136, _iq4_xs),
}


def block_of(kind: str) -> Block:
    """Of a type by its name in GGUF."""
    if kind not in BLOCKS:
        raise ValueError(f"gguf: kind must be one of {', '.join(BLOCKS)}, got {kind!r}")
    return BLOCKS[kind]


def dequantize_gguf_reference(blocks: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The definition of `dequantize_gguf` in plain torch."""
    block = block_of(kind)
    rows, width = blocks.shape[0], blocks.shape[1] // block.bytes * block.numbers
    return block.decode(blocks.reshape(-1, block.bytes)).view(rows, width).to(dtype)
