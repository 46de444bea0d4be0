"""What determines a picture apart from the model, all checked: prompts, sampling, adapters, device, dtype."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rfkernels import diagnosis, samplers

if TYPE_CHECKING:
    from rfkernels.models.emoji import EmojiConfig

__all__ = ["InputError", "Settings", "require", "resolve_device", "resolve_dtype", "sampling_of"]

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
_MAX_STRENGTH = 10.0  # of an adapter; beyond it nothing but noise comes


class InputError(ValueError):
    """An argument cannot be used; the message is one line with what was required, what came, what to do."""


@dataclass(frozen=True)
class Settings:
    """What determines the pictures, apart from the model: checked when it is made (`InputError`).

    `prompts` are drawn `n` times each, one after the other; picture i of the whole uses seed `seed + i`.
    `lora` holds (name or file, strength) of adapters, `few` says whether the few-step adapter is on.
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
    lora: tuple[tuple[str, float], ...] = ()
    few: bool = False

    def __post_init__(self) -> None:
        require(len(self.prompts) >= 1, "at least one prompt is required, got none")
        require(_is_int(self.n) and self.n >= 1, f"n must be a whole number of at least 1, got {self.n}")
        count = len(self.prompts) * self.n
        require(
            count <= _MAX_IMAGES, f"{count} pictures were asked for: use at most {_MAX_IMAGES} in one call"
        )
        in_range = _is_int(self.steps) and 1 <= self.steps <= _MAX_STEPS
        require(in_range, f"steps must be a whole number from 1 to {_MAX_STEPS}, got {self.steps}")
        known = ", ".join(samplers.METHODS)
        require(self.method in samplers.METHODS, f"unknown method {self.method!r}: use one of {known}")
        require(math.isfinite(self.guidance), f"guidance must be a finite number, got {self.guidance}: try 3")
        in_range = _is_int(self.seed) and 0 <= self.seed < 2**63 - count
        require(in_range, f"seed must be a whole number from 0 to 2^63 (-1: random), got {self.seed}")
        known = ", ".join(samplers.SCHEDULES)
        require(
            self.schedule in samplers.SCHEDULES, f"unknown schedule {self.schedule!r}: use one of {known}"
        )
        positive = self.shift is None or (math.isfinite(self.shift) and self.shift > 0)
        require(positive, f"shift must be a positive number, got {self.shift}")
        fits = (self.schedule == "shift") == (self.shift is not None)
        require(
            fits, f"schedule shift and a shift (such as 3) go together, got {self.schedule}, {self.shift}"
        )
        for name, strength in self.lora:
            require(
                math.isfinite(strength) and abs(strength) <= _MAX_STRENGTH,
                f"the strength of a LoRA must be from -{_MAX_STRENGTH:g} to {_MAX_STRENGTH:g}, "
                f"got {strength:g} for {name}",
            )

    @property
    def images(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture."""
        drawn = [prompt for prompt in self.prompts for _ in range(self.n)]
        return [(prompt, self.seed + index) for index, prompt in enumerate(drawn)]


def sampling_of(
    config: "EmojiConfig",
    *,
    few: bool,
    steps: int,
    method: str | None,
    guidance: float | None,
    schedule: str | None,
    shift: float | None,
) -> dict[str, object]:
    """The sampling settings with None replaced by the model's own; with `few` on by those it was made for.

    A shift other than 1 means the schedule "shift", and so does a shift that is given without a schedule.
    """
    if shift is None and schedule in (None, "shift") and config.shift != 1 and not few:
        shift = config.shift
    if schedule is None:
        schedule = "linear" if shift is None else "shift"
    own_method, own_guidance = ("euler", 1.0) if few else (config.method, config.guidance)
    return {
        "steps": steps,
        "method": own_method if method is None else method,
        "guidance": float(own_guidance if guidance is None else guidance),
        "schedule": schedule,
        "shift": shift,
        "few": few,
    }


def strengths_of(lora: str | Sequence[str] | Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    """(name or file, strength) of adapters given by name, as names, or with strengths."""
    if lora is None:
        return ()
    if isinstance(lora, str):
        return ((lora, 1.0),)
    if isinstance(lora, Mapping):
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in lora.values())
        require(numbers, f"the strength of a LoRA must be a number, got {dict(lora)}")
        return tuple((str(name), float(strength)) for name, strength in lora.items())
    return tuple((str(name), 1.0) for name in dict.fromkeys(lora))


def resolve_device(device: str) -> torch.device:
    """The device that `device` names; "auto": the first GPU that the kernels were built for, else the CPU."""
    if device == "auto":
        return torch.device("cuda:0" if _usable_gpu() else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N") from error
    require(
        where.type in ("cpu", "cuda"), f"device {device!r} is not supported: use auto, cpu, cuda or cuda:N"
    )
    if where.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = where.index or 0
    require(index < count, f"device {device!r} is not here (torch sees {count} GPUs): use cpu or auto")
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
    require(dtype in DTYPES, f"unknown dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    return DTYPES[dtype]


def _usable_gpu() -> bool:
    if not torch.cuda.is_available():
        return False
    from rfkernels._C import build_info

    return (
        diagnosis.cuda_coverage(torch.cuda.get_device_capability(0), build_info()["cuda_archs"]) is not None
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def require(condition: bool, message: str) -> None:
    """Raises `InputError` with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
