"""Structured pruning adapters (Hedegaard et al., 2022): fine-tuning of a layer that loses channels meanwhile.

    SPLoRA   W' = W + C R, C [out, r], R [r, in]
    SPPaRA   W' = W + P^T, P [in, out]
    SPLoPA   W' = W + sum_p pos_p (x) (c_p r_p), prototypes [p, q] of rank 1 on a grid of positions

Of an odd convolution kernel the first two change the centre tap. With masks m of kept channels the weight is
W' * (m_out m_in^T) and the bias (b + adapter_bias) * m_out: a pruned output is zero. Merging and slicing
commute.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels.adapters.base import Adapter, Factors, add_bias, check_weight, weight_of, wide
from rfkernels.adapters.kronecker import kron_apply, kron_sum
from rfkernels.ops._register import accumulator

__all__ = ["SPLoPA", "SPLoRA", "SPPaRA"]

_MASKS = ("in_features_mask", "out_features_mask")


class _Pruned(Adapter):
    """What the three share: masks, the merge, the slice."""

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        raise TypeError(f"{type(self).__name__}: a family must define delta_weight")

    def sliced_tensors(self, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__}: a family must define sliced_tensors")

    def delta(self, x: Tensor) -> Tensor:
        """x dW^T without masks and bias, not rounded."""
        return wide(x) @ self.delta_weight(accumulator(x.dtype)).T

    @property
    def pruned(self) -> bool:
        return any(self.tensor(m) is not None for m in _MASKS)

    def masks(self) -> tuple[Tensor, Tensor]:
        """Kept inputs and outputs, bool, ones where the file has none."""
        out, features = self.delta_weight().shape
        sizes = {"in_features_mask": features, "out_features_mask": out}
        device = next(self.parameters()).device
        masks = []
        for name in _MASKS:
            mask = self.tensor(name)
            mask = torch.ones(sizes[name], dtype=torch.bool, device=device) if mask is None else mask.bool()
            if mask.shape != (sizes[name],):
                raise ValueError(f"{self.kind}: {name} must be [{sizes[name]}], got {list(mask.shape)}")
            masks.append(mask)
        return masks[0], masks[1]

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """base(x) + x dW^T + adapter_bias; with masks the masked layer, which needs the layer's weight."""
        if self.pruned:
            weight, bias = self.merged(*weight_of(base))
            y = wide(x).to(weight.dtype) @ weight.T
            return (y if bias is None else y + bias).to(x.dtype)
        y = wide(base(x)) + self.delta(x)
        extra = self.tensor("adapter_bias")
        return (y if extra is None else y + extra.to(y.dtype)).to(x.dtype)

    def _whole(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.delta_weight(accumulator(weight.dtype))
        weight = check_weight(self.kind, weight, (*delta.shape, *weight.shape[2:]))
        kernel = weight.shape[2:]
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"{self.kind}: a kernel needs a centre, got a weight {list(weight.shape)}")
        merged = weight.clone()
        merged[(..., *(k // 2 for k in kernel))] += delta
        return merged, add_bias(bias, self.tensor("adapter_bias"), weight.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W' of full size, pruned channels zero."""
        merged, bias = self._whole(weight, bias)
        if self.pruned:
            keep_in, keep_out = self.masks()
            keep = (keep_out[:, None] & keep_in).view(*merged.shape[:2], *[1] * (merged.ndim - 2))
            merged = merged * keep
            bias = None if bias is None else bias * keep_out
        return merged, bias

    def sliced(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W' of the kept channels only: the smaller layer, for inputs that lack the pruned ones."""
        merged, bias = self._whole(weight, bias)
        keep_in, keep_out = self.masks()
        return merged[keep_out][:, keep_in], None if bias is None else bias[keep_out]

    def slice(self) -> "_Pruned":
        """The adapter of the sliced layer, without masks."""
        keep_in, keep_out = self.masks()
        tensors = self.sliced_tensors(keep_out, keep_in)
        if self.tensor("adapter_bias") is not None:
            tensors["adapter_bias"] = self.tensor("adapter_bias")[keep_out]
        return type(self)(tensors)


class SPLoRA(_Pruned):
    """A LoRA whose layer is pruned.

    Args:
        tensors: `adapter.cols` `[1, out, r]`, `adapter.rows` `[1, r, in]` (the leading axis counts groups:
            one), optional `adapter_bias` `[out]`, `in_features_mask` `[in]`, `out_features_mask` `[out]`.
    """

    kind = "SPLoRA"
    required = ("adapter.cols", "adapter.rows")
    optional = ("adapter_bias", *_MASKS)

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        cols, rows = (self.tensor(n) for n in self.required)
        if not cols.ndim == rows.ndim == 3 or len(cols) + len(rows) != 2 or cols.shape[2] != rows.shape[1]:
            shapes = f"{list(cols.shape)}, {list(rows.shape)}"
            raise ValueError(f"SPLoRA: cols [1, out, r], rows [1, r, in] required, got {shapes}")

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """C R, `[out, in]`."""
        return self.tensor("adapter.cols")[0].to(dtype) @ self.tensor("adapter.rows")[0].to(dtype)

    def delta(self, x: Tensor) -> Tensor:
        """(x R^T) C^T."""
        rows, cols = (self.tensor(n)[0].to(accumulator(x.dtype)) for n in ("adapter.rows", "adapter.cols"))
        return (wide(x) @ rows.T) @ cols.T

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """R, C; None with masks, which change the layer too: merge or slice those."""
        if self.pruned:
            return None
        rows, cols = self.tensor("adapter.rows")[0], self.tensor("adapter.cols")[0]
        return Factors(rows, cols, 1.0, self.tensor("adapter_bias"))

    def sliced_tensors(self, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        return {
            "adapter.cols": self.tensor("adapter.cols")[:, rows],
            "adapter.rows": self.tensor("adapter.rows")[:, :, columns],
        }


class SPPaRA(_Pruned):
    """A parallel residual adapter of full rank whose layer is pruned.

    Args:
        tensors: `adapter` `[in, out]`, optional `adapter_bias`, `in_features_mask`, `out_features_mask`.
    """

    kind = "SPPaRA"
    required = ("adapter",)
    optional = ("adapter_bias", *_MASKS)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """P^T, `[out, in]`."""
        return self.tensor("adapter").to(dtype).T

    def sliced_tensors(self, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        return {"adapter": self.tensor("adapter")[columns][:, rows]}


class SPLoPA(_Pruned):
    """Low-rank prototypes at block positions; pruning by zero positions, so there are no masks.

    Args:
        tensors: `adapter.pos_weights` `[P, out / p, in / q]`, `adapter.prototypes.cols` `[P, p, 1]`,
            `adapter.prototypes.rows` `[P, 1, q]` (which the layers of a model share), optional
            `adapter_bias`.
    """

    kind = "SPLoPA"
    required = ("adapter.pos_weights", "adapter.prototypes.cols", "adapter.prototypes.rows")
    optional = ("adapter_bias",)

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        pos, cols, rows = (self.tensor(n) for n in self.required)
        if not len(pos) == len(cols) == len(rows) or cols.shape[2:] != (1,) or rows.shape[1] != 1:
            shapes = ", ".join(str(list(t.shape)) for t in (pos, cols, rows))
            raise ValueError(f"SPLoPA: [P, out / p, in / q], [P, p, 1], [P, 1, q] required, got {shapes}")

    def _pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pos, cols, rows = (self.tensor(n).to(dtype) for n in self.required)
        return pos, cols @ rows

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """sum_p pos_p (x) (c_p r_p), `[out, in]`."""
        return kron_sum(*self._pair(dtype))

    def delta(self, x: Tensor) -> Tensor:
        """Two small products; dW is not formed."""
        return kron_apply(wide(x), *self._pair(accumulator(x.dtype)))

    def sliced_tensors(self, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.required}
