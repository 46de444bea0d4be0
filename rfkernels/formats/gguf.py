"""GGUF files (llama.cpp, stable-diffusion.cpp): the container, and the numbers of its block types.

A decoder takes blocks as bytes `[blocks, bytes]` and gives float32 `[blocks, numbers]`; sums are in the
order of the gguf package, so that the bits are its. Q4_0 is a w4a16 layer in groups of 32 as it stands;
every other type is decoded (`rfkernels.formats.load` requantises on the way in).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rfkernels.nn import QuantLinear
from rfkernels.ops.linear import pack_int4

__all__ = ["TYPES", "Header", "is_gguf", "read", "read_header"]

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


class _Type(NamedTuple):
    name: str
    numbers: int  # of a block
    bytes: int
    decode: Callable[[Tensor], Tensor]


def _plain(name: str, dtype: torch.dtype) -> _Type:
    return _Type(name, 1, dtype.itemsize, lambda b: b.contiguous().view(dtype))


TYPES = {
    0: _plain("F32", torch.float32),
    1: _plain("F16", torch.float16),
    2: _Type("Q4_0", 32, 18, _q4_0),
    3: _Type("Q4_1", 32, 20, _q4_1),
    6: _Type("Q5_0", 32, 22, _q5_0),
    7: _Type("Q5_1", 32, 24, _q5_1),
    8: _Type("Q8_0", 32, 34, _q8_0),
    10: _Type("Q2_K", 256, 84, _q2_k),
    11: _Type("Q3_K", 256, 110, _q3_k),
    12: _Type("Q4_K", 256, 144, _q4_k),
    13: _Type("Q5_K", 256, 176, _q5_k),
    14: _Type("Q6_K", 256, 210, _q6_k),
    20: _Type("IQ4_NL", 32, 18, _iq4_nl),
    23: _Type("IQ4_XS", 256, 136, _iq4_xs),
    30: _plain("BF16", torch.bfloat16),
}


class Header(NamedTuple):
    """Of a file: its values, and for each tensor shape, type and place."""

    values: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]


_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """Numbers and strings of a file, one after the other."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def number(self, kind: str):
        size = np.dtype(kind).itemsize
        found = np.frombuffer(self._take(size), kind)[0]
        return found.item()

    def string(self) -> str:
        return self._take(self.number("<u8")).decode()

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("<u4"), self.number("<u8")
            if inner in _SCALARS:
                dtype = np.dtype(_SCALARS[inner])
                return np.frombuffer(self._take(dtype.itemsize * count), dtype).tolist()
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"gguf: a value of the types 0 .. 12 is required, got {kind}")
        return self.number(_SCALARS[kind])

    def _take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ValueError(f"gguf: the file ends at {len(self.data)} bytes, within its header")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()


def is_gguf(path: str | Path) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4) == b"GGUF"


def read_header(path: str | Path) -> Header:
    """Values and tensors of a file of version 2 or 3, without its numbers; places are from the file's
    start."""
    if not is_gguf(path):
        raise ValueError(f"{path}: a GGUF file is required")
    cursor = _Cursor(np.memmap(path, np.uint8, "r"))
    cursor.at = 4
    version = cursor.number("<u4")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF of version 2 or 3 is required, got {version}")
    count, pairs = cursor.number("<u8"), cursor.number("<u8")
    values = {cursor.string(): cursor.value(cursor.number("<u4")) for _ in range(pairs)}
    tensors = {}
    for _ in range(count):
        name = cursor.string()
        shape = tuple(cursor.number("<u8") for _ in range(cursor.number("<u4")))[::-1]
        tensors[name] = (shape, cursor.number("<u4"), cursor.number("<u8"))
    align = values.get("general.alignment", 32)
    start = -(-cursor.at // align) * align
    return Header(values, {n: (shape, kind, start + at) for n, (shape, kind, at) in tensors.items()})


def read(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """Tensors one at a time: float32, 16-bit ones as they are; Q4_0 matrices as w4a16 layers.

    Names are the file's, less `model.diffusion_model.`; shapes those of `comfy.gguf.orig_shape`, where given.

    Raises:
        ValueError: no GGUF file; a tensor of a type that is not known here, or that ends after the file.
    """
    header = read_header(path)
    data = np.memmap(path, np.uint8, "r")
    biases = {n for n in header.tensors if n.endswith(".bias")}
    for name, (shape, kind, at) in header.tensors.items():
        if kind not in TYPES:
            known = ", ".join(t.name for t in TYPES.values())
            raise ValueError(f"{path}: {name} must be of {known}, got type {kind}")
        layer = name.removesuffix(".weight")
        if name in biases and _is_layer(header, f"{name.removesuffix('.bias')}.weight"):
            continue  # comes with its layer
        blocks = _blocks(data, path, name, shape, kind, at)
        short = name.removeprefix("model.diffusion_model.")
        if _is_layer(header, name):
            bias = header.tensors.get(f"{layer}.bias")
            bias = None if bias is None else _numbers(header, data, path, f"{layer}.bias")
            yield short.removesuffix(".weight"), _q4_0_layer(blocks, shape, bias, dtype)
        else:
            yield short, _numbers(header, data, path, name)


def _is_layer(header: Header, name: str) -> bool:
    if name not in header.tensors or f"comfy.gguf.orig_shape.{name}" in header.values:
        return False
    shape, kind, _ = header.tensors[name]
    return TYPES.get(kind, TYPES[0]).name == "Q4_0" and len(shape) == 2 and name.endswith(".weight")


def _blocks(data: np.ndarray, path, name: str, shape: tuple[int, ...], kind: int, at: int) -> Tensor:
    known = TYPES[kind]
    size = torch.Size(shape).numel() // known.numbers * known.bytes
    if at + size > len(data):
        raise ValueError(f"{path}: {name} ends at {at + size}, the file at {len(data)} bytes")
    return torch.from_numpy(np.array(data[at : at + size])).view(-1, known.bytes)


def _numbers(header: Header, data: np.ndarray, path, name: str) -> Tensor:
    shape, kind, at = header.tensors[name]
    numbers = TYPES[kind].decode(_blocks(data, path, name, shape, kind, at))
    return numbers.reshape(header.values.get(f"comfy.gguf.orig_shape.{name}", shape))


def _q4_0_layer(
    blocks: Tensor, shape: tuple[int, ...], bias: Tensor | None, dtype: torch.dtype
) -> QuantLinear:
    codes = _nibbles(blocks[:, 2:]).view(shape)
    scale = blocks[:, :2].contiguous().view(torch.float16).view(shape[0], -1)
    return QuantLinear("w4a16", pack_int4(codes), scale, bias=bias, dtype=dtype)
