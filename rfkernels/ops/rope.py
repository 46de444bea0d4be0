r"""Rotary position embedding: from the projection of a block to queries, keys and values, in one pass.

Tokens are float64, float32, float16 or bfloat16, and arithmetic is in float32 (float64 for float64 tokens).
Pairs are interleaved, :math:`(x_{2j}, x_{2j+1})`, as in FLUX, SD3, Qwen-Image, Wan and HiDream. All raise
ValueError for tensors that do not fit together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import accumulator, define

__all__ = ["qkv_norm_rope", "qkv_norm_rope_backward_reference", "qkv_norm_rope_reference", "rotary_table"]

Stream = Tensor | tuple[Tensor, Tensor, Tensor]


def rotary_table(
    ids: Tensor,
    axes_dims: Sequence[int],
    theta: float = 10000.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Returns (cos, sin) of the angles of every token, `[*lead, tokens, d/2, 2]`.

    d is the sum of `axes_dims`. Axis a, of dimension :math:`d_a`, has the angles
    :math:`\mathrm{id}_a\,\theta^{-2j/d_a}`, :math:`j = 0 \dots d_a/2 - 1`; the axes lie side by side
    (RoFormer, arXiv:2104.09864). Frequencies and angles are float64, rounded to `dtype` at the end: build
    it once per shape.

    Args:
        ids: positions, `[tokens, axes]` or `[batch, tokens, axes]`, of any real dtype.
        axes_dims: an even number per axis; FLUX.1 has (16, 56, 56).
        theta: 10000 in most models, 2000 in FLUX.2, 256 in Z-Image.
        dtype: float64 for float64 tokens.
    """
    if ids.ndim < 2 or ids.shape[-1] != len(axes_dims):
        raise ValueError(
            f"rotary_table: ids must be [*lead, tokens, {len(axes_dims)}] for axes_dims {tuple(axes_dims)}, "
            f"got {list(ids.shape)}"
        )
    if any(dim < 2 or dim % 2 for dim in axes_dims):
        raise ValueError(f"rotary_table: axes_dims must be even and positive, got {tuple(axes_dims)}")
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[..., axis, None].double() * (1.0 / theta**exponents))
    angle = torch.cat(angles, -1)
    return torch.stack([angle.cos(), angle.sin()], -1).to(dtype)


