"""The op behind `attention`: its definition, registration and gradient."""

from collections import deque

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._attention_gradient import attention_backward
from rfkernels.ops._attention_parts import hidden_keys, shifted, toeplitz
from rfkernels.ops._register import accumulator, define
from rfkernels.ops._workspace import workspace_of


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    key_lengths: Tensor | None,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    block_mask: Tensor | None,
    head_shift: Tensor | None,
    key_mean: Tensor | None,
    scale: float,
    frames: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The definition of the op in plain torch; `precision` and `key_mean` do not change what it means."""
    wide = accumulator(q.dtype)
    rows, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (t.to(wide).repeat_interleave(group, 1) for t in shifted(k, v, head_shift, frames))
    scores = scale * (q.to(wide) @ k.mT)
    if bias is not None:
        scores = scores + bias.to(wide)
    hidden = hidden_keys(q, keys, key_lengths, q_starts, k_starts, block_mask, head_shift, frames)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    if factor is not None:
        weights = weights * toeplitz(factor.to(wide), rows, keys)
    if hidden is not None:  # what is hidden counts as absent, not as a number times zero
        v = v.masked_fill(hidden.all(-2)[..., None], 0)
    return (weights @ v).to(q.dtype), lse


def _empty(q, k, v, *others):
    """The result in the order of axes that the queries have in memory; the logarithms of the sums."""
    tokens_first = q.stride(1) < q.stride(2)
    out = torch.empty_like(q.transpose(1, 2) if tokens_first else q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))
    return out.transpose(1, 2) if tokens_first else out, lse


def _kernel(out, lse, q, k, v, *others):
    *tensors, scale, frames, precision = others
    sequences = q.shape[0] if tensors[3] is None else len(tensors[3]) - 1
    fell_back = None
    if precision == "auto":
        fell_back = torch.zeros(sequences, q.shape[1], dtype=torch.uint8, device=q.device)
        fallbacks.append(fell_back)
    workspace = workspace_of(_C.attention_workspace(q, k, tensors[3], precision), q.device)
    _C.attention(out, lse, q, k, v, *tensors, fell_back, workspace, scale, frames, precision)


# What "auto" decided in the last calls, for `rfkernels.explain`: 1 where a head was computed in full.
fallbacks: deque[Tensor] = deque(maxlen=64)


run_attention = define(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? factor, Tensor? key_lengths, Tensor? q_starts, "
    "Tensor? k_starts, Tensor? block_mask, Tensor? head_shift, Tensor? key_mean, float scale, int frames, "
    "str precision",
    _kernel,
    _empty,
    attention_reference,
    attention_backward,
    saves=lambda results, *args: (*results, *args),
    outputs=("out", "lse"),
    strided_grads=True,
)
