"""A training run of the embedded model: legs that end on time, checkpoints, exact resume."""

import copy
import json
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from rfkernels.models.checkpoint import dequantise, quantise, write_emoji
from rfkernels.models.emoji import EmojiConfig, EmojiFlow
from rfkernels.train.muon import Muon

__all__ = ["Recipe", "State", "Task", "export", "new_state", "restore", "run", "save"]


@dataclass(frozen=True)
class Recipe:
    """What a run is, beside the model and its task: stored in its checkpoints and in the weights file."""

    minutes: float = 85.0  # of all legs together
    steps: int | None = None  # a fixed number of steps instead of minutes
    batch: int = 128
    seed: int = 0
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    ema: float = 0.998
    warmup: int = 50
    decay_from: float = 0.4  # of the run; the rate then falls linearly to `final`
    final: float = 0.02
    task: dict | None = None  # the settings of the task
    started_from: dict | None = None  # the training record of the weights that the run started from


class Task:
    """What is learnt. `inputs` runs on the host, ahead of time, and depends on (task, step) alone."""

    settings: Mapping = MappingProxyType({})  # recorded with the recipe

    def inputs(self, step: int) -> tuple:
        """Step number `step`: NumPy arrays, which go to the device, and anything else that pickles."""
        raise TypeError(f"{type(self).__name__} must define inputs(step)")

    def prepare(self, *inputs) -> tuple[Tensor, ...]:
        """On the device, without gradients: pictures and noise of the inputs."""
        return inputs

    def loss(self, model: EmojiFlow, *prepared: Tensor) -> Tensor:
        """The loss, under bfloat16 autocast, compiled as a whole."""
        raise TypeError(f"{type(self).__name__} must define loss(model, *prepared)")

    def report(self, state: "State", out: Path) -> dict[str, float]:
        """Called every few minutes, `state.ema` is the averaged model: what to log; may write sheets."""
        return {}


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
    begun: int = 0  # the step at which the optimizers started from nothing

    @property
    def device(self) -> torch.device:
        return self.model.out_offset.device

    def progress(self) -> float:
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        return self.seconds / (60 * self.recipe.minutes)

    def rate(self) -> float:
        """Factor of the learning rates: linear warm-up, constant, then linear decay."""
        r, p = self.recipe, min(self.progress(), 1.0)
        falling = (p - r.decay_from) / (1.0 - r.decay_from) if p > r.decay_from else 0.0
        return min(1.0, (self.step - self.begun + 1) / r.warmup) * (1.0 - (1.0 - r.final) * falling)


# -------------------------------------------------------------------------------------- state, checkpoints


def _is_hidden_matrix(name: str, p: Tensor) -> bool:
    hidden = name.startswith(("double", "single", "text.join", "text.out"))
    return hidden and name.endswith("weight") and p.ndim == 2


def new_state(model: EmojiFlow, recipe: Recipe, device: torch.device) -> State:
    """A run of `model` (moved to `device`) that has not begun."""
    model.to(device)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = {"params": [p for n, p in named if _is_hidden_matrix(n, p)]}  # none where adapters are trained
    muon = Muon([matrices], lr=recipe.muon_lr)
    rest = [p for n, p in named if not _is_hidden_matrix(n, p)]
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    return State(model, copy.deepcopy(model).requires_grad_(False), muon, adam, recipe)


def as_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """Matrices as int8 rows with scales, other numbers as float16."""
    floating = {n: p.cpu() for n, p in tensors.items()}
    return {
        n: quantise(p) if p.ndim == 2 and p.numel() > 4096 else p.half() if p.is_floating_point() else p
        for n, p in floating.items()
    }


