"""nunchaku checkpoints: SVDQuant layers, and AWQ layers for the modulation, in the order of its MMA
fragments.

A layout is a matrix whose axes are split, transposed and flattened. Names are those of version 2; version 1
has `smooth`, `lora_down` and `lora_up`. `smooth_factor_orig` is of no use when running, upstream neither.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rfkernels.formats.container import Checkpoint, write_safetensors
from rfkernels.formats.model import model_tensors
from rfkernels.formats.nvfp4 import e2m1
from rfkernels.nn import QuantLinear
from rfkernels.ops.linear import dequantize_weight, pack_int4, unpack_int4

__all__ = ["AWQ", "DOWN", "QWEIGHT", "SCALES", "SCALES_FP4", "UP", "detect", "read", "tensors", "write"]

SHIFT = 0.171875  # of tokens after GELU, which nunchaku quantises without a sign
SHIFTED = ("*mlp_fc2", "*mlp_context_fc2", "*.net.2")
_NEW = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}
_SVDQ = {"qweight", "wscales", "bias", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up"}
_FP4 = {"wcscales", "wtscale"}


class Layout(NamedTuple):
    """How a matrix lies in a file: inner sizes of its rows and columns, and the order of all axes."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]

    def pack(self, matrix: Tensor) -> Tensor:
        """The matrix flattened in this order."""
        return matrix.reshape(self._sizes(*matrix.shape)).permute(self.order).reshape(-1)

    def unpack(self, flat: Tensor, rows: int, columns: int) -> Tensor:
        """`[rows, columns]` of a flat tensor in this order."""
        sizes = self._sizes(rows, columns)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.reshape([sizes[i] for i in self.order]).permute(inverse).reshape(rows, columns)

    def _sizes(self, rows: int, columns: int) -> list[int]:
        if rows % prod(self.rows) or columns % prod(self.columns):
            required = f"multiples of {prod(self.rows)} rows and {prod(self.columns)} columns"
            raise ValueError(f"nunchaku: {required} are required, got {rows} x {columns}")
        return [rows // prod(self.rows), *self.rows, columns // prod(self.columns), *self.columns]


QWEIGHT = Layout((8, 2, 8), (2, 4, 8), (0, 4, 1, 3, 6, 2, 5, 7))  # nibbles, eight an int32
SCALES = Layout((8, 2, 4, 2), (), (0, 5, 1, 3, 2, 4))  # [out, groups]; vectors: one column
SCALES_FP4 = Layout((4, 4, 8), (4,), (0, 4, 3, 2, 1, 5))
DOWN = Layout((2, 8), (2, 4, 2), (3, 0, 2, 5, 1, 4, 6))  # [rank, in]
UP = Layout((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6))  # [out, rank]
AWQ = Layout((4,), (2, 4, 8), (0, 2, 1, 3, 5, 4))  # nibbles, four an int16


def detect(checkpoint: Checkpoint) -> bool:
    return any(n.endswith(".qweight") for n in checkpoint) and any(n.endswith(".wscales") for n in checkpoint)


def read(
    checkpoint: Checkpoint, dtype: torch.dtype, shifted: tuple[str, ...] = SHIFTED
) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """svdq-int4 and w4a16 layers; weights in NVFP4 as float32 tensors.

    Biases of the layers `shifted`, patterns of names, hold the shift of their unsigned tokens; it is taken
    out. Modulation layers get the rows [chunk, width] and lose the 1 that is in their scales, as diffusers
    has them.
    """
    for layer, stored in checkpoint.layers().items():
        if "qweight" not in stored:
            yield from ((n, checkpoint[n]) for n in stored.values())
            continue
        names = {_NEW.get(leaf, leaf): n for leaf, n in stored.items()}
        known = {"qweight", "wscales", "wzeros", "bias"} if "wzeros" in names else _SVDQ | _FP4
        if set(names) - known or not {"qweight", "wscales"} <= set(names):
            raise ValueError(f"nunchaku: {layer} must have of {sorted(known)}, got {sorted(names)}")
        parts = {leaf: checkpoint[n] for leaf, n in names.items() if leaf != "smooth_factor_orig"}
        if "wzeros" in parts:
            yield layer, _read_awq(parts, dtype)
        elif parts["wscales"].dtype == torch.float8_e4m3fn:
            yield from _read_fp4(layer, parts)
        else:
            shift = SHIFT if any(fnmatchcase(layer, pattern) for pattern in shifted) else 0.0
            yield layer, _read_svdq(parts, dtype, shift)


def _vector(packed: Tensor) -> Tensor:
    return SCALES.unpack(packed.flatten(), packed.numel(), 1).flatten()


def _branch(parts: dict[str, Tensor], out: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """smooth `[in]`, down `[rank, in]`, up `[out, rank]`."""
    rank = parts["proj_up"].numel() // out
    down = DOWN.unpack(parts["proj_down"].flatten(), rank, width)
    return _vector(parts["smooth_factor"]), down, UP.unpack(parts["proj_up"].flatten(), out, rank)


def _read_svdq(parts: dict[str, Tensor], dtype: torch.dtype, shift: float) -> QuantLinear:
    out, width = parts["qweight"].shape[0], 2 * parts["qweight"].shape[1]
    codes = QWEIGHT.unpack(unpack_int4(parts["qweight"].view(torch.uint8)).flatten(), out, width) ^ 8
    scale = SCALES.unpack(parts["wscales"].flatten(), out, width // 64)
    smooth, down, up = _branch(parts, out, width)
    weight, bias = pack_int4(codes), parts.get("bias")
    bias = None if bias is None else _vector(bias)
    if shift and bias is not None:
        bias = _shifted(bias, weight, scale, smooth, shift)
    return QuantLinear(
        "svdq-int4",
        weight,
        scale,
        bias=bias,
        smooth=smooth,
        proj_down=down,
        proj_up=up,
        dtype=dtype if bias is None else bias.dtype,
    )


def _shifted(bias: Tensor, weight: Tensor, scale: Tensor, smooth: Tensor, shift: float) -> Tensor:
    """b + c (R / λ) 1: of tokens that are c more than the layer's."""
    columns = dequantize_weight(weight, scale) / smooth.float()
    return (bias.float() + shift * columns.sum(1)).to(bias.dtype)


def _read_fp4(layer: str, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    out, width = parts["qweight"].shape[0], 2 * parts["qweight"].shape[1]
    codes = QWEIGHT.unpack(unpack_int4(parts["qweight"].view(torch.uint8)).flatten(), out, width)
    scale = SCALES_FP4.unpack(parts["wscales"].view(torch.uint8).flatten(), out, width // 16)
    scale = (
        scale.contiguous().view(torch.float8_e4m3fn).float() * parts.get("wtscale", torch.ones(())).float()
    )
    if "wcscales" in parts:
        scale = scale * _vector(parts["wcscales"]).float()[:, None]
    smooth, down, up = _branch(parts, out, width)
    residual = (e2m1(codes).unflatten(1, (-1, 16)) * scale[..., None]).flatten(1)
    yield f"{layer}.weight", residual / smooth.float() + up.float() @ down.float()
    if "bias" in parts:
        yield f"{layer}.bias", _vector(parts["bias"])


def _chunks(out: int, width: int) -> int:
    """Of the modulation that a layer makes: 3 or 6; 1 where it is none."""
    return out // width if out in (3 * width, 6 * width) else 1


def _read_awq(parts: dict[str, Tensor], dtype: torch.dtype) -> QuantLinear:
    out, width = 4 * parts["qweight"].shape[0], 2 * parts["qweight"].shape[1]
    nibbles = unpack_int4(parts["qweight"].contiguous().view(torch.uint8)).flatten()
    codes = AWQ.unpack(nibbles, out, width)
    scale = parts["wscales"].T.contiguous()
    zero = parts["wzeros"].T.float() + 8 * scale.float()  # theirs: code 0, ours: code 8
    bias = parts.get("bias")
    chunks = _chunks(out, width)
    rows = torch.arange(out).view(-1, chunks).T.flatten()
    layer = QuantLinear(
        "w4a16", pack_int4(codes), scale, zero, bias, dtype=dtype if bias is None else bias.dtype
    ).take_rows(rows)
    if layer.bias is not None:
        layer.bias.view(chunks, -1)[_scales(chunks)] -= 1
    return layer


def _scales(chunks: int) -> list[int]:
    """The chunks that multiply: 1 and the last but one."""
    return sorted({1, chunks - 2}) if chunks > 1 else []


def tensors(layer: QuantLinear, shift: float = 0.0) -> dict[str, Tensor]:
    """The leaves of an svdq-int4 or a w4a16 layer, groups of 64; `shift` as in `SHIFTED` layers.

    Raises:
        ValueError: another format, sizes that are not of whole tiles (128 x 128, ranks of 16).
    """
    out, width = layer.out_features, layer.in_features
    if layer.format not in ("svdq-int4", "w4a16") or layer.group != 64:
        required = "svdq-int4 or w4a16 in groups of 64"
        raise ValueError(f"nunchaku: {required} is required, got {layer.format} in {layer.group}")
    codes = unpack_int4(layer.weight)
    if layer.format == "w4a16":
        return _awq_tensors(layer, codes, _chunks(out, width))
    if width % 128:
        raise ValueError(f"nunchaku: multiples of 128 columns are required, got {out} x {width}")
    vector = lambda v: SCALES.pack(v[:, None])
    parts = {
        "qweight": pack_int4(QWEIGHT.pack(codes ^ 8)).view(torch.int8).view(out, width // 2),
        "wscales": SCALES.pack(layer.weight_scale).view(width // 64, out),
        "smooth_factor": vector(layer.smooth),
        "smooth_factor_orig": vector(layer.smooth),
        "proj_down": DOWN.pack(layer.proj_down).view(width, -1),
        "proj_up": UP.pack(layer.proj_up).view(out, -1),
    }
    if layer.bias is not None:
        bias = _shifted(layer.bias.detach(), layer.weight, layer.weight_scale, layer.smooth, -shift)
        parts["bias"] = vector(bias)
    return parts


def _awq_tensors(layer: QuantLinear, codes: Tensor, chunks: int) -> dict[str, Tensor]:
    out, width = layer.out_features, layer.in_features
    zero = layer.weight_zero
    if zero is not None and not zero.is_floating_point():
        raise ValueError("nunchaku: floating zeros, or none, are required, got integers")
    rows = torch.arange(out).view(chunks, -1).T.flatten()
    scale = layer.weight_scale[rows]
    zero = -8 * scale.float() + (0 if zero is None else zero[rows].float())
    parts = {
        "qweight": pack_int4(AWQ.pack(codes[rows])).view(torch.int32).view(out // 4, width // 2),
        "wscales": scale.T.contiguous(),
        "wzeros": zero.to(scale.dtype).T.contiguous(),
    }
    if layer.bias is not None:
        bias = layer.bias.detach().clone().view(chunks, -1)
        bias[_scales(chunks)] += 1
        parts["bias"] = bias.flatten()[rows]
    return parts


def write(model: nn.Module, path: str | Path) -> None:
    """Writes a model with svdq-int4 and w4a16 layers, with the model's names; no layer's tokens are shifted.

    `read` it with `shifted=()`.
    """
    write_safetensors(path, model_tensors(model, tensors))
