"""float8 checkpoints: four dialects of the same numbers.

ComfyUI, old   L.weight, L.scale_weight, L.scale_input; a tensor `scaled_fp8`, of two elements where products
               are to be made at full precision
ComfyUI, new   L.weight, L.weight_scale, L.input_scale, L.comfy_quant (rfkernels.formats.comfy)
BFL            L.weight, L.weight_scale `[out]`; tokens quantised per row
plain          L.weight: a cast
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rfkernels.formats.container import Checkpoint, write_safetensors
from rfkernels.formats.model import model_tensors
from rfkernels.nn import QuantLinear

__all__ = ["DIALECTS", "detect", "fp8_layer", "read", "tensors", "write"]

DIALECTS = ("comfy-old", "bfl", "plain")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MARK = "scaled_fp8"
_NEW = {"scale_weight": "weight_scale", "scale_input": "input_scale"}


def detect(checkpoint: Checkpoint) -> bool:
    return _MARK in checkpoint or any(checkpoint.dtype(n) in _FLOAT8 for n in checkpoint)


def read(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """Layers of e4m3 weights; e5m2 weights, and tensors that are no matrices, as float32."""
    full_precision = _MARK in checkpoint and checkpoint[_MARK].numel() == 2
    bfl = _MARK not in checkpoint
    for layer, names in checkpoint.layers().items():
        if "weight" not in names or checkpoint.dtype(names["weight"]) not in _FLOAT8:
            yield from ((n, checkpoint[n]) for n in names.values() if n != _MARK)
            continue
        parts = {_NEW.get(leaf, leaf): checkpoint[n] for leaf, n in names.items()}
        dynamic = bfl and "weight_scale" in parts and parts["weight_scale"].numel() > 1
        yield from fp8_layer(layer, parts, dtype, full_precision=full_precision, dynamic=dynamic)


def fp8_layer(
    layer: str,
    parts: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    full_precision: bool,
    dynamic: bool = False,
) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """The layer of weight, weight_scale, input_scale and bias.

    Tokens are quantised with the `input_scale` of the file, or per row if `dynamic`; as they are without
    either, and where `full_precision` products are asked for.
    """
    unknown = sorted(set(parts) - {"weight", "bias", "weight_scale", "input_scale"})
    if unknown:
        raise ValueError(
            f"fp8: {layer} must have weight, weight_scale, input_scale and bias, got also {unknown}"
        )
    weight, scale, bias = parts["weight"], parts.get("weight_scale"), parts.get("bias")
    scale = None if scale is None else scale.float().reshape(-1 if scale.numel() > 1 else ())
    if weight.ndim != 2 or weight.dtype != torch.float8_e4m3fn:
        numbers = weight.float() * (1 if scale is None else scale.reshape(-1, *[1] * (weight.ndim - 1)))
        yield f"{layer}.weight", numbers
        yield from () if bias is None else ((f"{layer}.bias", bias),)
        return
    static = parts.get("input_scale")
    yield (
        layer,
        QuantLinear(
            "fp8",
            weight,
            scale,
            bias=bias,
            input_scale=None if static is None else static.float().reshape(()),
            quantize_input=(dynamic or static is not None) and not full_precision,
            dtype=dtype if bias is None else bias.dtype,
        ),
    )


def tensors(layer: QuantLinear, dialect: str) -> dict[str, Tensor]:
    """The leaves of a layer in a dialect.

    Raises:
        ValueError: another format; a scale per row where the dialect has one number, or none.
    """
    if layer.format != "fp8" or dialect not in DIALECTS:
        raise ValueError(
            f"fp8: a layer of fp8 and one of {DIALECTS} are required, got {layer.format}, {dialect!r}"
        )
    scale = torch.ones(()) if layer.weight_scale is None else layer.weight_scale
    if dialect == "plain" and not (scale == 1).all():
        raise ValueError("fp8: a plain cast has no scale, the layer has one")
    if dialect == "comfy-old" and scale.numel() > 1:
        raise ValueError(f"fp8: this dialect has one scale a layer, got {list(scale.shape)}")
    parts = {"weight": layer.weight}
    if dialect == "bfl":
        parts["weight_scale"] = scale.reshape(-1).expand(layer.out_features).contiguous()
    elif dialect == "comfy-old":
        parts["scale_weight"] = scale.reshape(())
        if layer.input_scale is not None:
            parts["scale_input"] = layer.input_scale
    return parts if layer.bias is None else {**parts, "bias": layer.bias}


def write(model: nn.Module, path: str | Path, dialect: str = "bfl") -> None:
    """Writes a model whose quantised layers are fp8, with the model's names."""
    named = model_tensors(model, lambda layer: tensors(layer, dialect))
    if dialect == "comfy-old":
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        full = not any(layer.quantize_input for layer in layers)
        named = [*named, (_MARK, torch.zeros(2 if full else 0).to(torch.float8_e4m3fn))]
    write_safetensors(path, named)
