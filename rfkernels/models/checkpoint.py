"""Weights files: safetensors with matrices as int8 rows, and a loader that checks all before it believes.

A matrix W[rows, cols] is stored as `name` int8 and `name.scale` float32[rows] with W = int8 * scale, where
scale = max |row| / 127. Other parameters are float16. The metadata holds the format, its version, the shape
of the model, the licence and the record of the training.
"""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfkernels.models.blocks import rope_table
from rfkernels.models.emoji import EmojiConfig, EmojiFlow

__all__ = [
    "ADAPTER",
    "FORMAT",
    "VERSION",
    "WeightsError",
    "dequantise",
    "quantise",
    "read_adapter_record",
    "read_emoji",
    "read_record",
    "write_emoji",
]

FORMAT = "rfkernels-emoji"
ADAPTER = "rfkernels-lora"  # the format of adapters that ship beside a model
VERSION = "1"
LICENCE = (
    "Apache-2.0; trained on Noto Emoji and FxEmojis (Apache-2.0) and Fluent Emoji (MIT), see MODEL_CARD.md"
)
SCALE = ".scale"
LIMITS = {"double_blocks": 64, "single_blocks": 64, "table": 1 << 20}  # a larger number is not one of ours
LARGEST = 8192
LATER = {"text.position"}  # zeros in files that were written before it was there


class WeightsError(ValueError):
    """A weights file that cannot be used; one line: which file, what is wrong, what to do."""


def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8[rows, cols] and float32[rows] with w = int8 * scale up to half a step, symmetric, per row."""
    scale = w.float().abs().amax(1).clamp(min=1e-12) / 127
    return (w.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """float32[rows, cols], the inverse of `quantise`; by NumPy, which a busy machine does not delay."""
    return torch.from_numpy(np.multiply(q.numpy(), scale.numpy()[:, None]))


def write_emoji(model: EmojiFlow, path: Path, training: dict) -> None:
    """Writes the model as a weights file; `training` is a JSON-ready record of how it was made."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, p in model.state_dict().items():
        if p.ndim == 2 and p.numel() > 4096:
            tensors[name], tensors[name + SCALE] = quantise(p)
        else:
            tensors[name] = (p.half() if p.is_floating_point() else p).contiguous()
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": json.dumps(asdict(model.config)),
        "licence": LICENCE,
        "training": json.dumps(training),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.cpu() for k, v in tensors.items()}, partial, metadata)
    partial.replace(path)


def read_record(path: Path) -> dict:
    """Config, licence and training record of a weights file, without its tensors; raises WeightsError."""
    metadata, _ = _read(Path(path), tensors=False)
    return {
        "format": metadata["format"],
        "version": metadata["version"],
        "config": asdict(_config(Path(path), metadata)),
        "licence": metadata.get("licence", ""),
        "training": json.loads(metadata.get("training", "{}")),
    }


def read_adapter_record(path: Path) -> dict[str, str]:
    """The metadata of an adapter file that we made, without its tensors; raises WeightsError."""
    return _read(Path(path), kind=ADAPTER, tensors=False)[0]


def read_emoji(path: Path, *, device: torch.device, dtype: torch.dtype) -> EmojiFlow:
    """The model of a weights file, on `device` with parameters of `dtype`; raises WeightsError."""
    metadata, tensors = _read(path)
    with torch.device("meta"):
        model = EmojiFlow(_config(path, metadata))
    wanted = {name: p.shape for name, p in model.state_dict().items() if name != "known_words"}
    tensors |= {n: torch.zeros(wanted[n], dtype=torch.float16) for n in LATER - set(tensors)}
    _check_names(path, wanted, tensors)
    loaded = {name: _parameter(path, name, shape, tensors) for name, shape in wanted.items()}
    words = tensors["known_words"]
    if words.dtype != torch.int32 or words.ndim != 1:
        raise _broken(path, f"known_words must be int32[words], got {_describe(words)}")
    model.known_words = words.clone()
    model.load_state_dict({**loaded, "known_words": words}, assign=True)
    model = model.to(dtype=dtype).requires_grad_(False).eval()
    model.rotation = rope_table(model.grid, model.head_dim)
    return model.to(device)


def _broken(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"weights file {path}: {reason}; give a file made by rfkernels or reinstall the package"
    )


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def _read(
    path: Path, *, kind: str = FORMAT, tensors: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "not found"
        raise WeightsError(
            f"weights file {path}: {what}; check the path, or reinstall the package for its own weights"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise _broken(path, f"format {kind!r} is needed, got {metadata.get('format')!r}")
            if kind == FORMAT and metadata.get("version") != VERSION:
                raise _broken(path, f"format version {VERSION} is needed, got {metadata.get('version')!r}")
            return metadata, {k: file.get_tensor(k) for k in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _broken(path, f"not readable as safetensors ({str(error).splitlines()[0]})") from None


def _config(path: Path, metadata: dict[str, str]) -> EmojiConfig:
    try:
        raw = json.loads(metadata["architecture"])
        raw["styles"] = tuple(map(str, raw["styles"]))
        config = EmojiConfig(**raw)
        numbers = {f.name: getattr(config, f.name) for f in fields(config) if f.type is int}
        sound = all(type(v) is int and 0 < v <= LIMITS.get(k, LARGEST) for k, v in numbers.items())
        sound = sound and config.size % config.patch == 0 and config.width % (4 * config.heads) == 0
        sound = sound and math.isfinite(config.guidance) and 0 < config.shift <= LARGEST
        sound = sound and isinstance(config.method, str)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _broken(path, "its architecture record is not one of this model")
    return config


def _check_names(path: Path, wanted: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    names = {n for n in tensors if not n.endswith(SCALE)} | {n.removesuffix(SCALE) for n in tensors}
    missing, foreign = (set(wanted) | {"known_words"}) - set(tensors), names - set(wanted) - {"known_words"}
    if missing:
        raise _broken(path, f"{len(missing)} tensors are missing, first {min(missing)!r}")
    if foreign:
        raise _broken(path, f"{len(foreign)} tensors are unknown to this model, first {min(foreign)!r}")


def _parameter(path: Path, name: str, shape: torch.Size, tensors: dict[str, Tensor]) -> Tensor:
    """float32 parameter after checks of type, shape and finiteness."""
    stored, scale = tensors[name], tensors.get(name + SCALE)
    if stored.shape != shape:
        raise _broken(path, f"{name} must be {list(shape)}, got {_describe(stored)}")
    if stored.dtype == torch.int8:
        if (
            scale is None
            or scale.dtype != torch.float32
            or scale.shape != shape[:1]
            or not scale.isfinite().all()
        ):
            got = "nothing" if scale is None else _describe(scale)
            raise _broken(path, f"{name}{SCALE} must be float32[{shape[0]}] of finite numbers, got {got}")
        return dequantise(stored, scale)
    if stored.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not stored.isfinite().all():
        raise _broken(path, f"{name} must be int8 or finite 16-bit numbers, got {_describe(stored)}")
    return stored.float()
