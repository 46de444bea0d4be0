"""From prompts to pictures: text, noise, guided sampling and a finite result, in one call."""

import hashlib
import itertools
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfkernels import diagnosis, samplers
from rfkernels.ops import noise_keys, philox_normal

if TYPE_CHECKING:
    from PIL import Image

    from rfkernels.models.emoji import EmojiFlow

__all__ = ["InputError", "Pipeline", "Result", "ResultError", "Settings", "generate"]

MODELS = ("emoji",)
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

_MAX_STEPS = 1000
_MAX_IMAGES = 4096
_MAX_PROMPT = 1000  # characters; the text encoder reads far fewer words than these hold
_CHUNK_PIXELS = 64 * 1024  # of the pictures sampled together: bounds memory, keeps matrix products large

ProgressCallback = Callable[[int, int], None]
StepCallback = Callable[[samplers.StepInfo], bool | None]


class InputError(ValueError):
    """An argument cannot be used; the message is one line with what was required, what came, what to do."""


class ResultError(RuntimeError):
    """The sampled pictures hold values that are not finite."""


@dataclass(frozen=True)
class Settings:
    """What determines the pictures, apart from the model: checked when it is made (`InputError`).

    `prompts` are drawn `n` times each, one after the other; picture i of the whole uses seed `seed + i`.
    """

    prompts: tuple[str, ...]
    n: int = 1
    steps: int = 8
    method: str = "ab2"
    guidance: float = 3.0
    seed: int = 0
    schedule: str = "linear"
    shift: float | None = None
    style: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.prompts) >= 1, "at least one prompt is required, got none")
        _require(_is_int(self.n) and self.n >= 1, f"n must be a whole number of at least 1, got {self.n}")
        count = len(self.prompts) * self.n
        _require(
            count <= _MAX_IMAGES, f"{count} pictures were asked for: use at most {_MAX_IMAGES} in one call"
        )
        in_range = _is_int(self.steps) and 1 <= self.steps <= _MAX_STEPS
        _require(in_range, f"steps must be a whole number from 1 to {_MAX_STEPS}, got {self.steps}")
        known = ", ".join(samplers.METHODS)
        _require(self.method in samplers.METHODS, f"unknown method {self.method!r}: use one of {known}")
        _require(
            math.isfinite(self.guidance), f"guidance must be a finite number, got {self.guidance}: try 3"
        )
        in_range = _is_int(self.seed) and 0 <= self.seed < 2**63 - count
        _require(in_range, f"seed must be a whole number from 0 to 2^63 (-1: random), got {self.seed}")
        known = ", ".join(samplers.SCHEDULES)
        _require(
            self.schedule in samplers.SCHEDULES, f"unknown schedule {self.schedule!r}: use one of {known}"
        )
        positive = self.shift is None or (math.isfinite(self.shift) and self.shift > 0)
        _require(positive, f"shift must be a positive number, got {self.shift}")
        fits = (self.schedule == "shift") == (self.shift is not None)
        _require(
            fits, f"schedule shift and a shift (such as 3) go together, got {self.schedule}, {self.shift}"
        )

    @property
    def images(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture."""
        drawn = [prompt for prompt in self.prompts for _ in range(self.n)]
        return [(prompt, self.seed + index) for index, prompt in enumerate(drawn)]


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
    """A loaded model that turns prompts into pictures. It is never changed, so threads may share it."""

    name: str
    model: "EmojiFlow"
    device: torch.device
    dtype: torch.dtype
    digest: str  # sha256 of the weights file
    load_seconds: float

    @classmethod
    def load(
        cls,
        name: str = "emoji",
        *,
        device: str = "auto",
        dtype: str = "auto",
        weights: str | Path | None = None,
    ) -> "Pipeline":
        """The pipeline of model `name`, ready on `device`.

        `device`: "auto" (a GPU that the kernels were built for, else the CPU), "cpu", "cuda", "cuda:1".
        `dtype` of the model: "auto" (bfloat16 where it is fast, else float32), "float32", "bfloat16",
        "float16"; the state of the sampler is always float32. `weights`: a file; None for the package's own.
        Raises `InputError`, and `rfkernels.models.checkpoint.WeightsError` for a missing or damaged file.
        """
        start = time.perf_counter()
        _require(name in MODELS, f"unknown model {name!r}: use one of {', '.join(MODELS)}")
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        from rfkernels.models import emoji

        model = emoji.load_emoji(weights, device=where, dtype=kind)
        digest = hashlib.sha256(Path(weights or emoji.DEFAULT_WEIGHTS).read_bytes()).hexdigest()
        return cls(name, model, where, kind, digest, time.perf_counter() - start)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        steps: int = 8,
        method: str = "ab2",
        guidance: float = 3.0,
        seed: int = 0,
        schedule: str = "linear",
        shift: float | None = None,
        style: str | None = None,
        size: int | None = None,
        progress: ProgressCallback | None = None,
        callback: StepCallback | None = None,
    ) -> Result:
        """`n` pictures of every prompt, by `steps` steps of `method` along sigma = 1 -> 0.

        Picture i is drawn from noise of seed `seed + i` (-1: a random seed, see `Result.parameters`), so it
        can be made again alone. `guidance` is the scale of classifier-free guidance; 1 switches it off and
        halves the work. `style`: one of the model's style words. `size`: None, or the model's own in pixels.
        `progress(done, total)` counts evaluations of the model (adaptive methods do not know the total),
        `callback` sees each step of the sampler.
        Raises `InputError`, and `ResultError` if the result is not finite.
        """
        start = time.perf_counter()
        texts, warnings = _clean([prompts] if isinstance(prompts, str) else list(prompts))
        seed = secrets.randbelow(2**32) if seed == -1 else seed
        settings = Settings(tuple(texts), n, steps, method, float(guidance), seed, schedule, shift, style)
        self._check(style, size)

        sigmas = self._sigmas(settings)
        drawn = settings.images
        per_chunk = max(1, _CHUNK_PIXELS // self.model.config.size**2)
        chunks = [drawn[first : first + per_chunk] for first in range(0, len(drawn), per_chunk)]
        images: list[Image.Image] = []
        entry = samplers.METHODS[method]
        options = entry.network_options
        evaluations = 0 if entry.adaptive else samplers.plan_for(method, sigmas, **options).evaluations
        tick = _ticker(progress, len(chunks) * evaluations)
        for chunk in chunks:
            images += self._sample(chunk, settings, sigmas, tick, callback)

        seconds = time.perf_counter() - start
        return Result(
            images=tuple(images),
            seeds=tuple(seed for _, seed in drawn),
            parameters=self._parameters(settings),
            seconds={"load": self.load_seconds, "sample": seconds, "total": self.load_seconds + seconds},
            warnings=(*warnings, *self._word_warnings(texts)),
        )

    @torch.inference_mode()
    def _sample(
        self,
        drawn: Sequence[tuple[str, int]],
        settings: Settings,
        sigmas: Tensor,
        tick: Callable[[], None],
        callback: StepCallback | None,
    ) -> list["Image.Image"]:
        """The pictures of one chunk of (prompt, seed), sampled together."""
        count, config = len(drawn), self.model.config
        prompts = [_captioned(prompt, settings.style) for prompt, _ in drawn]
        guided = settings.guidance != 1 and any(prompts)
        text = self.model.encode([""] * count + prompts if guided else prompts)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            tick()
            return self.model.guided(x, sigma, text) if guided else self.model(x, sigma, text)

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
        _require(size in (None, config.size), f"the model {self.name} does not know size {size}: use {known}")
        known = ", ".join(config.styles)
        _require(style is None or style in config.styles, f"unknown style {style!r}: use one of {known}")

    def _sigmas(self, settings: Settings) -> Tensor:
        tokens = self.model.grid**2 if settings.schedule == "dynamic" else None
        return samplers.schedule(settings.schedule, settings.steps, shift=settings.shift, tokens=tokens)

    def _word_warnings(self, prompts: Sequence[str]) -> list[str]:
        text = self.model.encode(list(prompts))
        unknown = list(dict.fromkeys(word for row in text.unknown for word in row))
        warnings = []
        if unknown:
            named = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
            warnings.append(f"words not seen in training (the picture may be vague): {named}")
        longest = max(map(len, text.truncated))
        if longest:
            warnings.append(f"prompt cut: its last {longest} words were not read")
        return warnings

    def _parameters(self, settings: Settings) -> dict[str, Any]:
        from rfkernels import __version__

        return {
            "version": __version__,
            "model": self.name,
            "weights": f"sha256:{self.digest}",
            **asdict(settings),
            "prompts": list(settings.prompts),
            "size": self.model.config.size,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def generate(
    prompts: str | Sequence[str],
    *,
    n: int = 1,
    steps: int = 8,
    method: str = "ab2",
    guidance: float = 3.0,
    seed: int = 0,
    schedule: str = "linear",
    shift: float | None = None,
    style: str | None = None,
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
    )
    return list(result.images)


def resolve_device(device: str) -> torch.device:
    """The device that `device` names; "auto": the first GPU that the kernels were built for, else the CPU."""
    if device == "auto":
        return torch.device("cuda:0" if _usable_gpu() else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N") from error
    _require(
        where.type in ("cpu", "cuda"), f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N"
    )
    if where.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = where.index or 0
    _require(index < count, f"device {device!r} is not here (torch sees {count} GPUs): use cpu or auto")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype that `dtype` names; "auto": bfloat16 where `device` computes it fast, else float32."""
    if dtype == "auto":
        fast = (
            diagnosis.has_fast_bf16()
            if device.type == "cpu"
            else torch.cuda.get_device_capability(device) >= (8, 0)
        )
        return torch.bfloat16 if fast else torch.float32
    _require(dtype in DTYPES, f"unknown dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    return DTYPES[dtype]


def _usable_gpu() -> bool:
    if not torch.cuda.is_available():
        return False
    from rfkernels._C import build_info

    return (
        diagnosis.cuda_coverage(torch.cuda.get_device_capability(0), build_info()["cuda_archs"]) is not None
    )


def _clean(prompts: list[str]) -> tuple[list[str], list[str]]:
    """The prompts as the model takes them, and what there is to say about them."""
    texts, warnings = [], []
    for prompt in prompts:
        _require(isinstance(prompt, str), f"a prompt must be text, got {type(prompt).__name__}")
        text = " ".join(prompt.encode("utf-8", "replace").decode("utf-8").split())
        if len(text) > _MAX_PROMPT:
            warnings.append(f"prompt cut to its first {_MAX_PROMPT} of {len(text)} characters")
            text = text[:_MAX_PROMPT]
        if not text:
            warnings.append("empty prompt: the picture is unconditional, anything may come")
        texts.append(text)
    return texts, list(dict.fromkeys(warnings))


def _captioned(prompt: str, style: str | None) -> str:
    """The caption of `prompt` in `style`, in a word order of the training captions."""
    return f"{style} {prompt}".strip() if style else prompt


def _ticker(progress: ProgressCallback | None, total: int) -> Callable[[], None]:
    """A function that reports one more evaluation each time it is called; the total grows with need."""
    count = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            done = next(count)
            progress(done, max(done, total))

    return tick


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
