"""What every adapter of a linear layer offers.

An adapter changes a layer `f(x) = x W^T + b`, W `[out, in]`, tokens `[*lead, in]`. Four views of one formula:

    forward(x, base)      the definition; `base` is the layer without adapters
    merged(W, b)          the weight and bias of one plain layer, where the formula is affine in x
    factors(W, b)         an exact low-rank form, where there is one
    state_dict()          the tensors under the names that files use; `from_state_dict` reads them

Tensors are parameters without gradient: `adapter.requires_grad_()` trains them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rfkernels.ops._register import accumulator
from rfkernels.ops.linear import linear, lora_shrink

__all__ = ["Adapter", "Additive", "Exact", "Factors", "apply_factors", "run", "shrink", "weight_of", "wide"]

Branch = tuple[Tensor, Tensor, Tensor | None]  # (hidden [*lead, rank], up [out, rank], bias [out])


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


class Exact(nn.Module):
    """A module whose buffers named in `exact` move with it but keep their dtype: scales are not rounded."""

    exact: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers.pop(name) for name in self.exact if name in self._buffers}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            self._buffers[name] = tensor.to(fn(tensor).device)
        return self


class Adapter(Exact):
    """An adapter of one linear layer, made of named tensors.

    A family names its tensors in `required` and `optional`, and overrides `forward` and what else it offers.
    """

    kind: ClassVar[str] = "an adapter"
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        check_names(self.kind, tensors, self.required, self.optional)
        for name, tensor in tensors.items():
            _hold(self, name, tensor)

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor], **hyper) -> "Adapter":
        """The adapter of a file's tensors, the layer's prefix stripped; `hyper` is what files keep elsewhere.

        Raises ValueError for a name that is missing or unknown: nothing is dropped.
        """
        return cls(tensors, **hyper)

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of that name, None where the file has none."""
        *path, leaf = name.split(".")
        module = self
        for part in path:
            module = module._modules.get(part)
            if module is None:
                return None
        return getattr(module, leaf) if leaf in module._parameters or leaf in module._buffers else None

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The definition: the layer's output `[*lead, out]`, `base` being the layer without adapters."""
        raise TypeError(f"{type(self).__name__}: a family must define forward")

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain layer that does the same, in float32 (float64 for a float64 weight).

        Raises ValueError where no such layer exists, or `weight` holds codes.
        """
        raise ValueError(f"{self.kind} cannot be merged into a weight")

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """The exact low-rank form, None where there is none. Some need the layer's weight and bias."""
        return None


class Additive(Adapter):
    """An adapter that adds `delta(x)` to the layer's output, whatever the layer is."""

    def delta(self, x: Tensor) -> Tensor:
        """What is added, `[*lead, out]`, not rounded: float32 (float64 for float64 tokens)."""
        raise TypeError(f"{type(self).__name__}: a family must define delta")

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """base(x) + delta(x), rounded once to the dtype of x."""
        return (wide(base(x)) + self.delta(x)).to(x.dtype)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of sums and merges: float32, float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_weight(kind: str, weight: Tensor, shape: Iterable[int] | None = None) -> Tensor:
    """The weight of a merge in the wide dtype. ValueError for codes and for a shape that does not fit."""
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{kind} merges exactly only into a floating weight, got {weight.dtype}: dequantise it first"
        )
    if shape is not None and tuple(weight.shape) != tuple(shape):
        raise ValueError(f"{kind} is for a weight {list(shape)}, got {list(weight.shape)}")
    return wide(weight)


def check_names(
    kind: str, tensors: dict[str, Tensor], required: Iterable[str], optional: Iterable[str]
) -> None:
    """Raises ValueError where a required name is missing or a name is neither required nor optional."""
    required = tuple(required)
    missing = [name for name in required if name not in tensors]
    unknown = [name for name in tensors if name not in (*required, *optional)]
    if missing or unknown:
        raise ValueError(
            f"{kind} has the tensors {', '.join(required)}"
            + (f" and may have {', '.join(optional)}" if optional else "")
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )


def apply_factors(weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """The merged weight and bias of `factors`, in the wide dtype."""
    merged = wide(weight)
    dtype = merged.dtype
    merged = torch.addmm(merged, factors.up.to(dtype), factors.down.to(dtype), alpha=factors.scale)
    if factors.column_scale is not None:
        merged = factors.column_scale.to(dtype)[:, None] * merged
    return merged, add_bias(bias, factors.bias, dtype)


def add_bias(bias: Tensor | None, extra: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of what is there."""
    present = [b.to(dtype) for b in (bias, extra) if b is not None]
    return sum(present) if present else None


def weight_of(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in]` and bias of a layer, quantised or not, for adapters that need them."""
    if hasattr(base, "dequantized"):
        return base.dequantized(), base.bias
    if isinstance(getattr(base, "weight", None), Tensor):
        return base.weight, getattr(base, "bias", None)
    raise ValueError(f"this adapter needs the layer's weight, got {type(base).__name__} without one")


def shrink(x: Tensor, down: Tensor, scale: Tensor | None = None) -> Tensor:
    """`ops.lora_shrink` with factors and scales of any dtype."""
    if scale is not None:
        scale = scale.to(accumulator(x.dtype))
    return lora_shrink(x, down.to(x.dtype), scale)


def run_linear(
    base: nn.Module,
    x: Tensor,
    *,
    lora: tuple[Tensor, Tensor] | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`base.run`, for an `nn.Linear` the same through `ops.linear`.

    Args:
        lora: (hidden `[*lead, rank]`, up `[out, rank]`).
        column_scale: float32 `[out]`, multiplies the base's product alone.
        bias: `[out]`, added to the layer's own.

    Others as in `ops.linear`.
    """
    if hasattr(base, "run"):
        return base.run(
            x,
            lora=lora,
            column_scale=column_scale,
            bias=bias,
            activation=activation,
            gate=gate,
            residual=residual,
        )
    return linear(
        x,
        base.weight,
        base.bias if bias is None else add_bias(base.bias, bias, accumulator(x.dtype)),
        weight_scale=column_scale,
        lora=lora,
        activation=activation,
        gate=gate,
        residual=residual,
    )


def run(base: Callable[[Tensor], Tensor], x: Tensor, branch: Branch, **epilogue) -> Tensor:
    """base(x) + hidden up^T + bias, in one pass where the layer can: it has `run`, or is an `nn.Linear`.

    Args:
        branch: (hidden `[*lead, rank]`, up `[out, rank]`, bias `[out]` or None), of an adapter's `branch`.
        epilogue: `activation`, `gate`, `residual` of `ops.linear`.
    """
    hidden, up, extra = branch
    up = up.to(x.dtype)
    if hasattr(base, "run") or isinstance(base, nn.Linear):
        return run_linear(base, x, lora=(hidden, up), bias=extra, **epilogue)
    if epilogue:
        raise ValueError(f"an epilogue needs a linear layer, got {type(base).__name__}")
    y = wide(base(x)) + hidden @ up.to(hidden.dtype).T
    return (y if extra is None else y + extra.to(hidden.dtype)).to(x.dtype)


def _hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Registers a tensor under a name that may have dots."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    if tensor.is_floating_point():
        module.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        module.register_buffer(leaf, tensor)
