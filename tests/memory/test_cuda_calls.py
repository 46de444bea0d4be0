"""What is asked of CUDA, and in which order, where there is none: the calls of torch.cuda are recorded."""

import contextlib
import gc
import itertools
import mmap

import pytest
import torch
from torch import nn

from rfkernels.memory import CudaBackend, GraphRunner, stream_layers
from rfkernels.memory.graph import CudaCapture


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.cuda_stream = cuda, name

    def wait_event(self, event):
        self.cuda.log.append((self.cuda_stream, "waits", event))

    def wait_stream(self, other):
        self.cuda.log.append((self.cuda_stream, "waits", other.cuda_stream))

    def record_event(self):
        event = f"event {next(self.cuda.numbers)}"
        self.cuda.log.append((self.cuda_stream, "records", event))
        return event


class Cuda:
    """The part of torch.cuda that is used here."""

    def __init__(self):
        self.log, self.numbers, self.capturing, self.locked = [], itertools.count(), False, {}
        self.main, self.code, self.reserved = Stream(self, "main"), 0, iter((100, 350, 350, 350))

    def Stream(self, device=None):
        return Stream(self, "side")

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append((stream.cuda_stream, "copies", ""))
        yield

    @contextlib.contextmanager
    def graph(self, graph, pool):
        self.log.append(("graph", "in pool", pool))
        yield

    def cudaHostRegister(self, address, size, flags):
        self.locked[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        del self.locked[address]


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: cuda.main,
        "is_current_stream_capturing": lambda: cuda.capturing,
        "synchronize": lambda device=None: cuda.log.append(("all", "synchronize", "")),
        "cudart": lambda: cuda,
        "Stream": cuda.Stream,
        "stream": cuda.stream,
        "graph": cuda.graph,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: type("Graph", (), {"replay": "replay"}),
        "empty_cache": lambda: None,
        "memory_reserved": lambda: next(cuda.reserved),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return cuda


def test_copies_wait_for_the_slot_and_layers_for_their_copies(cuda):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
        backend = CudaBackend("cuda")
        assert backend.device == torch.device("cuda", 0)
        backend.device = torch.device("cpu")
        handle = stream_layers(model, list(model), slots=2, ahead=1, backend=backend)
        assert len(cuda.locked) == 4 and all(size % mmap.PAGESIZE == 0 for size in cuda.locked.values())
        assert cuda.log[:2] == [("side", "waits", "main")] * 2  # memory that may have been another's
        first, second, used = (f"event {i}" for i in range(3))
        assert cuda.log[2:] == [
            ("side", "copies", ""),
            ("side", "records", first),
            ("side", "copies", ""),
            ("side", "records", second),
        ]
        cuda.log.clear()
        assert torch.equal(model(x), expected)
        assert cuda.log[:6] == [
            ("main", "waits", first),
            ("main", "records", used),  # after the first layer
            ("main", "waits", second),
            ("side", "waits", used),  # the third goes where the first was
            ("side", "copies", ""),
            ("side", "records", "event 3"),
        ]
        cuda.capturing = True
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            model(x)
        cuda.capturing = False
        assert torch.equal(model(x), expected)
        handle.restore()
        assert ("all", "synchronize", "") in cuda.log
        gc.collect()
        assert not cuda.locked  # pages are given back
        assert torch.equal(model(x), expected)


def test_memory_that_cannot_be_locked(cuda):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    backend, cuda.code = CudaBackend(), 2
    backend.device = torch.device("cpu")
    with pytest.raises(MemoryError, match="must be page-locked, got CUDA error 2"):
        stream_layers(model, list(model), slots=2, backend=backend)


def test_graphs_are_warmed_up_aside_and_share_a_pool(cuda):
    capture, calls = CudaCapture(), []
    assert capture.warm(lambda: calls.append(1) or len(calls), 3) == 3
    assert cuda.log == [("side", "waits", "main"), ("side", "copies", ""), ("main", "waits", "side")]
    cuda.log.clear()
    assert capture.record(lambda: "a") == ("a", "replay", 250)
    assert capture.record(lambda: "b") == ("b", "replay", 0)
    assert [line for line in cuda.log if line[0] == "graph"] == [("graph", "in pool", "pool")] * 2


def test_what_a_graph_refuses(cuda):
    class Where:
        def __init__(self, device):
            self.device = torch.device(device)

    refusal = CudaCapture().refusal
    assert "one CUDA device" in refusal([]) and "one CUDA device" in refusal([Where("cpu")])
    assert "got cpu, cuda:0" in refusal([Where("cuda:0"), Where("cpu")])
    assert "the current device are required, got cuda:1" in refusal([Where("cuda:1")])
    assert refusal([Where("cuda:0")]) == ""
    cuda.capturing = True
    assert "being captured around it" in refusal([Where("cuda:0")])
    assert "got cpu" in next(iter(_called(GraphRunner(lambda x: x)).report().eager))


def _called(run):
    run(torch.zeros(1))
    return run
