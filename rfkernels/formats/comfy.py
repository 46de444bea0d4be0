"""ComfyUI's quantised checkpoints: a mark for each layer, `L.comfy_quant` (JSON as bytes) or an entry of
`_quantization_metadata` in the header, and the tensors of its format.

    int8_tensorwise   int8, int8-convrot   weight int8, weight_scale one number, [out] or [out, 1]
    float8_e4m3fn     fp8                  weight, weight_scale, input_scale
    convrot_w4a4      w4a8, rows           weight [out, in / 2] signed, even element low; weight_scale [out]
    asym_w4a8_int8    int8-convrot         codes, weight_codebook [16], weight_s_rel [out, in / 16] of e4m3,
                                           weight_s_channel [out]; read only, its int8 numbers are the same
    awq_w4a16         w4a16                weight, weight_scale and weight_zeros [groups, out]
    svdquant_w4a4     svdq-int4            weight, weight_scale [groups, out], weight_smooth_factor [in],
                                           weight_proj_down [in, rank], weight_proj_up [out, rank]
    nvfp4, mxfp8      float32 tensors      rfkernels.formats.nvfp4; read only
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.formats.container import Checkpoint, write_safetensors
from rfkernels.formats.fp8 import fp8_layer
from rfkernels.formats.model import model_tensors
from rfkernels.formats.nvfp4 import decode_mxfp8, decode_nvfp4
from rfkernels.nn import QuantLinear
from rfkernels.ops.linear import unpack_int4
from rfkernels.ops.quantize import rotate
from rfkernels.quantization import ROTATIONS

__all__ = ["HEADER", "detect", "header", "marked_tensors", "marks", "read", "tensors", "write"]

HEADER = "_quantization_metadata"
_MARK = "comfy_quant"
_OPTIONS = {"format", "params", "full_precision_matrix_mult", "convrot", "convrot_groupsize", "group_size"}
_OPTIONS |= {"linear_dtype", "quant_group_size", "orig_dtype", "orig_shape"}


def detect(checkpoint: Checkpoint) -> bool:
    return HEADER in checkpoint.metadata or any(n.endswith(f".{_MARK}") for n in checkpoint)


def marks(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The mark of each layer: its format and options.

    Raises:
        ValueError: an option that is not known here: it may change the numbers.
    """
    written = json.loads(checkpoint.metadata.get(HEADER, "{}")).get("layers", {})
    found = {layer.removeprefix(checkpoint.prefix): mark for layer, mark in written.items()}
    for name in checkpoint:
        if name.endswith(f".{_MARK}"):
            text = bytes(checkpoint[name].view(torch.uint8).tolist()).decode().rstrip("\0 ")
            found[name.removesuffix(f".{_MARK}")] = json.loads(text)
    for layer, mark in found.items():
        mark.update(mark.pop("params", None) or {})
        unknown = sorted(set(mark) - _OPTIONS)
        if unknown:
            raise ValueError(
                f"comfy: {layer} has the unknown options {unknown}, known are {sorted(_OPTIONS)}"
            )
    return found


