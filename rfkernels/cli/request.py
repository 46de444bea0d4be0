"""What a picture is made with: flags over the parameters of an earlier picture over defaults."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rfkernels import png
from rfkernels.cli.console import UserError
from rfkernels.cli.sheet import RESAMPLING

__all__ = ["Request", "settle"]

_MAX_SCALE = 64


@dataclass(frozen=True)
class Request:
    """One run of `rfkernels generate`. The fields are the keys of the parameters stored in a picture."""

    prompts: list[str]
    model: str = "emoji"
    n: int = 1
    steps: int | None = None
    method: str | None = None
    guidance: float | None = None
    seed: int = -1
    schedule: str | None = None
    shift: float | None = None
    style: str | None = None
    lora: dict[str, float] = field(default_factory=dict)
    few: bool | None = None
    size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    scale: int | None = None
    resample: str = "lanczos"
    weights: str | None = None  # of the earlier picture that is made again: sha256 of its weights,
    lora_files: dict[str, str] = field(default_factory=dict)  # those of its adapters by file,
    made_on: str | None = None  # and its device


def settle(flags: Mapping[str, Any], source: Path | None) -> Request:
    """The request that `flags` (None, no prompts: not given) and the parameters in `source` make together.

    Seed -1 becomes a random one here. Raises `UserError` for what makes no request, `PngError` for a `source`
    without parameters.
    """
    stored = _stored(source) if source is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    prompts = list(given.pop("prompts", []))
    if prompts:
        given["prompts"] = prompts
    if "shift" in given:
        given.setdefault("schedule", "shift")
    elif "schedule" in given:
        stored.pop("shift", None)
    if "steps" in given:
        stored.pop("few", None)  # other steps, another choice of the adapter for few
    adapters = dict(map(_named_strength, given.pop("lora", [])))
    if adapters:
        given["lora"] = adapters
    merged = {**stored, **given}
    if not merged.get("prompts"):
        raise UserError('no prompt was given: try rfkernels generate "a red heart"')
    request = Request(**merged)
    if request.resample not in RESAMPLING:
        raise UserError(f"unknown resampling {request.resample!r}: use one of {', '.join(RESAMPLING)}")
    if request.scale is not None and not 1 <= request.scale <= _MAX_SCALE:
        raise UserError(f"scale must be from 1 to {_MAX_SCALE}, got {request.scale}")
    return replace(request, seed=secrets.randbelow(2**32)) if request.seed == -1 else request


def _named_strength(text: str) -> tuple[str, float]:
    """("glow", 0.5) of "glow:0.5", ("glow", 1.0) of "glow"."""
    name, colon, number = text.rpartition(":")
    if not colon or "/" in number or "\\" in number:  # a path, such as C:\\style.safetensors
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        raise UserError(f"a LoRA is NAME or NAME:STRENGTH, such as glow:0.5, got {text}") from None


def _stored(source: Path) -> dict[str, Any]:
    """The parameters in `source` that a request knows, each of the right type; others are left out."""
    parameters = png.read_parameters(source)
    hints = get_type_hints(Request)
    known = {field.name: parameters[field.name] for field in fields(Request) if field.name in parameters}
    for name, value in known.items():
        if not _has_type(value, hints[name]):
            raise UserError(
                f"the parameters in {source} are damaged ({name} is {value!r:.40}): use another file"
            )
    known["made_on"] = known.pop("device", None)
    return known


def _has_type(value: object, hint: Any) -> bool:
    """Whether a JSON value fits a field: whole numbers count as float, true and false not as numbers."""
    if isinstance(hint, UnionType):
        return any(_has_type(value, kind) for kind in get_args(hint))
    if hint == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if get_origin(hint) is dict:
        kind = get_args(hint)[1]
        return isinstance(value, dict) and all(_has_type(item, kind) for item in value.values())
    if hint is NoneType:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and not isinstance(value, bool)
