r"""Linear layers in every storage format of the weight, with one epilogue.

    y = residual + gate * act(x W^T + hidden up^T + bias)

Tokens `x` are `[*lead, in]`, weights `[out, in]` as they lie in files: nothing is packed ahead of a call, so
that an adapter may be merged into a weight, and a weight mapped from a file, at any time. The formats:

    linear       W float64, float32, float16 or bfloat16 like x
    linear_int8  W = codes * scale, int8; x quantised to int8 per row (W8A8), summed exactly in int32
    linear_fp8   W = codes * scale, float8_e4m3fn; x as it is, or quantised to float8_e4m3fn
    linear_w4a16 W = (codes - zero) * scale in groups along `in`, codes 0 .. 15, two a byte; x as it is
    linear_w4a8  the same W beside x quantised to int8

Sums and the epilogue are float32 (float64 for float64 tokens), the result is rounded once. The hidden side of
a low-rank branch is rounded to the dtype of `up` where x has 16 or 8 bits. On the CPU float16 tokens are
widened, bfloat16 ones multiplied as they are where the CPU can.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels.ops._linear import (
    ACTIVATIONS,
    dequantize_weight,
    linear_reference,
    pack_int4,
    run_linear,
    unpack_int4,
)
from rfkernels.ops._register import accumulator

__all__ = [
    "dequantize_weight",
    "linear",
    "linear_fp8",
    "linear_int8",
    "linear_reference",
    "linear_w4a8",
    "linear_w4a16",
    "lora_shrink",
    "pack_int4",
    "unpack_int4",
]

_CODES = (torch.int8, torch.float8_e4m3fn)  # of tokens


def _segments(table: Tensor, x: Tensor) -> Tensor:
    """A gate [*lead, n] with axes of x or ones as [S, n], whose row m serves rows m rows/S .. of x."""
    lead = [1] * (x.ndim - table.ndim) + list(table.shape[:-1])
    if len(lead) != x.ndim - 1 or any(a not in (1, b) for a, b in zip(lead, x.shape[:-1], strict=True)):
        raise ValueError(
            f"linear: gate must be [*lead, out] with axes of x or ones for x {tuple(x.shape)}, got "
            f"{tuple(table.shape)}"
        )
    varies = 0
    for i, length in enumerate(lead):
        if length != 1:
            varies = i + 1
    lead[:varies] = x.shape[:varies]
    return _matrix(table.expand(*lead, table.shape[-1]))


def _matrix(t: Tensor) -> Tensor:
    """[*lead, n] as [rows, n] with neighbours adjacent; a copy only where a view cannot be."""
    rows = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def call_on_rows(
    run: Callable[..., Tensor],
    x: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """`run(x, bias, hidden, up, gate, residual, out_scale, activation, dtype)` on rows of tokens."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.ndim == 0:
        raise ValueError("linear: x must be [*lead, in], got a number")
    hidden, up = (None, None) if lora is None else lora
    default = x.dtype if x.dtype not in _CODES else torch.bfloat16
    out = run(
        _matrix(x),
        bias,
        None if hidden is None else _matrix(hidden),
        up,
        None if gate is None else _segments(gate, x),
        None if residual is None else _matrix(residual),
        out_scale,
        activation,
        torch.int8 if out_scale is not None else dtype or default,
    )
    return out.view(*x.shape[:-1], out.shape[-1])


def _call(
    x,
    weight,
    weight_scale,
    weight_zero,
    bias,
    lora,
    activation,
    gate,
    residual,
    out_scale,
    dtype,
    x_scale=None,
    tokens="as they are",
    rotation=0,
):
    """The op on rows of tokens; `tokens` is the format that floating x is quantised to."""
    codes = x.dtype in _CODES
    if codes != (x_scale is not None):
        raise ValueError(
            f"linear: x_scale must be given for codes and only for them, got x {x.dtype} "
            f"{tuple(x.shape)} and x_scale {None if x_scale is None else tuple(x_scale.shape)}"
        )
    if rotation and (codes or tokens == "as they are"):
        raise ValueError("linear: rotation belongs to floating x that is quantised here")
    x_scale = None if x_scale is None else x_scale.reshape(-1).contiguous()
    weight = weight.contiguous() if weight.is_floating_point() else weight
    how = "as they are" if codes else tokens, rotation
    return call_on_rows(
        lambda rows, *others: run_linear(
            rows, x_scale, weight, weight_scale, weight_zero, *others[:-2], *how, *others[-2:]
        ),
        x,
        bias,
        lora,
        activation,
        gate,
        residual,
        out_scale,
        dtype,
    )


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
    plain = weight_scale is lora is gate is residual is out_scale is None and activation == "none"
    if plain and x.is_cuda and dtype in (None, x.dtype) and weight.dtype == x.dtype:
        return torch.nn.functional.linear(x, weight, bias)  # cuBLASLt
    return _call(x, weight, weight_scale, None, bias, lora, activation, gate, residual, out_scale, dtype)


def lora_shrink(x: Tensor, down: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""Returns :math:`(x A^T) \odot s`, float32 `[*lead, rank]`: the hidden side of a low-rank branch.

    Args:
        x: `[*lead, in]`.
        down: A, `[rank, in]`, of the dtype of x; several adapters one below the other.
        scale: s, float32 `[rank]` or `[*lead, rank]` with axes of x or ones: `[batch, 1, rank]` gives each
            sample its own adapters, zeros switch one off.
    """
    return linear(x, down, gate=scale, dtype=accumulator(x.dtype))


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
    epilogue = (bias, lora, activation, gate, residual, out_scale, dtype)
    return _call(x, weight, weight_scale, None, *epilogue, x_scale, "int8", rotation)


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
    epilogue = (bias, lora, activation, gate, residual, out_scale, dtype)
    return _call(
        x,
        weight,
        weight_scale,
        None,
        *epilogue,
        x_scale,
        "fp8" if quantize_input else "as they are",
        rotation,
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
        x, weight, weight_scale, weight_zero, bias, lora, activation, gate, residual, out_scale, dtype
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
    """`linear` with symmetric four-bit weights and int8 tokens.

    Weight and scale as in `linear_w4a16`, the others as in `linear_int8`.
    """
    epilogue = (bias, lora, activation, gate, residual, out_scale, dtype)
    return _call(x, weight, weight_scale, None, *epilogue, x_scale, "int8", rotation)
