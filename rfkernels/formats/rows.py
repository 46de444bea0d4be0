"""Rows of weights, quantised or not: parts of a fused layer, and parts put together again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels.nn import QuantLinear

__all__ = ["count_rows", "decoded", "join", "take"]

Item = QuantLinear | Tensor


def count_rows(item: Item) -> int:
    if isinstance(item, QuantLinear):
        return item.out_features
    return len(item) if item.ndim else 0


def take(item: Item, start: int, stop: int, swap: bool = False) -> Item:
    """The rows start to stop; `swap`: their halves exchanged."""
    if (start, stop) == (0, count_rows(item)) and not swap:
        return item
    if isinstance(item, Tensor):
        rows = item[start:stop]
        return torch.cat(rows.chunk(2)[::-1]) if swap else rows
    index = torch.arange(start, stop)
    return item.take_rows(index.roll(len(index) // 2) if swap else index)


def decoded(item: Item, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers: of a quantised layer in float32, or in `dtype`."""
    numbers = item.dequantized() if isinstance(item, QuantLinear) else item
    return numbers if dtype is None or not numbers.is_floating_point() else numbers.to(dtype)


def join(items: Sequence[Item]) -> Item | None:
    """One tensor or layer (without bias) with the rows of all; None where they differ in more than rows."""
    if len(items) == 1:
        return items[0]
    if all(isinstance(item, Tensor) for item in items):
        return torch.cat(list(items)) if len({t.dtype for t in items}) == 1 else None
    if not all(isinstance(item, QuantLinear) for item in items) or not _alike(items):
        return None
    first = items[0]
    weight = torch.cat([m.weight.view(torch.uint8) for m in items]).view(first.weight.dtype)
    parts = {"weight": weight}
    if first.weight_scale is not None:
        parts["weight_scale"] = torch.cat([_row_scales(m) for m in items])
    if first.weight_zero is not None:
        parts["weight_zero"] = torch.cat([m.weight_zero for m in items])
    config = {**first.config(), "dtype": first.dtype, "input_scale": first.input_scale}
    return QuantLinear(**parts, **config)


def _row_scales(layer: QuantLinear) -> Tensor:
    scale = layer.weight_scale
    return scale if layer.group else scale.reshape(-1).expand(layer.out_features)


def _alike(layers: Sequence[QuantLinear]) -> bool:
    """Same format and settings, inputs treated alike, scales and zeros of one kind."""
    first = layers[0]

    def kind(m: QuantLinear) -> tuple:
        scale = None if m.weight_scale is None else m.weight_scale.dtype
        zero = None if m.weight_zero is None else m.weight_zero.dtype
        static = None if m.input_scale is None else m.input_scale.item()
        return (*m.config().values(), m.in_features, m.group, scale, zero, static)

    return first.smooth is None and all(kind(m) == kind(first) for m in layers)
