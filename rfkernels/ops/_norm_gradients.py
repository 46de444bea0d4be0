"""The gradients of the norm room: one kernel, and small tables of sums that those of the parameters are made
of."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._norm_definitions import normalise, table_of
from rfkernels.ops._register import accumulator, define


def like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def ada_norm_backward_reference(
    dy: Tensor,
    v: Tensor,
    add: Tensor | None,
    weight: Tensor | None,
    table: Tensor | None,
    index: Tensor | None,
    order: Tensor | None,
    begins: Tensor | None,
    groups: int,
    splits: int,
    wants_sums: bool,
    norm: str,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The definition of the backward kernel: the gradient of v, and the sums of dy N(v) and dy over each
    group."""
    with torch.enable_grad():
        leaf = v.detach().requires_grad_()
        n = normalise(leaf, norm, eps)
        y = n if weight is None else n * weight
        if table is not None:
            t = table_of(table, index, v)
            y = y * {"plain": t, "one_plus": 1 + t, "tanh": t.tanh()}[act]
    (dv,) = torch.autograd.grad(y, leaf, dy)
    dv = dv if add is None else dv + add
    if not wants_sums:
        return dv, v.new_empty(0, dtype=accumulator(v.dtype))
    rows = torch.stack([dy * n.detach(), dy], -2).reshape(-1, 2, v.shape[-1])
    rows = rows if order is None else rows[order]
    if begins is None:
        begins = torch.arange(groups + 1) * (len(rows) // groups)
    parts = []
    for first, last in pairwise(begins.tolist()):
        cuts = [first + (last - first) * s // splits for s in range(splits + 1)]
        parts.append(torch.stack([rows[a:b].sum(0) for a, b in pairwise(cuts)]))
    return dv, torch.stack(parts, 1)


_ada_norm_backward = define(
    "ada_norm_backward",
    "Tensor dy, Tensor v, Tensor? add, Tensor? weight, Tensor? table, Tensor? index, Tensor? order, "
    "Tensor? begins, "
    "int groups, int splits, bool wants_sums, str norm, str act, float eps",
    _C.ada_norm_backward,
    lambda dy, v, add, weight, table, index, order, begins, groups, splits, wants_sums, *_: (
        like(v),
        v.new_empty((splits, groups, 2, v.shape[-1]) if wants_sums else (0,), dtype=accumulator(v.dtype)),
    ),
    ada_norm_backward_reference,
    outputs=("dv", "sums"),
)


def _sorted_rows(
    table: Tensor | None, index: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None, int]:
    """How the rows of x fall into groups that share a row of `table`: their order, where each begins, how
    many."""
    lead = x.shape[:-1]
    if table is None:
        return None, None, 1
    if index is None:
        own = table.shape[:-1]
        while own and own[-1] == 1:
            own = own[:-1]
        groups = own.numel()
        if own == lead[: len(own)]:
            return None, None, groups
        ids = torch.arange(groups, device=x.device).view(*own, *[1] * (len(lead) - len(own)))
    else:
        groups = len(table)
        ids = index.long().clamp(0, groups - 1)  # one out of range has made NaN already
        ids = ids.view(*ids.shape, *[1] * (len(lead) - ids.ndim))
    ids, order = ids.expand(lead).reshape(-1).sort(stable=True)
    return order, torch.searchsorted(ids, torch.arange(groups + 1, device=x.device)), groups


def _affine_backward(
    dy: Tensor,
    v: Tensor,
    add: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    norm: str,
    act: str,
    eps: float,
    wants_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of v, table, shift, weight, bias of (N(v) w + b) act(table) + shift; `add` joins that of
    v."""
    source = shift if table is None else table
    order, begins, groups = _sorted_rows(source, index, v)
    rows = v.numel() // max(v.shape[-1], 1)
    tasks = 1024 if v.is_cuda else 16
    splits = (
        max(1, min(rows // groups // 8, tasks // groups))
        if wants_sums
        else max(1, min(rows // groups, tasks))
    )
    layout = (order, begins, groups, splits, wants_sums)
    row_of = None if table is None else index  # which may serve other tables of the call, or the shift alone
    dv, sums = _ada_norm_backward(dy, v, add, weight, table, row_of, *layout, norm, act, eps)
    if not wants_sums:
        return dv, None, None, None, None
    p, q = sums.sum(0).unbind(1)  # [groups, width]: sums of dy N(v), of dy
    factor = 1.0
    d_table = d_shift = d_weight = d_bias = None
    if table is not None:
        t = table.reshape(groups, -1).to(p.dtype)
        factor = {"plain": t, "one_plus": 1 + t, "tanh": t.tanh()}[act]
        d_table = p if weight is None else p * weight
        d_table = d_table if bias is None else d_table + q * bias
        d_table = d_table * (1 - factor**2) if act == "tanh" else d_table
        d_table = d_table.view(table.shape).to(table.dtype)
    if shift is not None:
        if shift.shape == source.shape:
            d_shift = q.view(shift.shape)
        else:
            d_shift = dy.to(p.dtype).sum_to_size(table_of(shift, index, v).shape).view(shift.shape)
        d_shift = d_shift.to(shift.dtype)
    if weight is not None:
        d_weight = (factor * p).sum(0).to(weight.dtype)
    if bias is not None:
        d_bias = (factor * q).sum(0).to(bias.dtype)
    return dv, d_table, d_shift, d_weight, d_bias


def norm_modulate_backward(grad, needs, x, scale, shift, index, weight, bias, norm, eps, tier):
    wants_sums = needs[1] or needs[2] or needs[4] or needs[5]
    dx, d_scale, d_shift, d_weight, d_bias = _affine_backward(
        grad, x, None, weight, bias, scale, shift, index, norm, "one_plus", eps, wants_sums
    )
    return dx, d_scale, d_shift, None, d_weight, d_bias, None, None, None


def _branch_backward(grad, wants_sums, y, gate, index, activation, norm, weight, eps):
    """The gradients of y, gate and weight of act(gate) w N(y)."""
    if gate is None and weight is None and norm == "none":
        return grad, None, None
    act = "tanh" if activation == "tanh" else "plain"
    dy, d_gate, _, d_weight, _ = _affine_backward(
        grad, y, None, weight, None, gate, None, index, norm, act, eps, wants_sums
    )
    return dy, d_gate, d_weight


def gated_residual_backward(grad, needs, y, gate, index, activation, branch_norm, branch_weight, eps):
    dy, d_gate, d_weight = _branch_backward(
        grad, needs[2] or needs[6], y, gate, index, activation, branch_norm, branch_weight, eps
    )
    return grad, dy, d_gate, None, None, None, d_weight, None, None


def gated_residual_norm_modulate_backward(
    grads,
    needs,
    r,
    y,
    gate,
    scale,
    shift,
    index,
    activation,
    branch_norm,
    branch_weight,
    weight,
    bias,
    norm,
    eps,
):
    d_r, d_n = grads
    d_scale = d_shift = d_weight = d_bias = None
    if d_n is not None:
        wants_sums = needs[3] or needs[4] or needs[9] or needs[10]
        d_r, d_scale, d_shift, d_weight, d_bias = _affine_backward(
            d_n, r, d_r, weight, bias, scale, shift, index, norm, "one_plus", eps, wants_sums
        )
    dy, d_gate, d_branch_weight = _branch_backward(
        d_r, needs[2] or needs[8], y, gate, index, activation, branch_norm, branch_weight, eps
    )
    grads = (d_r, dy, d_gate, d_scale, d_shift, None, None, None, d_branch_weight, d_weight, d_bias)
    return *grads, None, None, None
