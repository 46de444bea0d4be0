"""Names, shapes and bytes of the tensors of a checkpoint, from its header: no tensor is read."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from rfkernels.formats import gguf
from rfkernels.formats.header import read_header

__all__ = ["Entry", "read_entries"]

_INDEX = "*.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor: its dtype as the file spells it, and its bytes there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def read_entries(source: str | Path) -> list[Entry]:
    """The tensors of a safetensors or GGUF file, of an index of shards, or of a folder with one of them.

    The file may end after its header.

    Raises:
        FileNotFoundError: there is no such file, or a shard of an index is missing.
        ValueError: it is none of these; a folder with several models.
    """
    path = Path(source)
    if path.is_dir():
        path = _only_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"plan: a checkpoint is required, found no file {path}")
    if path.name.endswith(".json"):
        shards = sorted(set(_json(path.read_bytes(), path).get("weight_map", {}).values()))
        if not shards:
            raise ValueError(f"{path}: an index of shards with a weight_map is required")
        return [entry for shard in shards for entry in read_entries(path.parent / shard)]
    entries = _gguf(path) if gguf.is_gguf(path) else _safetensors(path)
    if not entries:
        raise ValueError(f"{path}: a file with tensors is required, got none")
    return entries


def _only_file(folder: Path) -> Path:
    for pattern in (_INDEX, "*.safetensors", "*.gguf"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:4])
            raise ValueError(f"{folder}: one model is required, got {len(found)} files: {names}")
    if (folder / "transformer").is_dir():
        return _only_file(folder / "transformer")
    raise FileNotFoundError(f"{folder}: a safetensors or GGUF file is required, found none")


def _safetensors(path: Path) -> list[Entry]:
    tensors = read_header(path, alone=True).tensors
    return [Entry(name, t.dtype, t.shape, t.stop - t.start) for name, t in tensors.items()]


def _json(encoded: bytes, path: Path) -> dict:
    try:
        found = json.loads(encoded)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a header in JSON is required, got {encoded[:20]!r}")
    return found


def _gguf(path: Path) -> list[Entry]:
    entries = []
    for name, (shape, kind, _) in gguf.read_header(path).tensors.items():
        if kind not in gguf.TYPES:
            raise ValueError(f"{path}: {name} is of the GGUF type {kind}, whose size is not known here")
        numbers, size = gguf.block_size(kind)
        entries.append(Entry(name, gguf.TYPES[kind], shape, math.prod(shape) // numbers * size))
    return entries
