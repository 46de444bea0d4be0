"""Training of the embedded text-to-emoji model: one command, resumable, ends when its minutes are over."""

import copy
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfkernels.models import text as text_module
from rfkernels.models.checkpoint import read_record, write_emoji
from rfkernels.models.emoji import SIGMA_MIN, EmojiConfig, EmojiFlow, load_emoji
from rfkernels.train import captions, sheet
from rfkernels.train.data import Dataset, open_data
from rfkernels.train.muon import Muon

__all__ = ["Recipe", "export", "train"]


@dataclass(frozen=True)
class Recipe:
    """What a run is, beside the model: stored in its checkpoints and in the weights file."""

    minutes: float = 85.0
    steps: int | None = None  # a fixed number of steps instead of minutes
    batch: int = 128
    seed: int = 0
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    ema: float = 0.998
    warmup: int = 50
    decay_from: float = 0.4  # of the run; the rate then falls linearly to `final`
    final: float = 0.02
    shift: float = 2.0  # of the logit-normal noise levels, towards noise
    uniform: float = 0.1  # share of noise levels drawn uniformly
    started_from: dict | None = None  # the training record of the weights that the run started from


@dataclass
class State:
    """Everything that a checkpoint holds."""

    model: EmojiFlow
    ema: EmojiFlow
    muon: Muon
    adam: torch.optim.AdamW
    recipe: Recipe
    step: int = 0
    seconds: float = 0.0

    def progress(self) -> float:
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        return self.seconds / (60 * self.recipe.minutes)


# --------------------------------------------------------------------------------------------- one step


def _noise_levels(count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """[count] sigmas: logit-normal shifted by s sigma / (1 + (s - 1) sigma), a share of them uniform."""
    u = torch.sigmoid(torch.randn(count, generator=generator))
    u = recipe.shift * u / (1 + (recipe.shift - 1) * u)
    flat = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < recipe.uniform, flat, u).clamp(1e-3, 1.0)


def _loss(model: EmojiFlow, x0: Tensor, eps: Tensor, sigma: Tensor, text: tuple[Tensor, ...]) -> Tensor:
    """Mean squared velocity error of a picture prediction: |x0' - x0|^2 / max(sigma, 0.05)^2."""
    s = sigma[:, None, None, None]
    x = (1 - s) * x0 + s * eps
    error = model.predict(x, sigma, *text).float() - x0
    return (error / s.clamp(min=SIGMA_MIN)).square().mean()


def _inputs(batch: captions.Batch, config: EmojiConfig, recipe: Recipe, step: int, device: torch.device):
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    x0 = torch.from_numpy(batch.pictures)
    eps = torch.randn(x0.shape, generator=generator)
    sigma = _noise_levels(len(x0), recipe, generator)
    tokens = text_module.tokenize(batch.captions, config.table, length=captions.TRAIN_WORDS)
    text = tuple(torch.from_numpy(a).to(device) for a in tokens)
    return x0.to(device), eps.to(device), sigma.to(device), text


def _rate(state: State) -> float:
    """Factor of the learning rates: linear warm-up, constant, then linear decay."""
    r, p = state.recipe, min(state.progress(), 1.0)
    decay = 1.0 if p < r.decay_from else 1.0 - (1.0 - r.final) * (p - r.decay_from) / (1.0 - r.decay_from)
    return min(1.0, (state.step + 1) / r.warmup) * decay


