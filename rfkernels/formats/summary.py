"""What a file of weights holds, in numbers: for people and for JSON. No weight is read."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfkernels.formats import comfy, gguf
from rfkernels.formats.container import open_checkpoint
from rfkernels.formats.detect import Listing, detect, listing
from rfkernels.formats.header import BITS
from rfkernels.formats.load import reader_of

__all__ = ["summarise"]

# Bits of a number in the blocks of GGUF
_KINDS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375}
_KINDS |= {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "IQ4_NL": 4.5, "IQ4_XS": 4.25}
# Leaves that say how to read the numbers of a layer, and are none themselves
_SIDE = re.compile(
    r"(^|\.)((input|weight|nested)_)?(scale\w*|zeros?|absmax|quant_map|s_rel|s_channel|codebook|format|smooth\w*"
    r"|proj_\w+|comfy_quant|scaled_fp8|SCB|wscales|wzeros|lora_(up|down)|quant_state\W.*)$"
)
_FOUR_BITS = ("convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "svdquant_w4a4", "nvfp4")


def summarise(source: str | Path | Mapping[str, Tensor]) -> dict[str, Any]:
    """Family, variant, naming, prefix, class and config (None for an unknown model), the format of quantised
    layers, tensors, parameters, bytes; bytes by dtype; the same for each series of blocks; metadata.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint` and `rfkernels.formats.gguf.read_header`.
    """
    found = listing(source)
    sizes = {name: _bytes(found.shapes[name], found.dtypes[name]) for name in found.shapes}
    format, packed = _format(source)
    counts = {name: _parameters(name, found, packed) for name in found.shapes}
    dtypes: dict[str, dict[str, int]] = {}
    blocks: dict[str, dict[str, Any]] = {}
    for name, size in sizes.items():
        dtype = str(found.dtypes[name]).removeprefix("torch.")
        _count(dtypes.setdefault(dtype, {}), size, counts[name])
        numbered = re.match(r"(.*?)\.(\d+)(\.|$)", name)
        series = blocks.setdefault(
            f"{numbered[1]}.*" if numbered else name.partition(".")[0], {"blocks": set()}
        )
        series["blocks"].add(numbered[2] if numbered else "")
        _count(series, size, counts[name])
    for series in blocks.values():
        series["blocks"] = len(series["blocks"])
    model = _model(found)
    total = {"tensors": len(sizes), "parameters": sum(counts.values()), "bytes": sum(sizes.values())}
    by_bytes = dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"]))
    strings = {key: value for key, value in found.metadata.items() if isinstance(value, (str, int, float))}
    return {**model, "format": format, **total, "dtypes": by_bytes, "blocks": blocks, "metadata": strings}


def _model(found: Listing) -> dict[str, Any]:
    try:
        model = detect(found)
    except ValueError:
        return dict.fromkeys(("family", "variant", "naming", "prefix", "class", "config"))
    names = {"family": model.family, "variant": model.variant, "naming": model.naming, "prefix": model.prefix}
    return {**names, "class": model.class_name, "config": model.config}


def _format(source) -> tuple[str, set[str]]:
    """The layout of quantised layers, and the layers whose bytes hold two numbers each."""
    if isinstance(source, (str, Path)) and Path(source).is_file() and gguf.is_gguf(source):
        return "gguf", set()
    checkpoint = open_checkpoint(source)
    try:
        reader = reader_of(checkpoint)
    except ValueError:
        return "unknown", set()
    marks = comfy.marks(checkpoint) if reader is comfy else {}
    packed = {layer for layer, mark in marks.items() if mark.get("format") in _FOUR_BITS}
    return "plain" if reader is None else reader.__name__.rpartition(".")[2], packed


def _bytes(shape: tuple[int, ...], dtype: torch.dtype | str) -> int:
    bits = 8 * dtype.itemsize if isinstance(dtype, torch.dtype) else _KINDS.get(dtype, BITS.get(dtype, 0))
    return math.ceil(math.prod(shape) * bits / 8)


def _parameters(name: str, found: Listing, packed: set[str]) -> int:
    layer, _, leaf = name.rpartition(".")
    if _SIDE.search(name) and not name.endswith("norm.scale"):
        return 0
    codes = leaf in ("weight", "qweight")
    two = codes and (found.dtypes[name] == torch.uint8 or layer in packed or leaf == "qweight")
    return math.prod(found.shapes[name]) * (2 if two else 1)


def _count(into: dict[str, Any], size: int, parameters: int) -> None:
    for key, value in (("tensors", 1), ("parameters", parameters), ("bytes", size)):
        into[key] = into.get(key, 0) + value
