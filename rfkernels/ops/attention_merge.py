"""Attention over a union of sets of keys, from the results over each set."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import accumulator, define

__all__ = ["attention_merge", "attention_merge_reference"]


def attention_merge(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Returns (out, lse) over the union of one to eight disjoint sets of keys, exactly:

    .. math:: \mathrm{lse} = \log \sum_k e^{\mathrm{lse}_k}, \quad
        \mathrm{out} = \sum_k e^{\mathrm{lse}_k - \mathrm{lse}}\, \mathrm{out}_k

    A part with lse -infinity has no weight, whatever its out holds; a row where all have is 0 with lse
    -infinity; NaN stays. Sums are of float32 (float64), rounded once.

    Args:
        outs: the results of `attention` over each set, `[..., rows, d]`, of one dtype.
        lses: the logarithms that it returns with `return_lse=True`, `[..., rows]` float32 (float64); of
            results in the layout "blhd" their transpose.
        out: (out, lse) to write into, those of a part allowed; no gradient then.

    Raises:
        ValueError: other numbers of parts, shapes or dtypes.

    Source: FlashDecoding, Dao et al., 2023; Ring Attention, Liu et al., 2023.
    """
    return _attention_merge([t.contiguous() for t in outs], [t.contiguous() for t in lses], out=out)


def attention_merge_reference(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition of `attention_merge` in plain torch."""
    wide = accumulator(outs[0].dtype)
    weights, lse = _weights(lses)
    parts = [w[..., None] * _present(y.to(wide), s) for w, y, s in zip(weights, outs, lses, strict=True)]
    return sum(parts[1:], parts[0]).to(outs[0].dtype), lse


def _weights(lses: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """exp(lse_k - lse) and lse."""
    lse = torch.logsumexp(torch.stack(list(lses)), 0)
    shift = lse.masked_fill(lse == -torch.inf, 0)
    return [(s - shift).exp() for s in lses], lse


def _present(y: Tensor, lse: Tensor) -> Tensor:
    return y.masked_fill((lse == -torch.inf)[..., None], 0)


def _backward(grads, needs, count, *tensors):
    outs, lses = tensors[:count], tensors[count:]
    grad, grad_lse = grads
    weights, _ = _weights(lses)
    if grad is None:
        return [None] * count, [w * grad_lse for w in weights]
    wide = grad.to(accumulator(outs[0].dtype))
    dots = [(wide * _present(y.to(wide.dtype), s)).sum(-1) for y, s in zip(outs, lses, strict=True)]
    mean = sum(w * dot for w, dot in zip(weights, dots, strict=True))
    change = -mean if grad_lse is None else grad_lse - mean
    grad_outs = [(w[..., None] * wide).to(y.dtype) for w, y in zip(weights, outs, strict=True)]
    return grad_outs, [w * (dot + change) for w, dot in zip(weights, dots, strict=True)]


def _empty(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if not outs or len(outs) != len(lses):
        raise ValueError(f"attention_merge: expected an lse for each of {len(outs)} parts, got {len(lses)}")
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])


_attention_merge = define(
    "attention_merge",
    "Tensor[] outs, Tensor[] lses",
    _C.attention_merge,
    _empty,
    attention_merge_reference,
    _backward,
    saves=lambda results, outs, lses: (len(outs), *outs, *lses),
    outputs=("out", "lse"),
)
