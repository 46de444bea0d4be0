"""The cases of the kernel rooms as pytest-benchmark tests.

    pytest bench/test_bench.py --benchmark-enable --benchmark-json=new.json -k "1M and ours"

The figures come with bytes, GB/s and the device in `extra_info`. `python -m bench` is the more careful way:
here sides are timed one after the other, not in turns.
"""

from collections.abc import Iterator
from itertools import count

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("rfkernels._C", reason="needs the compiled kernels: pip install .")

from bench import activation, embedding, guidance, harness, noise, norm, rope, solver, steps
from bench.cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAN = harness.plan_for(DEVICE, quick=True)
ROOMS = (solver, guidance, noise, steps, norm, rope, activation, embedding)
CASES = [case for room in ROOMS for case in room.cases(DEVICE)]
SIDES = ("ours.out", "ours.new", "eager.out", "eager.new", "compile.out", "compile.new")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.name} {case.label}")
def timed(request: pytest.FixtureRequest) -> Iterator[tuple[Case, dict[str, harness.Call], dict[str, str]]]:
    """A case with its sides, on as many tensors as keep the cache cold; freed before the next case."""
    case = request.param
    with torch.no_grad():
        slots = harness.make_slots(case, harness.slot_count(case, PLAN, DEVICE), DEVICE)
        yield case, *harness.case_calls(case, slots, PLAN)


@pytest.mark.parametrize("side", SIDES)
def test_side(benchmark, timed: tuple[Case, dict[str, harness.Call], dict[str, str]], side: str) -> None:
    """Times one side; that it computes the formula was checked when the sides were made."""
    case, calls, skipped = timed
    if side not in calls:
        pytest.skip(skipped.get(side, "there is no such side"))
    turns = count()

    def call(turn: int) -> None:
        calls[side](turn)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark.pedantic(call, setup=lambda: ((next(turns),), {}), rounds=15, warmup_rounds=2)
    assert next(turns) >= 1  # it ran, also where benchmarks are disabled
    benchmark.extra_info |= {
        "device": DEVICE,
        "bytes_moved": case.bytes_moved,
        "room": case.room,
        "side": side,
    }
    if benchmark.stats:
        benchmark.extra_info["gigabytes_per_s"] = case.bytes_moved / benchmark.stats.stats.median / 1e9
