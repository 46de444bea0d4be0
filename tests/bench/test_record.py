import json
from pathlib import Path

import pytest

from bench import record
from tests.bench.toy import toy_result, toy_run


def test_rates_count_minimal_passes() -> None:
    result = toy_result(seconds=1e-3)
    assert result.numel == 1 << 20
    assert result.rate("ours.out") == pytest.approx(12 * 2**20 / 1e-3)
    assert result.copy_rate == pytest.approx(12 * 2**20 / 0.9e-3)  # the faster of the two copies
    assert result.roof("ours.out") == pytest.approx(0.9)


def test_speedups_compare_the_same_allocation() -> None:
    result = toy_result()
    assert result.speedup("eager.out") == pytest.approx(3)
    assert result.speedup("eager.new") == pytest.approx(4)
    assert result.speedup("compile.out") is None and result.rate("compile.out") is None


def test_noise_floor_is_the_drift_of_the_copy() -> None:
    run = toy_run()
    assert run.copy_rate("start") == pytest.approx(1e10)
    assert run.copy_rate("end") == pytest.approx(1e8 / 0.012)
    assert run.drift == pytest.approx(1 - 0.010 / 0.012)
    assert toy_run(copy_end=run.copy_start).drift == pytest.approx(0.02)  # no drift: its spread


def test_a_run_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.save(toy_run(), path)
    assert record.load(path) == toy_run()
    data = json.loads(path.read_text())
    assert data["schema"] == record.SCHEMA
    assert data["cases"][0]["sides"]["ours.out"]["roof"] == pytest.approx(0.9)
    assert data["copy_bytes_per_s"]["start"] == pytest.approx(1e10)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "must be JSON"),
        ("[]", "got schema 'list'"),
        ('{"schema": "other/1"}', "got schema 'other/1'"),
        (f'{{"schema": "{record.SCHEMA}"}}', "a field is missing"),
    ],
)
def test_foreign_files_are_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        record.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: cannot be read \(No such file"):
        record.load(tmp_path / "none.json")
