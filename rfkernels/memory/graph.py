"""A function replayed as CUDA graphs: one launch in place of hundreds, the same bits."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["Buckets", "Capture", "CudaCapture", "GraphReport", "GraphRunner"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, slice)
_MOST_FAILURES = 3


class Capture(Protocol):
    """What can record the work that a function asks of a device."""

    def refusal(self, tensors: Sequence[Tensor]) -> str:
        """Why work on these tensors cannot be recorded; empty where it can."""

    def warm(self, run: Callable[[], Any], times: int) -> Any:
        """Runs as often, apart from the caller's stream; the last result."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None], int]:
        """(What `run` returned, the replay that writes there again, bytes that it keeps.)"""


class CudaCapture:
    """CUDA graphs that share one pool of memory."""

    def __init__(self, pool: Any = None):
        self._pool = pool

    def refusal(self, tensors: Sequence[Tensor]) -> str:
        devices = sorted({str(t.device) for t in tensors})
        if len(devices) != 1 or not devices[0].startswith("cuda"):
            return f"tensors on one CUDA device are required, got {', '.join(devices) or 'none'}"
        if tensors[0].device.index != torch.cuda.current_device():
            return f"tensors on the current device are required, got {devices[0]}"
        if torch.cuda.is_current_stream_capturing():
            return "a graph is being captured around it"
        return ""

    def warm(self, run: Callable[[], Any], times: int) -> Any:
        stream, result = torch.cuda.Stream(), None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                result = run()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None], int]:
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return result, graph.replay, max(0, torch.cuda.memory_reserved() - before)


@dataclass(frozen=True)
class Buckets:
    """Sizes that calls are padded to, so that few graphs serve many shapes.

    The function must give the same for padded arguments, after `crop`: masks are for the caller to make.

    Args:
        sizes: of the buckets; a larger call is not padded.
        size: of a call, from its arguments.
        pad: (bucket, *args, **kwargs) -> (args, kwargs).
        crop: (result, size) -> what the call returns.
    """

    sizes: Sequence[int]
    size: Callable[..., int]
    pad: Callable[..., tuple[tuple, dict]]
    crop: Callable[[Any, int], Any]


@dataclass
class _Graph:
    signature: str
    inputs: list[Tensor]
    result: Any
    replay: Callable[[], None]
    nbytes: int
    watched: list[Tensor]  # of the module
    addresses: list[int]
    hits: int = 0

    def moved(self) -> bool:
        return _addresses(self.watched) != self.addresses


@dataclass(frozen=True)
class GraphReport:
    """Graphs as (signature, replays, bytes), and calls without one by their reason."""

    graphs: list[tuple[str, int, int]] = field(default_factory=list)
    eager: dict[str, int] = field(default_factory=dict)
    evicted: int = 0

    def __str__(self) -> str:
        total = sum(nbytes for _, _, nbytes in self.graphs)
        lines = [f"{len(self.graphs)} graphs, {total:,} bytes, {self.evicted} evicted"]
        lines += [f"  {hits:7} replays  {nbytes:13,} bytes  {name}" for name, hits, nbytes in self.graphs]
        lines += [f"  {count:7} calls without a graph: {reason}" for reason, count in self.eager.items()]
        return "\n".join(lines)


