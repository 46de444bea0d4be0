"""Layers that come to the device when they are needed: a model larger than the device's memory."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rfkernels.memory.backends import Backend, CudaBackend
from rfkernels.memory.packing import Pack, Run, runs_of
from rfkernels.memory.residency import device_bytes, streamed_layers

__all__ = ["Handle", "stream_layers"]

_streaming: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass(eq=False)
class _Slot:
    """Memory for one layer at a time."""

    buffer: Tensor
    layer: "_Layer | None" = None
    ready: Any = None  # event of the copy
    version: int = 0  # of the tensors that were copied
    uses: dict[Any, Any] = field(default_factory=dict)  # stream: event of what read the slot last
    turn: int = 0  # of the last use


@dataclass(eq=False)
class _Layer:
    """A layer that comes and goes."""

    name: str
    pack: Pack
    host: Tensor
    home: list[Tensor]  # its tensors in `host`
    slot: _Slot | None = None
    depth: int = 0  # calls that run
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # its tensors in a slot


class Handle:
    """A model whose layers are streamed; see `stream_layers`. Also a context that restores at its end.

    Attributes:
        streamed, resident: names of the layers that come and go, and of those that stay.
        device_bytes: all that `stream_layers` put on the device.
        host_bytes: page-locked, of the streamed layers.
        copies, copied_bytes: of layers to the device, so far.
    """

    def __init__(self, model: nn.Module, names: list[str], backend: Backend, ahead: int):
        self.model, self.backend, self.ahead = model, backend, ahead
        self.copies = self.copied_bytes = self.device_bytes = self.host_bytes = 0
        self.streamed: list[str] = []
        self.resident = list(names)
        self._names = names
        self._layers: list[_Layer | None] = [None] * len(names)
        self._next: list[list[_Layer]] = []
        self._packs: list[tuple[Pack, Tensor]] = []  # and where they lie now
        self._allocated: list[Tensor] = []
        self._slots: list[_Slot] = []
        self._hooks: list = []
        self._turn = 0

    def __repr__(self) -> str:
        return (
            f"{len(self.streamed)} of {len(self._names)} layers streamed, {self.ahead} ahead: "
            f"{self.device_bytes:,} bytes on the device, {self.host_bytes:,} page-locked, "
            f"{self.copies} copies of {self.copied_bytes:,} bytes"
        )

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def refresh(self) -> None:
        """Copies anew what lies in slots. Needed after a write through `.data` or an inference tensor; other
        writes in place, `load_state_dict` among them, are seen."""
        for slot in self._slots:
            if slot.layer is not None and not slot.layer.depth:
                slot.layer.slot = slot.layer = None

    def restore(self) -> None:
        """The model as it was: the same parameters and buffers, with the same values, on their devices."""
        if self.model not in _streaming:
            return
        _streaming.difference_update(self.model.modules())
        self.backend.synchronize()
        for hook in self._hooks:
            hook.remove()
        for pack, buffer in self._packs:
            pack.unpack(buffer)
        for buffer in self._allocated:
            self.backend.free(buffer)
        self._packs, self._allocated, self._slots = [], [], []
        self._layers, self._next, self._hooks = [], [], []

    # --- making ---

    def _keep(self, runs: list[Run]) -> None:
        """Moves tensors to the device, to stay there."""
        pack = Pack(run for run in runs if not self.backend.holds(run.tensors[0]))
        if pack.places:
            self._place(pack, self._allocate(pack.nbytes))

    def _stream(self, number: int, runs: list[Run]) -> None:
        """Moves the tensors of a layer to the host's copy."""
        pack = Pack(runs)
        host = self.backend.host(pack.nbytes)
        self.host_bytes += pack.nbytes
        self.streamed.append(self._names[number])
        self.resident.remove(self._names[number])
        self._layers[number] = _Layer(self._names[number], pack, host, self._place(pack, host))

    def _place(self, pack: Pack, buffer: Tensor) -> list[Tensor]:
        pack.write(buffer)
        views = pack.views(buffer)
        pack.point(views)
        self._packs.append((pack, buffer))
        return views

    def _allocate(self, nbytes: int) -> Tensor:
        buffer = self.backend.allocate(nbytes)
        self.device_bytes += nbytes
        self._allocated.append(buffer)
        return buffer

    def _start(self, modules: list[nn.Module]) -> None:
        """Makes the slots and hooks, and starts the first copies."""
        moving = [layer for layer in self._layers if layer]
        largest = max((layer.pack.nbytes for layer in moving), default=0)
        self._slots = [_Slot(self._allocate(largest)) for _ in moving[: self.ahead + 1]]
        for i, module in enumerate(modules if moving else ()):
            order = [*self._layers[i + 1 :], *self._layers[:i]]
            self._next.append([layer for layer in order if layer][: self.ahead])
            self._hooks.append(module.register_forward_pre_hook(lambda *_, i=i: self._enter(i)))
            if layer := self._layers[i]:
                leave = lambda module, args, result, layer=layer: self._leave(layer, result)
                self._hooks.append(module.register_forward_hook(leave, always_call=True))
        self._hooks.append(self.model.register_forward_pre_hook(lambda *_: self._recover()))
        self._prefetch(moving[: self.ahead + 1])

    # --- running ---

    def _recover(self) -> None:
        """At the start of the model no layer runs: one that was interrupted (a key press) ends here."""
        for slot in self._slots:
            if slot.layer is not None and slot.layer.depth:
                slot.layer.depth = 1
                self._leave(slot.layer)

    def _enter(self, i: int) -> None:
        """Before layer i runs."""
        layer, refusal = self._layers[i], self.backend.refusal()
        if layer and torch.is_grad_enabled():
            refusal = "gradients are recorded, and its weights will be gone: use torch.no_grad()"
        if layer and not layer.depth and not layer.pack.at(layer.home):
            refusal = "its tensors were moved or replaced: restore() comes first"
        if refusal:
            raise RuntimeError(f"stream_layers: {self._names[i]} cannot be streamed: {refusal}")
        if layer and not layer.depth:
            self._load(layer, i)
        if layer:
            layer.depth += 1
        self._prefetch(self._next[i])

    def _load(self, layer: _Layer, i: int) -> None:
        """Points the layer at its slot."""
        version = layer.pack.version()
        if layer.slot is None or layer.slot.version != version:
            slot = layer.slot or self._free(self._next[i]) or self._free([])
            if slot is None:
                running = ", ".join(s.layer.name for s in self._slots)
                raise RuntimeError(f"stream_layers: no slot is left for {layer.name} while {running} run")
            self._fetch(layer, slot)
        slot = layer.slot
        self.backend.begin(slot.buffer, slot.ready)
        index = self._slots.index(slot)
        if index not in layer.views:
            layer.views[index] = layer.pack.views(slot.buffer)
        layer.pack.point(layer.views[index])

    def _leave(self, layer: _Layer, result: Any = None) -> None:
        """After it ran, or failed."""
        if layer.depth == 0:  # it never began
            return
        layer.depth -= 1
        if layer.depth:
            return
        slot = layer.slot
        stream, event = self.backend.end(slot.buffer)
        slot.uses[stream] = event
        self._turn += 1
        slot.turn = self._turn
        layer.pack.point(layer.home)
        lost = "writes to" if layer.pack.version() != slot.version else ""
        memory = slot.buffer.untyped_storage().data_ptr()
        tensors = (leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
        if any(tensor.untyped_storage().data_ptr() == memory for tensor in tensors):
            lost = "returns"
        if lost:
            layer.slot = slot.layer = None
            raise RuntimeError(
                f"stream_layers: {layer.name} {lost} its own tensors, which are lost after it ran: leave it "
                "out of `layers`"
            )

    def _prefetch(self, layers: list[_Layer]) -> None:
        """Starts the copies of the next layers, as far as slots are free."""
        for layer in layers:
            if layer.slot is None:
                slot = self._free(layers)
                if slot is None:
                    return
                self._fetch(layer, slot)

    def _free(self, wanted: list[_Layer]) -> _Slot | None:
        """The slot used longest ago that nothing reads and that holds no wanted layer."""
        free = [s for s in self._slots if s.layer is None or not (s.layer.depth or s.layer in wanted)]
        return min(free, key=lambda slot: slot.turn, default=None)

    def _fetch(self, layer: _Layer, slot: _Slot) -> None:
        """Starts the copy of a layer into a slot."""
        if slot.layer is not None:
            slot.layer.slot = None
        self._turn += 1
        slot.layer, slot.version, slot.turn, layer.slot = layer, layer.pack.version(), self._turn, slot
        target = slot.buffer[: layer.pack.nbytes]
        slot.ready = self.backend.copy(target, layer.host, slot.uses.values())
        slot.uses = {}
        self.copies, self.copied_bytes = self.copies + 1, self.copied_bytes + layer.pack.nbytes


def stream_layers(
    model: nn.Module,
    layers: Sequence[str | nn.Module],
    *,
    slots: int | None = None,
    resident_bytes: int | None = None,
    ahead: int = 1,
    device: str | torch.device = "cuda",
    backend: Backend | None = None,
) -> Handle:
    """Puts a model on a device that is too small for all its layers, in place, for inference.

    As many layers as fit stay on the device, with everything of the model that is no layer, adapters of
    linear layers, and tensors that several layers share. The others lie in page-locked memory, one buffer
    each, and come into `ahead + 1` slots in turn: while one runs, the next `ahead` are copied on a second
    stream, across the end of a step. The results are those of the model on the device, bit for bit. Layers
    may run in any order and any number of times: one that was not foreseen is waited for.

    While it is streamed: run it under `torch.no_grad()` from one thread; its state dict is right, and may be
    loaded into; do not move or cast it, and give it its first adapters before.

    Args:
        model: on any device, quantised or not.
        layers: names or modules, in the order of their use; an `nn.ModuleList` stands for its layers.
        slots: layers on the device at once, more than `ahead`; or
        resident_bytes: on the device, for layers.
        ahead: layers copied while another runs.
        device: that of the model from here on.
        backend: by default `CudaBackend(device)`.

    Raises:
        ValueError: a layer that is not in the model, is there twice or within another; neither or both of
            `slots` and `resident_bytes`, or too little of it; a model that is streamed already.

    Source: Superpipeline, 2024 (layers on the device, layers ahead).
    """
    if (slots is None) == (resident_bytes is None) or ahead < 0:
        raise ValueError(
            "stream_layers: one of slots and resident_bytes and ahead >= 0 are required, got "
            f"slots={slots}, resident_bytes={resident_bytes}, ahead={ahead}"
        )
    if any(m in _streaming for m in model.modules()):
        raise ValueError(f"stream_layers: the {type(model).__name__} is streamed already: restore() it first")
    chosen = _resolve(model, layers)
    runs = runs_of(model, list(chosen.values()))
    own = [[run for run in runs if run.owners == {i}] for i in range(len(chosen))]
    sizes = [Pack(of_layer).nbytes for of_layer in own]
    streamed = streamed_layers(sizes, ahead=ahead, slots=slots, budget=resident_bytes)
    if streamed is None:
        least = device_bytes(sizes, range(len(sizes)), ahead)
        raise ValueError(
            f"stream_layers: {ahead + 1} slots, {least} bytes, are required for layers of up to {max(sizes)} "
            f"bytes and {ahead} ahead, got slots={slots}, resident_bytes={resident_bytes}"
        )
    handle = Handle(model, list(chosen), CudaBackend(device) if backend is None else backend, ahead)
    moving = {id(run) for i in streamed for run in own[i]}
    _streaming.update(model.modules())
    try:
        handle._keep([run for run in runs if id(run) not in moving])
        for i in streamed:
            handle._stream(i, own[i])
        handle._start(list(chosen.values()))
    except BaseException:
        handle.restore()
        raise
    return handle


def _resolve(model: nn.Module, layers: Sequence[str | nn.Module]) -> dict[str, nn.Module]:
    """The layers by name."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for layer in layers:
        try:
            module = model.get_submodule(layer) if isinstance(layer, str) else layer
        except AttributeError:
            module = None
        if id(module) not in names or module is model:
            raise ValueError(
                f"stream_layers: layers must be parts of the {type(model).__name__}, got "
                f"{layer if isinstance(layer, str) else type(layer).__name__}"
            )
        for part in module if isinstance(module, nn.ModuleList) else [module]:
            if names[id(part)] in found:
                raise ValueError(f"stream_layers: layers must differ, got {names[id(part)]} twice")
            found[names[id(part)]] = part
    inner = {id(m): name for name, part in found.items() for m in part.modules() if m is not part}
    for name, part in found.items():
        if id(part) in inner:
            raise ValueError(f"stream_layers: layers must be apart, got {name} within {inner[id(part)]}")
    if not found:
        raise ValueError("stream_layers: at least one layer is required, got none")
    return found
