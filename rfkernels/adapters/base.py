"""What every adapter of a linear layer offers.

An adapter changes a layer `f(x) = x W^T + b`, W `[out, in]`, tokens `[*lead, in]`. Four views of one formula:

    forward(x, base)      the definition; `base` is the layer without adapters
    merged(W, b)          the weight and bias of one plain layer, where the formula is affine in x
    factors(W, b)         an exact low-rank form, where there is one
    state_dict()          the tensors under the names that files use; `from_state_dict` reads them
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Adapter", "Factors", "apply_factors", "wide"]


@dataclass(frozen=True)
class Factors:
    """A low-rank form: f(x) becomes k (x W^T) + b + scale (x down^T) (k up)^T + bias, k = column_scale or 1.

    Args:
        down: A, `[rank, in]`.
        up: B, `[out, rank]`; the strength is not in it.
        scale: alpha / rank.
        bias: `[out]`, added to the layer's bias; multiplied by a user's strength as the branch is.
        column_scale: DoRA's k, `[out]`: multiplies the base product and the branch, but not the bias.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    column_scale: Tensor | None = None


class Adapter(nn.Module):
    """An adapter of one linear layer. Families override what they offer."""

    kind = "an adapter"

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The definition: the layer's output `[*lead, out]`, `base` being the layer without adapters."""
        raise TypeError(f"{type(self).__name__}: a family must define forward")

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain layer that does the same, in float32 (float64 for a float64 weight).

        Raises ValueError where no such layer exists.
        """
        raise ValueError(f"{self.kind} cannot be merged into a weight")

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """The exact low-rank form, None where there is none. Some need the layer's weight and bias."""
        return None


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of merges: float32, float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def apply_factors(weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """The merged weight and bias of `factors`, in the wide dtype."""
    merged = wide(weight)
    dtype = merged.dtype
    merged = torch.addmm(merged, factors.up.to(dtype), factors.down.to(dtype), alpha=factors.scale)
    if factors.column_scale is not None:
        merged = factors.column_scale.to(dtype)[:, None] * merged
    if bias is not None:
        bias = bias.to(dtype)
    if factors.bias is not None:
        bias = factors.bias.to(dtype) if bias is None else bias + factors.bias.to(dtype)
    return merged, bias
