r"""Activation functions of feed-forward layers, with the bias of the layer before them, and gated products.

Tensors are `[*lead, width]`, float64, float32, float16 or bfloat16, with neighbours along the last axis
adjacent and any strides before it. Biases have the dtype of x, or are float32 beside 16-bit tokens.

    gelu        x P(N <= x) = x/2 (1 + erf(x / sqrt(2)))
    gelu_tanh   x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    silu        x / (1 + e^-x)
    relu2       max(x, 0)^2

`tier="fast"` computes in float32 (float64 for float64) and rounds once; `"exact"` rounds where eager torch
does: after the bias, after the function, after the product. The functions keep their accuracy in the tails,
where torch's own float32 gelus lose theirs. Gradients are computed in float32 from the inputs, which are all
that is saved, in one kernel; they have no gradient of their own. All raise ValueError for tensors, kinds or
tiers that do not fit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import accumulator, define

__all__ = [
    "activation",
    "activation_reference",
    "gated_activation",
    "gated_activation_reference",
    "geglu",
    "gelu",
    "silu",
    "squared_relu",
    "swiglu",
]


def activation(
    x: Tensor, kind: str, *, bias: Tensor | None = None, tier: str = "fast", out: Tensor | None = None
) -> Tensor:
    r"""Returns :math:`f(x + b)` for an activation function f.

    Args:
        x: `[*lead, width]`.
        kind: "gelu" (erf), "gelu_tanh", "silu" or "relu2".
        bias: `[width]`.
        tier: "fast" or "exact".
        out: where to write, `x` itself allowed; no gradient then.
    """
    return _activation(x, bias, kind, tier, out=out)


def gated_activation(
    x: Tensor,
    kind: str,
    *,
    up: Tensor | None = None,
    bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    gate_first: bool = True,
    tier: str = "fast",
    out: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`f(g + b)\,(u + c)`: SwiGLU, GEGLU and their like (Shazeer, "GLU variants improve
    transformer", 2020).

    Args:
        x: gate and up side by side, `[*lead, 2 width]`; or with `up` the gate alone, `[*lead, width]`.
        kind: of f, as in `activation`.
        up: `[*lead, width]`.
        bias: b and c as x holds gate and up, `[2 width]`; with `up` a tuple (b, c), each `[width]` or None.
        gate_first: whether the gate is the first half of x (FLUX.2) or the second (SwiGLU of diffusers).
        tier: "fast" or "exact".
        out: where to write, `[*lead, width]`; with `up` the gate or `up` itself allowed; no gradient then.
    """
    bias, up_bias = split_bias("gated_activation", up, bias)
    return _gated_activation(x, up, bias, up_bias, kind, gate_first, tier, out=out)


def split_bias(
    op: str, up: Tensor | None, bias: Tensor | tuple[Tensor | None, Tensor | None] | None
) -> tuple[Tensor | None, Tensor | None]:
    """The biases of a packed x, or of gate and up."""
    pair = isinstance(bias, (tuple, list))
    if up is None:
        if pair:
            raise ValueError(f"{op}: bias must be one tensor [2 width] beside a packed x, got a tuple")
        return bias, None
    if bias is None:
        return None, None
    if not pair or len(bias) != 2:
        raise ValueError(f"{op}: bias must be a tuple (of the gate, of up) where up is given")
    return tuple(bias)


