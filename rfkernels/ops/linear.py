r"""Linear layers in every storage format of the weight, with one epilogue.

    y = residual + gate * act(x W^T + hidden up^T + bias)

Tokens `x` are `[*lead, in]`, weights `[out, in]` as they lie in files: nothing is packed ahead of a call, so that
an adapter may be merged into a weight, and a weight mapped from a file, at any time. The formats:

    linear       W float64, float32, float16 or bfloat16 like x
    linear_int8  W = codes * scale, int8; x quantised to int8 per row (W8A8), summed exactly in int32
    linear_fp8   W = codes * scale, float8_e4m3fn; x as it is, or quantised to float8_e4m3fn
    linear_w4a16 W = (codes - zero) * scale in groups along `in`, codes 0 .. 15, two a byte; x as it is
    linear_w4a8  the same W beside x quantised to int8

Sums, the low-rank branch and the epilogue are float32 (float64 for float64 tokens); the result is rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels.ops._register import define
from rfkernels.ops.quantize import quantize

__all__ = [
    "dequantize_weight",
    "linear",
    "linear_fp8",
    "linear_int8",
    "linear_reference",
    "linear_w4a16",
    "linear_w4a8",
    "lora_shrink",
    "pack_int4",
    "unpack_int4",
]

_ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda y: F.relu(y).square(),
}


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0 .. 15 of `[..., in]`, two a byte, the even one in the low bits: uint8 `[..., in / 2]`."""
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_int4: the last axis must be even, got {tuple(codes.shape)}")
    if codes.numel() and not (0 <= codes.amin() and codes.amax() <= 15):
        raise ValueError(f"pack_int4: codes must be 0 .. 15, got {codes.amin()} .. {codes.amax()}")
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The codes 0 .. 15 of `pack_int4`, uint8 `[..., 2 n]`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantize_weight(
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers `[out, in]` of a stored weight.

    Args:
        weight: `[out, in]` floating, int8 or float8_e4m3fn; or uint8 `[out, in / 2]` of `pack_int4`.
        scale: one number, one per output `[out]` (or `[out, 1]`), or per group of inputs `[out, groups]`.
        zero: of four-bit codes, `[out, groups]`. Absent: W = (q - 8) s; uint8: W = (q - zero) s; floating:
            W = (q - 8) s + zero.
        dtype: of the result and the arithmetic.
    """
    if weight.dtype != torch.uint8:
        numbers = weight.to(dtype)
        return numbers if scale is None else numbers * _column(scale).to(dtype)
    codes = unpack_int4(weight).to(dtype)
    groups = scale.shape[1] if scale.ndim == 2 else 1
    codes = codes.unflatten(-1, (groups, -1))
    integer = zero is not None and not zero.is_floating_point()
    codes = codes - (zero.to(dtype)[..., None] if integer else 8)
    numbers = codes * (scale if scale.ndim == 2 else _column(scale)).to(dtype)[..., None]
    if zero is not None and not integer:
        numbers = numbers + zero.to(dtype)[..., None]
    return numbers.flatten(-2)


def _column(scale: Tensor) -> Tensor:
    return scale.reshape(-1, 1)


def _rows(table: Tensor, rows: int) -> Tensor:
    """Row m of [S, n] tables serves rows m rows/S .. of a call."""
    return table.repeat_interleave(rows // len(table), 0) if len(table) > 1 else table


def linear_reference(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    bias: Tensor | None,
    hidden: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The definition of the op behind all formats, in plain torch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers = x.to(wide)
    if x_scale is not None:
        numbers = numbers * _column(x_scale).to(wide)
    y = numbers @ dequantize_weight(weight, weight_scale, weight_zero, wide).T
    if hidden is not None:
        y = y + hidden.to(wide) @ up.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = _ACTIVATIONS[activation](y)
    if gate is not None:
        y = y * _rows(gate.to(wide), len(x))
    if residual is not None:
        y = y + residual.to(wide)
    if out_scale is not None:
        y = (y / out_scale.to(wide)).round().clamp(-127, 127)
    return y.to(dtype)


def _empty(x, x_scale, weight, *others):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=others[-1])


def _kernel(out, *args):
    out.copy_(linear_reference(*args))


_linear = define(
    "linear",
    "Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, Tensor? weight_zero, Tensor? bias, "
    "Tensor? hidden, Tensor? up, Tensor? gate, Tensor? residual, Tensor? out_scale, str activation, "
    "ScalarType dtype",
    _kernel,
    _empty,
    linear_reference,
)


def _segments(name: str, table: Tensor, x: Tensor) -> Tensor:
    """[*lead, n] with axes of x or ones, as [S, n] whose row m serves rows m rows/S .. of x."""
    lead = (*[1] * (x.ndim - table.ndim), *table.shape[:-1])
    if len(lead) > x.ndim - 1 or any(a not in (1, b) for a, b in zip(lead, x.shape[:-1], strict=True)):
        raise ValueError(f"linear: {name} must be [*lead, n] for x {tuple(x.shape)}, got {tuple(table.shape)}")
    varies = max([0, *(i + 1 for i, a in enumerate(lead) if a != 1)])
    return table.expand(*x.shape[:varies], *lead[varies:], table.shape[-1]).reshape(-1, table.shape[-1])


def _call(x, x_scale, weight, weight_scale, weight_zero, bias, lora, activation, gate, residual, out_scale, dtype):
    if activation not in _ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    hidden, up = (None, None) if lora is None else lora
    rows = x.reshape(-1, x.shape[-1])
    out = _linear(
        rows,
        None if x_scale is None else x_scale.reshape(-1),
        weight,
        weight_scale,
        weight_zero,
        bias,
        None if hidden is None else hidden.reshape(-1, hidden.shape[-1]),
        up,
        None if gate is None else _segments("gate", gate, x),
        None if residual is None else residual.reshape(-1, residual.shape[-1]),
        out_scale,
        activation,
        torch.int8 if out_scale is not None else dtype,
    )
    return out.view(*x.shape[:-1], out.shape[-1])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Returns :math:`r + g \odot f(x W^T + h U^T + b)`.

    Args:
        x: `[*lead, in]`.
        weight: `[out, in]`, of the dtype of x.
        bias: `[out]`.
        weight_scale: float32 `[out]`, multiplies the columns of `x W^T` (DoRA).
        lora: (hidden `[*lead, rank]` of `lora_shrink`, up `[out, rank]`).
        activation: "none", "relu", "gelu", "gelu_tanh", "silu" or "relu2".
        gate: `[*lead, out]` with axes of x or ones.
        residual: `[*lead, out]`.
        out_scale: float32 number: the result is int8 codes of y / out_scale, saturated at 127.
        dtype: of the result, by default that of x.
    """
    return _call(
        x, None, weight, weight_scale, None, bias, lora, activation, gate, residual, out_scale, dtype or x.dtype
    )


def lora_shrink(x: Tensor, down: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""Returns :math:`(x A^T) \odot s`, float32 `[*lead, rank]`: the hidden side of a low-rank branch.

    Args:
        x: `[*lead, in]`.
        down: A, `[rank, in]`, of the dtype of x; several adapters one below the other.
        scale: s, float32 `[rank]` or `[*lead, rank]` with axes of x or ones: `[batch, 1, rank]` gives each sample
            its own adapters, zeros switch one off.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return linear(x, down, gate=None if scale is None else scale, dtype=wide)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    rotation: int = 0,
    lora: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` with int8 weights and int8 tokens (W8A8).

    Args:
        x: `[*lead, in]` floating, quantised here; or the int8 codes of a quantising op, with `x_scale`.
        weight: int8 `[out, in]`.
        weight_scale: float32 `[out]` or one number.
        x_scale: float32 `[*lead]`.
        rotation: 0, 16, 64 or 256: x is rotated before it is quantised, as `weight` was (ConvRot).
        dtype: of the result, by default that of a floating x; bfloat16 for codes.

    Others as in `linear`.
    """
    x, x_scale, dtype = _quantized(x, x_scale, "int8", rotation, dtype)
    return _call(
        x, x_scale, weight, weight_scale, None, bias, lora, activation, gate, residual, out_scale, dtype
    )


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    quantize_input: bool = False,
    rotation: int = 0,
    lora: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` with float8_e4m3fn weights.

    Args:
        x: `[*lead, in]` floating; or float8_e4m3fn codes with `x_scale`.
        weight: float8_e4m3fn `[out, in]`.
        weight_scale: float32 `[out]` or one number; absent: 1.
        quantize_input: quantise a floating x to float8_e4m3fn per row.

    Others as in `linear_int8`.
    """
    if quantize_input or x.dtype == torch.float8_e4m3fn:
        x, x_scale, dtype = _quantized(x, x_scale, "fp8", rotation, dtype)
    return _call(
        x,
        x_scale,
        weight,
        weight_scale,
        None,
        bias,
        lora,
        activation,
        gate,
        residual,
        out_scale,
        dtype or x.dtype,
    )


def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lora: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` with four-bit weights (AWQ, Lin et al., 2023; GPTQ, Frantar et al., 2022).

    Args:
        weight: uint8 `[out, in / 2]` of `pack_int4`.
        weight_scale: floating `[out, groups]`, groups of 32, 64 or 128 inputs; or `[out]`.
        weight_zero: as in `dequantize_weight`.

    Others as in `linear`.
    """
    return _call(
        x,
        None,
        weight,
        weight_scale,
        weight_zero,
        bias,
        lora,
        activation,
        gate,
        residual,
        out_scale,
        dtype or x.dtype,
    )


def linear_w4a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    rotation: int = 0,
    lora: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` with symmetric four-bit weights and int8 tokens: `weight` and `weight_scale` of `linear_w4a16`,
    the others of `linear_int8`."""
    x, x_scale, dtype = _quantized(x, x_scale, "int8", rotation, dtype)
    return _call(
        x, x_scale, weight, weight_scale, None, bias, lora, activation, gate, residual, out_scale, dtype
    )


def _quantized(x: Tensor, x_scale: Tensor | None, format: str, rotation: int, dtype: torch.dtype | None):
    """Codes and scales of x, and the dtype of the result."""
    if x.dtype in (torch.int8, torch.float8_e4m3fn):
        if x_scale is None:
            raise ValueError(f"linear: x_scale must be given beside codes x {x.dtype} {tuple(x.shape)}")
        return x, x_scale, dtype or torch.bfloat16
    if x_scale is not None:
        raise ValueError(f"linear: x_scale belongs to codes, got x {x.dtype} {tuple(x.shape)}")
    return *quantize(x, format, rotation=rotation), dtype or x.dtype
