import json
import os
import pickle
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from rfkernels import samplers
from rfkernels.models.blocks import as_neighbours
from rfkernels.models.checkpoint import read_record, write_emoji
from rfkernels.models.emoji import load_emoji
from rfkernels.objectives import reflow_pairs, straightness
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.train import distil, loop, pairs, reflow
from rfkernels.train.scenes import SceneSampler
from tests.tiny import tiny_model
from tests.train.banks import make_bank
from tests.train.test_loop import same

RECIPE = loop.Recipe(steps=6, batch=8, warmup=2, muon_lr=0.004, adam_lr=4e-4)
SETTINGS = {"captions": lambda first, count: lines(first, count), "steps": 3, "seed": 5, "batch": 20}
WORDS = ("red heart", "blue circle", "pizza", "star flat", "cat face noto")


def lines(first: int, count: int) -> list[str]:
    return [f"{WORDS[i % 5]} {i // 5}" for i in range(first, first + count)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_emoji(tiny_model(), path, {"steps_done": 7})
    return path


@pytest.fixture(scope="module")
def kept(weights, tmp_path_factory) -> Path:
    """A folder of 60 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs.make_pairs(folder, 60, **SETTINGS, weights=weights)
    return folder


# ------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_where_the_guided_flow_takes_their_noise(weights, tmp_path):
    found = pairs.make_pairs(tmp_path, 60, **SETTINGS, weights=weights, dtype="float32")
    rows = np.array([3, 17, 58])
    keys = found.keys(rows)
    assert keys.tolist() == [[5, 3, 0], [5, 17, 0], [5, 58, 0]]
    model = load_emoji(weights)
    text = model.encode([""] * 3 + [found.captions[i] for i in rows])
    x = samplers.sample(
        lambda x, sigma: model.guided(x, sigma, text),
        philox_normal((3, 4, 16, 16), keys),
        samplers.schedule("linear", 3),
        method="ab2",
        guidance=3.0,
    )
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().numpy()
    difference = np.abs(expected - found.pictures[rows])  # another batch may turn a rounding
    assert difference.max() <= 1 and difference.mean() < 0.02
    assert found.captions[17] == "pizza 3" and found.captions[49] == ""  # every 50th has no prompt


def test_pairs_of_an_interrupted_run_are_the_same(kept, weights, tmp_path):
    some = pairs.make_pairs(tmp_path, 9, **SETTINGS, weights=weights)
    assert len(some) == 20  # whole batches
    with open(tmp_path / "pictures.u8", "ab") as file:  # a run that was killed in the middle of a write
        file.write(b"x" * 1500)
    with open(tmp_path / "captions.jsonl", "a") as file:
        file.write('"half')
    grown = pairs.make_pairs(tmp_path, 60, **SETTINGS, weights=weights)
    whole = pairs.Pairs(kept)
    assert len(grown) == 60 and grown.captions == whole.captions
    assert np.array_equal(grown.pictures, whole.pictures)
    assert len({p.tobytes() for p in grown.pictures}) == 60
    assert len(pairs.make_pairs(tmp_path, 20, **SETTINGS, weights=weights)) == 60  # never fewer
    again = pickle.loads(pickle.dumps(grown))
    assert np.array_equal(again.pictures, grown.pictures) and again.captions == grown.captions


def test_no_minutes_make_no_pairs(weights, tmp_path):
    assert len(pairs.make_pairs(tmp_path, 9, weights=weights, captions=lines, minutes=0.0)) == 0
    with pytest.raises(ValueError, match="has none: run make_pairs"):
        reflow.train(tmp_path / "run", tmp_path, start=weights, recipe=RECIPE, compile=False)


def test_pairs_of_other_settings_are_refused(kept, weights, tmp_path):
    with pytest.raises(ValueError, match=r"it has seed 5, not 6; steps 3, not 4$"):
        pairs.make_pairs(kept, 70, **{**SETTINGS, "steps": 4, "seed": 6}, weights=weights)
    with pytest.raises(ValueError, match="a folder of pairs"):
        pairs.Pairs(tmp_path)
    record = json.loads((kept / "record.json").read_text())
    (tmp_path / "record.json").write_text(json.dumps({**record, "size": 32}))
    with pytest.raises(ValueError, match="pairs of 16 pixels are required, got 32"):
        reflow.train(tmp_path / "run", tmp_path, start=weights, recipe=RECIPE, compile=False)


def test_scene_captions_are_numbered():
    bank = make_bank()
    captions = pairs.scene_captions(bank, seed=3)
    some = captions(50, 100)
    assert len(some) == 100 and all(some)
    assert captions(60, 5) == some[10:15] and captions(128, 22) == some[78:]
    assert set(some) <= {s.caption for k in range(3) for s in SceneSampler(bank, 3).scenes(k, 128)}
    assert pairs.scene_captions(bank, seed=4)(50, 100) != some


# ------------------------------------------------------------------------------------------------ reflow


class Gains(torch.nn.Module):
    """x0' = x * g(sigma), g linear between levels 0, 0.1, ..., 1."""

    def __init__(self, start: torch.Tensor):
        super().__init__()
        self.gains = torch.nn.Parameter(start)

    def predict(self, x, sigma, *words):
        near = (1 - (10 * sigma[:, None] - torch.arange(11)).abs()).clamp(min=0)
        return x * (near @ self.gains)[:, None, None, None]

    def velocity(self, x, sigma):
        return (x - self.predict(x, sigma)) / sigma.clamp(min=0.05)[:, None, None, None]


class Stored:
    """Pairs in memory."""

    def __init__(self, pictures: np.ndarray):
        self.pictures, self.captions = pictures, [""] * len(pictures)

    def __len__(self):
        return len(self.captions)

    def keys(self, rows):
        return noise_keys(0, len(self))[torch.from_numpy(rows)]


def measured(model, noise, x0) -> tuple[float, float]:
    """One step's error over the size of the data, and straightness of 20 steps per element."""
    x, seen, grid = noise, [], torch.linspace(1, 0, 21)
    for a, b in pairwise(grid):
        seen.append(model.velocity(x, a.expand(len(x))))
        x = x + (b - a) * seen[-1]
    one = model.predict(noise, torch.ones(len(x)))
    return ((one - x0).norm() / x0.norm()).item(), straightness(seen, noise, x, grid).mean().item() / 64


def test_reflow_makes_one_step_exact_on_gaussian_data():
    s, levels = 0.6, torch.linspace(0, 1, 11)  # data N(0, s^2): the flow takes noise z to s z, one step to 0
    gains = (1 - levels) * s * s / ((1 - levels) ** 2 * s * s + levels**2)  # E[x0 | x] / x
    model = Gains(gains)
    with torch.no_grad():
        x0, noise = reflow_pairs(model.velocity, noise_keys(0, 256), (256, 4, 4, 4), torch.linspace(1, 0, 41))
        before = measured(model, noise, x0)
    torch.testing.assert_close(x0, s * noise, rtol=0.05, atol=0.05)
    task = reflow.ReflowTask(Stored(((x0 + 1) * 127.5).numpy()), table=64, batch=64, huber=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
        loss = task.loss(model, *prepared(task, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = measured(model, noise, x0)
    assert before[0] > 0.95 and after[0] < 0.03
    assert before[1] > 0.1 and after[1] < 0.003


def task_of(kept, kind=reflow.ReflowTask, **options):
    return kind(pairs.Pairs(kept), 64, 8, seed=1, **options)


def prepared(task, step=0):
    return task.prepare(*loop.to_device(torch.device("cpu"), task.inputs(step)))


def test_passes_show_every_pair_once(kept):
    task = task_of(kept)
    seen = np.concatenate([task.rows(step) for step in range(15)])  # 120 = 2 * 60
    assert sorted(seen[:60]) == sorted(seen[60:]) == list(range(60))
    assert list(seen[:60]) != list(seen[60:])
    assert len(reflow.ReflowTask(task.pairs, 64, 150).rows(1)) == 150


def test_states_are_on_the_lines_of_the_pairs(kept):
    task = task_of(kept)
    x, x0, sigma, scale, *_ = prepared(task, step=3)
    rows = task.rows(3)
    noise = philox_normal(x.shape, task.pairs.keys(rows))
    torch.testing.assert_close(x0, torch.from_numpy(task.pairs.pictures[rows] / 127.5 - 1).float())
    s = sigma[:, None, None, None]
    torch.testing.assert_close(x, (1 - s) * x0 + s * noise)
    assert torch.equal(scale, sigma.clamp(min=0.05)) and len(set(sigma.tolist())) == 8
    levels = task.sigma(noise_keys(3, 5000))
    shares = [(levels < 0.2).double().mean(), (levels > 0.8).double().mean()]
    assert all(abs(share - 0.292) < 0.025 for share in shares)  # 1/2 - sinh(1.2) / (2 sinh 2)


def test_loss_is_that_of_velocities(kept):
    model = tiny_model()
    x, x0, sigma, _, *words = inputs = prepared(task := task_of(kept, huber=False))
    scale = sigma.clamp(min=0.05)[:, None, None, None]
    v = (x - model.predict(x, sigma, *words)) / scale
    expected = (v - (x - x0) / scale).square().mean()
    torch.testing.assert_close(task.loss(model, *inputs), expected)
    square = (v - (x - x0) / scale).flatten(1).square().sum(1)
    c = 0.00054 * 1024
    huber = (((square + c * c).sqrt() - c) / 1024).mean()
    torch.testing.assert_close(task_of(kept).loss(model, *inputs), huber)


def test_flip_mirrors_both_and_annealing_ends_with_the_pair(kept):
    plain, flipped = prepared(task_of(kept)), prepared(task_of(kept, flip=True))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(plain[0], flipped[0], strict=True)]
    assert 0 < sum(mirrored) < 8
    for i, turned in enumerate(mirrored):
        assert torch.equal(flipped[1][i], plain[1][i].flip(-1) if turned else plain[1][i])
        assert turned or torch.equal(flipped[0][i], plain[0][i])
    task = task_of(kept, anneal=10)
    ends = [torch.equal(prepared(task, k)[0], prepared(task_of(kept), k)[0]) for k in (0, 9, 10, 11)]
    assert ends == [False, False, True, True]
    x, x0, sigma, *_ = prepared(task, 0)  # r = 1: nothing of the pair's noise
    s = sigma[:, None, None, None]
    eps = (x - (1 - s) * x0) / s
    noise = philox_normal(x.shape, task.pairs.keys(task.rows(0)))
    high = sigma > 0.3
    assert abs(torch.corrcoef(torch.stack([eps[high].flatten(), noise[high].flatten()]))[0, 1]) < 0.1
    assert abs(eps[high].std() - 1) < 0.05


def stopped_at(monkeypatch, kind, step: int, name: str = "rows"):
    """Makes a run end after `step` steps; `name` is a method of the task that takes the step."""
    method = getattr(kind, name)

    def stop(self, at):
        if at == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(self, at)

    monkeypatch.setattr(kind, name, stop)


@pytest.mark.parametrize("how", ["reflow", "distil", "adapter"])
def test_stopped_run_goes_on_to_the_same_bits(how, kept, weights, tmp_path, monkeypatch):
    module = reflow if how == "reflow" else distil
    settings = {"start": weights, "recipe": RECIPE, "compile": False}
    settings |= {"rank": 2} if how == "adapter" else {}
    module.train(tmp_path / "whole", kept, **settings)
    with monkeypatch.context() as patch:
        stopped_at(patch, reflow.ReflowTask, 3)
        module.train(tmp_path / "parts", kept, **settings)
    records = [torch.load(tmp_path / "parts" / "last.pt", weights_only=True)]
    module.train(tmp_path / "parts", kept, **settings, resume=True)
    records += [torch.load(tmp_path / f / "last.pt", weights_only=True) for f in ("parts", "whole")]
    assert [r["step"] for r in records] == [3, 6, 6]
    for part in ("model", "ema", "muon", "adam"):
        assert same(records[1][part], records[2][part]), part
    assert not same(records[0]["model"], records[1]["model"])
    with pytest.raises(FileNotFoundError, match="start without resume"):
        module.train(tmp_path / "new", kept, **settings, resume=True)


def test_reflow_is_learnt_and_its_file_needs_no_guidance(kept, weights, tmp_path):
    recipe = replace(RECIPE, steps=40, batch=20)
    path = reflow.train(tmp_path, kept, start=weights, recipe=recipe, compile=False)
    task = task_of(kept)
    inputs = [prepared(task, 1000 + k) for k in range(8)]
    with torch.no_grad():
        before, after = (
            sum(task.loss(model, *i).item() for i in inputs)
            for model in (load_emoji(weights), load_emoji(path))
        )
    assert after < 0.8 * before
    record = read_record(path)
    assert record["config"]["guidance"] == 1.0 and record["training"]["started_from"] == {"steps_done": 7}
    assert record["training"]["task"]["pairs"] == 60 and record["training"]["steps_done"] == 40


# ---------------------------------------------------------------------------------------------- distillation


def test_distillation_has_the_levels_of_its_grids(kept):
    task = distil.DistilTask(pairs.Pairs(kept), 64, 4000, seed=1, keep=0.25, own=0.5)
    sigma, distilled, own = task.sigma(task.keys(0))
    few = sigma[distilled == 1]
    shares = {level: (few == level).double().mean().item() for level in (1.0, 0.75, 0.5, 0.25)}
    assert sum(shares.values()) == pytest.approx(1)  # no other level
    expected = {1.0: (1 + 1 / 2 + 1 / 4) / 3, 0.75: 1 / 12, 0.5: 1 / 6 + 1 / 12, 0.25: 1 / 12}
    assert all(abs(shares[k] - p) < 0.04 for k, p in expected.items())
    assert abs(distilled.mean() - 0.75) < 0.04 and abs(own.mean() - 0.375) < 0.04
    assert ((own == 0) | (distilled == 1)).all()
    assert len(sigma[distilled == 0].unique()) > 500


def test_student_meets_its_own_states(kept):
    model, options = tiny_model(), {"table": 64, "batch": 40, "keep": 0.3, "own": 0.6}
    task = distil.DistilTask(pairs.Pairs(kept), **options, student=model)
    plain = prepared(distil.DistilTask(pairs.Pairs(kept), **options), 2)
    x, x0, sigma, scale, *words = prepared(task, 2)
    _, distilled, own = task.sigma(task.keys(2)).bool()
    noise = philox_normal(x.shape, task.pairs.keys(task.rows(2)))
    with torch.autocast("cpu", torch.bfloat16):
        first = model.predict(noise, torch.ones(40), *words).float()  # where one step leads
    s = sigma[:, None, None, None]
    assert (own & (sigma < 1)).any() and (own & (sigma == 1)).any() and (~own & distilled).any()
    torch.testing.assert_close(x[own], (s * noise + (1 - s) * first)[own], rtol=0, atol=1e-4)
    assert (x - plain[0])[own & (sigma < 1)].abs().flatten(1).amax(1).min() > 0.1
    assert torch.equal(x[~own], plain[0][~own]) and torch.equal(x0, plain[1])
    assert torch.equal(scale, torch.where(distilled, 1.0, sigma.clamp(min=0.05)))


def test_one_student_is_better_in_one_two_and_four_steps(kept, weights, tmp_path):
    recipe = replace(RECIPE, steps=50, batch=20, muon_lr=0.008, adam_lr=8e-4)
    path = distil.train(tmp_path, kept, start=weights, recipe=recipe, compile=False)
    config = read_record(path)["config"]
    assert (config["steps"], config["guidance"], config["shift"], config["method"]) == (4, 1.0, 1.0, "euler")
    found = pairs.Pairs(kept)
    target = torch.from_numpy(found.pictures / 127.5 - 1)
    noise = philox_normal(target.shape, found.keys(np.arange(60)))

    def error(model, steps: int) -> float:
        text = model.encode(found.captions)
        with torch.no_grad():
            x = samplers.sample(
                lambda x, s: model(x, s, text), noise, samplers.schedule("linear", steps), method="euler"
            )
        return (x - target).square().mean().item()

    before, after = ({k: error(load_emoji(p), k) for k in (1, 2, 4)} for p in (weights, path))
    assert all(after[k] < 0.8 * before[k] for k in before), (before, after)


def test_distilled_adapter_loads_on_the_model(kept, weights, tmp_path):
    from rfkernels import load_lora

    path = distil.train(tmp_path, kept, start=weights, rank=3, recipe=RECIPE, compile=False)
    model = load_emoji(weights)
    assert set(load_lora(model, path).layers.values()) == {"rank 3"}
    ema = torch.load(tmp_path / "last.pt", weights_only=True)["ema"]
    ema = as_neighbours(ema, model.config.width, model.head_dim)  # an adapter has the order of the layer
    with torch.no_grad():
        merged = load_emoji(weights)
        for name, layer in merged.named_modules():
            if f"{name}.lora_A" in ema:
                layer.weight += ema[f"{name}.lora_B"] @ ema[f"{name}.lora_A"]
    x, sigma = philox_normal((2, 4, 16, 16), noise_keys(9, 2)), torch.tensor([1.0, 0.5])
    text = merged.encode(["red heart", "pizza"])
    torch.testing.assert_close(model(x, sigma, text), merged(x, sigma, text), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model(x, sigma, text), load_emoji(weights)(x, sigma, text), atol=3e-3)
