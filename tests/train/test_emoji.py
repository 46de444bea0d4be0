import pytest
import torch

from rfkernels import ops
from rfkernels.models.checkpoint import read_record
from rfkernels.models.emoji import EmojiFlow, load_emoji
from rfkernels.train import emoji, loop
from tests.tiny import CONFIG, tiny_model
from tests.train.banks import make_bank

RECIPE = loop.Recipe(steps=3, batch=8, warmup=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bank():
    return make_bank(size=16)


def run(out, bank, **options) -> dict:
    """Trains the tiny model on the tiny bank and returns the record of its checkpoint."""
    arguments = {"config": CONFIG, "recipe": RECIPE, "bank": bank, "compile": False, "report_minutes": 1e6}
    return torch.load(emoji.train(out, **{**arguments, **options}), weights_only=True)


def test_error_is_that_of_the_velocity(bank):
    """Of v = (x - x0') / sigma against eps - x0, where sigma is not clamped."""
    task = emoji.FlowTask(bank, CONFIG, RECIPE, emoji.Levels(), CPU)
    inputs = task.inputs(4)
    x, x0, sigma, *text = task.prepare(*loop.to_device(CPU, inputs))
    assert x.shape == x0.shape == (8, 4, 16, 16) and sigma.shape == (8,)
    eps = ops.philox_normal(x.shape, torch.from_numpy(inputs[0]))
    s = sigma[:, None, None, None]
    torch.testing.assert_close(x, (1 - s) * x0 + s * eps, rtol=1e-5, atol=1e-5)
    model, clear = tiny_model(), sigma > 0.05
    v = (x - model.predict(x, sigma, *text)) / s
    each = [task.loss(model, x[i : i + 1], x0[i : i + 1], sigma[i : i + 1], *(t[i : i + 1] for t in text))
            for i in range(8)]  # fmt: skip
    wanted = (v - (eps - x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(torch.stack(each)[clear], wanted[clear], rtol=1e-3, atol=1e-3)
    whole = task.loss(model, x, x0, sigma, *text)
    torch.testing.assert_close(whole, torch.stack(each).mean(), rtol=1e-4, atol=1e-4)


def test_batches_depend_on_seed_and_step_alone(bank):
    tasks = [emoji.FlowTask(bank, CONFIG, RECIPE, emoji.Levels(), CPU) for _ in range(2)]
    tasks[0].inputs(3)
    a, b, later = tasks[0].inputs(7), tasks[1].inputs(7), tasks[1].inputs(8)
    pictures = [tasks[0].prepare(*loop.to_device(CPU, i))[0] for i in (a, b, later)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_levels_lean_towards_noise():
    keys = ops.noise_keys(0, 20_000)
    sigma = emoji.Levels(shift=2.0, uniform=0.0).sample(keys)
    assert sigma.min() > 0 and sigma.max() <= 1 and sigma.dtype == torch.float32
    assert abs(sigma.median() - 2 / 3) < 0.01  # 1/2 shifted by 2
    flat = emoji.Levels(shift=2.0, uniform=1.0).sample(keys)
    assert abs(flat.median() - 1 / 2) < 0.01 and abs((flat < 0.1).float().mean() - 0.1) < 0.01


def test_sheet_and_errors_are_written(tmp_path, bank):
    run(tmp_path, bank, report_minutes=1e-9, recipe=loop.Recipe(steps=1, batch=4))
    assert (tmp_path / "sheet_000.png").stat().st_size > 1000
    line = (tmp_path / "log.jsonl").read_text()
    assert '"seen"' in line and '"tint"' in line


def test_run_starts_from_a_weights_file_of_smaller_pictures(tmp_path, bank):
    run(tmp_path / "first", bank)
    weights = emoji.export(tmp_path / "first" / "last.pt", tmp_path / "first.safetensors")
    still = loop.Recipe(steps=1, batch=4, muon_lr=0.0, adam_lr=0.0)
    record = run(tmp_path / "same", bank, recipe=still, start=weights)
    begun = load_emoji(weights).state_dict()
    assert all(torch.equal(record["ema"][n], p) for n, p in begun.items() if n != "known_words")
    assert record["config"]["size"] == 16
    large = EmojiFlow(CONFIG).config.__class__(**{**CONFIG.__dict__, "size": 32, "patch": 8, "shift": 2.0})
    record = run(tmp_path / "large", bank, config=large, recipe=still, start=weights)
    assert (record["config"]["size"], record["config"]["patch"], record["config"]["shift"]) == (32, 8, 2.0)
    again = emoji.export(tmp_path / "large" / "last.pt", tmp_path / "large.safetensors")
    assert read_record(again)["training"]["started_from"]["steps_done"] == 3
    assert run(tmp_path / "large", bank, resume=True, steps=2, recipe=still)["step"] == 2


def test_words_of_captions_are_known(tmp_path, bank):
    run(tmp_path, bank)
    model = load_emoji(emoji.export(tmp_path / "last.pt", tmp_path / "emoji.safetensors"))
    assert model.encode(["two red hearts on a blue background", "zyxwv"]).unknown == [[], ["zyxwv"]]


def test_refusals(tmp_path, bank):
    with pytest.raises(FileNotFoundError, match="start without resume"):
        run(tmp_path, bank, resume=True)
    with pytest.raises(ValueError, match="unknown preset 'huge': use one of small, full"):
        run(tmp_path, bank, preset="huge")
