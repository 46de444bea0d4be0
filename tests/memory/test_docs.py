"""The code of docs/memory.md runs, and prints what stands below it."""

import re
from pathlib import Path

import torch

from rfkernels.memory import BOARDS
from tests.memory.headers import flux, write_header
from tests.pages import run_page

DOC = (Path(__file__).parents[2] / "docs/memory.md").read_text()


def test_code_and_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_header(tmp_path / "flux1-dev.safetensors", flux())
    page = run_page(DOC)
    written = "".join(re.findall(r"```\n\n```\n(.*?)```", DOC, re.DOTALL))
    printed = capsys.readouterr().out
    if torch.cuda.is_available():  # the report is another there
        written, printed = (text[: text.index("0 graphs")] for text in (written, printed))
    assert printed == written
    assert page.handle.streamed and not page.step.report().graphs


def test_every_board_is_named():
    assert ", ".join(f"`{name}`" for name in BOARDS) in " ".join(DOC.split())
