"""Training of the embedded text-to-emoji model: the flow task, its presets, and the run that joins them."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rfkernels import objectives, ops
from rfkernels.models import text as text_module
from rfkernels.models.checkpoint import read_record
from rfkernels.models.emoji import SIGMA_MIN, EmojiConfig, EmojiFlow, load_emoji
from rfkernels.train import captions, loop, sheet
from rfkernels.train.enlarge import enlarge
from rfkernels.train.glyphs import Bank, open_bank
from rfkernels.train.loop import Recipe, State, export
from rfkernels.train.render import Packed, Renderer
from rfkernels.train.scenes import Scene, SceneSampler, evaluation_scenes

__all__ = ["PRESETS", "FlowTask", "Levels", "Preset", "Recipe", "export", "train"]

STYLES = ("noto", "blob", "flat", "fluent", "3d", "fx")
CHECKED = ("tint", "count", "relation", "accessory")  # kinds of held-out scenes whose error is logged


@dataclass(frozen=True)
class Preset:
    """The shape of a model and the recipe that it is trained with."""

    config: EmojiConfig
    recipe: Recipe


_SAMPLING = {"styles": STYLES, "size": 128, "shift": 2.0}
PRESETS = {
    # 64 tokens: what two CPU cores train in an hour, from weights for 64 pixels.
    "small": Preset(EmojiConfig(patch=16, **_SAMPLING), Recipe()),
    # 256 tokens, 15 million parameters: for a GPU.
    "full": Preset(
        EmojiConfig(patch=8, width=320, heads=5, double_blocks=2, single_blocks=6, **_SAMPLING),
        Recipe(minutes=18, batch=512, warmup=200, ema=0.999, muon_lr=0.02, adam_lr=2e-3, decay_from=0.3),
    ),
}


@dataclass(frozen=True)
class Levels:
    """Noise levels: logit-normal, shifted towards noise; the share `uniform` of them uniform."""

    shift: float = 4.0
    uniform: float = 0.1

    def sample(self, keys: Tensor) -> Tensor:
        """float32[batch] for the keys int64[batch, 3]."""
        bell = objectives.Shifted(objectives.LogitNormal(), self.shift).sample(keys)
        flat, chosen = objectives.Uniform().sample(keys, (2,)).unbind(1)
        return torch.where(chosen < self.uniform, flat, bell).clamp(1e-3, 1.0).float()


def velocity_error(
    model: EmojiFlow, x: Tensor, x0: Tensor, sigma: Tensor, text: tuple[Tensor, ...]
) -> Tensor:
    """The mean squared velocity error of a picture prediction: |x0' - x0|^2 / max(sigma, 0.05)^2."""
    error = model.predict(x, sigma, *text).float() - x0
    return (error / sigma.clamp(min=SIGMA_MIN)[:, None, None, None]).square().mean()


class FlowTask(loop.Task):
    """Rectified flow on scenes made meanwhile: x_sigma = (1 - sigma) x0 + sigma eps (Liu et al., 2022)."""

    def __init__(self, bank: Bank, config: EmojiConfig, recipe: Recipe, levels: Levels, device: torch.device):
        self.bank, self.config, self.recipe, self.levels = bank, config, recipe, levels
        self.sampler = SceneSampler(bank, recipe.seed)
        self.renderer = Renderer(bank, device, config.size)
        self.settings = {"shift": levels.shift, "uniform": levels.uniform}

    def inputs(self, step: int) -> tuple:
        return self._arrays(self.sampler.scenes(step, self.recipe.batch), step)

    def _arrays(self, scenes: list[Scene], step: int) -> tuple:
        """Keys and words of the scenes, then what their pictures are made of."""
        keys = ops.noise_keys(self.recipe.seed, len(scenes), step=step).numpy()
        lines = [scene.caption for scene in scenes]
        words = text_module.tokenize(lines, self.config.table, length=text_module.MAX_WORDS)
        return keys, *words, self.renderer.pack(scenes)

    def prepare(self, keys: Tensor, rows: Tensor, weights: Tensor, mask: Tensor, packed: Packed):
        x0 = self.renderer.draw(packed)
        sigma = self.levels.sample(keys)
        return ops.renoise(x0, 1 - sigma, sigma, keys=keys), x0, sigma, rows, weights, mask

    def loss(self, model: EmojiFlow, x: Tensor, x0: Tensor, sigma: Tensor, *text: Tensor) -> Tensor:
        return velocity_error(model, x, x0, sigma, text)

    @torch.no_grad()
    def report(self, state: State, out: Path) -> dict[str, float]:
        """Errors of the averaged model on fixed scenes, and a sheet of samples."""
        groups, errors = {"seen": SceneSampler(self.bank, 1).scenes(0, 64)}, {}
        for kind in CHECKED:
            with suppress(ValueError):  # a small bank may have no held-out scene of the kind
                groups[kind] = evaluation_scenes(self.bank, kind, 32, seed=1)
        for name, scenes in groups.items():
            inputs = self.prepare(*loop.to_device(state.device, self._arrays(scenes, 999_983)))
            with torch.autocast(state.device.type, torch.bfloat16):
                errors[name] = self.loss(state.ema, *inputs).item()
        sheet.write(state.ema, out / f"sheet_{round(state.seconds / 60):03d}.png")
        return errors


