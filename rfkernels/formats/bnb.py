"""bitsandbytes checkpoints: NF4 and FP4 (Dettmers et al., 2023), with nested scales or not, and int8.

Four-bit weights are `[out in / 2, 1]` bytes, the even element in the high bits, in blocks of the flattened
weight: w = quant_map[code] absmax[block]; nested, absmax = nested_quant_map[absmax] nested_absmax[block /
    256] + offset.
int8: W = codes SCB / 127.
"""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from rfkernels.formats.container import Checkpoint
from rfkernels.nn import QuantLinear

__all__ = ["decode_4bit", "detect", "read"]

_STATE = "weight.quant_state.bitsandbytes__"
_LEAVES = {
    "weight",
    "bias",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
}


def detect(checkpoint: Checkpoint) -> bool:
    return any(f".{_STATE}" in n or n.endswith(".SCB") for n in checkpoint)


def read(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """int8 layers; four-bit weights as float32 tensors."""
    four = {n.partition(f".{_STATE}")[0]: n for n in checkpoint if f".{_STATE}" in n}
    eight = {n.removesuffix(".SCB") for n in checkpoint if n.endswith(".SCB")}
    layers: dict[str, list[str]] = {}
    for name in checkpoint:
        base = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
        layers.setdefault(base, []).append(name)
    for layer, names in layers.items():
        parts = {n.removeprefix(f"{layer}."): checkpoint[n] for n in names}
        if layer in four:
            leaf = four[layer].removeprefix(f"{layer}.")
            state = json.loads(bytes(parts.pop(leaf).tolist()))
            _known(layer, parts, _LEAVES)
            yield f"{layer}.weight", decode_4bit(parts, state)
            yield from ((f"{layer}.bias", parts["bias"]),) if "bias" in parts else ()
        elif layer in eight:
            _known(layer, parts, {"weight", "bias", "SCB", "weight_format"})
            bias = parts.get("bias")
            if parts.get("weight_format", torch.zeros(())).item() != 0:
                raise ValueError(f"bnb: {layer}.weight_format must be 0 (rows), got {parts['weight_format']}")
            yield (
                layer,
                QuantLinear(
                    "int8",
                    parts["weight"],
                    parts["SCB"].float() / 127,
                    bias=bias,
                    dtype=dtype if bias is None else bias.dtype,
                ),
            )
        else:
            yield from ((n, parts[n.removeprefix(f"{layer}.")]) for n in names)


def decode_4bit(parts: dict[str, Tensor], state: dict) -> Tensor:
    """float32 weight of the leaves of a layer and its quant_state."""
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_absmax"].float().repeat_interleave(state["nested_blocksize"])
        absmax = parts["weight.nested_quant_map"].float()[absmax.long()] * nested[: len(absmax)]
        absmax = absmax + state["nested_offset"]
    packed = parts["weight"].view(torch.uint8).flatten()
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten()
    numbers = parts["weight.quant_map"].float()[codes.long()]
    scale = absmax.float().repeat_interleave(state["blocksize"])[: len(numbers)]
    count = torch.Size(state["shape"]).numel()
    return (numbers * scale)[:count].view(state["shape"])


def _known(layer: str, parts: dict[str, Tensor], known: set[str]) -> None:
    unknown = sorted(set(parts) - known)
    if unknown:
        raise ValueError(f"bnb: {layer} must have of {sorted(known)}, got also {unknown}")
