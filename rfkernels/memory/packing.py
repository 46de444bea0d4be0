"""The tensors of layers as bytes, so that a layer lies in one buffer and moves in one copy."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from rfkernels.adapters.base import Adapter
from rfkernels.nn.lora import LoRALinear

__all__ = ["Pack", "Run", "runs_of"]

_ALIGNMENT = 256


@dataclass(eq=False)
class Run:
    """Bytes that tensors share, alone or because they overlap, and the layers that use them."""

    start: int  # addresses
    stop: int
    tensors: list[Tensor] = field(default_factory=list)
    owners: set[int | None] = field(default_factory=set)


class Pack:
    """Where each tensor of some runs lies in one buffer of `nbytes` bytes."""

    def __init__(self, runs: Iterable[Run]):
        self.places: list[tuple[Tensor, int]] = []
        self._runs: list[tuple[torch.device, int, int, int]] = []  # device, first byte, bytes, tensors
        self.nbytes = 0
        for run in runs:
            size = run.stop - run.start
            self.places += [(t, self.nbytes + _extent(t)[0] - run.start) for t in run.tensors]
            self._runs.append((run.tensors[0].device, self.nbytes, size, len(run.tensors)))
            self.nbytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def write(self, buffer: Tensor) -> None:
        """Copies the bytes of all tensors into a buffer, uint8 `[>= nbytes]`."""
        for tensor, at in self.places:
            start, stop = _extent(tensor)
            storage = tensor.untyped_storage()
            source = torch.empty(0, dtype=torch.uint8, device=storage.device)
            source.set_(storage, start - storage.data_ptr(), (stop - start,))
            buffer[at : at + stop - start].copy_(source)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as they lie in a buffer: same dtypes, shapes and strides."""
        return [_like(tensor, buffer, at) for tensor, at in self.places]

    def point(self, views: list[Tensor]) -> None:
        """Makes the tensors, the same objects, read from `views`."""
        for (tensor, _), view in zip(self.places, views, strict=True):
            tensor.data = view

    def unpack(self, buffer: Tensor) -> None:
        """Gives each run memory of its own again, on its device, with the bytes of `buffer`."""
        places = iter(self.places)
        for device, first, size, count in self._runs:
            with torch.inference_mode(False), torch.no_grad():
                own = torch.empty(size, dtype=torch.uint8, device=device)
                own.copy_(buffer[first : first + size])
            for tensor, at in islice(places, count):
                tensor.data = _like(tensor, own, at - first)

    def at(self, views: list[Tensor]) -> bool:
        """Whether the tensors read from there, in the same dtypes."""
        places = zip(self.places, views, strict=True)
        return all(t.data_ptr() == v.data_ptr() and t.dtype == v.dtype for (t, _), v in places)

    def version(self) -> int:
        """A number that grows when a tensor is written in place."""
        return sum(tensor._version for tensor, _ in self.places if not tensor.is_inference())


def runs_of(model: nn.Module, layers: list[nn.Module]) -> list[Run]:
    """All tensors of a model, in its order, those that overlap together.

    The owners of a run are the layers that use it, by their number, and None for the rest of the model.
    Adapters of linear layers belong to the rest wherever they stand.

    Raises:
        ValueError: a tensor without bytes of its own (meta, sparse, a wrapper of others).
    """
    number = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
    branches = {id(m) for adapter in model.modules() for m in _branches(adapter)}
    owners: dict[int, tuple[Tensor, set]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            _check(f"{name}.{leaf}", tensor)
            side = id(module) in branches or "lora_" in f"{name}.{leaf}"
            owner = None if side or isinstance(module, LoRALinear) else number.get(id(module))
            owners.setdefault(id(tensor), (tensor, set()))[1].add(owner)
    order = {key: i for i, key in enumerate(owners)}
    runs: list[Run] = []
    for tensor, users in sorted(owners.values(), key=lambda item: (str(item[0].device), _extent(item[0]))):
        start, stop = _extent(tensor)
        last = runs[-1] if runs else None
        if last is None or start >= last.stop or last.tensors[0].device != tensor.device:
            runs.append(last := Run(start - start % 16, stop))
        last.stop = max(last.stop, stop)
        last.tensors.append(tensor)
        last.owners |= users
    return sorted(runs, key=lambda run: min(order[id(t)] for t in run.tensors))


def _branches(module: nn.Module) -> Iterable[nn.Module]:
    """The modules of an adapter, which are small and stay where they are used."""
    if isinstance(module, Adapter):
        return module.modules()
    return module.extras.modules() if isinstance(module, LoRALinear) else ()


def _check(name: str, tensor: Tensor) -> None:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    wrapped = is_traceable_wrapper_subclass(tensor)
    if tensor.is_meta or tensor.layout != torch.strided or wrapped:
        kind = type(tensor).__name__ if wrapped else f"{tensor.layout} on {tensor.device}"
        raise ValueError(f"stream_layers: {name} must be a strided tensor with memory, got {kind}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses where the bytes of a tensor start and end."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.itemsize


def _like(tensor: Tensor, buffer: Tensor, at: int) -> Tensor:
    """A tensor of the same kind at a byte of a buffer."""
    offset = (buffer.storage_offset() + at) // tensor.itemsize
    with torch.inference_mode(tensor.is_inference()):
        empty = torch.empty(0, dtype=tensor.dtype, device=buffer.device)
        return empty.set_(buffer.untyped_storage(), offset, tensor.shape, tensor.stride())
