"""Quantising forms: a region that hands eight-bit codes to the linear layer behind it, in one pass over
memory.

`codes` are int8 or float8_e4m3fn in the shape of the tokens, the value of a code is `codes * scales[...,
None]`:

- "int8": per row `scale = amax / 127`, `code = round(x / scale)` in -127 .. 127;
- "fp8": per row `scale = amax / 448`, or one given `tensor_scale`, beyond which values saturate;

rounded to nearest even (the code is made of `x` times the reciprocal, in float32). A row of zeros has codes 0
and a small positive scale. A row with a NaN or an infinity has the scale NaN and codes 0, and with a
`tensor_scale` the code NaN where one stood: what is made of it is NaN, never a wrong number.

`rotation` G = 16, 64 or 256 multiplies groups of G neighbours by the orthogonal matrix `rotation_matrix(G)`
first, which spreads outliers over the group (ConvRot; QuaRot, Ashkboos et al., 2024); the weights of the
linear layer carry the same.

Tiers: "fast" quantises the float32 values of the region, "exact" what eager torch would have stored. No
gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._norm_definitions import (
    gated_residual_norm_modulate_reference,
    norm_modulate_reference,
)
from rfkernels.ops._norm_gradients import like
from rfkernels.ops._register import Op, define
from rfkernels.ops.activation import activation_reference, gated_activation_reference, split_bias
from rfkernels.ops.norm import BRANCH, PARAMETERS, checked_index

__all__ = [
    "activation_quantize",
    "activation_quantize_reference",
    "gated_activation_quantize",
    "gated_activation_quantize_reference",
    "gated_residual_norm_modulate_quantize",
    "gated_residual_norm_modulate_quantize_reference",
    "norm_modulate_quantize",
    "norm_modulate_quantize_reference",
    "quantize",
    "quantize_reference",
    "rotation_matrix",
]

_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LIMIT = {"int8": 127.0, "fp8": 448.0}


def _dtype(format: str) -> torch.dtype:
    if format not in _CODES:
        raise ValueError(f"quantize: format must be 'int8' or 'fp8', got {format!r}")
    return _CODES[format]


def rotation_matrix(group: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix of a rotation: Kronecker powers of the 4 x 4 Hadamard matrix with equal row sums, over
    sqrt(group).

        Symmetric and its own inverse. `group` is 4, 16, 64, 256, ...
    """
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=dtype) / 2
    matrix = torch.ones(1, 1, dtype=dtype)
    while len(matrix) < group:
        matrix = torch.kron(matrix, h4)
    if len(matrix) != group:
        raise ValueError(f"rotation_matrix: group must be a power of 4, got {group}")
    return matrix


def rotate(x: Tensor, group: int) -> Tensor:
    """Groups of `group` neighbours times `rotation_matrix(group)`; its own inverse. 0: x as it is."""
    if not group:
        return x
    matrix = rotation_matrix(group).to(x.device, x.dtype)
    return (x.unflatten(-1, (-1, group)) @ matrix).flatten(-2)


