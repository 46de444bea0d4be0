"""A model of ours from a file, whatever its names and formats."""

from collections.abc import Mapping
from importlib import import_module
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from rfkernels.formats.detect import detect, keys_of
from rfkernels.formats.keys import is_dropped
from rfkernels.formats.load import Part, Rename, load

__all__ = ["MODELS", "load_model"]

MODELS = {  # by the family that `rfkernels.formats.detect` names
    "auraflow": "auraflow.AuraFlow",
    "chroma": "chroma.Chroma",
    "flux": "flux.Flux",
    "flux2": "flux2.Flux2",
    "flux3": "flux3.Flux3",
    "hidream": "hidream.HiDream",
    "lumina2": "lumina2.Lumina2",
    "pixart": "pixart.PixArt",
    "qwen-image": "qwen.QwenImage",
    "sd3": "sd3.SD3",
    "wan": "wan.Wan",
    "z-image": "zimage.ZImage",
}
MADE = {"pixart"}  # makes a table of positions that is in no file
WIDE = {"wan": {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}}  # float32 in any model


def load_model(
    source: str | Path | Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    method: str | None = None,
    **options,
) -> nn.Module:
    """The model of `rfkernels.models` that a file holds, ready for inference.

    Names of diffusers or of the original repositories, safetensors, shards or GGUF, floating or quantised in
    any layout of `rfkernels.formats`. Floating tensors that have their dtype already stay where the file is
    mapped.

    Args:
        dtype: of the model. What Wan has in float32 stays so.
        method, options: of `rfkernels.formats.load`: floating linear layers are quantised as they arrive.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no model known here, or not a whole one.
    """
    found = detect(source)
    if found.family not in MODELS:
        raise ValueError(f"load_model: a model of {', '.join(MODELS)} is required, got {found.family}")
    module, _, name = MODELS[found.family].partition(".")
    cls = getattr(import_module(f"rfkernels.models.{module}"), name)
    with torch.device("cpu" if found.family in MADE else "meta"):
        model = cls(**found.config).eval().requires_grad_(False)
    for path, parameter in model.named_parameters():
        wide = WIDE.get(found.family, set()).intersection(path.split("."))
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    rename = _original(found.family, model) if found.naming == "original" else None
    dropped = lambda name: is_dropped(found.family, name)
    return load(model, source, rename=rename, method=method, drop=dropped, **options)


def _original(family: str, model: nn.Module) -> Rename:
    """From the original names of a family to those of its model."""
    state = model.state_dict()
    keys = keys_of(family, {name: tuple(t.shape) for name, t in state.items()})

    def rename(name: str) -> str | list[Part]:
        found = keys.find(name, "original")
        if found is None or not all(part in state for part in found.parts):
            return name
        rows = [len(state[part]) for part in found.parts]
        swap = keys.find(name, "original", sum(rows)).swap
        if len(rows) == 1 and not swap:
            return found.parts[0]
        ends = list(accumulate(rows, initial=0))
        return [Part(*row, swap) for row in zip(found.parts, ends, ends[1:], strict=False)]

    return rename
