"""Style adapters: branches beside the frozen model that learn a function of its training pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfkernels import ops
from rfkernels.train import loop
from rfkernels.train.emoji import FlowTask, Levels
from rfkernels.train.glyphs import Bank, open_bank
from rfkernels.train.lowrank import adapt, largest_rank, write_lora
from rfkernels.train.reflow import begin
from rfkernels.train.render import Packed
from rfkernels.train.styles import STYLES, over

__all__ = ["LARGEST", "RECIPE", "STYLES", "StyleTask", "train"]

LARGEST = 400_000  # bytes of an adapter's file
RANK = 8
RECIPE = loop.Recipe(minutes=2.0, batch=64, adam_lr=2e-3, ema=0.98, warmup=10)


class StyleTask(FlowTask):
    """Rectified flow on the training scenes, their objects drawn in a style, their backgrounds as they were.

    word: what captions say of the style, before all else; "" leaves them as they are.
    """

    def __init__(self, *arguments, style: str, word: str = ""):
        super().__init__(*arguments)
        self.style, self.word = STYLES[style], word
        self.settings = {**self.settings, "style": style, "word": word}

    def _arrays(self, scenes: list, step: int) -> tuple:
        if self.word:
            scenes = [replace(s, caption=f"{self.word} {s.caption}" if s.caption else "") for s in scenes]
        return super()._arrays(scenes, step)

    def prepare(self, keys: Tensor, rows: Tensor, weights: Tensor, mask: Tensor, packed: Packed):
        grounds = torch.from_numpy(packed.grounds).to(keys.device)
        drawn = self.style(self.renderer.draw(packed._replace(grounds=np.zeros_like(packed.grounds))))
        x0 = 2 * over((drawn + 1) / 2, grounds[:, :, None, None]) - 1
        sigma = self.levels.sample(keys)
        return ops.renoise(x0, 1 - sigma, sigma, keys=keys), x0, sigma, rows, weights, mask


def train(
    out: str | Path,
    style: str,
    *,
    bank: Bank | None = None,
    start: str | Path | None = None,
    rank: int = RANK,
    word: str = "",
    levels: Levels | None = None,
    recipe: loop.Recipe = RECIPE,
    minutes: float | None = None,
    steps: int | None = None,
    leg: float | None = None,
    resume: bool = False,
    device: str = "cpu",
    seed: int = 0,
    compile: bool = True,
    workers: int = 0,
) -> Path:
    """Trains the adapter of a style; returns `out/STYLE.safetensors`, for `rfkernels.load_lora`.

    Args:
        style: of `STYLES`.
        bank: the glyphs; None: those of the default folder.
        start: the weights that the adapter is for; None: the package's own.
        rank: at most; it is lowered until the file has at most `LARGEST` bytes.
        word: of the style in captions; "" so that the adapter alone decides.
        recipe, minutes, steps, leg, resume, device, seed, compile, workers: as in `reflow.train`.

    Raises:
        ValueError: an unknown style.
        FileNotFoundError: `resume` without a checkpoint.
    """
    if style not in STYLES:
        raise ValueError(f"a style of {', '.join(STYLES)} is required, got {style!r}")
    out, model, recipe = begin(out, start, recipe, minutes, steps, resume, seed)
    where = torch.device(device)
    state = loop.new_state(adapt(model, largest_rank(model, LARGEST, rank)), recipe, where)
    bank = bank or open_bank()
    task = StyleTask(bank, model.config, recipe, levels or Levels(), where, style=style, word=word)
    if resume:
        loop.restore(state, out / "last.pt")
    loop.run(state, task, out, leg=leg, compile=compile, workers=workers)
    return write_lora(state, out / f"{style}.safetensors", start, style=style, word=word)
