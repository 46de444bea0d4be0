"""Attention inside groups of tokens, and across frames, without a copy of queries, keys or values."""

import torch
from torch import Tensor

from rfkernels.ops.attention import attention

__all__ = ["local_attention", "sliced_attention", "zero_i2v_head_shift"]


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: int,
    *,
    layout: str = "bhld",
    scale: float | None = None,
    precision: str = "full",
) -> Tensor:
    """Attention inside `groups` runs of neighbouring tokens: the block-diagonal mask, without its zeros.

    Queries and keys are cut into the same number of groups, which may differ in length: with q of the data
    this is a local layer of FIT (Chen and Li, 2023), with q of the latents of every group it is how they read
    the data, and with k and v of the latents how they write to it. Where tensors lie as a projection leaves
    them (`[batch, tokens, heads, d]` in memory), or where k and v have as many heads as q, a group is a view.

    Args:
        q: `[batch, heads, groups rows, d]`; k, v: `[batch, kv_heads, groups keys, d]`.
        layout, scale, precision: as of `rfkernels.ops.attention`.

    Raises:
        ValueError: tokens that the groups do not divide.
    """
    _check("local_attention", q, k, groups, layout)
    axis = layout.index("l")
    cut = [t.unflatten(axis, (groups, t.shape[axis] // groups)) for t in (q, k, v)]
    if layout == "bhld" and q.is_contiguous() and q.shape[1] == k.shape[1]:  # a group is a head
        cut, merged = cut, 1
    else:  # a group is a sample
        cut, merged = [t.movedim(axis, 1) for t in cut], 0
    out = attention(
        *(t.flatten(merged, merged + 1) for t in cut), layout=layout, scale=scale, precision=precision
    )
    out = out.unflatten(merged, (out.shape[merged] // groups, groups))
    return out.movedim(merged + 1, axis).flatten(axis, axis + 1)


def sliced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: int,
    *,
    strided: bool = True,
    layout: str = "bhld",
    scale: float | None = None,
    precision: str = "full",
) -> Tensor:
    """Sliced group self-attention (SReT, Shen et al., 2022): token i sees the tokens j = i modulo `groups`.

    SReT permutes the tokens at random before it groups them; this is the fixed permutation that strides
    express. With `strided=False` groups are neighbours, as in `local_attention`.

    Args and errors are those of `local_attention`.
    """
    if not strided:
        return local_attention(q, k, v, groups, layout=layout, scale=scale, precision=precision)
    _check("sliced_attention", q, k, groups, layout)
    axis = layout.index("l")
    every = lambda t, first: t[(slice(None),) * axis + (slice(first, None, groups),)]
    parts = [
        attention(*(every(t, i) for t in (q, k, v)), layout=layout, scale=scale, precision=precision)
        for i in range(groups)
    ]
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def zero_i2v_head_shift(heads: int, div: int = 12, *, device: torch.device | None = None) -> Tensor:
    """The `head_shift` of `attention` with which ZeroI2V (Li et al., 2024) turns an image model into one of
    video: keys and values of the first heads / div heads are those of the frame before, of the next heads /
    div those of the frame after.

    Raises:
        ValueError: a `div` that does not divide `heads`, or is 1.
    """
    if div < 2 or heads % div:
        raise ValueError(
            f"zero_i2v_head_shift: div must divide the heads and be 2 or more, got {div}, {heads}"
        )
    shift = torch.zeros(heads, dtype=torch.int32, device=device)
    shift[: heads // div], shift[heads // div : 2 * heads // div] = -1, 1
    return shift


def _check(name: str, q: Tensor, k: Tensor, groups: int, layout: str) -> None:
    if layout not in ("bhld", "blhd") or q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"{name}: expected four axes, bhld or blhd, got {tuple(q.shape)}, {tuple(k.shape)}, {layout!r}"
        )
    rows, keys = (t.shape[layout.index("l")] for t in (q, k))
    if groups < 1 or rows % groups or keys % groups:
        raise ValueError(f"{name}: {groups} groups must divide the {rows} queries and {keys} keys")
