"""Legs on a machine for minutes: checkpoints in parts, and what is too much to carry."""

import time
from pathlib import Path

import pytest
import torch

from bench import train_leg
from rfkernels.models.emoji import EmojiConfig
from rfkernels.train import emoji, loop, parts
from tests.train.banks import make_bank

CONFIG = EmojiConfig(
    size=16, patch=4, width=64, heads=1, mlp=2, double_blocks=1, single_blocks=1, table=64, embed=16
)
RECIPE = emoji.Recipe(steps=4, batch=4, warmup=1)


@pytest.fixture(scope="module")
def bank():
    return make_bank(16)


@pytest.fixture(scope="module")
def phase(bank):
    """The phase flow, tiny."""

    def run(phase, work, *, leg, minutes, resume, start=None):
        leg = leg if leg > 0.01 else 1e-9  # no time: one step, however fast the machine
        last = emoji.train(
            work, minutes, resume=resume, leg=leg, start=start, config=CONFIG, recipe=RECIPE, bank=bank,
            compile=False, report_minutes=1e6,
        )  # fmt: skip
        return emoji.export(last, work / "emoji.safetensors")

    return run


def go(out: Path, phase, minutes: float = 0.0, **options) -> list[Path]:
    return train_leg.leg(out, "flow", until=time.time() + 60 * minutes, run=phase, **options)


def test_legs_from_parts_to_parts_end_where_one_run_does(tmp_path, phase):
    go(tmp_path / "whole", phase, minutes=60)
    half = (tmp_path / "whole/last.pt.0").stat().st_size // 2 + 1
    before = None
    for k in range(4):
        made = go(tmp_path / str(k), phase, checkpoint=before, largest=half)  # no time: a step a leg
        before = tmp_path / str(k)
        assert len(made) <= train_leg.FILES - 1 and (before / "last.pt.1").exists()
    step = lambda folder: loop.read_checkpoint(parts.join(folder, "last.pt", tmp_path / "joined.pt"))[1]
    expected, found = step(tmp_path / "whole"), step(before)
    assert found["step"] == expected["step"] == 4
    for name, value in expected["ema"].items():
        assert torch.equal(found["ema"][name], value), name
    assert (before / "emoji.safetensors").stat().st_size == (
        tmp_path / "whole/emoji.safetensors"
    ).stat().st_size


def test_a_checkpoint_that_is_too_large_becomes_compact_and_goes_on(tmp_path, phase):
    go(tmp_path / "a", phase, largest=100_000)
    assert "rows" in loop.read_checkpoint(parts.join(tmp_path / "a", "last.pt", tmp_path / "a.pt"))[1]
    go(tmp_path / "b", phase, checkpoint=tmp_path / "a", minutes=60)
    record = loop.read_checkpoint(parts.join(tmp_path / "b", "last.pt", tmp_path / "b.pt"))[1]
    assert (record["step"], record["begun"]) == (4, 1)
    with pytest.raises(ValueError, match="too much to bring back: a checkpoint of"):
        go(tmp_path / "c", phase, largest=1000)


def test_parts_come_back_as_they_were_and_damage_is_seen(tmp_path):
    file = tmp_path / "x.pt"
    file.write_bytes(bytes(range(256)) * 10)
    made = parts.split(file, tmp_path, largest=1000)
    assert [p.name for p in made] == ["x.pt.0", "x.pt.1", "x.pt.2", "x.pt.json"]
    back = parts.join(tmp_path, "x.pt", tmp_path / "back")
    assert back.read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="at most 2 parts of 1000 bytes"):
        parts.split(file, tmp_path, largest=1000, most=2)
    (tmp_path / "x.pt.1").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="damaged: 2560 bytes"):
        parts.join(tmp_path, "x.pt", tmp_path / "again")
    (tmp_path / "x.pt.1").unlink()
    with pytest.raises(ValueError, match="not complete"):
        parts.join(tmp_path, "x.pt", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_travels_is_counted(tmp_path, monkeypatch, capsys):
    pack = tmp_path / "a.pack"
    pack.write_bytes(bytes(1000))
    sizes = train_leg.check_travel(train_leg.ROOT, None, pack)
    assert sizes["pack"] == 1000 and 2**20 < sizes["repository"] < 40 * 2**20
    monkeypatch.setattr(train_leg, "TRAVELS", sizes["repository"] + 999)
    with pytest.raises(
        ValueError, match=r"repository \d+.\d MiB, pack 0.0 MiB, checkpoint 0.0 MiB: more than"
    ):
        train_leg.check_travel(train_leg.ROOT, None, pack)
    with pytest.raises(ValueError, match="does not exist"):
        train_leg.check_travel(train_leg.ROOT, tmp_path / "none", pack)
    assert "of 64 MiB" in capsys.readouterr().out
