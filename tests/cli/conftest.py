"""The command line in this process, and the weights of a tiny random model for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rfkernels.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command left behind: exit code and both streams."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path) -> Run:
    """Runs `rfkernels *words` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)

    def command(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    from rfkernels.models.checkpoint import write_emoji
    from rfkernels.models.emoji import EmojiConfig, EmojiFlow
    from rfkernels.models.text import word_key

    torch.manual_seed(0)
    model = EmojiFlow(
        EmojiConfig(size=16, patch=4, width=64, heads=1, double_blocks=1, single_blocks=1, table=64, embed=16)
    )
    for weight in (model.out.weight, model.modulation.weight):  # zero at the start of training
        torch.nn.init.normal_(weight, std=0.05)
    model.known_words = torch.tensor([word_key(word) for word in ("red", "heart")], dtype=torch.int32)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_emoji(model, path, {})
    return path


def one_line(ran: Ran, words: Sequence[str] = ()) -> bool:
    """Whether the command failed as it should: code 2, nothing on stdout, one line that holds `words`."""
    lines = ran.err.splitlines()
    return (
        ran.code == 2
        and ran.out == ""
        and len(lines) == 1
        and lines[0].startswith("rfkernels: ")
        and all(word in lines[0] for word in words)
    )
