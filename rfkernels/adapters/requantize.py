"""A new weight for a quantised layer, in the layer's own format and tensors."""

import torch
from torch import Tensor, nn

from rfkernels.nn.quant_linear import QuantLinear
from rfkernels.ops.linear import pack_int4
from rfkernels.ops.quantize import rotate
from rfkernels.ops.rounding import round_to
from rfkernels.quantization import quantize_int4

__all__ = ["refuse_blocks", "requantize"]

_LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def refuse_blocks(layer: nn.Module, name: str = "a layer") -> None:
    """Raises for a layer on blocks of GGUF, which are those of its file."""
    if isinstance(layer, QuantLinear) and layer.format == "gguf":
        raise ValueError(
            f"merge: {name} must have a weight that can be written, got blocks of a GGUF file "
            f"({layer.kind}): leave its adapters beside it"
        )


@torch.no_grad()
def requantize(layer: QuantLinear, weight: Tensor, rounding: str = "nearest", seed: int = 0) -> None:
    """Writes `weight` `[out, in]`, what `layer.dequantized()` is to give, into the layer in place.

    Scales are made anew from the extremes of rows or groups, without a search; a rotation is applied; the
    low-rank part and the smoothing of "svdq-int4" stay, its codes carry the rest.

    Args:
        rounding, seed: of codes, as in `ops.round_to`.

    Raises:
        ValueError: a layer on blocks of a GGUF file.
    """
    refuse_blocks(layer)
    weight = weight.float()
    if layer.smooth is not None:
        weight = (weight - layer.proj_up.float() @ layer.proj_down.float()) * layer.smooth.float()
    weight = rotate(weight, layer.rotation)
    codes = layer.weight
    if codes.dtype == torch.uint8:
        codes.copy_(_int4(layer, weight, rounding, seed))
        return
    scale = layer.weight_scale
    if scale is not None:
        amax = weight.abs().amax() if scale.numel() == 1 else weight.abs().amax(1)
        scale.copy_((amax / _LIMIT[codes.dtype]).clamp_min(1e-12).reshape(scale.shape))
        scale = scale.float().reshape(-1, 1)
    codes.copy_(round_to(weight, codes.dtype, rounding=rounding, seed=seed, scale=scale))


def _int4(layer: QuantLinear, weight: Tensor, rounding: str, seed: int) -> Tensor:
    """Packed codes; scales and zeros are written."""
    zero = layer.weight_zero
    kind = "none" if zero is None else "float" if zero.is_floating_point() else "integer"
    codes, scale, zeros = quantize_int4(weight, layer.group, kind, layer.weight_scale.dtype)
    layer.weight_scale.copy_(scale.reshape(layer.weight_scale.shape))
    if zeros is not None:
        zero.copy_(zeros)
    if rounding == "nearest":
        return codes
    steps = scale.float().reshape(len(weight), -1, 1)
    blocks, middle = weight.unflatten(-1, (steps.shape[1], -1)), 8.0
    if kind == "float":
        blocks = blocks - zeros.float()[..., None]
    elif kind == "integer":
        middle = zeros.float()[..., None]
    digits = (blocks / steps + middle).clamp(0, 15).flatten(1)
    return pack_int4(round_to(digits, torch.uint8, rounding=rounding, seed=seed))
