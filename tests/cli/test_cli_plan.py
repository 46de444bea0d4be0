"""`rfkernels plan`: the plan on stdout, what does not fit as exit code 1, wrong input in one line."""

import json
import re
import shlex
from pathlib import Path

from rfkernels.memory import plan
from tests.cli.conftest import one_line
from tests.memory.headers import flux, write_header

PAGE = (Path(__file__).parents[2] / "docs/memory.md").read_text()


def test_the_command_of_the_page(run, tmp_path):
    file = write_header(tmp_path / "flux1-dev.safetensors", flux())
    words = shlex.split(re.search(r"^ +rfkernels (plan .*)", PAGE, re.MULTILINE)[1])
    made = plan(file, vram="8G", gpu="rtx4060", quant="int8-convrot", modulation="w4a16")
    ran = run(*words)
    assert (ran.code, ran.out, ran.err) == (0, f"{made}\n", "")
    ran = run(*words, "--json")
    assert json.loads(ran.out) == json.loads(made.to_json())


def test_every_flag_is_passed_on(run, tmp_path):
    file = write_header(tmp_path / "flux1-dev.safetensors", flux())
    ran = run("plan", file, "--vram", "9G", "--ram", "30G", "--resolution", "512x768", "--text-tokens", 100,
              "-b", 2, "--steps", 4, "--ahead", 2, "--json")  # fmt: skip
    options = {"vram": "9G", "ram": "30G", "resolution": "512x768", "text_tokens": 100, "batch": 2}
    assert json.loads(ran.out) == json.loads(plan(file, **options, steps=4, ahead=2).to_json())
    ran = run("plan", file, "--vram", "9G", "--tokens", 77, "--quant", "int8", "--json")
    assert json.loads(ran.out)["tokens"] == 77


def test_what_does_not_fit_is_exit_code_1(run, tmp_path):
    file = write_header(tmp_path / "flux1-dev.safetensors", flux())
    ran = run("plan", file, "--gpu", "orin-nano")
    assert ran.code == 1 and "does not fit" in ran.out and ran.err == ""


def test_wrong_input_is_one_line(run, tmp_path):
    file = write_header(tmp_path / "flux1-dev.safetensors", flux(2, 2))
    assert one_line(run("plan", file), ["vram or a gpu"])
    assert one_line(run("plan", "missing.safetensors", "--vram", "8G"), ["missing.safetensors"])
    assert one_line(run("plan", file, "--gpu", "voodoo"), ["rtx4060", "voodoo"])
    assert one_line(run("plan", file, "--vram", "lots"), ["lots"])
