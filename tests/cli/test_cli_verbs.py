"""The other verbs, and what all share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rfkernels
from rfkernels import diagnosis
from rfkernels.cli import bench
from tests.cli.conftest import one_line

WITHOUT = "import sys; sys.modules[{0!r}] = None; from rfkernels.cli import main; sys.exit(main({1!r}))"
VERBS = ("generate", "mix", "show", "inspect", "convert", "quantize", "doctor", "bench", "train", "eval")


def test_help_names_every_verb(run):
    for words in ([], ["--help"]):
        ran = run(*words)
        assert ran.code == 0 and ran.err == ""
        assert all(f"  {verb} " in ran.out for verb in VERBS)


def test_version(run):
    assert run("--version").out == f"rfkernels {rfkernels.__version__}\n"


def test_unknown_verbs_and_missing_arguments_are_one_line(run):
    assert one_line(run("paint"), ["paint"])
    assert one_line(run("inspect"), ["file"])
    assert one_line(run("train"), ["model"])


def test_module_is_the_command():
    ran = subprocess.run([sys.executable, "-m", "rfkernels", "--version"], capture_output=True, text=True)
    assert ran.stdout == f"rfkernels {rfkernels.__version__}\n" and ran.returncode == 0


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_packages_are_named_in_one_line(package):
    code = WITHOUT.format(package, ["--version"])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and "pip install 'rfkernels[cli]'" in ran.stderr


def test_defects_of_ours_are_not_hidden(run, monkeypatch):
    def broken():
        raise RuntimeError("a defect")

    monkeypatch.setattr(diagnosis, "explain", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run("doctor")


def test_doctor_exits_1_exactly_when_something_needs_fixing(run, monkeypatch):
    report = diagnosis.explain()
    report["problems"] = [{"level": "hint", "problem": "slow", "fix": "do this"}]
    monkeypatch.setattr(diagnosis, "explain", lambda: report)
    ran = run("doctor")
    assert ran.code == 0 and "hint: slow -> do this" in ran.out
    report["problems"] = [{"level": "error", "problem": "broken", "fix": "do that"}]
    ran = run("doctor", "--json")
    assert ran.code == 1 and json.loads(ran.out)["problems"] == report["problems"] and ran.err == ""


def test_doctor_works_without_kernels():
    """A package whose `_C` cannot be imported still says so, with the fix."""
    code = WITHOUT.format("rfkernels._C", ["doctor"])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1 and "error: the compiled kernels" in ran.stdout and "pip install" in ran.stdout


def test_kernels_that_do_not_load_point_to_doctor(tmp_path):
    code = WITHOUT.format("rfkernels._C", ["generate", "a"])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1 and "rfkernels doctor" in ran.stderr


def test_bench_passes_its_arguments_on(run, monkeypatch, tmp_path):
    calls = []
    done = subprocess.CompletedProcess([], 7)
    monkeypatch.setattr(bench, "find_benchmarks", lambda folders: tmp_path)
    monkeypatch.setattr(bench.subprocess, "run", lambda words, cwd: calls.append((words[1:], cwd)) or done)
    assert run("bench", "solver", "--quick", "--help").code == 7
    assert calls == [(["-m", "bench", "solver", "--quick", "--help"], tmp_path)]


def test_bench_says_where_the_benchmarks_are(run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "find_benchmarks", lambda folders: None)
    assert one_line(run("bench"), ["source tree"])


def test_benchmarks_are_found_in_a_source_tree_only(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").touch()
    assert bench.find_benchmarks([tmp_path]) is None
    (tmp_path / "csrc").mkdir()
    assert bench.find_benchmarks([Path("/nowhere"), tmp_path]) == tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "flux"], ["unknown model 'flux'", "emoji"]),
        (["eval", "flux"], ["unknown model 'flux'", "emoji"]),
        (["train", "emoji", "--minutes", "0"], ["minutes", "got 0"]),
        (["train", "emoji", "--minutes", "nan"], ["minutes", "got nan"]),
        (["train", "emoji", "--resume", "--out", "empty"], ["no checkpoint", "without --resume"]),
        (["train", "emoji", "--out", "/proc/none"], ["cannot create the folder"]),
        (["train", "emoji", "--device", "tpu"], ["unknown device"]),
        (["train", "emoji", "--phase", "dream"], ["unknown phase 'dream'", "flow, reflow, distil, lora"]),
        (["train", "emoji", "--config", "huge"], ["unknown config 'huge'", "small, full"]),
        (["train", "emoji", "--phase", "lora", "--style", "oil"], ["unknown style 'oil'", "pixel"]),
        (["train", "emoji", "--leg", "-1"], ["leg", "got -1"]),
        (["train", "emoji", "--steps", "0"], ["steps", "got 0"]),
        (["train", "emoji", "--data", "absent.pack"], ["--data absent.pack does not exist"]),
        (["train", "emoji", "--from", "absent.safetensors"], ["--from absent.safetensors does not exist"]),
        (["mix", "a"], ["two to 8 prompts", "got 1"]),
        (["mix", "a", "b", "--between", "9"], ["between must be from 1 to 5", "got 9"]),
        (["mix", "a", "b", "-o", "none/mix.png"], ["folder none"]),
        (["eval", "emoji", "--weights", "absent.safetensors"], ["absent.safetensors"]),
    ],
)
def test_train_and_eval_refuse_in_one_line(run, words, expected):
    assert one_line(run(*words), expected)