def quantize_reference(
    x: Tensor, format: str = "int8", tensor_scale: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """The definition of `quantize` in plain torch."""
    x, limit = rotate(x, rotation).float(), _LIMIT[format]
    if tensor_scale is not None:
        scaled = (x * (1 / tensor_scale.float())).clamp(-limit, limit)
        return torch.where(x.isfinite(), scaled, torch.nan).to(_CODES[format]), tensor_scale
    finite = x.isfinite().all(-1)
    top = torch.where(finite, x.abs().amax(-1), 1).clamp_min(1e-28)
    scaled = torch.where(finite[..., None], x, 0) * (limit / top)[..., None]
    codes = scaled.round() if format == "int8" else scaled
    return codes.to(_CODES[format]), torch.where(finite, top / limit, torch.nan)


def norm_modulate_quantize_reference(
    x, scale, shift, index, weight, bias, norm, eps, tier, format, tensor_scale, rotation
):
    """The definition of `norm_modulate_quantize` in plain torch."""
    n = norm_modulate_reference(x, scale, shift, index, weight, bias, norm, eps)
    return quantize_reference(n, format, tensor_scale, rotation)


def gated_residual_norm_modulate_quantize_reference(x, y, *args):
    """The definition of `gated_residual_norm_modulate_quantize` in plain torch."""
    *region, format, tensor_scale, rotation = args
    r, n = gated_residual_norm_modulate_reference(x, y, *region)
    return r, *quantize_reference(n, format, tensor_scale, rotation)


def activation_quantize_reference(x, bias, kind, tier, format, tensor_scale, rotation):
    """The definition of `activation_quantize` in plain torch."""
    return quantize_reference(activation_reference(x, bias, kind), format, tensor_scale, rotation)


def gated_activation_quantize_reference(x, up, bias, up_bias, kind, gate_first, tier, *coding):
    """The definition of `gated_activation_quantize` in plain torch."""
    return quantize_reference(gated_activation_reference(x, up, bias, up_bias, kind, gate_first), *coding)


def quantize(
    x: Tensor, format: str = "int8", *, tensor_scale: Tensor | None = None, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the codes and scales of the rows of `x`, `[*lead, width]`.

    Args:
        x: float64, float32, float16 or bfloat16; the leading axes may have any strides.
        format: "int8" or "fp8".
        tensor_scale: float32 number on the device of `x`, for "fp8"; absent: a scale per row.
        rotation: 0, 16, 64 or 256, a divisor of the width.

    Returns:
        codes like `x`, int8 or float8_e4m3fn; scales, float32 `[*lead]`, or `tensor_scale`.

    Raises:
        ValueError: an unknown format, a rotation that does not divide the width, tensors that do not fit.
    """
    return norm_modulate_quantize(x, norm="none", format=format, tensor_scale=tensor_scale, rotation=rotation)


def norm_modulate_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    tier: str = "fast",
    format: str = "int8",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """`quantize` of `norm_modulate`: returns codes and scales. Arguments and errors as there."""
    index = checked_index("norm_modulate_quantize", index, scale, shift)
    region = (x, scale, shift, index, weight, bias, norm, eps, tier)
    codes, scales = _norm_modulate_quantize(*region, format, tensor_scale, rotation)
    return codes, scales if tensor_scale is None else tensor_scale


def gated_residual_norm_modulate_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    index: Tensor | None = None,
    gate_activation: str = "none",
    branch_norm: str = "none",
    branch_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    tier: str = "fast",
    format: str = "int8",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_residual_norm_modulate` with its second result quantised: returns x', codes, scales."""
    index = checked_index("gated_residual_norm_modulate_quantize", index, gate, scale, shift)
    branch = (gate_activation, branch_norm, branch_weight)
    region = (x, y, gate, scale, shift, index, *branch, weight, bias, norm, eps, tier)
    x_out, codes, scales = _gated_residual_norm_modulate_quantize(*region, format, tensor_scale, rotation)
    return x_out, codes, scales if tensor_scale is None else tensor_scale


def activation_quantize(
    x: Tensor,
    kind: str,
    *,
    bias: Tensor | None = None,
    tier: str = "fast",
    format: str = "int8",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """`quantize` of `activation`: returns codes and scales. Arguments and errors as there."""
    codes, scales = _activation_quantize(x, bias, kind, tier, format, tensor_scale, rotation)
    return codes, scales if tensor_scale is None else tensor_scale


def gated_activation_quantize(
    x: Tensor,
    kind: str,
    *,
    up: Tensor | None = None,
    bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    gate_first: bool = True,
    tier: str = "fast",
    format: str = "int8",
    tensor_scale: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """`quantize` of `gated_activation`: returns codes and scales. Arguments and errors as there."""
    bias, up_bias = split_bias("gated_activation_quantize", up, bias)
    region = (x, up, bias, up_bias, kind, gate_first, tier)
    codes, scales = _gated_activation_quantize(*region, format, tensor_scale, rotation)
    return codes, scales if tensor_scale is None else tensor_scale


# --- registration ---


def _empty(x: Tensor, format: str, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    scales = x.shape[:-1] if tensor_scale is None else (0,)
    return x.new_empty(x.shape, dtype=_dtype(format)), x.new_empty(scales, dtype=torch.float32)


def _bytes(codes: Tensor) -> Tensor:
    """Codes as a type that every DLPack knows."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def _define(
    name: str, params: str, reference: Callable, tokens: Callable, results: tuple[str, ...] = ()
) -> Op:
    """Registers an op that ends in codes and scales; `results` come before, each like the first argument.

    `tokens(*args)` is shaped as the codes. The last three arguments are format, tensor_scale, rotation; the
    kernel sees the format by the dtype of the codes.
    """
    kernel, at = getattr(_C, name), len(results)
    return define(
        name,
        f"{params}, str format, Tensor? tensor_scale, int rotation",
        lambda *args: kernel(*args[:at], _bytes(args[at]), *args[at + 1 : -3], *args[-2:]),
        lambda *args: (*(like(args[0]) for _ in results), *_empty(tokens(*args), *args[-3:-1])),
        reference,
        outputs=(*results, "codes", "scales"),
    )


_norm_modulate_quantize = _define(
    "norm_modulate_quantize",
    f"Tensor x, Tensor? scale, Tensor? shift, Tensor? index, {PARAMETERS}",
    norm_modulate_quantize_reference,
    lambda x, *_: x,
)
_gated_residual_norm_modulate_quantize = _define(
    "gated_residual_norm_modulate_quantize",
    f"Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? index, {BRANCH}, {PARAMETERS}",
    gated_residual_norm_modulate_quantize_reference,
    lambda x, *_: x,
    results=("x_out",),
)
_activation_quantize = _define(
    "activation_quantize",
    "Tensor x, Tensor? bias, str kind, str tier",
    activation_quantize_reference,
    lambda x, *_: x,
)
_gated_activation_quantize = _define(
    "gated_activation_quantize",
    "Tensor x, Tensor? up, Tensor? bias, Tensor? up_bias, str kind, bool gate_first, str tier",
    gated_activation_quantize_reference,
    lambda x, up, *_: x if up is not None else x[..., : x.shape[-1] // 2],
)
