"""Reflow: the pairs of a teacher are learnt as straight lines, its guidance with them.

The student sees x_sigma = (1 - sigma) x0 + sigma eps of kept pairs (eps, x0) and predicts x0, so that its
velocity tends to eps - x0 at every level. It never sees the unconditional branch: what guidance made of the
pictures is in the pairs, and the exported weights say guidance 1. Liu, Gong and Liu, "Flow straight and
fast", 2022; levels and loss of Lee, Lin and Fanti, "Improving the training of rectified flows", 2024;
annealing of Zhu, Liu and Liu, "SlimFlow", 2024.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfkernels.models import text
from rfkernels.models.checkpoint import read_record
from rfkernels.models.emoji import DEFAULT_WEIGHTS, SIGMA_MIN, EmojiFlow, load_emoji
from rfkernels.objectives import UShaped, anneal_rate, interpolate, joint_flip, pseudo_huber, velocity_loss
from rfkernels.ops import noise_keys, philox_normal, renoise
from rfkernels.train import loop
from rfkernels.train.pairs import Pairs, make_pairs

__all__ = ["RECIPE", "ReflowTask", "make_pairs", "train"]

RECIPE = loop.Recipe(minutes=8.0, muon_lr=0.004, adam_lr=4e-4, ema=0.995, warmup=20, decay_from=0.3)


@dataclass
class ReflowTask(loop.Task):
    """The velocity along kept pairs.

    Args:
        pairs: what is learnt.
        table: of the model's text encoder.
        batch, seed: step k sees the next `batch` pairs of a shuffled pass, with levels of (seed, k).
        levels: `a` of the U-shaped density of levels.
        huber: pseudo-Huber distance of a sample's velocities; else their mean square.
        flip: mirror pictures with their noise, half of them: for captions without left and right only.
        anneal: steps until pairs are kept whole, eps = sqrt(1 - r^2) noise + r z with r from 1 to 0 before.
    """

    pairs: Pairs
    table: int
    batch: int
    seed: int = 0
    levels: float = 4.0
    huber: bool = True
    flip: bool = False
    anneal: int = 0

    def __post_init__(self):
        if not len(self.pairs):
            raise ValueError(f"pairs are required, {self.pairs.folder} has none: run make_pairs first")

    @property
    def settings(self) -> dict:
        names = ("levels", "huber", "flip", "anneal")
        return {**{n: getattr(self, n) for n in names}, "pairs": len(self.pairs), **self.pairs.record}

    def rows(self, step: int) -> np.ndarray:
        """int64[batch]: which pairs step number `step` sees; each pass over all has an order of its own."""
        count, first = len(self.pairs), step * self.batch
        passes = range(first // count, (first + self.batch - 1) // count + 1)
        orders = [np.random.default_rng([self.seed, p]).permutation(count) for p in passes]
        start = first % count
        return np.concatenate(orders)[start : start + self.batch].astype(np.int64)

    def keys(self, step: int) -> Tensor:
        """int64[batch, 3]: keys of levels and of noise beside the pairs', of a seed apart from theirs."""
        return noise_keys(self.seed + (1 << 40), self.batch, step=step)

    def sigma(self, keys: Tensor) -> Tensor:
        """float64[batch]: the levels of a step."""
        return UShaped(self.levels).sample(keys)

    def inputs(self, step: int) -> tuple:
        rows, keys = self.rows(step), self.keys(step)
        lines = [self.pairs.captions[i] for i in rows]
        words = text.tokenize(lines, self.table, length=text.MAX_WORDS)
        rate = anneal_rate(step=step, steps=self.anneal) if self.anneal else 0.0
        pictures = np.ascontiguousarray(self.pairs.pictures[rows])
        return pictures, self.pairs.keys(rows).numpy(), keys.numpy(), np.array(rate, np.float32), *words

    def pair(self, pictures: Tensor, kept: Tensor, keys: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures in [-1, 1] and the noise that goes with them."""
        x0 = pictures.float() / 127.5 - 1
        noise = philox_normal(x0.shape, kept)
        if self.flip:
            x0, noise = joint_flip(x0, noise, keys)
        if self.anneal:
            noise = renoise(noise, (1 - rate**2).sqrt(), rate, keys)
        return x0, noise

    def prepare(
        self, pictures: Tensor, kept: Tensor, keys: Tensor, rate: Tensor, *words: Tensor
    ) -> tuple[Tensor, ...]:
        x0, noise = self.pair(pictures, kept, keys, rate)
        sigma = self.sigma(keys)
        x, _ = interpolate(x0, sigma, noise)
        return x, x0, sigma.float(), sigma.float().clamp(min=SIGMA_MIN), *words

    def loss(
        self, model: EmojiFlow, x: Tensor, x0: Tensor, sigma: Tensor, scale: Tensor, *words: Tensor
    ) -> Tensor:
        """The distance of x0' / scale and x0 / scale: that of velocities where the scale is sigma."""
        scale = scale[:, None, None, None]
        distance = pseudo_huber if self.huber else velocity_loss
        return distance(model.predict(x, sigma, *words).float() / scale, x0 / scale)


def begin(
    out: Path,
    start: str | Path | None,
    recipe: loop.Recipe,
    minutes: float | None,
    steps: int | None,
    resume: bool,
    seed: int,
) -> tuple[Path, EmojiFlow, loop.Recipe]:
    """The folder of a run, the model of the weights it starts from, and its recipe with their record."""
    recipe = replace(recipe, minutes=minutes or recipe.minutes, steps=steps or recipe.steps)
    out, path = Path(out), Path(start or DEFAULT_WEIGHTS)
    out.mkdir(parents=True, exist_ok=True)
    if resume and not (out / "last.pt").exists():
        raise FileNotFoundError(f"resume needs {out / 'last.pt'}, which is not there; start without resume")
    torch.manual_seed(seed)
    model = load_emoji(path).requires_grad_(True).train()
    return out, model, replace(recipe, seed=seed, started_from=read_record(path)["training"])


def train(
    out: str | Path,
    pairs: str | Path,
    *,
    start: str | Path | None = None,
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
    """Trains on pairs; returns the weights `out/reflow.safetensors`, beside the checkpoint `out/last.pt`.

    Args:
        pairs: a folder of `make_pairs`.
        start: weights to start from, best those of the teacher; None: the package's own.
        recipe: `minutes` or `steps` instead of its own may be given beside it.
        leg: minutes of this call; `resume` goes on to the same bits.
        options: of `ReflowTask`.

    Raises:
        ValueError: a folder without pairs, or pictures of another size than the model's.
        FileNotFoundError: `resume` without a checkpoint.
    """
    out, model, recipe = begin(out, start, recipe, minutes, steps, resume, seed)
    task = ReflowTask(fitting(pairs, model), model.config.table, recipe.batch, seed, **options)
    state = loop.new_state(model, recipe, torch.device(device))
    if resume:
        loop.restore(state, out / "last.pt")
    last = loop.run(state, task, out, leg=leg, compile=compile, workers=workers)
    return loop.export(last, out / "reflow.safetensors", guidance=1.0, shift=1.0)


def fitting(folder: str | Path, model: EmojiFlow) -> Pairs:
    """The pairs of a folder, which must have the model's size."""
    pairs = Pairs(folder)
    if pairs.record["size"] != model.config.size:
        raise ValueError(f"pairs of {model.config.size} pixels are required, got {pairs.record['size']}")
    return pairs