def read(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """Layers in our formats; weights of nvfp4, mxfp8, and w4a8 with a correction, as float32 tensors."""
    known, layers = marks(checkpoint), checkpoint.layers()
    absent = sorted(set(known) - set(layers))
    if absent:
        raise ValueError(f"comfy: {len(absent)} layers have marks and no tensors, among them {absent[:4]}")
    for layer, names in layers.items():
        if layer not in known:
            yield from ((n, checkpoint[n]) for n in names.values())
            continue
        mark = known[layer]
        if mark["format"] not in _READERS:
            raise ValueError(f"comfy: {layer} must be of {', '.join(_READERS)}, got {mark['format']!r}")
        parts = {leaf: checkpoint[n] for leaf, n in names.items() if leaf != _MARK}
        reader, leaves = _READERS[mark["format"]]
        unknown = sorted(set(parts) - {"weight", "bias", *leaves})
        if unknown:
            raise ValueError(f"comfy: {layer} of {mark['format']} must have of {leaves}, got also {unknown}")
        bias = parts.get("bias")
        yield from reader(layer, parts, mark, bias, dtype if bias is None else bias.dtype)


def _rotation(layer: str, mark: dict, default: bool = True) -> int:
    group = mark.get("convrot_groupsize", 256) if mark.get("convrot", default) else 0
    if group and group not in ROTATIONS:
        raise ValueError(f"comfy: {layer}: convrot_groupsize must be of {ROTATIONS}, got {group}")
    return group


def _int8(layer, parts, mark, bias, dtype):
    rotation, scale = _rotation(layer, mark, False), parts["weight_scale"].float()
    scale = scale.reshape(-1 if scale.numel() > 1 else ())
    format = "int8-convrot" if rotation else "int8"
    yield layer, QuantLinear(format, parts["weight"], scale, bias=bias, rotation=rotation, dtype=dtype)


def _fp8(layer, parts, mark, bias, dtype):
    yield from fp8_layer(
        layer, parts, dtype, full_precision=bool(mark.get("full_precision_matrix_mult", False))
    )


def _signed(weight: Tensor) -> Tensor:
    """Signed nibbles as the codes 0 .. 15 of `pack_int4`: both hold the even element low."""
    return weight.view(torch.uint8) ^ 0x88


def _convrot_w4a4(layer, parts, mark, bias, dtype):
    rotation, scale = _rotation(layer, mark), parts["weight_scale"].float().reshape(-1)
    yield (
        layer,
        QuantLinear("w4a8", _signed(parts["weight"]), scale, bias=bias, rotation=rotation, dtype=dtype),
    )


def _asym_w4a8_int8(layer, parts, mark, bias, dtype):
    relative, channel = parts["weight_s_rel"], parts["weight_s_channel"].float().flatten()
    if relative.dtype in (torch.uint8, torch.int8):
        relative = relative.view(torch.float8_e4m3fn)
    codes = unpack_int4(parts["weight"].view(torch.uint8)).long()
    out, width = codes.shape
    if width % relative.shape[1] or len(relative) != out:
        raise ValueError(f"comfy: {layer}: weight_s_rel must be [{out}, groups], got {list(relative.shape)}")
    book = parts.get("weight_codebook")
    levels = torch.arange(-8.0, 8) if book is None else book.float()
    steps = relative.float().repeat_interleave(width // relative.shape[1], 1)
    numbers = (levels.to(codes.device)[codes] * steps).round().clamp(-127, 127)
    rotation, correction = _rotation(layer, mark), parts.get("weight_correction", parts.get("correction"))
    if correction is not None:
        turned = numbers * channel[:, None]
        turned = turned + correction.float().T.repeat_interleave(width // len(correction), 1)
        yield f"{layer}.weight", rotate(turned, rotation)
        yield from () if bias is None else ((f"{layer}.bias", bias),)
        return
    codes = numbers.to(torch.int8)
    yield layer, QuantLinear("int8-convrot", codes, channel, bias=bias, rotation=rotation, dtype=dtype)


def _awq(layer, parts, mark, bias, dtype):
    scale, zero = parts["weight_scale"].T.contiguous(), parts["weight_zeros"].T.contiguous()
    yield layer, QuantLinear("w4a16", parts["weight"].view(torch.uint8), scale, zero, bias, dtype=dtype)


def _svdquant(layer, parts, mark, bias, dtype):
    yield (
        layer,
        QuantLinear(
            "svdq-int4",
            _signed(parts["weight"]),
            parts["weight_scale"].T.contiguous(),
            bias=bias,
            smooth=parts["weight_smooth_factor"],
            proj_down=parts["weight_proj_down"].T.contiguous(),
            proj_up=parts["weight_proj_up"],
            dtype=dtype,
        ),
    )


def _dense(layer, parts, mark, bias, dtype):
    """nvfp4 and mxfp8; rows that pad the weight to whole blocks go where a bias tells how many there are."""
    if mark["format"] == "nvfp4":
        stored = (parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
        numbers = decode_nvfp4(*stored, high_first=True, swizzled=True)
    else:
        numbers = decode_mxfp8(parts["weight"], parts["weight_scale"])
    yield f"{layer}.weight", numbers if bias is None else numbers[: len(bias)]
    yield from () if bias is None else ((f"{layer}.bias", bias),)


_SVD_LEAVES = ("weight_scale", "weight_smooth_factor", "weight_proj_down", "weight_proj_up")
_W4A8_LEAVES = ("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction", "correction")
_READERS = {
    "int8_tensorwise": (_int8, ("weight_scale",)),
    "float8_e4m3fn": (_fp8, ("weight_scale", "input_scale")),
    "convrot_w4a4": (_convrot_w4a4, ("weight_scale",)),
    "asym_w4a8_int8": (_asym_w4a8_int8, _W4A8_LEAVES),
    "awq_w4a16": (_awq, ("weight_scale", "weight_zeros")),
    "svdquant_w4a4": (_svdquant, _SVD_LEAVES),
    "nvfp4": (_dense, ("weight_scale", "weight_scale_2", "input_scale")),
    "mxfp8": (_dense, ("weight_scale",)),
}


def tensors(layer: QuantLinear) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The leaves of a layer, and its mark.

    Raises:
        ValueError: what ComfyUI has no format for: w4a8 in groups, integer zeros.
    """
    scale, turned = layer.weight_scale, {"convrot": True, "convrot_groupsize": layer.rotation}
    if layer.format in ("int8", "int8-convrot"):
        parts = {"weight_scale": scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())}
        mark = {"format": "int8_tensorwise", **(turned if layer.rotation else {})}
    elif layer.format == "fp8":
        scale = torch.ones(()) if scale is None else scale
        parts = {"weight_scale": scale} | (
            {} if layer.input_scale is None else {"input_scale": layer.input_scale}
        )
        mark = {"format": "float8_e4m3fn", "full_precision_matrix_mult": not layer.quantize_input}
    elif layer.format == "w4a8" and not layer.group:
        parts = {"weight_scale": scale.float().reshape(-1)}
        mark = {"format": "convrot_w4a4", **turned, "linear_dtype": "int8"}
    elif layer.format == "w4a16" and (layer.weight_zero is None or layer.weight_zero.is_floating_point()):
        zero = torch.zeros_like(scale) if layer.weight_zero is None else layer.weight_zero
        parts = {"weight_scale": scale.T.contiguous(), "weight_zeros": zero.T.contiguous()}
        mark = {"format": "awq_w4a16", "group_size": layer.group}
    elif layer.format == "svdq-int4":
        down, up = layer.proj_down.T.contiguous(), layer.proj_up
        values = (scale.T.contiguous(), layer.smooth, down, up)
        parts, mark = dict(zip(_SVD_LEAVES, values, strict=True)), {"format": "svdquant_w4a4"}
    else:
        zero = "" if layer.weight_zero is None else f", zeros {layer.weight_zero.dtype}"
        raise ValueError(f"comfy: there is no format for {layer.format} in groups of {layer.group}{zero}")
    signed = mark["format"] in ("convrot_w4a4", "svdquant_w4a4")
    weight = _signed(layer.weight) if signed else layer.weight
    parts["weight"] = weight.view(torch.int8) if weight.dtype == torch.uint8 else weight
    return parts if layer.bias is None else {**parts, "bias": layer.bias}, mark


def write(model: nn.Module, path: str | Path) -> None:
    """Writes a model with quantised layers, with the model's names; marks stand beside the layers and in the
    header."""
    layers = {n: tensors(m)[1] for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    write_safetensors(path, model_tensors(model, marked_tensors), header(layers))


def marked_tensors(layer: QuantLinear) -> dict[str, Tensor]:
    """The leaves of a layer, its mark as one of them."""
    parts, mark = tensors(layer)
    return {**parts, _MARK: torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)}


def header(layers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The strings of the header, of the marks of all layers."""
    return {HEADER: json.dumps({"format_version": "1.0", "layers": layers})}
