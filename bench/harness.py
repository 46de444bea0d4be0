"""The one timing loop: all sides of a case in one process, in turns, beside a copy of the same bytes."""

import ctypes
import gc
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import Case, nbytes, random_tensor
from bench.machine import cache_bytes
from bench.record import CaseResult
from bench.stats import Stats, summarise

Call = Callable[[int], object]  # does the work on the tensors of one turn
Timer = Callable[[Call, int], float]  # seconds of one call


@dataclass(frozen=True)
class Plan:
    """How long and how often. A round visits every side once, in a new order."""

    seconds: float = 5.0  # no new round of a case starts after this
    min_rounds: int = 7
    slow: float = 0.5  # a call of as many seconds is timed once in a round, and three rounds are enough
    max_rounds: int = 40
    burst: int = 2  # timed calls of a side in one round
    settle: float = 2e-3  # untimed calls before them: the thread pool of the side before has gone to sleep
    cold_bytes: int = 1 << 30  # memory visited before a tensor is used again, when the cache shall be cold
    warm_bytes: int = 64 << 20  # cases up to this size are timed with a warm cache too
    compile: bool = True


def plan_for(device: str, quick: bool) -> Plan:
    """Twice the last-level cache (at most 1 GiB) is visited between two uses; `quick` settles for 128 MiB.

    CUDA needs no settling: one untimed call, or the queue would fill up.
    """
    settle = 0.0 if device == "cuda" else Plan.settle
    if quick:
        return Plan(
            seconds=0.4, min_rounds=3, max_rounds=15, settle=settle, cold_bytes=128 << 20, warm_bytes=0
        )
    return Plan(settle=settle, cold_bytes=min(2 * cache_bytes(device), 1 << 30))


def interleave(
    calls: dict[str, Call], timer: Timer, plan: Plan, *, rotate: bool = True
) -> dict[str, list[float]]:
    """Seconds of every timed call of each side.

    Sides take turns, so that a disturbance of the machine meets all of them; their order changes from round
    to round. With `rotate` each call gets the next turn number (other tensors: a cold cache), else always 0.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle, turn = list(calls), random.Random(0).shuffle, 0
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(plan.max_rounds):
            slow = any(times and times[-1] > plan.slow for times in seconds.values())
            enough = min(3, plan.min_rounds) if slow else plan.min_rounds
            if done >= enough and time.perf_counter() - start > plan.seconds:
                break
            shuffle(order)
            for name in order:
                settled = time.perf_counter() + plan.settle
                # a call of 20 settling times hardly feels what was before it
                long = seconds[name] and seconds[name][-1] > 20 * plan.settle > 0
                while not long:
                    calls[name](turn)
                    turn += rotate
                    if time.perf_counter() >= settled:
                        break
                for _ in range(plan.burst):
                    seconds[name].append(timer(calls[name], turn))
                    turn += rotate
                    if seconds[name][-1] > plan.slow:
                        break
    finally:
        if collecting:
            gc.enable()
    return seconds


def time_cpu(call: Call, turn: int) -> float:
    """Wall-clock seconds of one call, the release of what it returns included."""
    start = time.perf_counter()
    call(turn)
    return time.perf_counter() - start


def cuda_timer(*, warm: bool) -> Timer:
    """Event-timed seconds of one call, behind a fill that empties the L2 and hides the launch."""
    flush = torch.empty(max(4 * cache_bytes("cuda"), 256 << 20), dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer(call: Call, turn: int) -> float:
        flush.zero_()
        if warm:
            call(turn)
        start.record()
        call(turn)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return timer


def timer_for(device: str, *, warm: bool = False) -> Timer:
    """The timer of the device."""
    return cuda_timer(warm=warm) if device == "cuda" else time_cpu


# --- the copy: what the machine moves at best ---


def copy_calls(bytes_moved: int, slots: int, device: str) -> dict[str, Call]:
    """Two copies that read and write `bytes_moved` in all: torch's, and one that does not go through torch.

    On the CPU the other is `memmove` on one part per thread (it need not read what it overwrites); on CUDA
     an elementwise kernel. The faster of the two is the roof.
    """
    words = max(bytes_moved // 8, 1)
    pairs = []
    for _ in range(slots):
        source = random_tensor((words,), torch.int32, device, seed=0) if not pairs else pairs[0][0].clone()
        pairs.append((source, torch.empty_like(source).zero_()))

    def by_torch(turn: int) -> None:
        source, target = pairs[turn % slots]
        target.copy_(source)

    def by_kernel(turn: int) -> None:
        source, target = pairs[turn % slots]
        torch.bitwise_or(source, 0, out=target)

    def by_threads(turn: int) -> None:
        source, target = pairs[turn % slots]
        _memmove(target.data_ptr(), source.data_ptr(), 4 * words)

    return {"copy.torch": by_torch, "copy.other": by_kernel if device == "cuda" else by_threads}


def roof_calls(case: Case, device: str) -> dict[str, Call]:
    """The arithmetic of a product alone, from panels in the first cache, by all threads; not on CUDA."""
    if device == "cuda":
        return {}
    from rfkernels import _C

    repeats = max(case.operations // _C.linear_roof(case.product, 1), 1)
    return {"roof.product": lambda turn: _C.linear_roof(case.product, repeats)}


def _memmove(target: int, source: int, size: int) -> None:
    """memmove by all threads; ctypes gives the lock back while it copies."""
    threads = torch.get_num_threads()
    part = -(-size // threads)
    starts = range(part, size, part)
    jobs = [
        _pool(threads).submit(ctypes.memmove, target + s, source + s, min(part, size - s)) for s in starts
    ]
    ctypes.memmove(target, source, min(part, size))
    for job in jobs:
        job.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept: starting threads is not part of a copy."""
    return ThreadPoolExecutor(threads)


