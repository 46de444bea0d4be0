"""The simulated device sees the faults that it is there to see."""

import mmap

import pytest
import torch

from rfkernels.memory import SimulatedBackend
from rfkernels.memory.backends import _pages


def test_the_simulation_sees_faults():
    backend = SimulatedBackend(1024, seed=1)
    slot, host = backend.allocate(64), backend.host(64)
    host.fill_(1)
    ready = backend.copy(slot, host, ())
    backend.begin(slot, ready)
    assert bool((slot == 1).all())
    with pytest.raises(RuntimeError, match="while a layer reads"):
        backend.copy(slot, host, ())
    _, event = backend.end(slot)
    with pytest.raises(RuntimeError, match="does not wait"):
        backend.copy(slot, host, ())
    backend.begin(slot, ready)
    _, event = backend.end(slot)
    backend.copy(slot, host, (event,))
    with pytest.raises(RuntimeError, match="without its last copy"):
        backend.begin(slot, ready)
    with pytest.raises(MemoryError, match="960 of 1024 bytes are free, 961 required"):
        backend.allocate(961)


def test_memory_of_the_host_is_whole_pages():
    for nbytes in (0, 1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1):
        pages = _pages(nbytes)
        assert nbytes <= pages.nbytes < nbytes + mmap.PAGESIZE
        assert pages.nbytes % mmap.PAGESIZE == pages.data_ptr() % mmap.PAGESIZE == 0
        assert SimulatedBackend(0).host(nbytes).shape == (nbytes,)


def test_a_slot_that_is_not_waited_for_is_poison():
    seen = set()
    for seed in range(20):
        backend = SimulatedBackend(1024, seed=seed)
        slot, host = backend.allocate(64), backend.host(64)
        host.fill_(1)
        backend.copy(slot, host, ())
        seen.add(bool(slot.view(torch.bfloat16).isnan().all()))
    assert seen == {True, False}  # done by chance, or not yet
