"""safetensors files: tensors one at a time, both ways (https://github.com/huggingface/safetensors)."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Checkpoint", "open_checkpoint", "write_safetensors"]

_NAMES = {
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

    def dtype(self, name: str) -> torch.dtype | str:
        """Without reading the tensor; as the file says, where torch has no such dtype."""
        return self._tensors.dtype(name) if isinstance(self._tensors, _View) else self._tensors[name].dtype

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
        return Checkpoint(_Renamed(self, {n.removeprefix(prefix): n for n in self}), self.metadata, prefix)


class _View(Mapping[str, Tensor]):
    """Tensors that lie elsewhere, there perhaps under other names."""

    def __init__(self, origin, names: dict[str, str]):
        self._origin, self._names = origin, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Renamed(_View):
    def __getitem__(self, name: str) -> Tensor:
        return self._origin[self._names[name]]

    def dtype(self, name: str) -> torch.dtype | str:
        return self._origin.dtype(self._names[name])


class _File(_View):
    def __getitem__(self, name: str) -> Tensor:
        return self._origin.get_tensor(self._names[name])

    def dtype(self, name: str) -> torch.dtype | str:
        written = self._origin.get_slice(self._names[name]).get_dtype()
        return next((dtype for dtype, known in _NAMES.items() if known == written), written)


def open_checkpoint(source: str | Path | Mapping[str, Tensor]) -> Checkpoint:
    """A safetensors file, or tensors by name, as a `Checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return Checkpoint(source)
    from safetensors import SafetensorError, safe_open

    if not Path(source).is_file():
        raise FileNotFoundError(f"checkpoint {source}: a safetensors file is required, found none")
    try:
        file = safe_open(source, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"checkpoint {source}: a safetensors file is required, got: {error}") from None
    return Checkpoint(_File(file, {n: n for n in file.keys()}), file.metadata())  # noqa: SIM118


def write_safetensors(
    path: str | Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors one after the other, with no copy of more than one; complete or not at all.

    Raises:
        ValueError: two tensors of one name, a dtype that the container has no name for.
    """
    tensors = list(tensors)
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors:
        if name in header or tensor.dtype not in _NAMES:
            reason = "is there twice" if name in header else f"has the dtype {tensor.dtype}"
            raise ValueError(f"safetensors: {name} {reason}; names must differ, dtypes be of {list(_NAMES)}")
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = Path(path).with_name(Path(path).name + ".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in tensors:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            file.write(memoryview(flat.numpy()))
    partial.replace(path)