def _whole(rows: dict[str, Tensor | tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    whole = {n: dequantise(*p) if isinstance(p, tuple) else p for n, p in rows.items()}
    return {n: p.float() if p.is_floating_point() else p for n, p in whole.items()}


def save(state: State, path: Path, *, compact: bool = False) -> None:
    """Writes a checkpoint, whole or not at all.

    compact: only the averaged weights, as int8 rows (a byte each), for a run that goes on elsewhere; the
    optimizers then start from nothing, with a new warm-up, at the same place of the schedule.
    """
    record = {
        "config": asdict(state.model.config),
        "recipe": asdict(state.recipe),
        "step": state.step,
        "seconds": state.seconds,
    }
    if compact:
        record["rows"] = as_rows(state.ema.state_dict())
    else:
        record |= {n: getattr(state, n).state_dict() for n in ("model", "ema", "muon", "adam")}
        record["begun"] = state.begun
    partial = path.with_suffix(".partial")
    torch.save(record, partial)
    partial.replace(path)


def read_checkpoint(path: Path) -> tuple[EmojiConfig, dict]:
    """The shape of the model and the record of a checkpoint, whole or compact."""
    record = torch.load(path, map_location="cpu", weights_only=True)
    raw = record["config"]
    return EmojiConfig(**{**raw, "styles": tuple(raw["styles"])}), record


def restore(state: State, path: Path) -> None:
    """Takes up the run of a checkpoint; what it started from comes along."""
    _, record = read_checkpoint(path)
    state.recipe = replace(state.recipe, started_from=record["recipe"]["started_from"])
    state.step, state.seconds = record["step"], record["seconds"]
    compact = "rows" in record
    if compact:
        record["model"] = record["ema"] = _whole(record["rows"])
    for model, weights in ((state.model, record["model"]), (state.ema, record["ema"])):
        model.known_words = weights["known_words"].to(state.device)
        model.load_state_dict(weights)
    state.begun = state.step if compact else record["begun"]
    for name in () if compact else ("muon", "adam"):
        getattr(state, name).load_state_dict(record[name])


def export(checkpoint: Path, out: Path, **sampling) -> Path:
    """Writes the averaged model of a checkpoint as a weights file (int8 rows) and returns `out`.

    sampling: of EmojiConfig, where the trained model wants another `steps`, `guidance`, `shift`, `method`.
    """
    config, record = read_checkpoint(checkpoint)
    weights = record["ema"] if "ema" in record else _whole(record["rows"])
    model = EmojiFlow(replace(config, **sampling))
    model.known_words = weights["known_words"]
    model.load_state_dict(weights)
    done = {"steps_done": record["step"], "minutes_done": round(record["seconds"] / 60, 1)}
    write_emoji(model, Path(out), {**record["recipe"], **done})
    return Path(out)


# ------------------------------------------------------------------------------------------------- the run


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


_worker_task: Task | None = None  # of a worker process


def _worker_inputs(step: int) -> tuple:
    return _worker_task.inputs(step)


def _begin_worker(task: Task) -> None:
    global _worker_task
    _worker_task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run itself ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _inputs_ahead(task: Task, first: int, workers: int) -> Iterator[Callable[[], tuple]]:
    """Yields a function that returns the inputs of step `first`, first + 1, ..., made ahead by `workers`."""
    if workers == 0:
        counter = iter(range(first, 1 << 62))
        yield lambda: task.inputs(next(counter))
        return
    fork = multiprocessing.get_context("fork")  # the pictures are shared, not copied
    with ProcessPoolExecutor(workers, fork, _begin_worker, (task,)) as pool:
        waiting = deque(pool.submit(_worker_inputs, first + k) for k in range(2 * workers))
        at = first + len(waiting)

        def following() -> tuple:
            nonlocal at
            waiting.append(pool.submit(_worker_inputs, at))
            at += 1
            return waiting.popleft().result()

        try:
            yield following
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def to_device(device: torch.device, inputs: tuple) -> tuple:
    """Arrays as tensors on the device; what is no array stays as it is."""
    return tuple(
        torch.from_numpy(a).to(device, non_blocking=True) if isinstance(a, np.ndarray) else a for a in inputs
    )


def _loss_of(task: Task, model: EmojiFlow, compile: bool) -> Callable[..., Tensor]:
    kind = model.out_offset.device.type

    def loss(*prepared: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            return task.loss(model, *prepared)

    return torch.compile(loss) if compile else loss


def update(state: State) -> None:
    """One step of the optimizers at the rate of the schedule, and of the average of the weights."""
    factor = state.rate()
    for optimizer, rate in ((state.muon, state.recipe.muon_lr), (state.adam, state.recipe.adam_lr)):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = min(state.recipe.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        averages, values = list(state.ema.parameters()), list(state.model.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)


def log(out: Path, record: dict) -> None:
    """One line on stdout and in `out/log.jsonl`."""
    print(
        " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()),
        flush=True,
    )
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def run(
    state: State,
    task: Task,
    out: Path,
    *,
    leg: float | None = None,
    compile: bool = True,
    report_minutes: float = 5.0,
    workers: int = 0,
) -> Path:
    """Steps until the run, or its leg of `leg` minutes, is over, or SIGTERM comes; returns `out/last.pt`.

    The learning rate follows the time spent over all legs (`Recipe.minutes`), so that the run ends on time
    however busy the machine is. A checkpoint and the task's report are written every `report_minutes`, a line
    every 20 steps. `workers` processes make inputs ahead; the result does not depend on them.
    """
    last, before, begun = out / "last.pt", state.seconds, time.monotonic()
    loss_of = _loss_of(task, state.model, compile)
    state.recipe = replace(state.recipe, task={"name": type(task).__name__, **task.settings})
    next_report = (before // (60 * report_minutes) + 1) * 60 * report_minutes
    total, since, at = 0.0, state.step, begun
    with _stop_on_signal() as stopped, _inputs_ahead(task, state.step, workers) as following:
        while state.progress() < 1 and not stopped() and (leg is None or state.seconds - before < 60 * leg):
            with torch.no_grad():
                prepared = task.prepare(*to_device(state.device, following()))
            loss = loss_of(*prepared)
            loss.backward()
            update(state)
            state.step += 1
            total = total + loss.detach()
            if state.step % 20 == 0:
                mean, now = float(total) / (state.step - since), time.monotonic()
                speed = (state.step - since) * state.recipe.batch / (now - at)
                log(out, {"step": state.step, "min": state.seconds / 60, "loss": mean, "img/s": speed})
                total, since, at = 0.0, state.step, now
            state.seconds = before + time.monotonic() - begun
            if state.seconds >= next_report:
                next_report += 60 * report_minutes
                save(state, last)
                minutes = {"step": state.step, "min": state.seconds / 60}
                log(out, {**minutes, **task.report(state, out)})
    save(state, last)
    return last
