"""Distillation to one, two and four steps in one student, which keeps the many-step flow.

Euler steps of k on the linear grid visit the levels 1, 1 - 1/k, ..., 1/k. There the student learns the
picture of the pair, from states as it will meet them: its own, x_sigma = eps - (1 - sigma) v(eps, 1), where
its first step leads (SlimFlow's point), beside those of the straight line. A share of each batch stays reflow
on all levels. Liu et al., "InstaFlow", 2023; Zhu, Liu and Liu, "SlimFlow", 2024.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rfkernels.models.emoji import SIGMA_MIN, EmojiFlow
from rfkernels.objectives import UShaped, distill_sigma, guided_point, interpolate
from rfkernels.objectives.densities import stream
from rfkernels.ops.noise import philox_words
from rfkernels.train import loop
from rfkernels.train.lowrank import adapt, write_lora
from rfkernels.train.reflow import ReflowTask, begin, fitting

__all__ = ["GRIDS", "RECIPE", "DistilTask", "train"]

GRIDS = (1, 2, 4)  # numbers of steps
RECIPE = loop.Recipe(minutes=5.0, muon_lr=0.002, adam_lr=2e-4, ema=0.995, warmup=20, decay_from=0.3)
_CHOICE = 0x67726964  # "grid"


@dataclass
class DistilTask(ReflowTask):
    """Pictures of pairs at the levels of few-step grids.

    Args:
        keep: the share of samples that are reflow, on U-shaped levels of the straight line.
        own: the share of the others whose state is the student's own.
        student: makes those states, without gradients: the averaged model of the run.
    """

    keep: float = 0.25
    own: float = 0.5
    student: EmojiFlow | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict:
        return {**super().settings, "keep": self.keep, "own": self.own, "grids": list(GRIDS)}

    def sigma(self, keys: Tensor) -> Tensor:
        """float64[3, batch]: levels; 1 where a sample is distilled; 1 where its state is the student's."""
        u = philox_words(3, stream(keys, _CHOICE)).double() / 2**32
        grids = torch.stack([distill_sigma("k", keys, k=k, eps=0.0) for k in GRIDS])
        few = grids.gather(0, (u[:, :1] * len(GRIDS)).long().T)[0]
        distilled = u[:, 1] >= self.keep
        own = distilled & (u[:, 2] < self.own)
        levels = torch.where(distilled, few, UShaped(self.levels).sample(keys))
        return torch.stack([levels, distilled.double(), own.double()])

    def prepare(
        self, pictures: Tensor, kept: Tensor, keys: Tensor, rate: Tensor, *words: Tensor
    ) -> tuple[Tensor, ...]:
        x0, noise = self.pair(pictures, kept, keys, rate)
        sigma, distilled, own = self.sigma(keys)
        distilled, own = distilled.bool(), own.bool()
        x, _ = interpolate(x0, sigma, noise)
        if self.student is not None and self.own:
            with torch.autocast(x.device.type, torch.bfloat16):
                first = self.student.predict(noise, torch.ones_like(sigma, dtype=x.dtype), *words)
            point = guided_point(noise, noise - first.float(), sigma)
            x = torch.where(own[:, None, None, None], point, x)
        scale = torch.where(distilled, 1.0, sigma.clamp(min=SIGMA_MIN))  # pictures, or velocities
        return x, x0, sigma.float(), scale.float(), *words


def train(
    out: str | Path,
    pairs: str | Path,
    *,
    start: str | Path | None = None,
    rank: int = 0,
    recipe: loop.Recipe = RECIPE,
    minutes: float | None = None,
    steps: int | None = None,
    leg: float | None = None,
    resume: bool = False,
    device: str = "cpu",
    seed: int = 0,
    compile: bool = True,
    workers: int = 0,
    **options,
) -> Path:
    """Distils; returns the weights file `out/distil.safetensors`, which says 4 Euler steps without guidance.

    Args:
        pairs: a folder of `make_pairs`; those of the many-step teacher, also after reflow.
        start: weights to start from, best reflowed ones; None: the package's own.
        rank: above 0 these stay as they are and an adapter of that rank on all hidden layers learns it: the
            result then is `out/distil-lora.safetensors`, for `rfkernels.load_lora`.
        recipe, minutes, steps, leg, resume, device, seed, compile, workers: as in `reflow.train`.
        options: of `DistilTask`.

    Raises:
        ValueError: a folder without pairs, or pictures of another size than the model's.
        FileNotFoundError: `resume` without a checkpoint.
    """
    out, model, recipe = begin(out, start, recipe, minutes, steps, resume, seed)
    if rank:
        adapt(model, rank)
    state = loop.new_state(model, recipe, torch.device(device))
    pair = fitting(pairs, model)
    task = DistilTask(pair, model.config.table, recipe.batch, seed, student=state.ema, **options)
    if resume:
        loop.restore(state, out / "last.pt")
    last = loop.run(state, task, out, leg=leg, compile=compile, workers=workers)
    sampling = {"steps": max(GRIDS), "guidance": 1.0, "shift": 1.0, "method": "euler"}
    if not rank:
        return loop.export(last, out / "distil.safetensors", **sampling)
    return write_lora(state, out / "distil-lora.safetensors", start, sampling=json.dumps(sampling))
