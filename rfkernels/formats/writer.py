"""Writing safetensors files, tensor by tensor: one file, or shards with an index; complete or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["NAMES", "Writer", "header_room", "write_safetensors"]

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Writer:
    """Takes tensors one after the other, keeps none.

    The header stands before the numbers and is known last: `room` bytes are kept for it in every file, what
    it leaves is blank. Files have other names until `finish`.

    Args:
        path: of the file; shards are `stem-00001-of-00002.safetensors` beside it, their index
            `stem.safetensors.index.json`.
        room: an upper bound of the header's bytes (`header_room`).
        max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
    """

    def __init__(self, path: str | Path, room: int, max_shard_bytes: int | None = None):
        self._path, self._room, self._limit = Path(path), room + -room % 8, max_shard_bytes
        if max_shard_bytes is not None and max_shard_bytes < 1:
            raise ValueError(f"safetensors: shards of 1 byte or more are required, got {max_shard_bytes}")
        if self._path.is_dir():
            raise ValueError(f"{path}: the name of a file is required, this is a directory")
        self._shards: list[dict] = []  # the entries of each file
        self._names: set[str] = set()
        self._file, self._end = None, 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._close()
        for shard in range(len(self._shards)):
            self._partial(shard).unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor.

        Raises:
            ValueError: a second one of this name, a dtype that the container has no name for.
        """
        if name in self._names or tensor.dtype not in NAMES:
            reason = "is there twice" if name in self._names else f"has the dtype {tensor.dtype}"
            raise ValueError(f"safetensors: {name} {reason}; names must differ, dtypes be of {list(NAMES)}")
        full = self._limit is not None and self._end and self._end + tensor.nbytes > self._limit
        if self._file is None or full:
            self._next_file()
        self._names.add(name)
        places = [self._end, self._end + tensor.nbytes]
        self._shards[-1][name] = _entry(tensor, places)
        self._end = places[1]
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        self._file.write(memoryview(flat.numpy()))

    def finish(self, metadata: Mapping[str, str] | None = None) -> list[Path]:
        """Writes the headers and gives the files their names: those of the tensors, then the index."""
        if not self._shards:
            self._next_file()
        self._close()
        for shard, entries in enumerate(self._shards):
            header = _encoded(entries, metadata).ljust(self._room)
            if len(header) > self._room:
                raise ValueError(f"safetensors: a header of {self._room} bytes must do, got {len(header)}")
            with self._partial(shard).open("r+b") as file:
                file.write(self._room.to_bytes(8, "little") + header)
        count = len(self._shards)
        paths = [self._named(f"-{i + 1:05}-of-{count:05}") if count > 1 else self._path for i in range(count)]
        for shard, path in enumerate(paths):
            self._partial(shard).replace(path)
        if count > 1:
            places = {
                name: path.name for path, names in zip(paths, self._shards, strict=True) for name in names
            }
            total = sum(max(e["data_offsets"][1] for e in entries.values()) for entries in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            paths.append(self._path.with_name(self._named("").name + ".index.json"))
            paths[-1].write_text(json.dumps(index, indent=2) + "\n")
        return paths

    def _named(self, suffix: str) -> Path:
        return self._path.with_name(f"{self._path.name.removesuffix('.safetensors')}{suffix}.safetensors")

    def _partial(self, shard: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{shard}.partial")

    def _next_file(self) -> None:
        self._close()
        self._shards.append({})
        self._file, self._end = self._partial(len(self._shards) - 1).open("wb"), 0
        self._file.seek(8 + self._room)

    def _close(self) -> None:
        if self._file is not None:
            self._file.truncate(8 + self._room + self._end)
            self._file.close()
            self._file = None


def header_room(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes that suffice for the header of these tensors, whatever their shapes and places."""
    return 1024 + len(_encoded({}, metadata)) + sum(256 + len(json.dumps(name)) for name in names)


def write_safetensors(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Writes tensors one after the other, with no copy of more than one; complete or not at all.

    Returns:
        The files (`Writer.finish`): more than one only with `max_shard_bytes`.

    Raises:
        ValueError: two tensors of one name, a dtype that the container has no name for.
    """
    tensors, end, entries = list(tensors), 0, {}
    for name, tensor in tensors:
        entries[name] = _entry(tensor, [end, end := end + tensor.nbytes])
    with Writer(path, len(_encoded(entries, metadata)), max_shard_bytes) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        return writer.finish(metadata)


def _entry(tensor: Tensor, places: list[int]) -> dict:
    return {"dtype": NAMES.get(tensor.dtype), "shape": list(tensor.shape), "data_offsets": places}


def _encoded(entries: dict, metadata: Mapping[str, str] | None) -> bytes:
    header = {"__metadata__": dict(metadata)} | entries if metadata else entries
    return json.dumps(header, separators=(",", ":")).encode()
