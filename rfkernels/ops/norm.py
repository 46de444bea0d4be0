"""Norm regions: what stands between the linear layers of a transformer block, each in one pass over memory.

Tokens `x` are `[*lead, width]`, float64, float32, float16 or bfloat16; neighbours along the last axis are adjacent, the
leading axes may have any strides (a slice of a fused buffer needs no copy). Parameters have the dtype of the
tokens, or are float32 beside 16-bit tokens:

- `weight`, `bias`: `[width]`;
- `scale`, `shift`, `gate`: `[*lead', width]`, where `lead'` are leading axes of `x`, each as long or 1: `[width]` for all,
  `[batch, width]` per sample, `[batch, frames, 1, width]` per frame, `[batch, tokens, width]` per token; chunks of a larger
  tensor are fine. With `index`, int64 or int32 with leading axes of `x`, they are `[groups, width]` tables and a token takes
  the row that its index names: no table is ever expanded to the tokens.

An index out of range is an error on the CPU; on CUDA the token becomes NaN, and `check_indices(True)` makes it an
error there too, at the price of a synchronisation.

`tier` says where 16-bit results are rounded. "fast": everything in float32, one rounding. "exact": where the chain of
torch ops rounds, so that the bits are eager's; where a mean or a tanh stands before a rounding its last float32 bit may
differ, and with it one element in thousands by one unit. "exact_before_weight" is exact for an RMSNorm that rounds before it
multiplies by its weight (diffusers' `RMSNorm`, BFL's); `torch.nn.RMSNorm` is "exact".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import define

__all__ = [
    "check_indices",
    "gated_residual",
    "gated_residual_norm_modulate",
    "gated_residual_norm_modulate_reference",
    "gated_residual_reference",
    "norm_modulate",
    "norm_modulate_reference",
]

_checks_indices = False


def check_indices(on: bool) -> None:
    """Debugging: `index` arguments on CUDA are checked too, which synchronises with the device at every call."""
    global _checks_indices
    _checks_indices = on


def _checked(op: str, index: Tensor | None, *tables: Tensor | None) -> Tensor | None:
    if _checks_indices and index is not None and index.is_cuda:
        groups = next((len(t) for t in tables if t is not None), 0)
        wrong = (index < 0) | (index >= groups)
        if wrong.any():
            raise ValueError(f"{op}: index must be in 0..{groups - 1}, got {index[wrong][0].item()}")
    return index


# --- the definitions ---


def _table(table: Tensor, index: Tensor | None, x: Tensor) -> Tensor:
    """A parameter table with axes that broadcast against `x`."""
    if index is not None:
        table = table[index.long()]
    return table.reshape(*table.shape[:-1], *[1] * (x.ndim - table.ndim), table.shape[-1])


def _norm(x: Tensor, norm: str, eps: float) -> Tensor:
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
    n = _norm(x, norm, eps)
    n = n if weight is None else n * weight
    n = n if bias is None else n + bias
    n = n if scale is None else n * (1 + _table(scale, index, x))
    n = n if shift is None else n + _table(shift, index, x)
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
    branch = _norm(y, branch_norm, eps)
    branch = branch if branch_weight is None else branch * branch_weight
    if gate is not None:
        gate = _table(gate, index, x)
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


# --- the ops ---


def norm_modulate(
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
    out: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`(N(x)\,w + b)(1 + \mathrm{scale}) + \mathrm{shift}`: a norm and its adaptive modulation.

    LayerNorm (Ba et al., 2016), :math:`N(x) = (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}`, or RMSNorm (Zhang and
    Sennrich, 2019), :math:`N(x) = x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`, over the last axis, modulated as in DiT
    (Peebles and Xie, 2022), with one table row per sample, frame, segment or token.

    Args:
        x: tokens, `[*lead, width]`.
        scale, shift: modulation tables; absent: 0.
        index: which table row serves which token.
        weight, bias: the affine parameters of the norm, `[width]`; absent: 1 and 0.
        norm: "layer", "rms", or "none" for modulation alone.
        eps: :math:`\epsilon`.
        tier: see the module.
        out: where to write, `x` itself allowed; no gradient then.

    Returns:
        Tokens in the dtype of `x`. Differentiable in x, scale, shift, weight and bias; the backward pass keeps the inputs
        and nothing else.

    Raises:
        ValueError: tensors that do not fit together, an index out of range, an unknown name.
    """
    index = _checked("norm_modulate", index, scale, shift)
    return _norm_modulate(x, scale, shift, index, weight, bias, norm, eps, tier, out=out)


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    index: Tensor | None = None,
    gate_activation: str = "none",
    branch_norm: str = "none",
    branch_weight: Tensor | None = None,
    eps: float = 1e-6,
    tier: str = "fast",
    out: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`x + \mathrm{act}(\mathrm{gate})\, w\, N(y)`: a branch joins the residual stream.

    Args:
        x: tokens, `[*lead, width]`.
        y: what the branch made of them, like `x`.
        gate: a modulation table; absent: 1.
        index: which table row serves which token.
        gate_activation: "none", or "tanh" (Lumina-Image 2, Z-Image).
        branch_norm: the norm of the branch before it joins, "none", "rms" (sandwich norm) or "layer".
        branch_weight: `[width]`, the weight of that norm.
        eps, tier, out: as in `norm_modulate`; `out` may be `x` or `y`.

    Raises:
        ValueError: tensors that do not fit together, an index out of range, an unknown name.
    """
    index = _checked("gated_residual", index, gate)
    return _gated_residual(x, y, gate, index, gate_activation, branch_norm, branch_weight, eps, tier, out=out)


def gated_residual_norm_modulate(
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
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns `(r, n)` with `r = gated_residual(x, y, gate)` and `n = norm_modulate(r, scale, shift)`, in one pass.

    To the bit what the two ops give one after the other: the norm reads `r` as it is stored. `index` serves gate,
    scale and shift. For the other arguments and errors see there; `out` is a pair.
    """
    index = _checked("gated_residual_norm_modulate", index, gate, scale, shift)
    branch = (gate_activation, branch_norm, branch_weight)
    return _gated_residual_norm_modulate(
        x, y, gate, scale, shift, index, *branch, weight, bias, norm, eps, tier, out=out
    )


