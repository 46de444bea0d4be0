import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from rfkernels.models.checkpoint import read_record
from rfkernels.models.emoji import EmojiFlow, load_emoji
from rfkernels.models.text import tokenize
from rfkernels.train import loop
from tests.tiny import CONFIG, tiny_model

RECIPE = loop.Recipe(steps=6, batch=8, warmup=2)
PROMPTS = ["red circle", "blue heart", "", "pizza on a blue background"] * 2


class Colours(loop.Task):
    """Pictures of one colour, a pure function of the step; `at` is called with each step on the host."""

    def __init__(self, at=lambda step: None):
        self.at, self.settings = at, {"kind": "colours"}

    def inputs(self, step):
        self.at(step)
        rng = np.random.default_rng(step)
        return rng.uniform(-1, 1, (8, 4)).astype(np.float32), *tokenize(PROMPTS, CONFIG.table, length=6)

    def prepare(self, colours, *text):
        x0 = colours[:, :, None, None].expand(-1, -1, 16, 16)
        return x0, torch.linspace(0.1, 0.9, 8), *text

    def loss(self, model, x0, sigma, *text):
        return (
            (model.predict(x0 * (1 - sigma[:, None, None, None]), sigma, *text).float() - x0).square().mean()
        )


def run(out, *, recipe=RECIPE, resume=False, task=None, model=None, **options) -> dict:
    """Trains a tiny model and returns the record of its checkpoint."""
    out.mkdir(exist_ok=True)
    model = (model or tiny_model()).requires_grad_(True).train()
    state = loop.new_state(model, recipe, torch.device("cpu"))
    if resume:
        loop.restore(state, out / "last.pt")
    path = loop.run(state, task or Colours(), out, compile=False, report_minutes=1e6, **options)
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole = run(tmp_path / "whole")
    handler = signal.getsignal(signal.SIGTERM)
    stop = Colours(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    stopped = run(tmp_path / "parts", task=stop)
    assert stopped["step"] == 3 and signal.getsignal(signal.SIGTERM) is handler
    resumed = run(tmp_path / "parts", resume=True)
    assert resumed["step"] == whole["step"] == 6
    for part in ("model", "ema", "muon", "adam"):
        assert same(resumed[part], whole[part]), part
    assert not same(stopped["model"], whole["model"]) and not same(whole["model"], whole["ema"])


def test_inputs_made_ahead_change_nothing(tmp_path):
    assert same(run(tmp_path / "two", workers=2)["model"], run(tmp_path / "none")["model"])


def test_error_of_a_worker_ends_the_run(tmp_path):
    def fail(step):
        if step == 3:
            raise OSError("no picture")

    with pytest.raises(OSError, match="no picture"):
        run(tmp_path, task=Colours(fail), workers=1)


def test_legs_share_one_schedule(tmp_path):
    recipe = replace(RECIPE, steps=None, minutes=0.04)
    first = run(tmp_path, recipe=recipe, leg=0.01)
    assert 0.6 <= first["seconds"] < 2.4
    second = run(tmp_path, recipe=recipe, resume=True)
    assert second["seconds"] >= 2.4 and second["step"] > first["step"]
    assert run(tmp_path, recipe=recipe, resume=True)["step"] == second["step"]  # nothing left to do


def test_compact_checkpoint_has_the_averages_and_the_place(tmp_path):
    state = loop.new_state(tiny_model().requires_grad_(True), RECIPE, torch.device("cpu"))
    for p in state.ema.parameters():
        p.add_(1.0)
    state.step, state.seconds = 4, 12.0
    loop.save(state, tmp_path / "last.pt", compact=True)
    loop.save(state, tmp_path / "whole.pt")
    assert (tmp_path / "last.pt").stat().st_size < 0.3 * (tmp_path / "whole.pt").stat().st_size
    again = loop.new_state(EmojiFlow(CONFIG), RECIPE, torch.device("cpu"))
    loop.restore(again, tmp_path / "last.pt")
    assert (again.step, again.seconds, again.begun) == (4, 12.0, 4)
    for model in (again.model, again.ema):
        for (name, p), q in zip(model.named_parameters(), state.ema.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=q.abs().max().item() / 200, msg=name)
    assert again.rate() == pytest.approx(0.5 * (1 - 0.98 * (4 / 6 - 0.4) / 0.6))  # warms up once more
    record = run(tmp_path, resume=True)
    assert record["step"] == 6 and record["begun"] == 4
    loop.export(tmp_path / "last.pt", tmp_path / "w.safetensors")


def test_run_exports_what_it_is(tmp_path):
    record = run(tmp_path, recipe=replace(RECIPE, started_from={"steps_done": 60}))
    weights = loop.export(tmp_path / "last.pt", tmp_path / "emoji.safetensors", guidance=1.0, steps=2)
    model, training = load_emoji(weights), read_record(weights)["training"]
    torch.testing.assert_close(model.out.bias, record["ema"]["out.bias"], rtol=1e-3, atol=1e-3)
    assert (model.config.guidance, model.config.steps, model.config.size) == (1.0, 2, 16)
    assert training["task"] == {"name": "Colours", "kind": "colours"} and training["steps_done"] == 6
    resumed = run(tmp_path, recipe=replace(RECIPE, steps=7), resume=True)
    assert resumed["recipe"]["started_from"] == {"steps_done": 60} and resumed["step"] == 7


def test_training_learns_and_logs(tmp_path, capsys):
    run(tmp_path, recipe=loop.Recipe(steps=80, batch=8, warmup=5))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(line[line.index("loss") + 1]) for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 4


def test_rate_warms_up_stays_and_falls():
    state = loop.new_state(EmojiFlow(CONFIG), loop.Recipe(steps=100, warmup=10), torch.device("cpu"))
    rates = []
    for state.step in range(101):
        rates.append(state.rate())
    assert rates[0] == pytest.approx(0.1) and rates[10] == rates[40] == 1
    assert rates[70] == pytest.approx(0.51) and rates[100] == pytest.approx(0.02)
