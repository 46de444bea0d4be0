"""A model of ours from a file, whatever its names and formats."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from rfkernels.formats.detect import detect
from rfkernels.formats.keys import is_dropped
from rfkernels.formats.load import load, original_names

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
    with torch.device("meta"):
        model = cls(**found.config).eval().requires_grad_(False)
    for path, parameter in model.named_parameters():
        wide = WIDE.get(found.family, set()).intersection(path.split("."))
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    rename = original_names(model) if found.naming == "original" else None
    dropped = lambda name: is_dropped(found.family, name)
    return load(model, source, rename=rename, method=method, drop=dropped, **options)
