"""The op behind every linear layer: its definition, registration and gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import accumulator, define
from rfkernels.ops._workspace import workspace_of
from rfkernels.ops.quantize import quantize, quantize_reference, rotate

ACTIVATIONS = {
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
    if codes.numel() and not (codes.amin() >= 0 and codes.amax() <= 15):
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
    tokens: str,
    rotation: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The definition of the op behind all formats, in plain torch.

    Tokens that are quantised have the gradient of tokens that are not (straight through).
    """
    wide = accumulator(x.dtype)
    numbers = rotate(x.to(wide), rotation)
    if tokens != "as they are":
        codes, scale = quantize_reference(numbers.detach(), tokens)
        numbers = numbers + (codes.to(wide) * scale[..., None].to(wide) - numbers).detach()
    if x_scale is not None:
        numbers = numbers * _column(x_scale).to(wide)
    y = numbers @ dequantize_weight(weight, weight_scale, weight_zero, wide).T
    if hidden is not None:
        y = y + hidden.to(wide) @ up.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = ACTIVATIONS[activation](y)
    if gate is not None:
        y = y * _rows(gate.to(wide), len(x))
    if residual is not None:
        y = y + residual.to(wide)
    if out_scale is not None:
        y = (y / out_scale.to(wide)).round().clamp(-127, 127)
    return y.to(dtype)


def _empty(x, x_scale, weight, *others):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=others[-1])


def _bytes(t: Tensor | None) -> Tensor | None:
    return t.view(torch.uint8) if t is not None and t.dtype == torch.float8_e4m3fn else t


def _kernel(out, x, x_scale, *others):
    *parameters, tokens, rotation, activation, _ = others
    if tokens != "as they are":
        x, x_scale = quantize(x, tokens, rotation=rotation)
    tensors = [_bytes(t) for t in (x, x_scale, *parameters)]
    x, _, weight, weight_scale, weight_zero, _, _, up = tensors[:8]
    workspace = None
    if x.device.type == "cpu":
        size = _C.linear_workspace(x, weight, weight_scale, weight_zero, up)
        workspace = workspace_of(size, x.device)
    _C.linear(out, *tensors, workspace, activation)


def linear_backward(grad, needs, *saved):
    (x, x_scale, weight, weight_scale, weight_zero, bias, hidden, up, gate, residual) = saved[:10]
    out_scale, tokens, rotation, activation, _ = saved[10:]
    if out_scale is not None:
        raise RuntimeError("linear: codes have no gradient, call it without out_scale")
    wide = accumulator(x.dtype)
    grad, grads = grad.to(wide), [None] * len(saved)
    if needs[9]:
        grads[9] = grad.to(residual.dtype)
    if gate is not None or activation != "none":  # the sum before the activation, once more
        before = (x, x_scale, weight, weight_scale, weight_zero, bias, hidden, up, None, None, None)
        total = run_linear(*before, tokens, rotation, "none", wide)
        value, pull = torch.func.vjp(ACTIVATIONS[activation], total)
        if needs[8]:
            grads[8] = (grad * value).unflatten(0, (len(gate), -1)).sum(1).to(gate.dtype)
        grad = pull(grad if gate is None else grad * _rows(gate.to(wide), len(x)))[0]
    if needs[5]:
        grads[5] = grad.sum(0).to(bias.dtype)
    if needs[6]:
        grads[6] = (grad.to(up.dtype) @ up).to(hidden.dtype)
    if needs[7]:
        grads[7] = (grad.T @ hidden).to(up.dtype)
    if needs[0]:
        numbers = dequantize_weight(weight, weight_scale, weight_zero, x.dtype)
        grads[0] = rotate(grad.to(x.dtype) @ numbers, rotation)
    if needs[2]:
        scaled = grad if weight_scale is None else grad * weight_scale.reshape(1, -1)
        grads[2] = (scaled.to(x.dtype).T @ x).to(weight.dtype)
    if needs[3] and weight.is_floating_point():
        grads[3] = (grad * (x @ weight.T)).sum(0).sum_to_size(weight_scale.shape).to(weight_scale.dtype)
    return tuple(grads)


run_linear = define(
    "linear",
    "Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, Tensor? weight_zero, Tensor? bias, "
    "Tensor? hidden, Tensor? up, Tensor? gate, Tensor? residual, Tensor? out_scale, str tokens, "
    "int rotation, str activation, ScalarType dtype",
    _kernel,
    _empty,
    linear_reference,
    linear_backward,
)