def train(
    out: Path,
    minutes: float | None = None,
    data: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    *,
    leg: float | None = None,
    start: Path | None = None,
    preset: str = "small",
    config: EmojiConfig | None = None,
    recipe: Recipe | None = None,
    levels: Levels | None = None,
    bank: Bank | None = None,
    compile: bool = True,
    report_minutes: float = 5.0,
    workers: int = 0,
    **changes,
) -> Path:
    """Trains the model and returns its last checkpoint, `out/last.pt`; `export` makes a weights file of it.

    The learning rate follows the time spent, so that the run ends after `minutes` however busy the machine
    is. A checkpoint and a sheet of samples are written every few minutes; SIGTERM saves and ends; `resume`
    goes on from `out/last.pt` with the same order of scenes, noise, averages and optimizer states.

    Args:
        out: folder of checkpoints, sheets and `log.jsonl`.
        minutes: how long to train, over all legs; None: the preset's.
        data: folder of the data or its `.pack` file (see `rfkernels.train.glyphs.open_bank`).
        resume: go on from `out/last.pt`, whole or compact.
        device: "cpu" or a CUDA device.
        leg: minutes of this part; the checkpoint goes on to the rest.
        start: a weights file to start from, instead of random numbers. A model of smaller pictures with the
            same number of tokens is enlarged; else it decides the model's shape.
        preset: a name of PRESETS. config, recipe, levels: instead of its own.
        bank: pictures already in memory, instead of `data`.
        compile: compile the step; off for tiny runs.
        report_minutes: time between checkpoints, sheets and errors.
        workers: processes that make scenes ahead.
        changes: settings of the recipe, by name: `steps=100, seed=3`.

    Raises:
        DataError: the data packages are missing and cannot be fetched.
        FileNotFoundError: `resume` without a checkpoint.
        WeightsError: `start` is not a weights file of this model.
        ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
    out, where = Path(out), torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    last = out / "last.pt"
    if resume and not last.exists():
        raise FileNotFoundError(f"resume needs {last}, which is not there; start without resume")
    recipe = replace(recipe or PRESETS[preset].recipe, **changes)
    recipe = recipe if minutes is None else replace(recipe, minutes=minutes)
    torch.manual_seed(recipe.seed)
    if resume:
        model = EmojiFlow(loop.read_checkpoint(last)[0])
    elif start is not None:
        model = started(load_emoji(start), config or PRESETS[preset].config)
        recipe = replace(recipe, started_from=read_record(start)["training"])
    else:
        model = EmojiFlow(config or PRESETS[preset].config)
    bank = bank or open_bank(data, size=128)
    model.known_words = torch.from_numpy(captions.known_words(bank))
    state = loop.new_state(model, recipe, where)
    if resume:
        loop.restore(state, last)
    task = FlowTask(bank, state.model.config, state.recipe, levels or Levels(), where)
    return loop.run(
        state, task, out, leg=leg, compile=compile, report_minutes=report_minutes, workers=workers
    )


def started(model: EmojiFlow, wanted: EmojiConfig) -> EmojiFlow:
    """`model` to train on, its pictures enlarged to those of `wanted` where only their size differs."""
    has = model.config
    factor = wanted.size // has.size
    if factor > 1 and (has.size * factor, has.patch * factor) == (wanted.size, wanted.patch):
        model = enlarge(model, factor)
    sampling = {name: getattr(wanted, name) for name in ("styles", "steps", "guidance", "shift", "method")}
    model.config = replace(model.config, **sampling)
    return model.requires_grad_(True).train()
