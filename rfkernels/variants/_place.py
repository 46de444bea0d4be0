"""Where new layers go that stand beside those of a model."""

import torch
from torch import nn

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def beside_layer(owner: str, layer: nn.Module, dtype: torch.dtype | None) -> dict:
    """Device and dtype of a layer's weight as arguments of `nn.Linear`; `dtype` comes first."""
    dtype = dtype or layer.weight.dtype
    if dtype not in _FLOATING:
        raise ValueError(f"{owner}: dtype must be given beside weights that are codes, got {dtype}")
    return {"device": layer.weight.device, "dtype": dtype}
