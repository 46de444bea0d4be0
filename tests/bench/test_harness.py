import gc
from dataclasses import replace

import pytest
import torch

from bench import harness
from bench.harness import Plan
from tests.bench.toy import add_out, toy_case

PLAN = Plan(
    seconds=0.0,
    min_rounds=3,
    max_rounds=5,
    slow=float("inf"),
    burst=2,
    settle=0.0,
    cold_bytes=10_000,
    compile=False,
)


def count_turns(rotate: bool, plan: Plan) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    turns: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def timer(call: harness.Call, turn: int) -> float:
        call(turn)
        return float(turn)

    return turns, harness.interleave({n: t.append for n, t in turns.items()}, timer, plan, rotate=rotate)


def test_every_round_visits_every_side() -> None:
    turns, seconds = count_turns(True, PLAN)
    assert {name: len(s) for name, s in seconds.items()} == {"a": 6, "b": 6, "c": 6}  # 3 rounds of 2
    assert {name: len(t) for name, t in turns.items()} == {"a": 9, "b": 9, "c": 9}  # and an untimed one each
    assert sorted(t for ts in turns.values() for t in ts) == list(range(27))  # no tensors twice in a row


def test_sides_are_interleaved_and_their_order_changes() -> None:
    turns, _ = count_turns(True, replace(PLAN, min_rounds=5))
    firsts = [min(ts[i * 3] for ts in turns.values()) for i in range(5)]
    orders = {tuple(sorted(turns, key=lambda name: turns[name][i * 3])) for i in range(5)}
    assert firsts == [0, 9, 18, 27, 36]  # a round ends before the next begins
    assert len(orders) > 1


def test_warm_calls_stay_on_the_same_tensors() -> None:
    turns, _ = count_turns(False, PLAN)
    assert {t for ts in turns.values() for t in ts} == {0}


def test_long_calls_need_no_settling() -> None:
    calls: list[int] = []
    plan = replace(PLAN, settle=1e-6)
    harness.interleave({"long": calls.append}, lambda call, turn: call(turn) or 1.0, plan)
    settling = len(calls) - PLAN.min_rounds * PLAN.burst
    assert calls == list(range(len(calls))) and 1 <= settling < 20  # in the first round alone


def test_slow_calls_are_timed_once_in_three_rounds() -> None:
    plan = replace(PLAN, min_rounds=5, slow=0.5)
    for seconds, expected in ((1.0, 3), (0.1, 5 * PLAN.burst)):
        found = harness.interleave({"a": lambda turn: None}, lambda call, turn, s=seconds: s, plan)
        assert found["a"] == [seconds] * expected


def test_rounds_are_bounded_by_time_and_number() -> None:
    _, seconds = count_turns(True, replace(PLAN, seconds=1e9))
    assert len(seconds["a"]) == 2 * PLAN.max_rounds


def test_garbage_collection_is_put_back() -> None:
    def fail(turn: int) -> None:
        raise KeyError(turn)

    assert gc.isenabled()
    with pytest.raises(KeyError):
        harness.interleave({"a": fail}, harness.time_cpu, PLAN)
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["copy.torch", "copy.other"])
@pytest.mark.parametrize("size", [8, 24, 8000, 8_000_008])
def test_copies_copy_all(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t: made.append((t, real(t))) or made[-1][1])
    calls = harness.copy_calls(size, slots=2, device="cpu")
    calls[name](1)
    (_, untouched), (source, target) = made
    assert torch.equal(source, target) and source.all()
    assert source.nbytes == size // 2 and not untouched.any()


def test_a_case_is_measured_with_all_its_sides() -> None:
    cold, warm = harness.measure(toy_case(), "cpu", PLAN)
    assert (cold.cache, warm.cache) == ("cold", "warm")
    for result in (cold, warm):
        ours = {"ours.out", "ours.new", "eager.out", "eager.new"}
        assert set(result.sides) == ours | {"copy.torch", "copy.other"}
        assert result.skipped == {"compile.*": "left out by the plan"}
        assert all(s.samples == 6 and 0 < s.min <= s.median for s in result.sides.values())
        assert result.bytes_moved == 2400


