"""Headers of safetensors files, read with nothing taken on trust: 8 bytes of length, JSON, numbers.

Refused before anything is mapped: truncated files, offsets that overlap, leave holes or end outside, shapes
that do not make the bytes, names that are there twice; and pickles, which run code, are never opened.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

__all__ = ["BITS", "MAX_HEADER", "PICKLES", "Entry", "Header", "read_header"]

MAX_HEADER = 100_000_000  # bytes, of safetensors itself
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8}
BITS |= {"F8_E5M2FNUZ": 8, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """A tensor: dtype in the words of the file, and the bytes start to stop behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path, *, alone: bool = False) -> Header:
    """Tensors and strings of a safetensors file, in the order of the header.

    Args:
        alone: the file may end behind its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or not a whole one; file, tensor and what is required are
            named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: a safetensors file is required, found none")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        whole = len(start) == 8 and length <= min(MAX_HEADER, size - 8)
        _refuse_pickle(path, b"" if whole else start)
        if not whole:
            got = f"a header of {length:,} bytes, not at most {MAX_HEADER:,} in a file of {size:,}"
            raise ValueError(f"{path}: a safetensors file is required, got {got}")
        raw = file.read(length)
    header = _parse(path, raw)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: {_METADATA} must be an object of strings, got {str(metadata)[:80]!r}")
    tensors = {name: _entry(path, name, found) for name, found in header.items()}
    _check_places(path, tensors, None if alone else size - 8 - length)
    return Header(tensors, metadata)


def _refuse_pickle(path: Path, start: bytes) -> None:
    pickled = start.startswith((b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6))))
    if pickled or path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path}: a safetensors or GGUF file is required, got a pickle by "
            f"{'content' if pickled else 'name'}: it runs code when it is opened, so it is not"
        )


def _parse(path: Path, raw: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in made if names.count(name) > 1)
            raise ValueError(f"{twice!r} is there twice, names must differ")
        return made

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: a header in JSON is required, got: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: a header of names and tensors is required, got a {type(header).__name__}")
    return header


def _entry(path: Path, name: str, found: object) -> Entry:
    """One tensor of the header, whose shape and dtype make its bytes."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(found, dict) or set(found) != keys:
        raise ValueError(f"{path}: {name!r} must have {sorted(keys)}, got {str(found)[:80]!r}")
    dtype, shape, places = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{path}: {name!r} must have a dtype of {', '.join(BITS)}, got {str(dtype)[:40]!r}")
    if not (_counts(shape) and _counts(places) and len(places) == 2):
        got = str((shape, places))[:80]
        raise ValueError(f"{path}: {name!r} must have counts as shape and two data_offsets, got {got}")
    start, stop = places
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (stop - start):
        need, got = f"{dtype} {shape} takes {bits / 8:g} bytes", f"data_offsets {places}"
        raise ValueError(f"{path}: {name!r}: {need}, got {got}, {stop - start} bytes")
    return Entry(dtype, tuple(shape), start, stop)


def _counts(found: object) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)


def _check_places(path: Path, tensors: dict[str, Entry], size: int | None) -> None:
    """Tensors fill the bytes behind the header, one after the other."""
    at, last = 0, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start != at:
            kind = "overlaps" if entry.start < at else "leaves a hole behind"
            raise ValueError(f"{path}: {name!r} must start at {at}, got {entry.start}: it {kind} {last}")
        at, last = entry.stop, repr(name)
    if size is not None and at != size:
        kind = "truncated" if at > size else "followed by something else"
        raise ValueError(f"{path}: {at:,} bytes of tensors are required, found {size:,}: the file is {kind}")
