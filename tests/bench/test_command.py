"""`python -m bench` itself, on toy cases."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import emoji, guidance, harness, noise, overhead, record, rope, solver, text
from tests.bench.toy import stats, toy_case, toy_run


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases and a short plan; the real rooms have tests of their own."""
    plan = harness.Plan(seconds=0, min_rounds=2, max_rounds=2, settle=0, cold_bytes=5000, compile=False)
    monkeypatch.setattr(harness, "plan_for", lambda device, quick: plan)
    copy = harness.measure_copy
    monkeypatch.setattr(harness, "measure_copy", lambda device, plan, size: copy(device, plan, 1 << 16))
    for room in (solver, guidance, noise, rope):
        case = toy_case(room=room.__name__.split(".")[1])
        monkeypatch.setattr(room, "cases", lambda device, quick, case=case: [case])
    monkeypatch.setattr(overhead, "measure", lambda device, quick: {"_C.toy": stats(1e-6)})
    monkeypatch.setattr(emoji, "measure", lambda device, quick: toy_run().emoji)


def test_all_rooms_go_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "new.json"
    arguments = ["--quick", "--no-compile", "--device", "cpu", "--commit", "abc", "--json", str(path)]
    assert command.main(arguments) == 0
    run = record.load(path)
    assert [(case.room, case.cache) for case in run.cases] == [
        (room, cache) for room in ("solver", "guidance", "noise", "rope") for cache in ("cold", "warm")
    ]
    assert run.commit == {"id": "abc", "dirty": None} and run.device == "cpu" and run.plan["quick"]
    assert run.overhead == {"_C.toy": stats(1e-6)} and run.emoji == toy_run().emoji
    assert run.machine["cores"] >= 1 and run.machine["memory_bytes"] > 1 << 28
    assert run.drift is not None and run.copy_rate("end") > 0
    printed = capsys.readouterr().out
    assert "add f32[4, 50] toy" in printed and "noise floor" in printed and "16 emoji peak" in printed


def test_only_the_named_rooms_run(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["noise", "--quick", "--no-compile", "--device", "cpu", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)  # the table went to stderr
    assert {case["room"] for case in data["cases"]} == {"noise"} and not data["overhead"]


def test_a_wrong_side_fails_the_run_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = toy_case(ours=lambda out, x, y: x - y)
    monkeypatch.setattr(solver, "cases", lambda device, quick: [wrong, toy_case(op="sum")])
    path = tmp_path / "new.json"
    assert command.main(["solver", "--no-compile", "--device", "cpu", "--json", str(path)]) == 1
    run = record.load(path)
    assert {case.op for case in run.cases} == {"sum"}
    assert run.skipped["add f32[4, 50]"].startswith("failed: ")


def test_a_model_that_does_not_run_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emoji, "measure", lambda device, quick: {"failed": "no weights"})
    path = tmp_path / "new.json"
    assert command.main(["emoji", "--device", "cpu", "--json", str(path)]) == 1
    assert record.load(path).skipped == {"emoji": "failed: no weights"}


def test_quick_stops_when_its_time_is_spent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "QUICK_SECONDS", -1.0)
    path = tmp_path / "new.json"
    assert command.main(["solver", "--quick", "--device", "cpu", "--json", str(path)]) == 0
    assert record.load(path).skipped == {"add f32[4, 50]": "the time of --quick was spent"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["kitchen"], "rooms are solver, guidance, noise, rope, overhead, emoji; got kitchen"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_wrong_use_is_one_line_and_2(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert command.main(argv) == 2
    assert capsys.readouterr().err == f"bench: {message}\n"


def test_missing_kernels_are_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def cases(device: str, quick: bool) -> list:
        raise ImportError("no _C")

    monkeypatch.setattr(solver, "cases", cases)
    assert command.main(["solver", "--quick", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("bench: needs the compiled kernels, run pip install -e . first")


def test_emoji_figures_are_medians_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seconds = iter([0.3, 0.1, 0.2])

    def process(job: str, device: str, quick: bool) -> dict:
        if job == "times":
            return {"load_s": [next(seconds)], "dtype": "float32"}
        return {"peak_bytes": 100}

    monkeypatch.setattr(emoji, "_process", process)
    found = emoji.measure("cpu")
    assert found["load_s"] == {"median": 0.2, "min": 0.1, "samples": 3}
    assert found["16_emoji_peak_bytes"] == 100 and found["dtype"] == "float32"
    assert ("load", "0.200 s (best 0.100)") in text.emoji_rows(found)


def test_emoji_says_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nWeightsError: no weights\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    assert emoji.measure("cpu") == {"failed": "WeightsError: no weights"}


def test_memory_is_that_of_a_fresh_process() -> None:
    ours = bytearray(1 << 30)  # a large parent, whose pages are none of the child's
    ours[::4096] = bytes([1]) * (len(ours) // 4096)
    found = emoji._process("torch", "cpu", quick=True)
    assert 20 << 20 < found["peak_bytes"] < len(ours)


def test_help_needs_no_torch() -> None:
    code = "import sys; from bench.__main__ import parse; parse(['--quick']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=emoji.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"  # so that --threads is set before torch starts its threads


def test_result_lines_hold_what_is_there() -> None:
    line = text.case_line(replace(toy_run().cases[0], sides={}, skipped={"*": "needs 9 MiB"}))
    assert line.endswith("left out: needs 9 MiB")
