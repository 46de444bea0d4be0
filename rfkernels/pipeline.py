"""From prompts to pictures: text, noise, guided sampling and a finite result, in one call."""

import hashlib
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfkernels import loras, samplers
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.prompts import clean, spelled
from rfkernels.settings import (
    InputError,
    Settings,
    require,
    resolve_device,
    resolve_dtype,
    sampling_of,
    strengths_of,
)

if TYPE_CHECKING:
    from PIL import Image

    from rfkernels.models.emoji import EmojiFlow

__all__ = [
    "InputError",
    "Pipeline",
    "Result",
    "ResultError",
    "Settings",
    "generate",
    "resolve_device",
    "resolve_dtype",
]

MODELS = ("emoji",)
_CHUNK_PIXELS = 64 * 1024  # of the pictures sampled together: bounds memory, keeps matrix products large

ProgressCallback = Callable[[int, int], None]
StepCallback = Callable[[samplers.StepInfo], bool | None]
Loras = str | Sequence[str] | Mapping[str, float] | None


class ResultError(RuntimeError):
    """The sampled pictures hold values that are not finite."""


@dataclass(frozen=True)
class Result:
    """Pictures with what is needed to make them again.

    `images` are PIL images (RGBA), `seeds` theirs; `parameters` can be written as JSON; `seconds` has "load",
    "sample" and "total"; `warnings` are lines for people.
    """

    images: tuple["Image.Image", ...]
    seeds: tuple[int, ...]
    parameters: dict[str, Any]
    seconds: dict[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """A loaded model that turns prompts into pictures.

    Threads may share it: the model is never changed. LoRAs stand on a copy of its modules that shares the
    weights; calls with LoRAs take turns on it, and may run beside calls without.
    """

    name: str
    model: "EmojiFlow"
    device: torch.device
    dtype: torch.dtype
    digest: str  # sha256 of the weights file
    load_seconds: float
    few: Path | None = None  # the adapter that is used for few steps, if there is one for these weights
    rack: loras.Rack = field(default_factory=loras.Rack, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        name: str = "emoji",
        *,
        device: str = "auto",
        dtype: str = "auto",
        weights: str | Path | None = None,
        lora: Loras = None,
    ) -> "Pipeline":
        """The pipeline of model `name`, ready on `device`.

        `device`: "auto" (a GPU that the kernels were built for, else the CPU), "cpu", "cuda", "cuda:1".
        `dtype` of the model: "auto" (bfloat16 where it is fast, else float32), "float32", "bfloat16",
        "float16"; the state of the sampler is always float32. `weights`: a file; None for the package's own.
        `lora`: adapters to load now, by name or file, so that no call has to; a call says which are on.
        Raises `InputError`, and `rfkernels.models.checkpoint.WeightsError` for a missing or damaged file.
        """
        start = time.perf_counter()
        require(name in MODELS, f"unknown model {name!r}: use one of {', '.join(MODELS)}")
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        from rfkernels.models import emoji

        model = emoji.load_emoji(weights, device=where, dtype=kind)
        digest = hashlib.sha256(Path(weights or emoji.DEFAULT_WEIGHTS).read_bytes()).hexdigest()
        guided = model.config.guidance != 1  # else the weights need no guidance, and no other adapter for it
        few = loras.FEW if weights is None and guided and loras.FEW.is_file() else None
        rack = loras.Rack()
        rack.load(model, [loras.find(adapter) for adapter, _ in strengths_of(lora)])
        return cls(name, model, where, kind, digest, time.perf_counter() - start, few, rack)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        steps: int | None = None,
        method: str | None = None,
        guidance: float | None = None,
        seed: int = 0,
        schedule: str | None = None,
        shift: float | None = None,
        style: str | None = None,
        lora: Loras = None,
        few: bool | None = None,
        size: int | None = None,
        progress: ProgressCallback | None = None,
        callback: StepCallback | None = None,
    ) -> Result:
        """`n` pictures of every prompt, by `steps` steps of `method` along sigma = 1 -> 0.

        None for steps, method, guidance, schedule and shift is what the weights were made for; the values are
        in `Result.parameters`. Emoji in a prompt are read as the words of their names. Picture i is drawn
        from noise of seed `seed + i` (-1: a random one), so it can be made again alone.

        `guidance` is the scale of classifier-free guidance; 1 switches it off and halves the work. `style`:
        one of the model's style words. `size`: None, or the model's own in pixels.
        `lora`: adapters by name or file, or their strengths by these: {"pixel": 1.0, "glow": 0.5}. `few`: the
        adapter for few steps; None: where there is one for these weights and at most 2 steps are made.
        `progress(done, total)` counts evaluations of the model (adaptive methods do not know the total),
        `callback` sees each step of the sampler.
        Raises `InputError`, and `ResultError` if the result is not finite.
        """
        start = time.perf_counter()
        texts, warnings = clean([prompts] if isinstance(prompts, str) else list(prompts))
        seed = secrets.randbelow(2**32) if seed == -1 else seed
        config = self.model.config
        steps = config.steps if steps is None else steps
        few = self.few is not None and steps <= loras.FEW_STEPS if few is None else few
        require(not few or self.few is not None, "there is no adapter for few steps for these weights")
        sampling = sampling_of(
            config, few=few, steps=steps, method=method, guidance=guidance, schedule=schedule, shift=shift
        )
        settings = Settings(tuple(texts), n, seed=seed, style=style, lora=strengths_of(lora), **sampling)
        self._check(style, size)
        adapters = self._adapters(settings)

        sigmas = self._sigmas(settings)
        drawn = settings.images
        per_chunk = max(1, _CHUNK_PIXELS // config.size**2)
        chunks = [drawn[first : first + per_chunk] for first in range(0, len(drawn), per_chunk)]
        images: list[Image.Image] = []
        entry = samplers.METHODS[settings.method]
        options = entry.network_options
        plan = None if entry.adaptive else samplers.plan_for(settings.method, sigmas, **options)
        evaluations = plan.evaluations if plan else 0
        tick = _ticker(progress, len(chunks) * evaluations)
        with self.rack.on(self.model, dict(adapters.values())) as model:
            for chunk in chunks:
                images += self._sample(model, chunk, settings, sigmas, tick, callback)

        seconds = time.perf_counter() - start
        return Result(
            images=tuple(images),
            seeds=tuple(seed for _, seed in drawn),
            parameters=self._parameters(settings, adapters),
            seconds={"load": self.load_seconds, "sample": seconds, "total": self.load_seconds + seconds},
            warnings=(*warnings, *self._word_warnings(texts)),
        )

    @torch.inference_mode()
    def _sample(
        self,
        model: "EmojiFlow",
        drawn: Sequence[tuple[str, int]],
        settings: Settings,
        sigmas: Tensor,
        tick: Callable[[], None],
        callback: StepCallback | None,
    ) -> list["Image.Image"]:
        """The pictures of one chunk of (prompt, seed), sampled together."""
        count, config = len(drawn), model.config
        prompts = [_captioned(prompt, settings.style) for prompt, _ in drawn]
        guided = settings.guidance != 1 and any(prompts)
        text = model.encode([""] * count + prompts if guided else prompts)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            tick()
            return model.guided(x, sigma, text) if guided else model(x, sigma, text)

        keys = noise_keys([seed for _, seed in drawn], count, device=self.device)
        noise = philox_normal((count, config.channels, config.size, config.size), keys)
        guidance = settings.guidance if guided else None
        x = samplers.sample(
            velocity,
            noise,
            sigmas,
            method=settings.method,
            guidance=guidance,
            callback=callback,
            seeds=[seed for _, seed in drawn],
            options=samplers.METHODS[settings.method].network_options,
        )
        if not bool(torch.isfinite(x).all()):
            raise ResultError(
                "the pictures hold values that are not finite: use float32, or a lower guidance"
            )
        from rfkernels.models.emoji import to_images

        return to_images(x)

    def _check(self, style: str | None, size: int | None) -> None:
        config = self.model.config
        known = f"{config.size} (enlarge the picture with --scale)"
        require(size in (None, config.size), f"the model {self.name} does not know size {size}: use {known}")
        known = ", ".join(config.styles)
        require(style is None or style in config.styles, f"unknown style {style!r}: use one of {known}")

    def _adapters(self, settings: Settings) -> dict[str, tuple[Path, float]]:
        """File and strength of the adapters of `settings`, by name."""
        named = {name: (loras.find(name), strength) for name, strength in settings.lora if strength}
        return {**named, "few": (self.few, 1.0)} if settings.few else named

    def _sigmas(self, settings: Settings) -> Tensor:
        tokens = self.model.grid**2 if settings.schedule == "dynamic" else None
        return samplers.schedule(settings.schedule, settings.steps, shift=settings.shift, tokens=tokens)

    def _word_warnings(self, prompts: Sequence[str]) -> list[str]:
        text = self.model.encode([spelled(prompt) for prompt in prompts])
        unknown = list(dict.fromkeys(word for row in text.unknown for word in row))
        warnings = []
        if unknown:
            named = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
            warnings.append(f"words not seen in training (the picture may be vague): {named}")
        longest = max(map(len, text.truncated))
        if longest:
            warnings.append(f"prompt cut: its last {longest} words were not read")
        return warnings

    def _parameters(self, settings: Settings, adapters: dict[str, tuple[Path, float]]) -> dict[str, Any]:
        from rfkernels import __version__

        return {
            "version": __version__,
            "model": self.name,
            "weights": f"sha256:{self.digest}",
            **asdict(settings),
            "prompts": list(settings.prompts),
            "lora": dict(settings.lora),
            "lora_files": {name: f"sha256:{self.rack.digest(f)}" for name, (f, _) in adapters.items()},
            "size": self.model.config.size,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def generate(
    prompts: str | Sequence[str],
    *,
    n: int = 1,
    steps: int | None = None,
    method: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    schedule: str | None = None,
    shift: float | None = None,
    style: str | None = None,
    lora: Loras = None,
    few: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    weights: str | Path | None = None,
) -> list["Image.Image"]:
    """`n` pictures (PIL, RGBA) of every prompt from the embedded model; see `Pipeline.__call__`.

    The model is loaded for this call; `Pipeline.load` keeps it for many.
    """
    pipe = Pipeline.load("emoji", device=device, dtype=dtype, weights=weights)
    result = pipe(
        prompts,
        n=n,
        steps=steps,
        method=method,
        guidance=guidance,
        seed=seed,
        schedule=schedule,
        shift=shift,
        style=style,
        lora=lora,
        few=few,
    )
    return list(result.images)


def _captioned(prompt: str, style: str | None) -> str:
    """The caption of `prompt` in `style`, in a word order of the training captions."""
    return f"{style or ''} {spelled(prompt)}".strip()


def _ticker(progress: ProgressCallback | None, total: int) -> Callable[[], None]:
    """A function that reports one more evaluation each time it is called; the total grows with need."""
    count = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            done = next(count)
            progress(done, max(done, total))

    return tick