def _update(state: State) -> None:
    factor = _rate(state)
    for optimizer, rate in ((state.muon, state.recipe.muon_lr), (state.adam, state.recipe.adam_lr)):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = min(state.recipe.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        averages, values = list(state.ema.parameters()), list(state.model.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)


# --------------------------------------------------------------------------------------------- state


def _is_hidden_matrix(name: str, p: Tensor) -> bool:
    hidden = name.startswith(("double", "single", "text.join", "text.out"))
    return hidden and name.endswith("weight") and p.ndim == 2


def _new_state(model: EmojiFlow, recipe: Recipe, data: Dataset, device: torch.device) -> State:
    model.known_words = torch.from_numpy(captions.known_words(data))
    model.to(device)
    named = list(model.named_parameters())
    muon = Muon([p for n, p in named if _is_hidden_matrix(n, p)], lr=recipe.muon_lr)
    rest = [p for n, p in named if not _is_hidden_matrix(n, p)]
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    return State(model, copy.deepcopy(model).requires_grad_(False), muon, adam, recipe)


def _save(state: State, path: Path) -> None:
    record = {
        "config": asdict(state.model.config),
        "recipe": asdict(state.recipe),
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "muon": state.muon.state_dict(),
        "adam": state.adam.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
    }
    partial = path.with_suffix(".partial")
    torch.save(record, partial)
    partial.replace(path)


def _restore(state: State, path: Path) -> None:
    record = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("model", "ema", "muon", "adam"):
        getattr(state, name).load_state_dict(record[name])
    state.recipe = replace(state.recipe, started_from=record["recipe"]["started_from"])
    state.step, state.seconds = record["step"], record["seconds"]


# --------------------------------------------------------------------------------------------- the run


def _compiled_loss(model: EmojiFlow, device: torch.device, compile: bool) -> Callable[..., Tensor]:
    def loss(x0: Tensor, eps: Tensor, sigma: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return _loss(model, x0, eps, sigma, text)

    return torch.compile(loss) if compile else loss


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGTERM or SIGINT came: the run then saves and ends after the step under way."""
    asked: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(name, lambda number, _: asked.append(number)) for name in names]
    try:
        yield lambda: bool(asked)
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def _report(out: Path, record: dict) -> None:
    line = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
    print(line, flush=True)
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")


def _errors(state: State, data: Dataset, device: torch.device) -> dict[str, float]:
    """Velocity error of the averaged model on 128 fixed pictures of each split."""
    result = {}
    for split in ("train", "held-out"):
        rows = data.indices(split)
        weights = np.zeros(len(data.entries))
        weights[rows] = 1 / len(rows)
        batch = captions.make_batch(data, weights, 128, seed=12345, step=0)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            inputs = _inputs(batch, state.model.config, state.recipe, 999_983, device)
            result[split] = _loss(state.ema, *inputs).item()
    return result


def train(
    out: Path,
    minutes: float = 85.0,
    data: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    *,
    start: Path | None = None,
    config: EmojiConfig | None = None,
    recipe: Recipe | None = None,
    dataset: Dataset | None = None,
    compile: bool = True,
    sheet_minutes: float = 5.0,
) -> Path:
    """Trains the model and returns its last checkpoint, `out/last.pt`; `export` makes a weights file of it.

    The learning rate follows the time spent, so that the run ends after `minutes` however busy the machine
    is. A checkpoint and a sheet of samples are written every few minutes; SIGTERM saves and ends; `resume`
    goes on from `out/last.pt` with the same order of pictures, noise, averages and optimizer states.

    Args:
        out: folder of checkpoints, sheets and `log.jsonl`.
        minutes: how long to train, over all resumed parts.
        data: folder of the data (see `rfkernels.train.data.build`).
        resume: go on from `out/last.pt`.
        device: "cpu" or a CUDA device.
        start: a weights file to start from, instead of random numbers; it decides the model's shape.
        config, recipe: the model's shape and the run's settings; default those of the shipped model.
        dataset: data already in memory, instead of `data`.
        compile: compile the step; off for tiny runs.
        sheet_minutes: time between sheets.

    Raises:
        DataError: the data packages are missing and cannot be fetched.
        FileNotFoundError: `resume` without a checkpoint.
        WeightsError: `start` is not a weights file of this model.
    """
    out, where = Path(out), torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    last = out / "last.pt"
    if resume and not last.exists():
        raise FileNotFoundError(f"resume needs {last}, which is not there; start without resume")
    recipe = recipe or Recipe(minutes=minutes)
    torch.manual_seed(recipe.seed)
    if start is None:
        model = EmojiFlow(config or EmojiConfig())
    else:
        model = load_emoji(start).requires_grad_(True).train()
        recipe = replace(recipe, started_from=read_record(start)["training"])
    dataset = dataset or open_data(data, size=model.config.size)
    state = _new_state(model, recipe, dataset, where)
    if resume:
        _restore(state, last)
    loss_of = _compiled_loss(state.model, where, compile)
    with _stop_on_signal() as stopped:
        _run(state, dataset, where, out, loss_of, sheet_minutes, stopped)
    _save(state, last)
    return last


def _run(
    state: State,
    dataset: Dataset,
    device: torch.device,
    out: Path,
    loss_of: Callable[..., Tensor],
    sheet_minutes: float,
    stopped: Callable[[], bool],
) -> None:
    """Steps until the run is over or stopped; a line every 20 steps, a sheet every `sheet_minutes`."""
    recipe, weights = state.recipe, captions.sampling_weights(dataset)
    before, begun = state.seconds, time.monotonic()
    next_sheet = (before // (60 * sheet_minutes) + 1) * 60 * sheet_minutes
    mean, since, at = None, state.step, begun
    while state.progress() < 1 and not stopped():
        batch = captions.make_batch(dataset, weights, recipe.batch, recipe.seed, state.step)
        loss = loss_of(*_inputs(batch, state.model.config, recipe, state.step, device))
        loss.backward()
        _update(state)
        state.step += 1
        now = time.monotonic()
        state.seconds = before + now - begun
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if state.step % 20 == 0:
            speed = (state.step - since) * recipe.batch / (now - at)
            _report(out, {"step": state.step, "min": state.seconds / 60, "loss": mean, "img/s": speed})
            since, at = state.step, now
        if state.seconds >= next_sheet:
            next_sheet += 60 * sheet_minutes
            _save(state, out / "last.pt")
            _report(out, {"step": state.step, "min": state.seconds / 60, **_errors(state, dataset, device)})
            sheet.write(state.ema, out / f"sheet_{round(state.seconds / 60):03d}.png")


def export(checkpoint: Path, out: Path) -> Path:
    """Writes the averaged model of a checkpoint as a weights file (int8 rows) and returns `out`."""
    record = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = EmojiConfig(**{**record["config"], "styles": tuple(record["config"]["styles"])})
    model = EmojiFlow(config)
    model.known_words = record["ema"]["known_words"]
    model.load_state_dict(record["ema"])
    training = {
        **record["recipe"],
        "steps_done": record["step"],
        "minutes_done": round(record["seconds"] / 60, 1),
    }
    write_emoji(model, Path(out), training)
    return Path(out)
