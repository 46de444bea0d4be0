"""The cases as data: found, distinct, and moving the bytes that they say."""

import pytest
import torch

from bench import (
    activation,
    attention,
    cases,
    embedding,
    guidance,
    harness,
    linear,
    models,
    moe,
    noise,
    norm,
    overhead,
    rope,
    smoke,
    solver,
    steps,
)
from rfkernels.ops._register import Op

ROOMS = {
    "activation": activation,
    "attention": attention,
    "embedding": embedding,
    "guidance": guidance,
    "linear": linear,
    "models": models,
    "moe": moe,
    "noise": noise,
    "norm": norm,
    "rope": rope,
    "solver": solver,
    "steps": steps,
}
SMALL = 300_000  # elements: what a test may fill


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("room", ROOMS)
def test_cases_are_distinct(room: str, quick: bool) -> None:
    found = list(ROOMS[room].cases("cpu", quick))
    assert found and len({case.name for case in found}) == len(found)
    assert {case.room for case in found} == {room}


def small_cases() -> list[cases.Case]:
    found = [case for room in ROOMS.values() for case in room.cases("cpu")]
    return [case for case in found if torch.Size(case.shape).numel() <= SMALL]


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: f"{case.name} {case.label}")
def test_bytes_are_those_of_the_tensors_and_sides_agree(case: cases.Case) -> None:
    plan = harness.Plan(seconds=0, min_rounds=1, max_rounds=1, settle=0, cold_bytes=0, compile=False)
    (slot,) = slots = harness.make_slots(case, 1, "cpu")
    results = case.ours(None, *slot.inputs)
    tensors = [*slot.inputs, *([results] if isinstance(results, torch.Tensor) else results)]
    assert case.bytes_moved == sum(t.nbytes for t in tensors)
    assert slot.out.shape == case.shape and all(_without_zeros(t) for t in slot.inputs)
    with torch.no_grad():
        calls, _ = harness.case_calls(case, slots, plan)  # raises if a side computes something else
    assert {"ours.new", "eager.new"} <= set(calls)


def _without_zeros(t: torch.Tensor) -> bool:
    """Codes of eight bits that random numbers were quantised to hold some."""
    share = t.float().count_nonzero() / t.numel()
    return share == 1 if t.dtype.itemsize > 1 else share > 0.97


def test_the_named_sizes_are_covered() -> None:
    """What the speed claims are made on: 1, 16 and 64 M elements, every pair of dtypes."""
    timed = {(c.op, c.label, c.dtypes) for room in (solver, guidance) for c in room.cases("cpu")}
    for op in ("affine_step", "linear_combination k=3", "linear_combination k=5", "cfg_step"):
        for label, shape in cases.SIZES.items():
            assert torch.Size(shape).numel() == int(label[:-1]) << 20
            assert {(op, label, dtypes) for dtypes in cases.DTYPES} <= timed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
def test_random_tensors_have_no_zero_and_are_reproducible(dtype: torch.dtype) -> None:
    first, again = (cases.random_tensor((3, 700_001), dtype, "cpu", seed=5) for _ in range(2))
    assert torch.equal(first, again) and first.count_nonzero() == first.numel()
    assert len(first[0, :1000].unique()) > 100


def test_calls_are_timed_at_every_layer() -> None:
    sides = overhead.sides("cpu")
    for call in sides.values():
        call()
    for layer in ("_C.", "torch.ops.rfkernels.", "ops.", "torch.add", "a*x + b*v"):
        assert any(name.startswith(layer) for name in sides)


def test_a_block_makes_its_calls() -> None:
    made: list[int] = []
    overhead.block(lambda: made.append(1), 7, "cpu", 0)
    assert len(made) == 7


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_smoke_program_passes(device: str, capsys: pytest.CaptureFixture) -> None:
    assert smoke.main(device) == 0
    assert capsys.readouterr().out == f"all ops are right on {device}\n"


@pytest.mark.parametrize("name", ["affine_step", "attention", "gated_residual", "norm_modulate_quantize"])
def test_smoke_program_sees_a_wrong_result(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = getattr(smoke.ops, name)

    def wrong(*args, **options):
        result = real(*args, **options)
        return 1.1 * result if isinstance(result, torch.Tensor) else (*result[:-1], 1.1 * result[-1])

    monkeypatch.setattr(smoke.ops, name, wrong)
    assert smoke.main("cpu") == 1
    assert f"\n{name}" in "\n" + capsys.readouterr().out


def test_smoke_program_runs_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    run: set[str] = set()
    real = Op.__call__

    def noted(op: Op, *args, out=None):
        run.add(op.name)
        return real(op, *args, out=out)

    monkeypatch.setattr(Op, "__call__", noted)
    assert smoke.main("cpu") == 0
    backward = {name for name in smoke.ops.OPS if name.endswith("_backward")}  # called by autograd
    assert run | backward == set(smoke.ops.OPS)