def test_a_large_case_is_not_measured_warm() -> None:
    assert [r.cache for r in harness.measure(toy_case(), "cpu", replace(PLAN, warm_bytes=100))] == ["cold"]


def test_a_case_that_does_not_fit_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "free_bytes", lambda device: 10)
    (result,) = harness.measure(toy_case(), "cpu", PLAN)
    assert not result.sides and "MiB are free" in result.skipped["*"]


def test_slots_outgrow_the_cache_and_share_no_memory() -> None:
    count = harness.slot_count(toy_case(), PLAN, "cpu")
    assert count * toy_case().bytes_moved >= PLAN.cold_bytes
    slots = harness.make_slots(toy_case(), count, "cpu")
    pointers = {t.data_ptr() for s in slots for t in (s.out, *s.inputs)}
    assert len(slots) == count and len(pointers) == 3 * count
    assert all(torch.equal(s.inputs[0], slots[0].inputs[0]) for s in slots)


def test_an_op_without_out_has_no_such_side() -> None:
    case = toy_case(has_out=False, formula_out=None)
    (cold, _) = harness.measure(case, "cpu", PLAN)
    assert {n for n in cold.sides if not n.startswith("copy")} == {"ours.new", "eager.new"}


def half(out: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Forgets the second half of its output."""
    out = torch.empty_like(x) if out is None else out
    out[:2] = (x + y)[:2]
    return out


@pytest.mark.parametrize(
    "wrong, side",
    [
        ({"ours": lambda out, x, y: add_out(out, x, 1.001 * y)}, "ours.new"),
        ({"ours": lambda out, x, y: half(out, x, y) if out is not None else x + y}, "ours.out"),
        ({"formula_out": lambda out, x, y: torch.sub(x, y, out=out)}, "eager.out"),
        ({"formula_out": lambda out, x, y: out}, "eager.out"),  # leaves what the side before it wrote
    ],
)
def test_a_side_that_computes_something_else_is_refused(wrong: dict, side: str) -> None:
    with pytest.raises(ValueError, match=f"{side} must compute the formula"):
        harness.measure(toy_case(**wrong), "cpu", PLAN)


def test_a_compiler_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(function, **options):
        def fail(*args):
            raise RuntimeError("no compiler here\nand a long trace")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    cold, _ = harness.measure(toy_case(), "cpu", replace(PLAN, compile=True))
    assert cold.skipped["compile.out"] == "RuntimeError: no compiler here"
    assert "compile.out" not in cold.sides and "ours.out" in cold.sides


def test_compiled_sides_write_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    cold, _ = harness.measure(toy_case(), "cpu", replace(PLAN, compile=True))
    assert {"compile.out", "compile.new"} <= set(cold.sides) and not cold.skipped


def test_the_copy_is_measured() -> None:
    found = harness.measure_copy("cpu", PLAN, size=1 << 16)
    assert set(found) == {"copy.torch", "copy.other"} and all(s.median > 0 for s in found.values())


def test_results_of_other_dtypes_are_compared_by_their_values() -> None:
    def codes(factor: float):
        return lambda *args: ((args[-2] + args[-1]).to(torch.int8), torch.tensor(factor))

    parts = {"has_out": False, "formula_out": None, "value": lambda codes, scale: codes * scale}
    case = toy_case(ours=codes(0.5), formula=codes(0.5), **parts)
    assert {"ours.new", "eager.new"} <= set(harness.measure(case, "cpu", PLAN)[0].sides)
    with pytest.raises(ValueError, match=r"ours\.new must compute the formula"):
        harness.measure(replace(case, ours=codes(0.6)), "cpu", PLAN)