# --- gradients ---


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    """The definition of the backward kernel: the gradient of v, and the sums of dy N(v) and dy over each group."""
    with torch.enable_grad():
        leaf = v.detach().requires_grad_()
        n = _norm(leaf, norm, eps)
        y = n if weight is None else n * weight
        if table is not None:
            t = _table(table, index, v)
            y = y * {"plain": t, "one_plus": 1 + t, "tanh": t.tanh()}[act]
    (dv,) = torch.autograd.grad(y, leaf, dy)
    dv = dv if add is None else dv + add
    if not wants_sums:
        return dv, v.new_empty(0, dtype=_acc(v))
    rows = torch.stack([dy * n.detach(), dy], -2).reshape(-1, 2, v.shape[-1])
    rows = rows if order is None else rows[order]
    if begins is None:
        begins = torch.arange(groups + 1) * (len(rows) // groups)
    parts = []
    for first, last in zip(begins.tolist(), begins.tolist()[1:], strict=False):
        cuts = [first + (last - first) * s // splits for s in range(splits + 1)]
        parts.append(torch.stack([rows[a:b].sum(0) for a, b in zip(cuts, cuts[1:], strict=False)]))
    return dv, torch.stack(parts, 1)


_ada_norm_backward = define(
    "ada_norm_backward",
    "Tensor dy, Tensor v, Tensor? add, Tensor? weight, Tensor? table, Tensor? index, Tensor? order, Tensor? begins, "
    "int groups, int splits, bool wants_sums, str norm, str act, float eps",
    _C.ada_norm_backward,
    lambda dy, v, add, weight, table, index, order, begins, groups, splits, wants_sums, *_: (
        _like(v),
        v.new_empty((splits, groups, 2, v.shape[-1]) if wants_sums else (0,), dtype=_acc(v)),
    ),
    ada_norm_backward_reference,
    outputs=("dv", "sums"),
)


def _sorted_rows(
    table: Tensor | None, index: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None, int]:
    """How the rows of x fall into groups that share a row of `table`: their order, where each begins, how many."""
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
    """The gradients of v, table, shift, weight, bias of (N(v) w + b) act(table) + shift; `add` joins that of v."""
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
            d_shift = dy.to(p.dtype).sum_to_size(_table(shift, index, v).shape).view(shift.shape)
        d_shift = d_shift.to(shift.dtype)
    if weight is not None:
        d_weight = (factor * p).sum(0).to(weight.dtype)
    if bias is not None:
        d_bias = (factor * q).sum(0).to(bias.dtype)
    return dv, d_table, d_shift, d_weight, d_bias


def _norm_modulate_backward(grad, needs, x, scale, shift, index, weight, bias, norm, eps, tier):
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


def _gated_residual_backward(grad, needs, y, gate, index, activation, branch_norm, branch_weight, eps):
    dy, d_gate, d_weight = _branch_backward(
        grad, needs[2] or needs[6], y, gate, index, activation, branch_norm, branch_weight, eps
    )
    return grad, dy, d_gate, None, None, None, d_weight, None, None


def _gated_residual_norm_modulate_backward(
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


# --- registration ---

_PARAMETERS = "Tensor? weight, Tensor? bias, str norm, float eps, str tier"
_BRANCH = "str gate_activation, str branch_norm, Tensor? branch_weight"

_norm_modulate = define(
    "norm_modulate",
    f"Tensor x, Tensor? scale, Tensor? shift, Tensor? index, {_PARAMETERS}",
    _C.norm_modulate,
    _like,
    norm_modulate_reference,
    _norm_modulate_backward,
)
_gated_residual = define(
    "gated_residual",
    f"Tensor x, Tensor y, Tensor? gate, Tensor? index, {_BRANCH}, float eps, str tier",
    _C.gated_residual,
    _like,
    gated_residual_reference,
    _gated_residual_backward,
    saves=lambda out, x, y, gate, index, *others: (y, gate, index, *others[:-1]),
)
_gated_residual_norm_modulate = define(
    "gated_residual_norm_modulate",
    f"Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? index, {_BRANCH}, {_PARAMETERS}",
    _C.gated_residual_norm_modulate,
    lambda x, *_: (_like(x), _like(x)),
    gated_residual_norm_modulate_reference,
    _gated_residual_norm_modulate_backward,
    saves=lambda out, x, *others: (out[0], *others[:-1]),
    outputs=("x_out", "out"),
)
