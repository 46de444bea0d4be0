"""Where streamed layers go: a CUDA device, or a simulation of one that proves the order of copies."""

import mmap
import random
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Backend", "CudaBackend", "SimulatedBackend"]


class Backend(Protocol):
    """A device with memory of its own, a stream that computes and a stream that copies.

    Events are what `copy` and `end` return: the first is done when the slot holds the layer, the second when
    everything is done that was asked of the device before.
    """

    device: torch.device

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device already."""

    def host(self, nbytes: int) -> Tensor:
        """Memory that copies read from, uint8 `[nbytes]`."""

    def allocate(self, nbytes: int) -> Tensor:
        """Memory of the device, uint8 `[nbytes]`."""

    def free(self, buffer: Tensor) -> None:
        """Takes memory of `allocate` back; nothing uses it any more."""

    def copy(self, slot: Tensor, host: Tensor, after: Iterable[Any]) -> Any:
        """Starts a copy that waits for the events `after`; returns its event."""

    def begin(self, slot: Tensor, ready: Any) -> None:
        """What is asked of the device from here on waits for the copy `ready`, then reads the slot."""

    def end(self, slot: Tensor) -> tuple[Any, Any]:
        """What reads the slot has been asked for: (the stream that does it, its event)."""

    def synchronize(self) -> None:
        """Waits for all copies and everything else."""

    def refusal(self) -> str:
        """Why no layer can come or go now; empty where it can."""


class CudaBackend:
    """A CUDA device: copies from page-locked memory on a stream of their own."""

    def __init__(self, device: str | torch.device = "cuda"):
        device = torch.device(device)
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ValueError(
                f"stream_layers: a CUDA device is required, got {device}, CUDA available: "
                f"{torch.cuda.is_available()}; a backend may be given (SimulatedBackend)"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def host(self, nbytes: int) -> Tensor:
        # torch's own page-locked memory comes in powers of two: up to twice the model
        pages, cudart = _pages(nbytes), torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(pages.data_ptr(), pages.nbytes, 0)) if nbytes else 0
        if code:
            raise MemoryError(f"stream_layers: {nbytes} bytes must be page-locked, got CUDA error {code}")
        buffer = pages[:nbytes]
        if nbytes:
            weakref.finalize(buffer, cudart.cudaHostUnregister, pages.data_ptr()).atexit = False
        return buffer

    def allocate(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # that may use what it was before
        return buffer

    def free(self, buffer: Tensor) -> None:
        pass  # goes back to torch with its last tensor

    def copy(self, slot: Tensor, host: Tensor, after: Iterable[torch.cuda.Event]) -> torch.cuda.Event:
        for event in after:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            slot.copy_(host, non_blocking=True)
        return self._stream.record_event()

    def begin(self, slot: Tensor, ready: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ready)

    def end(self, slot: Tensor) -> tuple[int, torch.cuda.Event]:
        stream = torch.cuda.current_stream(self.device)
        return stream.cuda_stream, stream.record_event()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def refusal(self) -> str:
        return "a CUDA graph is being captured" if torch.cuda.is_current_stream_capturing() else ""


def _pages(nbytes: int) -> Tensor:
    """At least so many bytes: whole pages that nothing else lies in, which can be locked by themselves."""
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    with torch.inference_mode(False):
        memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + size]


class _Copy(NamedTuple):
    event: int
    slot: Tensor
    host: Tensor


class SimulatedBackend:
    """A device made of CPU memory, for tests: a fault in the order of copies is an error or a NaN.

    A copy fills its slot with NaNs at once, and with the layer when something waits for it, or by chance
    before. A slot that is read without its last copy, overwritten while it is read, or overwritten by a copy
    that does not wait for what read it last, raises RuntimeError.

    Args:
        budget_bytes: of `allocate`; more raises MemoryError.
        seed: of the chance.
    """

    device = torch.device("cpu")

    def __init__(self, budget_bytes: int, *, seed: int = 0):
        self.budget, self.allocated, self.peak = budget_bytes, 0, 0
        self.copies = self.copied_bytes = 0
        self._random, self._events = random.Random(seed), 0
        self._queue: deque[_Copy] = deque()
        self._last: dict[int, int] = {}  # by slot: its last copy
        self._readers: dict[int, int] = {}
        self._uses: dict[int, set[int]] = {}  # that no copy has waited for

    def holds(self, tensor: Tensor) -> bool:
        return False

    def host(self, nbytes: int) -> Tensor:
        return _pages(nbytes)[:nbytes]

    def allocate(self, nbytes: int) -> Tensor:
        if self.allocated + nbytes > self.budget:
            raise MemoryError(
                f"simulated device: {self.budget - self.allocated} of {self.budget} bytes are free, "
                f"{nbytes} required"
            )
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        with torch.inference_mode(False):
            return torch.full((nbytes,), 255, dtype=torch.uint8)

    def free(self, buffer: Tensor) -> None:
        self.allocated -= buffer.nbytes

    def copy(self, slot: Tensor, host: Tensor, after: Iterable[int]) -> int:
        key = slot.data_ptr()
        if self._readers.get(key, 0):
            raise RuntimeError("simulated device: a slot is overwritten while a layer reads it")
        if self._uses.pop(key, set()) - set(after):
            raise RuntimeError("simulated device: a copy does not wait for what read its slot last")
        slot.fill_(255)  # NaN in every floating dtype
        self._last[key] = self._event()
        self._queue.append(_Copy(self._last[key], slot, host))
        self.copies, self.copied_bytes = self.copies + 1, self.copied_bytes + host.nbytes
        self._chance()
        return self._last[key]

    def begin(self, slot: Tensor, ready: int) -> None:
        if self._last.get(slot.data_ptr()) != ready:
            raise RuntimeError("simulated device: a slot is read without its last copy")
        while self._queue and self._queue[0].event <= ready:
            self._step()
        self._chance()
        self._readers[slot.data_ptr()] = self._readers.get(slot.data_ptr(), 0) + 1

    def end(self, slot: Tensor) -> tuple[int, int]:
        key, event = slot.data_ptr(), self._event()
        self._readers[key] -= 1
        self._uses[key] = {event}  # of one stream: done after those before
        self._chance()
        return 0, event

    def synchronize(self) -> None:
        while self._queue:
            self._step()

    def refusal(self) -> str:
        return ""

    def _event(self) -> int:
        self._events += 1
        return self._events

    def _step(self) -> None:
        copy = self._queue.popleft()
        copy.slot.copy_(copy.host)

    def _chance(self) -> None:
        while self._queue and self._random.random() < 0.3:
            self._step()
