"""Linear layers of several experts in one call: each multiplies its own segment of rows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import accumulator, define
from rfkernels.ops._workspace import workspace_of

__all__ = ["grouped_linear", "grouped_linear_reference"]

Experts = Tensor | Sequence[Tensor]


def grouped_linear(
    x: Tensor,
    weights: Experts,
    offsets: Tensor,
    *,
    index: Tensor | None = None,
    activation: str = "none",
    up: Experts | None = None,
    bias: Experts | None = None,
    up_bias: Experts | None = None,
) -> Tensor:
    r"""Returns :math:`y_s = x_{index(s)} W_e^T + b_e` for the slots `offsets[e] <= s < offsets[e + 1]`.

    With `activation="swiglu"` :math:`y_s = silu(x W_e^T + b_e) (x U_e^T + c_e)`, in one pass. Segments may
    have any lengths, none among them; slots behind the last one are 0. Sums are in float32 (float64), the
    result is rounded once. The gradient of a weight takes the time of a product of all slots for each expert.

    Args:
        x: `[rows, in]`, float64, float32, float16 or bfloat16; rows may be strided.
        weights: W, up to 64 tensors `[out, in]` as they lie, or one `[experts, out, in]`.
        offsets: int32 `[experts + 1]`, rising from 0, as of `Routing`. On the CPU they are checked; on CUDA
            they are confined to the slots.
        index: int32 `[slots]`, the row of x of each slot; of a row that is not there the result is NaN.
            Absent: the slots are the rows.
        activation: "none" or "swiglu".
        up: U, like `weights`, with "swiglu".
        bias, up_bias: b and c, tensors `[out]` or one `[experts, out]`.
    """
    if activation not in ("none", "swiglu") or (activation == "swiglu") != (up is not None):
        given = f"{activation!r} {'without' if up is None else 'with'} up"
        raise ValueError(f"grouped_linear: activation must be 'none', or 'swiglu' with up, got {given}")
    return _grouped(x, _list(weights), offsets, index, _list(up), _list(bias), _list(up_bias))


def _list(experts: Experts | None) -> list[Tensor]:
    if isinstance(experts, Tensor):
        return list(experts.unbind(0))
    return list(experts or ())


def grouped_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    index: Tensor | None,
    up: Sequence[Tensor],
    bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
) -> Tensor:
    """The definition of `grouped_linear` in plain torch."""
    wide = accumulator(x.dtype)
    rows, at = (x if index is None else x[index.long()]).to(wide), offsets.tolist()
    out = rows.new_zeros(len(rows), len(weights[0]))
    product = lambda x, w, b: F.linear(x, w.to(wide), b.to(wide) if b is not None else None)
    for e in range(len(weights)):
        segment = rows[at[e] : at[e + 1]]
        y = product(segment, weights[e], bias[e] if bias else None)
        if up:
            y = F.silu(y) * product(segment, up[e], up_bias[e] if up_bias else None)
        out[at[e] : at[e + 1]] = y
    return out.to(x.dtype)


def _grouped_empty(x, weights, offsets, index, *others):
    if x.ndim != 2 or not weights or weights[0].ndim != 2:
        raise ValueError(
            "grouped_linear: expected x [rows, in] and weights [out, in] of 1..64 experts, got "
            f"{list(x.shape)} and {[list(w.shape) for w in weights]}"
        )
    return x.new_empty(x.shape[0] if index is None else index.shape[0], weights[0].shape[0])


def _grouped_kernel(out, x, weights, offsets, index, up, bias, up_bias):
    workspace = None
    if x.device.type == "cpu":
        workspace = workspace_of(_C.grouped_linear_workspace(x, weights, len(out), bool(up)), x.device)
    _C.grouped_linear(out, x, weights, offsets, index, up, bias, up_bias, workspace)


def _grouped_backward(grad, needs, x, offsets, index, lengths, *tensors):
    tensors = iter(tensors)
    weights, up, bias, up_bias = ([next(tensors) for _ in range(n)] for n in lengths)
    wide, slots = accumulator(x.dtype), torch.arange(len(grad), device=x.device, dtype=torch.int32)
    of_sums = [grad]
    if up:
        a = _grouped(x, weights, offsets, index, [], bias, []).to(wide)
        b = _grouped(x, up, offsets, index, [], up_bias, []).to(wide)
        s = a.sigmoid()
        of_sums = [(grad * b * (s + a * s * (1 - s))).to(x.dtype), (grad * a * s).to(x.dtype)]
    of_x = None
    if needs[0]:
        of_x = x.new_zeros((), dtype=wide)
        for g, side in zip(of_sums, (weights, up)[: len(of_sums)], strict=True):
            back = [w.T.contiguous() for w in side]
            of_x = of_x + _grouped(g, back, offsets, None, [], [], []).to(wide)
        if index is not None:
            of_x = of_x.new_zeros(x.shape).index_add(0, index, of_x)
        of_x = of_x.to(x.dtype)
    expert = torch.searchsorted(offsets[1:], slots, right=True)
    rows = x if index is None else x.index_select(0, index)
    own = lambda g, e: g.where((expert == e)[:, None], 0)  # no count comes to the host
    grads = [[], [], [], []]
    for side, g in enumerate(of_sums):
        for e in range(len(weights)):
            if any(needs[(1, 4)[side]]):
                grads[side].append(own(g, e).T @ rows)
            if any(needs[5 + side]):
                grads[2 + side].append(own(g, e).to(wide).sum(0).to(x.dtype))
    of_weights, of_up, of_bias, of_up_bias = (g or [None] * n for g, n in zip(grads, lengths, strict=True))
    return of_x, of_weights, None, None, of_up, of_bias, of_up_bias


_grouped = define(
    "grouped_linear",
    "Tensor x, Tensor[] weights, Tensor offsets, Tensor? index, Tensor[] up, Tensor[] bias, Tensor[] up_bias",
    _grouped_kernel,
    _grouped_empty,
    grouped_linear_reference,
    _grouped_backward,
    saves=lambda out, x, weights, offsets, index, *others: (
        *(x, offsets, index, [len(t) for t in (weights, *others)]),
        *(t for tensors in (weights, *others) for t in tensors),
    ),
)