def measure_copy(device: str, plan: Plan, size: int = 512 << 20) -> dict[str, Stats]:
    """The copy of `size` bytes (read + written), by each of the two ways, on memory that no cache holds."""
    calls = copy_calls(size, max(1, -(-plan.cold_bytes // size)), device)
    short = replace(plan, seconds=min(plan.seconds, 2.0))
    return {name: summarise(s) for name, s in interleave(calls, timer_for(device), short).items()}


# --- one case ---


@dataclass(frozen=True)
class Slot:
    """The tensors of one turn."""

    out: Tensor
    inputs: tuple[Tensor, ...]


Form = Callable[[Slot], object]  # one side of a case


def slot_count(case: Case, plan: Plan, device: str) -> int:
    """How many copies of the tensors keep the cache cold; on CUDA a fill does that (`cuda_timer`)."""
    return 2 if device == "cuda" else max(1, -(-plan.cold_bytes // case.bytes_moved))


def make_slots(case: Case, count: int, device: str) -> list[Slot]:
    """The case's tensors, `count` times; every page is written, so that no page fault is timed."""
    inputs = case.inputs()
    slots = []
    for i in range(count):
        mine = inputs if i == 0 else tuple(t.clone() for t in inputs)
        slots.append(Slot(torch.empty(case.shape, dtype=case.dtype, device=device).zero_(), mine))
    return slots


def case_calls(case: Case, slots: list[Slot], plan: Plan) -> tuple[dict[str, Call], dict[str, str]]:
    """The sides of a case and the reasons of those that cannot run.

    `*.out` write to a tensor that is there; `*.new` allocate their result (on a CPU a large new tensor costs
    page faults). A comparison is fair between sides of the same ending.
    """
    forms: dict[str, Form] = {
        "ours.new": lambda s: case.ours(None, *s.inputs),
        "eager.new": lambda s: case.formula(*s.inputs),
    }
    skipped: dict[str, str] = {}
    if case.has_out:
        forms["ours.out"] = lambda s: case.ours(s.out, *s.inputs)
    if case.formula_out:
        forms["eager.out"] = lambda s: case.formula_out(s.out, *s.inputs)
    for name, form in (_compiled(case) if plan.compile else {}).items():
        try:
            form(slots[0])
            forms[name] = form
        except Exception as error:  # whatever the compiler raises, the other sides are still worth timing
            skipped[name] = _one_line(error)
    if not plan.compile:
        skipped |= {"compile.*": "left out by the plan"}
    _check(case, forms, slots[0])
    for name, peer in case.peers.items():
        forms[f"peer.{name}"] = lambda s, peer=peer: peer(*s.inputs)
    return {name: partial(_call_slot, form, slots, len(slots)) for name, form in forms.items()}, skipped


def _one_line(error: Exception) -> str:
    """The kind of the error and its first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _compiled(case: Case) -> dict[str, Form]:
    """torch.compile of the formula, with static shapes; it compiles at the first call."""

    def into(out: Tensor, *inputs: Tensor) -> Tensor:
        return out.copy_(_whole(case.formula(*inputs)))  # becomes one loop that writes to out

    torch._dynamo.reset()
    new = torch.compile(case.formula, dynamic=False, fullgraph=True)
    forms: dict[str, Form] = {"compile.new": lambda s: new(*s.inputs)}
    if case.has_out:
        out = torch.compile(into, dynamic=False, fullgraph=True)
        forms["compile.out"] = lambda s: out(s.out, *s.inputs)
    return forms


def _whole(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    return results if isinstance(results, Tensor) else torch.stack(results)


def _call_slot(form: Form, slots: list[Slot], count: int, turn: int) -> None:
    form(slots[turn % count])


def _check(case: Case, forms: dict[str, Form], slot: Slot) -> None:
    """Every side computes the formula: both ends of the result are compared, `out` is poisoned before."""

    def result(name: str) -> Tensor:
        slot.out.fill_(float("nan"))
        value = forms[name](slot)
        if name.endswith(".out"):
            value = slot.out
        value = case.value(*value) if case.value else _whole(value)
        flat = value.reshape(-1)
        return torch.cat([flat[: 1 << 16], flat[-(1 << 16) :]]).double()

    expected = result("eager.new")
    for name in forms:
        got = result(name)
        error = ((got - expected).abs() / (1 + expected.abs())).max().item() if case.tolerance else 0.0
        if not got.isfinite().all() or not error <= case.tolerance:
            raise ValueError(
                f"{case.name}: {name} must compute the formula within {case.tolerance}, off by {error}"
            )


def measure(case: Case, device: str, plan: Plan) -> list[CaseResult]:
    """The case with a cold cache, and with a warm one if it is small enough."""
    moved = case.bytes_moved
    count = slot_count(case, plan, device)
    needed, free = (
        2 * count * moved + 4 * nbytes(torch.Size(case.shape).numel(), case.dtype),
        free_bytes(device),
    )
    if needed > 0.9 * free:
        return [_result(case, "cold", {}, {"*": f"needs {needed >> 20} MiB, {free >> 20} MiB are free"})]
    with torch.no_grad():
        slots = make_slots(case, count, device)
        calls, skipped = case_calls(case, slots, plan)
        calls |= roof_calls(case, device) if case.operations else copy_calls(moved, count, device)
        results = [_result(case, "cold", interleave(calls, timer_for(device), plan), skipped)]
        if moved <= plan.warm_bytes:
            timer = timer_for(device, warm=True)
            results.append(_result(case, "warm", interleave(calls, timer, plan, rotate=False), skipped))
    return results


def _result(case: Case, cache: str, seconds: dict[str, list[float]], skipped: dict[str, str]) -> CaseResult:
    return CaseResult(
        room=case.room,
        op=case.op,
        label=case.label,
        shape=case.shape,
        dtypes=case.dtypes,
        cache=cache,
        bytes_moved=case.bytes_moved,
        operations=case.operations,
        sides={name: summarise(s) for name, s in seconds.items()},
        skipped=skipped,
    )


def free_bytes(device: str) -> int:
    """Memory that can still be taken on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return 4 << 30
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
