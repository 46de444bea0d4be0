r"""Mixtures of experts: every row goes through its top k experts, and the results are added up.

    y = shared(x) + sum_j p_j E_{e_j}(x),    E(x) = (silu(x w1^T) * (x w3^T)) w2^T

`moe` is the layer (HiDream-I1: four experts, top 2, not renormalised), made of three ops: `moe_route` sorts
the choices of all rows by expert, `grouped_linear` multiplies each expert's rows by its own weights,
`moe_combine` adds up. Counts stay on the device: nothing waits, and every shape is that of the worst case,
rows x top_k slots, so that a captured graph serves any routing. Sums run in a fixed order, without atomics.

Tutel (Hwang et al. 2023) has capacity and adaptive top-k, MegaBlocks (Gale et al. 2023) the sorted segments.
All raise ValueError for tensors that do not fit together.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import accumulator, define
from rfkernels.ops.grouped_linear import Experts, grouped_linear
from rfkernels.ops.linear import linear

__all__ = [
    "Routing",
    "moe",
    "moe_combine",
    "moe_combine_reference",
    "moe_reference",
    "moe_route",
    "moe_route_reference",
]


class Routing(NamedTuple):
    """Which experts the rows go to, and their choices, row x top_k + j, sorted by expert into slots."""

    weights: Tensor  # [rows, top_k], float32 (float64 beside float64 logits), best first
    experts: Tensor  # int32 [rows, top_k]; -1: dropped, with weight 0
    offsets: Tensor  # int32 [experts + 1]: where the slots of an expert begin; the last: where all end
    order: Tensor  # int32 [rows * top_k]: the choice in a slot; by row inside an expert, dropped ones last
    slots: Tensor  # int32 [rows, top_k]: the slot of a choice


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    capacity: int | None = None,
    normalize: bool = False,
    threshold: float | None = None,
) -> Routing:
    r"""The top k of :math:`p = softmax(logits)` of every row, sorted by expert.

    The softmax is in float32 (float64 of float64 logits). Experts are ordered by their logits, the lowest
    expert first of equal ones; `torch.topk` promises nothing there, and a softmax that is rounded to 16 bits
    makes more of them equal. `weights` has gradients.

    Args:
        logits: `[rows, experts]`, floating, up to 64 experts; rows may be strided.
        top_k: choices of a row, 1 to experts.
        capacity: rows that an expert takes at most; what is beyond is dropped. The first choices of all rows
            are placed before any second choice, in the order of rows. Weights are not renormalised after it.
        normalize: weights are divided by their sum over the choices of a row.
        threshold: in (0, 1], adaptive top-k: experts are kept until their weights add up to it, at most k.
    """
    return Routing(*_route(logits, top_k, capacity, normalize, threshold))


def moe_route_reference(
    logits: Tensor, top_k: int, capacity: int | None, normalize: bool, threshold: float | None
) -> Routing:
    """The definition of `moe_route` in plain torch."""
    rows, count = logits.shape
    weights, experts = _choose(logits, top_k, normalize, threshold)
    every = torch.arange(count + 1, device=logits.device)
    if capacity is not None:
        placed = experts.T.flatten()[:, None] == every[:-1]  # first choices of all rows first
        rank = (placed.cumsum(0) * placed).sum(1).view(top_k, rows).T
        weights, experts = weights.where(rank <= capacity, 0), experts.where(rank <= capacity, -1)
    key, order = experts.where(experts >= 0, count).flatten().sort(stable=True)
    slots = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    offsets = torch.searchsorted(key, every)
    integers = experts, offsets, order, slots.view(rows, top_k)
    return Routing(weights, *(t.to(torch.int32) for t in integers))


def _choose(logits, top_k, normalize, threshold):
    """Weights and experts of every row, before any capacity."""
    probs = logits.to(accumulator(logits.dtype)).softmax(-1)
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probs.gather(1, experts)
    if threshold is not None:
        before = F.pad(weights.cumsum(1)[:, :-1], (1, 0))
        weights, experts = weights.where(before < threshold, 0), experts.where(before < threshold, -1)
    return weights / weights.sum(1, keepdim=True) if normalize else weights, experts


def _route_empty(logits, top_k, capacity, normalize, threshold):
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            "moe_route: expected logits [rows, experts] and top_k of 1..experts, got "
            f"{list(logits.shape)} and {top_k}"
        )
    rows, count = logits.shape
    shapes = (rows, top_k), (count + 1,), (rows * top_k,), (rows, top_k)
    return (
        logits.new_empty((rows, top_k), dtype=accumulator(logits.dtype)),
        *(logits.new_empty(shape, dtype=torch.int32) for shape in shapes),
    )


def _route_kernel(weights, experts, offsets, order, slots, logits, top_k, *options):
    _C.moe_route(weights, experts, offsets, order, slots, logits, *options)


def _route_backward(grads, needs, logits, experts, top_k, normalize, threshold):
    weights = lambda wide: _choose(wide, top_k, normalize, threshold)[0]
    _, pull = torch.func.vjp(weights, logits.to(grads[0].dtype))
    return pull(grads[0].where(experts >= 0, 0))[0].to(logits.dtype), None, None, None, None


_route = define(
    "moe_route",
    "Tensor logits, int top_k, int? capacity, bool normalize, float? threshold",
    _route_kernel,
    _route_empty,
    moe_route_reference,
    _route_backward,
    saves=lambda out, logits, top_k, capacity, normalize, threshold: (
        *(logits, out[1], top_k, normalize, threshold),
    ),
    outputs=("weights", "experts", "offsets", "order", "slots"),
)


def moe_combine(y: Tensor, routing: Routing, *, residual: Tensor | None = None) -> Tensor:
    r"""Returns :math:`r_i + \sum_j w_{ij} y_{slot(i, j)}`, summed from left to right, rounded once.

    Choices that were dropped add nothing, whatever their slots hold. `y`, the weights and `residual` have
    gradients.

    Args:
        y: `[rows * top_k, width]`, one row for each slot, floating; rows may be strided.
        residual: r, `[rows, width]` of the dtype of `y`; rows may be strided.
    """
    return _combine(y, routing.weights, routing.slots, routing.offsets, residual)


def moe_combine_reference(
    y: Tensor, weights: Tensor, slots: Tensor, offsets: Tensor, residual: Tensor | None
) -> Tensor:
    """The definition of `moe_combine` in plain torch."""
    chosen = y[slots.long()].to(weights.dtype).where((slots < offsets[-1])[..., None], 0)
    sums = (weights[..., None] * chosen).sum(1)
    return (sums if residual is None else residual.to(sums.dtype) + sums).to(y.dtype)


def _combine_backward(grad, needs, y, weights, slots, offsets, residual):
    kept, at = (slots < offsets[-1])[..., None], slots.flatten()
    wide = grad.to(weights.dtype)[:, None]
    of_y = of_weights = None
    if needs[0]:
        shares = (wide * weights[..., None]).where(kept, 0).to(y.dtype).flatten(0, 1)
        of_y = torch.empty_like(shares).index_copy(0, at.long(), shares)
    if needs[1]:
        chosen = y.index_select(0, at).view(*slots.shape, -1).to(weights.dtype)
        of_weights = (wide * chosen.where(kept, 0)).sum(-1)
    return of_y, of_weights, None, None, grad if needs[4] else None


_combine = define(
    "moe_combine",
    "Tensor y, Tensor weights, Tensor slots, Tensor offsets, Tensor? residual",
    lambda out, *args: _C.moe_combine(out, *args),
    lambda y, weights, slots, *_: y.new_empty(slots.shape[0], y.shape[-1]),
    moe_combine_reference,
    _combine_backward,
)


def moe(
    x: Tensor,
    gate: Tensor,
    w1: Experts,
    w3: Experts,
    w2: Experts,
    top_k: int = 2,
    *,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    capacity: int | None = None,
    normalize: bool = False,
    threshold: float | None = None,
) -> Tensor:
    r"""The layer :math:`y = S(x) + \sum_j p_j E_{e_j}(x)` of SwiGLU experts
    :math:`E(x) = (silu(x w_1^T) (x w_3^T)) w_2^T`.

    The logits of the gate are in the dtype of `x`, as HiDream's are.

    Args:
        x: `[*lead, in]`, float64, float32, float16 or bfloat16; all weights are of its dtype.
        gate: `[experts, in]`.
        w1, w3, w2: `[hidden, in]`, `[hidden, in]` and `[in, hidden]` of each expert: lists, or stacked.
        top_k, capacity, normalize, threshold: see `moe_route`.
        shared: w1, w3 and w2 of S, an expert that every row goes through with weight 1.
    """
    rows = x.reshape(-1, x.shape[-1])
    routing = moe_route(
        linear(rows, gate), top_k, capacity=capacity, normalize=normalize, threshold=threshold
    )
    index = routing.order // top_k
    hidden = grouped_linear(rows, w1, routing.offsets, index=index, activation="swiglu", up=w3)
    y = grouped_linear(hidden, w2, routing.offsets)
    residual = None
    if shared is not None:
        whole = torch.arange(2, dtype=torch.int32, device=x.device) * len(rows)
        first, up, second = ([w] for w in shared)
        hidden = grouped_linear(rows, first, whole, activation="swiglu", up=up)
        residual = grouped_linear(hidden, second, whole)
    return moe_combine(y, routing, residual=residual).view(*x.shape[:-1], -1)


def moe_reference(
    x: Tensor,
    gate: Tensor,
    w1: Experts,
    w3: Experts,
    w2: Experts,
    top_k: int = 2,
    *,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    capacity: int | None = None,
    normalize: bool = False,
    threshold: float | None = None,
) -> Tensor:
    """The definition of `moe`: every expert on every row, in the dtype of `x`."""
    rows = x.reshape(-1, x.shape[-1])
    expert = lambda w1, w3, w2: F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)
    routing = moe_route_reference(F.linear(rows, gate), top_k, capacity, normalize, threshold)
    y = expert(*shared) if shared is not None else torch.zeros_like(rows)
    for e, weights in enumerate(zip(w1, w3, w2, strict=True)):
        share = routing.weights.where(routing.experts == e, 0).sum(1, keepdim=True)
        y = y + share.to(y.dtype) * expert(*weights)
    return y.view(*x.shape[:-1], -1)
