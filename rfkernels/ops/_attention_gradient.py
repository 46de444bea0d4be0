"""The gradient of `attention`, blocks of queries at a time: no matrix of all scores exists.

Weights are made again from the logarithms of the sums: P = exp(scale q k^T + bias - lse), R = P * C. With dO
the gradient of the result, dL that of lse and D_i = sum_d dO_id O_id:

    dR = dO v^T    dS = P * (C * dR - D + dL)
    dq = scale dS k    dk = scale dS^T q    dv = R^T dO    dbias = sum of dS    dC = sum of P * dR

(FlashAttention-2, Dao, 2023; with C, Universal RPE, Luo et al., 2022). In float32, float64 for float64. An
eight-bit forward pass has this gradient too, straight through its rounding, with its own out and lse.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from rfkernels.ops._attention_parts import hidden_keys, shifted, source_samples, toeplitz
from rfkernels.ops._register import accumulator

_MOST_SCORES = 1 << 22  # of a block of queries, over all samples and heads


def attention_backward(grads, needs, out, lse, q, k, v, *others):
    """One gradient, or None, per argument of the op."""
    q_starts, k_starts = others[3:5]
    result = [None] * (3 + len(others))
    if q_starts is None or is_fake(q_starts):  # where a graph is traced, lengths are unknown: by a mask
        _accumulate(result, grads, needs, out, lse, q, k, v, others)
        return tuple(result)
    grads = tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, (out, lse), strict=True))
    pieces = [torch.zeros_like(t, dtype=accumulator(q.dtype)) for t in (q, k, v)]
    plain = (None,) * 8 + others[8:]
    starts = zip(q_starts.tolist(), k_starts.tolist(), strict=True)
    (i, j), *ends = starts
    for i_end, j_end in ends:
        rows = [t[:, :, i:i_end] for t in (*grads, out, lse, q)]
        keys = [t[:, :, j:j_end] for t in (k, v)]
        own = [None] * len(result)
        _accumulate(own, rows[:2], needs, *rows[2:], *keys, plain)
        for piece, a, b, grad in zip(pieces, (i, j, j), (i_end, j_end, j_end), own[:3], strict=True):
            if grad is not None:
                piece[:, :, a:b] = grad
        i, j = i_end, j_end
    result[:3] = [p.to(q.dtype) if need else None for p, need in zip(pieces, needs[:3], strict=True)]
    return tuple(result)


def _accumulate(result, grads, needs, out, lse, q, k, v, others) -> None:
    """Fills in the gradients of a call; packed sequences are told apart by a mask."""
    bias, factor, key_lengths, q_starts, k_starts, block_mask, head_shift, _, scale, frames, _ = others
    wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    widened = [t.to(wide).repeat_interleave(group, 1) for t in shifted(k, v, head_shift, frames)]
    k_wide, v_wide = widened
    dk, dv = (torch.zeros_like(t) for t in widened)
    dq = torch.empty(q.shape, dtype=wide, device=q.device)
    dbias = None if bias is None or not needs[3] else torch.zeros(bias.shape, dtype=wide, device=q.device)
    dfactor = torch.zeros_like(factor) if needs[4] else None
    hidden = hidden_keys(q, keys, key_lengths, q_starts, k_starts, block_mask, head_shift, frames)
    step = max(1, _MOST_SCORES // max(1, batch * heads * keys))
    for i in range(0, rows, step):
        at = slice(i, min(i + step, rows))
        rows_of = lambda t: t if t is None or t.shape[-2] == 1 else t[..., at, :]  # noqa: B023
        q_i, sums = q[:, :, at].to(wide), lse[:, :, at, None]
        scores = scale * (q_i @ k_wide.mT)
        if bias is not None:
            scores = scores + rows_of(bias).to(wide)
        weights = (scores - sums).exp().masked_fill(sums == -torch.inf, 0)
        if hidden is not None:
            weights = weights.masked_fill(rows_of(hidden), 0)
        dout = None if grads[0] is None else grads[0][:, :, at].to(wide)
        dscores = torch.zeros_like(weights)
        if dout is not None:
            dweights = dout @ v_wide.mT
            c = None if factor is None else toeplitz(factor.to(wide), rows, keys, at)
            dv += (weights if c is None else weights * c).mT @ dout
            if dfactor is not None:
                _add_diagonals(dfactor, weights * dweights, rows, at)
            if c is not None:
                dweights = dweights * c
            total = (dout * out[:, :, at].to(wide)).sum(-1, keepdim=True)
            dscores = weights * (dweights - total)
        if grads[1] is not None:
            dscores = dscores + weights * grads[1][:, :, at, None]
        dq[:, :, at] = scale * (dscores @ k_wide)
        dk += scale * (dscores.mT @ q_i)
        if dbias is not None:
            part = dbias if dbias.shape[2] == 1 else dbias[:, :, at]
            part += dscores.sum_to_size(part.shape)
    like = lambda t: t.to(q.dtype)
    own = lambda t: _unshifted(t.unflatten(1, (-1, group)).sum(2), head_shift, frames)
    result[0] = like(dq) if needs[0] else None
    result[1] = like(own(dk)) if needs[1] else None
    result[2] = like(own(dv)) if needs[2] else None
    result[3] = None if dbias is None else dbias.to(bias.dtype)
    result[4] = dfactor


def _unshifted(grad: Tensor, head_shift: Tensor | None, frames: int) -> Tensor:
    """Gradients of shifted keys or values, added up where these came from."""
    if head_shift is None:
        return grad
    source = source_samples(grad.shape[0], head_shift, frames)
    head = torch.arange(grad.shape[1], device=grad.device).expand_as(source)
    return torch.zeros_like(grad).index_put_((source, head), grad, accumulate=True)


def _add_diagonals(to: Tensor, values: Tensor, rows: int, at: slice) -> None:
    """Adds [batch, heads, rows in `at`, keys] to the entries j - i + rows - 1 of a table [heads or 1, .]."""
    values = values.sum(0)
    values = values if len(to) > 1 or len(values) == 1 else values.sum(0, keepdim=True)
    i = torch.arange(at.start, at.stop, device=to.device)[:, None]
    entry = torch.arange(values.shape[-1], device=to.device) - i + rows - 1
    to.index_add_(1, entry.flatten(), values.flatten(1).to(to.dtype))
