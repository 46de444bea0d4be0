from pathlib import Path

import pytest

from bench import __main__ as command
from bench import compare, record
from bench.record import Run
from tests.bench.toy import stats, toy_result, toy_run


def files(tmp_path: Path, old: Run, new: Run) -> list[str]:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for run, path in zip((old, new), paths, strict=True):
        record.save(run, path)
    return [str(p) for p in paths]


def test_the_same_run_is_not_slower(tmp_path: Path) -> None:
    assert command.main(["compare", *files(tmp_path, toy_run(), toy_run()), "--fail-above", "0%"]) == 0


def test_a_regression_fails_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    slow = toy_run(cases=(toy_result(1.2e-3), toy_result(4e-3, (4, 1 << 20))))
    assert command.main(["compare", *files(tmp_path, toy_run(), slow), "--fail-above", "5%"]) == 1
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.endswith("SLOWER")]
    assert len(lines) == 2 and all(
        "f32[4, 262144] cold, ours." in line and "+20.0%" in line for line in lines
    )
    assert "2 of 5 figures are slower by more than 5%" in output.err


def test_a_limit_above_the_change_passes_and_no_limit_never_fails(tmp_path: Path) -> None:
    paths = files(tmp_path, toy_run(), toy_run(cases=(toy_result(1.2e-3),)))
    assert command.main(["compare", *paths, "--fail-above", "25%"]) == 0
    assert command.main(["compare", *paths]) == 0


def test_overlapping_samples_are_noise(tmp_path: Path) -> None:
    wide = {"ours.out": stats(1.2e-3, spread=0.5)}
    noisy = toy_run(cases=(toy_result(sides=toy_result().sides | wide),))
    assert command.main(["compare", *files(tmp_path, toy_run(), noisy), "--fail-above", "5%"]) == 0


def test_a_dearer_call_fails_but_a_slower_peer_does_not(tmp_path: Path) -> None:
    ours = toy_run(overhead=toy_run().overhead | {"_C.taylor_step, 4 tensors": stats(2e-6)})
    peer = toy_run(overhead=toy_run().overhead | {"torch.add(out=)": stats(2e-6)})
    assert command.main(["compare", *files(tmp_path, toy_run(), ours), "--fail-above", "5%"]) == 1
    assert command.main(["compare", *files(tmp_path, toy_run(), peer), "--fail-above", "5%"]) == 0


def test_what_is_missing_and_what_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    new = toy_run(cases=(toy_result(),), threads=1, copy_start={"copy.torch": stats(0.02)})
    assert command.main(["compare", *files(tmp_path, toy_run(), new)]) == 0
    output = capsys.readouterr().out
    assert "note: threads differs: 2 and 1" in output
    assert "note: the machine's own copy differs: 10.0 and 5.0 GB/s" in output
    assert "only in" in output and "f32[4, 1048576] cold, ours.out" in output


@pytest.mark.parametrize("limit", ["-5%", "much", "nan", "inf", ""])
def test_bad_limits_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=r"must be like 5% or 0\.05"):
        compare.fraction(limit)


@pytest.mark.parametrize("text, value", [("5%", 0.05), ("0.05", 0.05), ("0%", 0.0), ("150%", 1.5)])
def test_limits_are_percent_or_fractions(text: str, value: float) -> None:
    assert compare.fraction(text) == pytest.approx(value)


def test_wrong_use_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing = toy_run(cases=(), overhead={})
    for argv in (
        ["compare", *files(tmp_path, toy_run(), nothing)],
        ["compare", str(tmp_path / "none.json"), str(tmp_path / "new.json")],
        ["report", str(tmp_path / "none.json")],
    ):
        assert command.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench: ") and error.count("\n") == 1