def qkv_norm_rope(
    qkv: Stream | Sequence[Stream],
    heads: int,
    *,
    kv_heads: int | None = None,
    q_weight: Tensor | Sequence[Tensor | None] | None = None,
    k_weight: Tensor | Sequence[Tensor | None] | None = None,
    rotation: Tensor | tuple[Tensor, Tensor] | None = None,
    rotate_from: int = 0,
    eps: float = 1e-6,
    layout: str = "blhd",
    tier: str = "fast",
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the queries, keys and values of an attention, `[batch, tokens, heads, d]`.

    Queries and keys become :math:`R_l\,(w \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon})`, where token l
    turns its pairs, :math:`R_l: (a, b) \mapsto (a \cos - b \sin, b \cos + a \sin)`, and the mean is over a
    head or over all heads of the token; values are copied into the layout. Every byte is read and written
    once; several streams need no concatenation.

    Args:
        qkv: `[batch, tokens, (heads + 2 kv_heads) d]`, the fused projection, through any strides but for the
            last axis; or a tuple `(q, k, v)` of `[batch, tokens, heads d]` (or split, `[batch, tokens, heads,
            d]`); or a list of up to four such streams, written one after the other along the tokens. d is
            even, at most 256.
        heads: of the queries.
        kv_heads: of keys and values; divides `heads`, which is the default.
        q_weight, k_weight: `[d]` for a norm per head; or, all of them, `[heads d]` and `[kv_heads d]` for one
            over the full width (Wan, HiDream). Or lists, one per stream; None: no norm. Of the dtype of the
            tokens, or float32 beside 16-bit tokens.
        rotation: `[rows, d/2, 2]` or `[batch, rows, d/2, 2]` from `rotary_table`, float32 (for float64 tokens
            float64), or a tuple (cos, sin), each `[rows, d/2]`. It gets no gradient.
        rotate_from: the first token of the joint sequence that is rotated, by row 0; tokens before it and
            behind the last row are not.
        eps: added to the mean square.
        layout: "bhld" gives `[batch, heads, tokens, d]`. torch's attention takes views of either, and answers
            in the memory of its queries: of "blhd" `attend(*(t.transpose(1, 2) for t in (q, k, v)))
            .transpose(1, 2).flatten(2)` is a view, of "bhld" a copy. Where no gradient is recorded, v of a
            single stream in "blhd" is a view of the input, which saves copying it.
        tier: "fast" rounds once, at the end; "exact" rounds after the norm too, as torch.nn.RMSNorm does;
            "exact_before_weight" before and after the weight, as diffusers' RMSNorm does.
        out: where to write (q, k, v), through any strides but for the last axis; no gradient then.
    """
    arguments = _arguments(qkv, heads, kv_heads, q_weight, k_weight, rotation, rotate_from, eps, layout, tier)
    if out is None and _v_may_be_a_view(*arguments):
        q, k, _ = _qkv_norm_rope(*arguments[:-1], False)
        return q, k, _values(*arguments[0], heads=heads, kv_heads=k.shape[2])
    return _qkv_norm_rope(*arguments, out=None if out is None else tuple(out))


def _v_may_be_a_view(tensors, weights, rotation, per_stream, *numbers) -> bool:
    """A single stream whose layout is that of the result, where no gradient is recorded."""
    alone = len(tensors) == per_stream and "blhd" in numbers
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *weights))
    return alone and not recorded and not torch.compiler.is_compiling()


def _values(*stream: Tensor, heads: int, kv_heads: int) -> Tensor:
    """v of a stream as a view, which takes no part in autograd."""
    v = _apart(stream[0] if len(stream) == 1 else stream, heads, kv_heads)[2]
    return _split(v, kv_heads).detach()


def _split(x: Tensor, heads: int) -> Tensor:
    """`[batch, tokens, heads, d]`, a view."""
    return x if x.ndim == 4 else x.unflatten(-1, (heads, x.shape[-1] // heads))


def _arguments(qkv, heads, kv_heads, q_weight, k_weight, rotation, rotate_from, eps, layout, tier) -> tuple:
    """The arguments of the op: flat lists of tensors, and numbers."""
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"qkv_norm_rope: heads and kv_heads must be positive, got {heads} and {kv_heads}")
    streams = list(qkv) if isinstance(qkv, list) else [qkv]
    fused = all(isinstance(s, Tensor) for s in streams)
    tensors = streams if fused else [t for s in streams for t in _apart(s, heads, kv_heads)]
    for t in tensors:
        if t.ndim < 3:
            raise ValueError(f"qkv_norm_rope: qkv must be [batch, tokens, width], got {list(t.shape)}")
    weights = []
    if q_weight is not None or k_weight is not None:
        pairs = [_per_stream(w, len(streams), name) for w, name in ((q_weight, "q"), (k_weight, "k"))]
        weights = [_or_empty(w, tensors) for pair in zip(*pairs, strict=True) for w in pair]
    if isinstance(rotation, (tuple, list)):
        rotation = torch.stack(tuple(rotation), -1)
    per_stream = 1 if fused else 3
    return tensors, weights, rotation, per_stream, heads, kv_heads, rotate_from, eps, layout, tier, True


def _apart(stream: Stream, heads: int, kv_heads: int) -> Sequence[Tensor]:
    """q, k, v of a stream."""
    if isinstance(stream, Tensor):
        d = stream.shape[-1] // (heads + 2 * kv_heads)
        return stream.split([heads * d, kv_heads * d, stream.shape[-1] - (heads + kv_heads) * d], -1)
    if len(stream) != 3:
        raise ValueError(f"qkv_norm_rope: expected streams of one tensor or of (q, k, v), got {len(stream)}")
    return stream


def _per_stream(weight, streams: int, name: str) -> Sequence[Tensor | None]:
    if weight is None or isinstance(weight, Tensor):
        return [weight] * streams
    if len(weight) != streams:
        raise ValueError(
            f"qkv_norm_rope: {name}_weight must be one or as many as the {streams} streams, got {len(weight)}"
        )
    return weight


def _or_empty(weight: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(0) if weight is None else weight


def qkv_norm_rope_reference(
    tensors,
    weights,
    rotation,
    per_stream,
    heads,
    kv_heads,
    rotate_from,
    eps,
    layout="blhd",
    tier="fast",
    with_v=True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `qkv_norm_rope` in plain torch, on the arguments of the registered op."""
    joint, row = [], -rotate_from
    for i in range(len(tensors) // per_stream):
        stream = tensors[per_stream * i : per_stream * (i + 1)]
        parts = _apart(stream[0] if per_stream == 1 else tuple(stream), heads, kv_heads)
        q, k, v = (
            _split(part, count) for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
        )
        q, k = (
            _rotate(_norm(x, w, eps, tier), rotation, row)
            for x, w in zip((q, k), weights[2 * i : 2 * i + 2] or (None, None), strict=True)
        )
        joint.append((q, k, v))
        row += q.shape[1]
    q, k, v = (torch.cat(parts, 1).to(tensors[0].dtype) for parts in zip(*joint, strict=True))
    q, k, v = (x.transpose(1, 2) if layout == "bhld" else x for x in (q, k, v))
    return q, k, v if with_v else v.new_empty(0)


def _norm(x: Tensor, weight: Tensor | None, eps: float, tier: str) -> Tensor:
    if weight is None or not weight.numel():
        return x
    if weight.numel() != x.shape[-1]:  # over the full width
        return _norm(x.flatten(2), weight, eps, tier).unflatten(2, x.shape[2:])
    wide = x.to(accumulator(x.dtype))
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if tier == "exact_before_weight":
        return n.to(weight.dtype) * weight
    n = n * weight
    return n.to(x.dtype) if tier == "exact" else n


def _rotate(x: Tensor, rotation: Tensor | None, row: int) -> Tensor:
    """Turns the tokens that have a row; token 0 has row `row`."""
    if rotation is None:
        return x
    length, rows = x.shape[1], rotation.shape[-3]
    first = min(max(-row, 0), length)
    end = max(min(rows - row, length), first)
    x = x.to(rotation.dtype)
    before, turned, behind = x.split([first, end - first, length - end], 1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    # the heads have one angle
    cos, sin = rotation.narrow(-3, row + first if end > first else 0, end - first).unsqueeze(-3).unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([before, turned, behind], 1)


def _head_dim(q: Tensor, per_stream: int, heads: int, kv_heads: int) -> int:
    return q.shape[3] if q.ndim == 4 else q.shape[2] // (heads + 2 * kv_heads if per_stream == 1 else heads)


def _norm_widths(weights: Sequence[Tensor], d: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """The lengths of the weights of q and k."""
    return (heads * d, kv_heads * d) if any(w.numel() > d for w in weights) else (d, d)


def _empty(tensors, weights, rotation, per_stream, heads, kv_heads, rotate_from, eps, layout, tier, with_v):
    q = tensors[0]
    d = _head_dim(q, per_stream, heads, kv_heads)
    length = sum(t.shape[1] for t in tensors[::per_stream])
    shape = lambda n: (q.shape[0], n, length, d) if layout == "bhld" else (q.shape[0], length, n, d)
    return (
        *(q.new_empty(shape(n)) for n in (heads, kv_heads)),
        q.new_empty(shape(kv_heads) if with_v else 0),
    )


def _empty_backward(
    dq, dk, dv, tensors, weights, rotation, per_stream, heads, kv_heads, start, rotate_from, eps, layout
):
    q = tensors[0]
    batch, length, d = q.shape[0], q.shape[1], _head_dim(q, per_stream, heads, kv_heads)
    # 512 blocks fill the largest GPU; fewer than eight tokens do not outweigh a block's sums
    splits = max(1, min(512, (batch * length + 7) // 8))
    return (
        q.new_empty(batch, length, (heads + 2 * kv_heads) * d),
        q.new_empty(splits, sum(_norm_widths(weights, d, heads, kv_heads)), dtype=accumulator(q.dtype)),
    )


def qkv_norm_rope_backward_reference(
    dq, dk, dv, tensors, weights, rotation, per_stream, heads, kv_heads, start, rotate_from, eps, layout
) -> tuple[Tensor, Tensor]:
    """The gradient of `qkv_norm_rope_reference` for one stream, as the op of the backward gives it."""
    length, axis = tensors[0].shape[1], 2 if layout == "bhld" else 1
    with torch.enable_grad():
        tensors = [t.detach().requires_grad_() for t in tensors]
        weights = [w.detach().requires_grad_() for w in weights]
        results = qkv_norm_rope_reference(
            tensors, weights, rotation, per_stream, heads, kv_heads, rotate_from - start, eps, layout
        )
        pairs = [
            (r, g.narrow(axis, start, length))
            for r, g in zip(results, (dq, dk, dv), strict=True)
            if g is not None
        ]
        leaves = [*tensors, *weights]
        results, wanted = zip(*pairs, strict=True)
        grads = torch.autograd.grad(results, leaves, wanted, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
    d = _head_dim(tensors[0], per_stream, heads, kv_heads)
    d_tokens = torch.cat([g.flatten(2) for g in grads[: len(tensors)]], -1)
    widths = _norm_widths(weights, d, heads, kv_heads)
    d_weights = grads[len(tensors) :] or [tensors[0].new_empty(0)] * 2
    sums = torch.cat([g if g.numel() else g.new_zeros(n) for g, n in zip(d_weights, widths, strict=True)])
    return d_tokens, sums.to(accumulator(tensors[0].dtype))[None]


_qkv_norm_rope_backward = define(
    "qkv_norm_rope_backward",
    "Tensor? dq, Tensor? dk, Tensor? dv, Tensor[] tensors, Tensor[] weights, Tensor? rotation, "
    "int per_stream, int heads, int kv_heads, int start, int rotate_from, float eps, str layout",
    _C.qkv_norm_rope_backward,
    _empty_backward,
    qkv_norm_rope_backward_reference,
    outputs=("d_tokens", "d_weights"),
)


def _no_gaps(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.shape[-1] == 1 or grad.stride(-1) == 1 else grad.contiguous()


def _backward(
    grads, needs, streams, per_stream, rotation, heads, kv_heads, rotate_from, eps, layout, with_v, *saved
):
    tensors, weights = saved[: streams * per_stream], saved[streams * per_stream :]
    grads = [_no_gaps(g) for g in (grads if with_v else (*grads[:2], None))]
    d_tensors, d_weights, start = [], [], 0
    for i in range(streams):
        mine = list(tensors[per_stream * i : per_stream * (i + 1)])
        of_mine = list(weights[2 * i : 2 * i + 2])
        d_tokens, sums = _qkv_norm_rope_backward.functional(
            *grads, mine, of_mine, rotation, per_stream, heads, kv_heads, start, rotate_from, eps, layout
        )
        if per_stream == 1:
            d_tensors.append(d_tokens)
        else:
            parts = _apart(d_tokens, heads, kv_heads)
            d_tensors += [part.reshape(t.shape) for part, t in zip(parts, mine, strict=True)]
        if of_mine:
            d = _head_dim(mine[0], per_stream, heads, kv_heads)
            sums = sums.sum(0).split(_norm_widths(of_mine, d, heads, kv_heads))
            d_weights += [s.to(w.dtype) if w.numel() else None for s, w in zip(sums, of_mine, strict=True)]
        start += mine[0].shape[1]
    return d_tensors, d_weights, *[None] * 9


def _saves(out, tensors, weights, rotation, per_stream, *others):
    *numbers, _, with_v = others  # no tier
    return len(tensors) // per_stream, per_stream, rotation, *numbers, with_v, *tensors, *weights


_qkv_norm_rope = define(
    "qkv_norm_rope",
    "Tensor[] tensors, Tensor[] weights, Tensor? rotation, int per_stream, int heads, int kv_heads, "
    "int rotate_from, float eps, str layout, str tier, bool with_v",
    _C.qkv_norm_rope,
    _empty,
    qkv_norm_rope_reference,
    _backward,
    saves=_saves,
    strided_grads=True,
    outputs=("q", "k", "v"),
)
