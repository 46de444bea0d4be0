"""safetensors files: tensors one at a time, both ways (https://github.com/huggingface/safetensors)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rfkernels.formats.header import read_header
from rfkernels.formats.writer import NAMES, write_safetensors

__all__ = ["Checkpoint", "Joined", "open_checkpoint", "write_safetensors"]

_DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name, made when they are asked for, and the strings of the file's header."""

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, prefix: str = ""
    ):
        self._tensors, self.metadata = tensors, dict(metadata or {})
        self.prefix = prefix  # taken off the names, not off those in the header

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def dtype(self, name: str) -> torch.dtype | str:
        """Without reading the tensor; as the file says, where torch has no such dtype."""
        return self._tensors.dtype(name) if isinstance(self._tensors, _View) else self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        found = self._tensors.shape(name) if isinstance(self._tensors, _View) else self._tensors[name].shape
        return tuple(found)

    def layers(self) -> dict[str, dict[str, str]]:
        """The leaves of each module, names split at the last dot, and their full names."""
        found: dict[str, dict[str, str]] = {}
        for name in self:
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, {})[leaf] = name
        return found

    def without_prefix(self, *prefixes: str) -> "Checkpoint":
        """The same tensors, a prefix that all names have taken off."""
        prefix = next((p for p in prefixes if self and all(n.startswith(p) for n in self)), "")
        names = {n.removeprefix(prefix): n for n in self}
        return Checkpoint(_Renamed(self, names), self.metadata, self.prefix + prefix)


class _View(Mapping[str, Tensor]):
    """Tensors that lie elsewhere, there perhaps under other names."""

    def __init__(self, origin, names: Mapping):
        self._origin, self._names = origin, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


class _Renamed(_View):
    def __getitem__(self, name: str) -> Tensor:
        return self._origin[self._names[name]]

    def dtype(self, name: str) -> torch.dtype | str:
        return self._origin.dtype(self._names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._origin.shape(self._names[name])


class Joined(_View):
    """The tensors of several checkpoints; names say where each is."""

    def __getitem__(self, name: str) -> Tensor:
        return self._origin[self._names[name]][name]

    def dtype(self, name: str) -> torch.dtype | str:
        return self._origin[self._names[name]].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._origin[self._names[name]].shape(name)


class _File(_View):
    """An open file and the entries of its header."""

    def __init__(self, origin, names: Mapping, path: str | Path):
        super().__init__(origin, names)
        self._path = path

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        path, dtype = self._path, self._names[name].dtype
        try:
            return self._origin.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: {name} has the dtype {dtype}, one of torch is required: {error}"
            ) from None

    def dtype(self, name: str) -> torch.dtype | str:
        written = self._names[name].dtype
        return _DTYPES.get(written, written)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._names[name].shape


def open_checkpoint(source: str | Path | Mapping[str, Tensor]) -> Checkpoint:
    """Tensors by name as a `Checkpoint`: given so, of a safetensors file, or of the shards of a directory or
    of its `*.safetensors.index.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or not a whole one (`rfkernels.formats.header`).
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return Checkpoint(source)
    if Path(source).is_dir() or Path(source).name.endswith(".json"):
        from rfkernels.formats.sharded import open_shards

        return open_shards(Path(source))
    from safetensors import SafetensorError, safe_open

    header = read_header(source)
    try:
        file = safe_open(source, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{source}: a safetensors file is required, got: {error}") from None
    return Checkpoint(_File(file, header.tensors, source), header.metadata)
