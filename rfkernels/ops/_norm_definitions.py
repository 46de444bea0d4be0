"""The definitions of the norm room in plain torch."""

import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "gated_residual_norm_modulate_reference",
    "gated_residual_reference",
    "norm_modulate_reference",
]


def table_of(table: Tensor, index: Tensor | None, x: Tensor) -> Tensor:
    """A parameter table with axes that broadcast against `x`."""
    if index is not None:
        table = table[index.long()]
    return table.reshape(*table.shape[:-1], *[1] * (x.ndim - table.ndim), table.shape[-1])


def normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) if norm == "rms" else x


def norm_modulate_reference(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    tier: str = "fast",
) -> Tensor:
    """The definition of `norm_modulate` in plain torch; of the tiers only the roundings differ."""
    n = normalise(x, norm, eps)
    n = n if weight is None else n * weight
    n = n if bias is None else n + bias
    n = n if scale is None else n * (1 + table_of(scale, index, x))
    n = n if shift is None else n + table_of(shift, index, x)
    return n.to(x.dtype)


def gated_residual_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    gate_activation: str = "none",
    branch_norm: str = "none",
    branch_weight: Tensor | None = None,
    eps: float = 1e-6,
    tier: str = "fast",
) -> Tensor:
    """The definition of `gated_residual` in plain torch."""
    branch = normalise(y, branch_norm, eps)
    branch = branch if branch_weight is None else branch * branch_weight
    if gate is not None:
        gate = table_of(gate, index, x)
        branch = branch * (gate.tanh() if gate_activation == "tanh" else gate)
    return (x + branch).to(x.dtype)


def gated_residual_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    index: Tensor | None = None,
    gate_activation: str = "none",
    branch_norm: str = "none",
    branch_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    tier: str = "fast",
) -> tuple[Tensor, Tensor]:
    """The definition of `gated_residual_norm_modulate` in plain torch."""
    r = gated_residual_reference(x, y, gate, index, gate_activation, branch_norm, branch_weight, eps)
    return r, norm_modulate_reference(r, scale, shift, index, weight, bias, norm, eps)