class GraphRunner:
    """Calls `function`, by the replay of a CUDA graph where it can.

    A graph is made for each signature: shapes, strides, dtypes and devices of tensors, values of everything
    else. Arguments are copied into its own inputs, then it is replayed. Where that cannot be right, the
    function itself is called, and `report()` has the reason: no CUDA device, gradients, autocast, random
    numbers (draw them before, pass them in), writes to arguments, a wait for the device (`.item()`, a branch
    on a tensor), values that are no plain numbers or strings, more signatures than graphs.

    What is no argument must stay where it is: parameters of a module are watched, and its graphs made anew
    when they moved; after another change (adapters, submodules, global variables) call `reset()`. The
    function runs `warmup + 1` times on copies when a graph is made. Calls come from one stream.

    Args:
        function: a function, module or method of tensors; arguments and result may be nested in tuples,
            lists and dicts.
        buckets: shapes to pad to.
        max_graphs: the one used longest ago goes.
        pool: memory shared with other graphs (`torch.cuda.graph_pool_handle()`).
        warmup: calls before a graph is recorded.
        copy_outputs: False returns the graph's own outputs, good until the next call.
        capture: by default `CudaCapture(pool)`.

    Raises:
        ValueError: max_graphs or warmup below 1, no or unordered sizes of buckets.
    """

    def __init__(
        self,
        function: Callable,
        *,
        buckets: Buckets | None = None,
        max_graphs: int = 8,
        pool: Any = None,
        warmup: int = 2,
        copy_outputs: bool = True,
        capture: Capture | None = None,
    ):
        if max_graphs < 1 or warmup < 1:
            raise ValueError(
                f"GraphRunner: max_graphs and warmup must be at least 1, got {max_graphs} and {warmup}"
            )
        if buckets and (not buckets.sizes or list(buckets.sizes) != sorted(set(buckets.sizes))):
            raise ValueError(f"GraphRunner: sizes of buckets must ascend, got {list(buckets.sizes)}")
        self.function, self.buckets = function, buckets
        self.max_graphs, self.warmup, self.copy_outputs = max_graphs, warmup, copy_outputs
        self._capture = CudaCapture(pool) if capture is None else capture
        self.reset()

    def reset(self) -> None:
        """Forgets all graphs and reasons."""
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._failed: dict[Any, str] = {}
        self._eager: Counter[str] = Counter()
        self._evicted = self._made = self._replays = 0

    def report(self) -> GraphReport:
        """What happened so far; `print` it."""
        graphs = [(g.signature, g.hits, g.nbytes) for g in self._graphs.values()]
        return GraphReport(graphs, dict(self._eager), self._evicted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, size = (args, kwargs), None
        if self.buckets is not None:
            size = self.buckets.size(*args, **kwargs)
            bucket = next((b for b in self.buckets.sizes if b >= size), size)
            call = self.buckets.pad(bucket, *args, **kwargs) if bucket != size else call
        leaves, tree = tree_flatten(call)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        reason = self._refusal(leaves, tensors)
        graph = None
        if not reason:
            mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            key = (mode, repr(tree), *map(_key, leaves))
            graph = self._graphs.get(key)
            if graph is None or graph.moved():
                self._graphs.pop(key, None)
                graph, reason = self._make(key, leaves, tree)
        if reason:
            self._eager[reason] += 1
            return self.function(*args, **kwargs)
        self._graphs.move_to_end(key)
        for inner, tensor in zip(graph.inputs, tensors, strict=True):
            inner.copy_(tensor)
        graph.replay()
        graph.hits, self._replays = graph.hits + 1, self._replays + 1
        result = tree_map_only(Tensor, Tensor.clone, graph.result) if self.copy_outputs else graph.result
        return result if size is None else self.buckets.crop(result, size)

    def _refusal(self, leaves: list, tensors: list[Tensor]) -> str:
        """Why a call can have no graph, as far as its arguments tell."""
        odd = [type(leaf).__name__ for leaf in leaves if not _is_plain(leaf)]
        if odd:
            return f"arguments must be tensors, numbers and strings, got {odd[0]}"
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "gradients are recorded: use torch.no_grad()"
        if any(torch.is_autocast_enabled(t.device.type) for t in tensors):
            return "autocast is on: cast the model instead"
        return self._capture.refusal(tensors)

    def _make(self, key: Any, leaves: list, tree: Any) -> tuple[_Graph | None, str]:
        """(A new graph, "") or (None, the reason)."""
        if key in self._failed:
            return None, self._failed[key]
        failed = [reason for other, reason in self._failed.items() if other[0] == key[0]]
        if len(failed) >= _MOST_FAILURES:
            return None, f"given up after {_MOST_FAILURES} signatures: {failed[-1]}"
        if self._evicted >= 2 * self.max_graphs and self._replays < 2 * self._made:
            return None, f"more signatures than max_graphs={self.max_graphs}: use buckets, or pass tensors"
        inputs = [_own(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(inputs, tree)
        run = lambda: self.function(*args, **kwargs)
        own = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        reason = self._try(run, own)
        if not reason:
            try:
                result, replay, nbytes = self._capture.record(run)
            except Exception as error:
                reason = _explained(error)
        if reason:
            self._failed[key] = reason
            return None, reason
        nbytes, watched = nbytes + sum(t.nbytes for t in own), self._watched()
        graph = _Graph(_text(leaves), own, result, replay, nbytes, watched, _addresses(watched))
        self._graphs[key], self._made = graph, self._made + 1
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
            self._evicted += 1
        return graph, ""

    def _try(self, run: Callable[[], Any], inputs: list[Tensor]) -> str:
        """Warms up, and looks for what a replay would not do."""
        cuda = sorted({t.device.index for t in inputs if t.is_cuda})
        watched = [*inputs, *self._watched()]
        versions, states = _versions(watched), _random_states(cuda)
        try:
            result = self._capture.warm(run, self.warmup)
        finally:
            drew = any(not torch.equal(a, b) for a, b in zip(states, _random_states(cuda), strict=True))
            torch.set_rng_state(states[0])
            for index, state in zip(cuda, states[1:], strict=True):
                torch.cuda.set_rng_state(state, index)
        if drew:
            return "it draws random numbers: draw them before, and pass them"
        written = [i for i, version in enumerate(_versions(watched)) if version != versions[i]]
        if written:
            inside = written[0] >= len(inputs)
            return f"it writes to {'the module' if inside else f'its tensor argument {written[0]}'}"
        leaves = tree_flatten(result)[0]
        odd = [type(leaf).__name__ for leaf in leaves if not _is_plain(leaf)]
        if odd:
            return f"it must return tensors, numbers and strings, got {odd[0]}"
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return "gradients are recorded: use torch.no_grad()"
        return ""

    def _watched(self) -> list[Tensor]:
        owner = getattr(self.function, "__self__", self.function)
        return [*owner.parameters(), *owner.buffers()] if isinstance(owner, nn.Module) else []


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _is_plain(leaf: Any) -> bool:
    return type(leaf) in (*_PLAIN, Tensor, nn.Parameter)


def _key(leaf: Any) -> Any:
    """Equal where a graph may serve both."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    exact = float.hex(leaf) if isinstance(leaf, float) else repr(leaf)  # 0.0 == -0.0, True == 1
    return type(leaf).__name__, exact


def _text(leaves: list) -> str:
    words = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            words.append(f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}")
        else:
            words.append(f"{leaf:g}" if isinstance(leaf, float) and math.isfinite(leaf) else repr(leaf))
    return " ".join(words)


def _own(tensor: Tensor) -> Tensor:
    """An input of a graph: it may be written to from any mode."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(tensor, requires_grad=False).copy_(tensor)


def _random_states(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]


def _explained(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    hint = " (.item(), .cpu(), nonzero or a branch on a tensor wait for the device)"
    return f"not recorded, {type(error).__name__}: {text}{hint if 'captur' in text else ''}"
