import os
import signal
from pathlib import Path

import pytest
import torch

from rfkernels.models.checkpoint import read_record
from rfkernels.models.emoji import EmojiFlow, load_emoji
from rfkernels.train import captions, emoji
from tests.tiny import CONFIG, tiny_dataset

RECIPE = emoji.Recipe(steps=6, batch=8, warmup=2)


def run(out: Path, *, resume: bool = False, recipe: emoji.Recipe = RECIPE, start: Path | None = None) -> dict:
    """Trains the tiny model and returns its last checkpoint."""
    arguments = {"config": CONFIG, "recipe": recipe, "dataset": tiny_dataset(), "compile": False}
    path = emoji.train(out, resume=resume, start=start, sheet_minutes=1e6, **arguments)
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    make_batch = captions.make_batch

    def stop_at_third(data, weights, size, seed, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(data, weights, size, seed, step)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(captions, "make_batch", stop_at_third)
        stopped = run(tmp_path / "parts")
    assert stopped["step"] == 3 and signal.getsignal(signal.SIGTERM) is handler
    resumed = run(tmp_path / "parts", resume=True)
    assert resumed["step"] == whole["step"] == 6
    for part in ("model", "ema", "muon", "adam"):
        assert same(resumed[part], whole[part]), part
    assert not same(stopped["model"], whole["model"]) and not same(whole["model"], whole["ema"])


def test_training_lowers_the_error_and_exports(tmp_path, capsys):
    recipe = emoji.Recipe(steps=80, batch=16, warmup=5)
    record = run(tmp_path, recipe=recipe)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(line[line.index("loss") + 1]) for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 4
    model = load_emoji(emoji.export(tmp_path / "last.pt", tmp_path / "emoji.safetensors"))
    torch.testing.assert_close(model.out.bias, record["ema"]["out.bias"], rtol=1e-3, atol=1e-3)
    assert model.encode(["red circle", "zyxwv"]).unknown == [[], ["zyxwv"]]


def test_run_ends_when_its_minutes_are_over(tmp_path):
    record = run(tmp_path, recipe=emoji.Recipe(minutes=0.02, batch=4))
    assert 1.2 <= record["seconds"] < 30 and record["step"] >= 1
    again = run(tmp_path, recipe=emoji.Recipe(minutes=0.02, batch=4), resume=True)
    assert again["step"] == record["step"]  # nothing left to do


def test_sheet_and_errors_are_written(tmp_path):
    recipe = emoji.Recipe(steps=2, batch=4)
    emoji.train(
        tmp_path, config=CONFIG, recipe=recipe, dataset=tiny_dataset(), compile=False, sheet_minutes=1e-9
    )
    assert (tmp_path / "sheet_000.png").stat().st_size > 1000
    assert '"held-out"' in (tmp_path / "log.jsonl").read_text()


def test_run_starts_from_a_weights_file_and_records_it(tmp_path):
    run(tmp_path / "first", recipe=emoji.Recipe(steps=60, batch=16, warmup=5))
    weights = emoji.export(tmp_path / "first" / "last.pt", tmp_path / "first.safetensors")
    begun = load_emoji(weights).state_dict()
    still = emoji.Recipe(steps=1, batch=4, muon_lr=0.0, adam_lr=0.0)
    record = run(tmp_path / "second", recipe=still, start=weights)
    for part in ("model", "ema"):
        assert all(torch.equal(record[part][name], p) for name, p in begun.items()), part
    resumed = run(tmp_path / "second", recipe=emoji.Recipe(steps=2, batch=4), resume=True)
    assert resumed["step"] == 2 and not same(resumed["model"], record["model"])
    again = emoji.export(tmp_path / "second" / "last.pt", tmp_path / "second.safetensors")
    assert read_record(again)["training"]["started_from"]["steps_done"] == 60


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="start without resume"):
        emoji.train(tmp_path, resume=True, dataset=tiny_dataset(), config=CONFIG)


def test_rate_warms_up_stays_and_falls(tmp_path):
    recipe = emoji.Recipe(steps=100, warmup=10)
    state = emoji._new_state(EmojiFlow(CONFIG), recipe, tiny_dataset(), torch.device("cpu"))
    rates = []
    for state.step in range(101):
        rates.append(emoji._rate(state))
    assert rates[0] == pytest.approx(0.1) and rates[10] == rates[40] == 1
    assert rates[70] == pytest.approx(0.51) and rates[100] == pytest.approx(0.02)


def test_noise_levels_lean_towards_noise():
    g = torch.Generator().manual_seed(0)
    sigma = emoji._noise_levels(20_000, emoji.Recipe(uniform=0.0), g)
    assert sigma.min() > 0 and sigma.max() <= 1
    assert abs(sigma.median() - 2 / 3) < 0.01  # 1/2 shifted by 2
