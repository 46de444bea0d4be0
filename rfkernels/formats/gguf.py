"""GGUF files (llama.cpp, stable-diffusion.cpp): the container. Blocks stay as they lie in the file, in layers
that multiply them (`rfkernels.ops.linear_gguf`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rfkernels.nn import QuantLinear
from rfkernels.ops.gguf import GGUF_KINDS, block_of, dequantize_gguf

__all__ = ["TYPES", "Header", "block_size", "is_gguf", "read", "read_header"]

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K"}
TYPES |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16"}


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
    """Tensors one at a time: matrices in blocks as layers on these blocks, mapped and not copied; others as
    they are, or as float32 where they are blocks.

    Names are the file's, less `model.diffusion_model.`; shapes those of `comfy.gguf.orig_shape`, where given.

    Args:
        dtype: of the tokens of the layers.

    Raises:
        ValueError: no GGUF file; a tensor of a type that is not known here, that is no whole number of blocks
            or ends after the file.
    """
    header = read_header(path)
    data = np.memmap(path, np.uint8, "c")  # a write would go to a copy of its page
    for name, (shape, kind, at) in header.tensors.items():
        if kind not in TYPES:
            raise ValueError(f"{path}: {name} must be of {', '.join(TYPES.values())}, got type {kind}")
        layer = name.removesuffix(".weight")
        if name.endswith(".bias") and _is_layer(header, f"{name.removesuffix('.bias')}.weight"):
            continue  # comes with its layer
        short = name.removeprefix("model.diffusion_model.")
        if _is_layer(header, name):
            bias = f"{layer}.bias"
            bias = _numbers(header, data, path, bias) if bias in header.tensors else None
            blocks = _rows(data, path, name, shape, kind, at)
            yield (
                short.removesuffix(".weight"),
                QuantLinear("gguf", blocks, bias=bias, kind=TYPES[kind], dtype=dtype),
            )
        else:
            yield short, _numbers(header, data, path, name)


def block_size(kind: int) -> tuple[int, int]:
    """Numbers and bytes of a block of a type of `TYPES`; of one number where it is floating."""
    plain = _PLAIN.get(TYPES[kind])
    return block_of(TYPES[kind])[:2] if plain is None else (1, plain.itemsize)


def _is_layer(header: Header, name: str) -> bool:
    if name not in header.tensors or f"comfy.gguf.orig_shape.{name}" in header.values:
        return False
    shape, kind, _ = header.tensors[name]
    return TYPES.get(kind) in GGUF_KINDS and len(shape) == 2 and name.endswith(".weight")


def _rows(data: np.ndarray, path, name: str, shape: tuple[int, ...], kind: int, at: int) -> Tensor:
    """The bytes of a tensor `[rows, bytes]`: a view of the mapping, or a copy where it is not aligned."""
    numbers, size = block_size(kind)
    width = shape[-1] if shape else 1
    if width % numbers:
        raise ValueError(f"{path}: {name} must have rows of whole blocks of {numbers}, got {list(shape)}")
    end = at + torch.Size(shape).numel() // numbers * size
    if end > len(data):
        raise ValueError(f"{path}: {name} ends at {end}, the file at {len(data)} bytes")
    found = data[at:end] if at % 8 == 0 else data[at:end].copy()
    return torch.from_numpy(found).view(torch.Size(shape[:-1]).numel(), width // numbers * size)


def _numbers(header: Header, data: np.ndarray, path, name: str) -> Tensor:
    shape, kind, at = header.tensors[name]
    rows, plain = _rows(data, path, name, shape, kind, at), _PLAIN.get(TYPES[kind])
    numbers = dequantize_gguf(rows, TYPES[kind]) if plain is None else rows.view(plain).clone()
    return numbers.reshape(header.values.get(f"comfy.gguf.orig_shape.{name}", shape))