def gelu(x: Tensor, approximate: str = "none", bias: Tensor | None = None) -> Tensor:
    """`activation` "gelu", or "gelu_tanh" with `approximate="tanh"`, as in `torch.nn.functional.gelu`."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be none or tanh, got {approximate}")
    return activation(x, "gelu" if approximate == "none" else "gelu_tanh", bias=bias)


def silu(x: Tensor) -> Tensor:
    """`activation` "silu"."""
    return activation(x, "silu")


def squared_relu(x: Tensor) -> Tensor:
    """`activation` "relu2" (So et al., "Primer", 2021)."""
    return activation(x, "relu2")


def swiglu(x: Tensor, up: Tensor | None = None, gate_first: bool = True) -> Tensor:
    """`gated_activation` "silu"."""
    return gated_activation(x, "silu", up=up, gate_first=gate_first)


def geglu(x: Tensor, up: Tensor | None = None, gate_first: bool = True) -> Tensor:
    """`gated_activation` "gelu"."""
    return gated_activation(x, "gelu", up=up, gate_first=gate_first)


_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else (x + bias).to(x.dtype)


def activation_reference(x: Tensor, bias: Tensor | None, kind: str, tier: str = "fast") -> Tensor:
    """The definition of `activation` in plain torch; in 16 bits, the exact tier."""
    return _FUNCTIONS[kind](_add(x, bias))


def gated_activation_reference(
    x: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    up_bias: Tensor | None,
    kind: str,
    gate_first: bool = True,
    tier: str = "fast",
) -> Tensor:
    """The definition of `gated_activation` in plain torch; in 16 bits, the exact tier."""
    if up is None:
        gate, up = _add(x, bias).chunk(2, -1)[:: 1 if gate_first else -1]
    else:
        gate, up = _add(x, bias), _add(up, up_bias)
    return _FUNCTIONS[kind](gate) * up


def _dense(like: Tensor, width: int) -> Tensor:
    return like.new_empty((*like.shape[:-1], width))


def _width(x: Tensor) -> int:
    return x.shape[-1] if x.ndim else 0


def _sum_of_columns(dx: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias."""
    return dx.reshape(-1, dx.shape[-1]).sum(0, dtype=accumulator(dx.dtype)).to(bias.dtype)


def _activation_backward_reference(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The gradient of x, by torch."""
    return torch.func.vjp(lambda x: activation_reference(x, bias, kind), x)[1](grad)[0]


_activation_grad = define(
    "activation_backward",
    "Tensor grad, Tensor x, Tensor? bias, str kind",
    _C.activation_backward,
    lambda grad, x, *_: _dense(x, _width(x)),
    _activation_backward_reference,
)


def _activation_backward(grad, needs, x, bias, kind, tier):
    dx = _activation_grad(grad, x, bias, kind)
    return dx, _sum_of_columns(dx, bias) if needs[1] else None, None, None


_activation = define(
    "activation",
    "Tensor x, Tensor? bias, str kind, str tier",
    _C.activation,
    lambda x, *_: _dense(x, _width(x)),
    activation_reference,
    _activation_backward,
)


def _gated_activation_backward_reference(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    up_bias: Tensor | None,
    kind: str,
    gate_first: bool,
) -> Tensor:
    """The gradients of gate and up side by side, by torch."""
    if up is None:
        return torch.func.vjp(lambda x: gated_activation_reference(x, None, bias, None, kind, gate_first), x)[
            1
        ](grad)[0]
    grads = torch.func.vjp(lambda x, up: gated_activation_reference(x, up, bias, up_bias, kind), x, up)
    return torch.cat(grads[1](grad), -1)


_gated_activation_grad = define(
    "gated_activation_backward",
    "Tensor grad, Tensor x, Tensor? up, Tensor? bias, Tensor? up_bias, str kind, bool gate_first",
    _C.gated_activation_backward,
    lambda grad, x, up, *_: _dense(x, _width(x) * (1 if up is None else 2)),
    _gated_activation_backward_reference,
)


def _gated_activation_backward(grad, needs, x, up, bias, up_bias, kind, gate_first, tier):
    packed = _gated_activation_grad(grad, x, up, bias, up_bias, kind, gate_first)
    dx, d_up = (packed, None) if up is None else packed.chunk(2, -1)
    return (
        dx if needs[0] else None,
        d_up if needs[1] else None,
        _sum_of_columns(dx, bias) if needs[2] else None,
        _sum_of_columns(d_up, up_bias) if needs[3] else None,
        None,
        None,
        None,
    )


_gated_activation = define(
    "gated_activation",
    "Tensor x, Tensor? up, Tensor? bias, Tensor? up_bias, str kind, bool gate_first, str tier",
    _C.gated_activation,
    lambda x, up, *_: _dense(x, _width(x) // (2 if up is None else 1)),
    gated_activation_reference,
    _gated_activation_backward,
)
