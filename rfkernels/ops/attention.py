r"""Attention in 16, 32 and 64 bits and in eight, for padded, packed and block-sparse sequences.

    out = (softmax(scale q k^T + bias) * C) v

No buffer of queries times keys exists at any point. Softmax is computed online in base 2 with float32 sums
(float64 for float64 tensors); weights are rounded to the type that the second product multiplies.
"""

import torch
from torch import Tensor

from rfkernels.ops._attention import attention_reference, run_attention

__all__ = ["attention", "attention_reference", "key_mean"]

PRECISIONS = ("full", "bf16", "int8", "fp8", "auto")
LAYOUTS = ("bhld", "blhd")


def key_mean(k: Tensor, *, layout: str = "bhld") -> Tensor:
    """The mean of the keys of every head, float32 `[batch, kv_heads, d]`: `key_mean=` of a later call."""
    _check_layout(layout)
    return k.float().mean(2 if layout == "bhld" else 1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    block_mask: Tensor | None = None,
    head_shift: Tensor | None = None,
    frames: int = 1,
    key_mean: Tensor | None = None,
    layout: str = "bhld",
    precision: str = "full",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Returns :math:`(\mathrm{softmax}(s\,q k^\top + B) \odot C)\,v`, in the layout of `q`.

    Args:
        q: `[batch, heads, rows, d]`, through any strides but for the last axis (slices of a fused projection
            need no copy), d at most 256; float64, float32, float16 or bfloat16.
        k, v: `[batch, kv_heads, keys, d]` like q; kv_heads divides heads.
        scale: s, by default :math:`1 / \sqrt{d}`.
        bias: B, `[batch or 1, heads or 1, rows or 1, keys]`, of the dtype of q or float32 (float64); or bool,
            True where a query sees a key.
        factor: a relative factor C, `[heads or 1, rows + keys - 1]` float32 (float64): weights are multiplied
            by :math:`C_{ij} = \mathrm{factor}[h, j - i + \mathrm{rows} - 1]` after the softmax and not
            normalised again (URPE, Luo et al., 2022).
        key_lengths: integers `[batch]`: the keys from there on are padding.
        cu_seqlens: int32 `[sequences + 1]`, 0 to the number of tokens: q, k and v are `[tokens, heads, d]`,
            sequences one behind the other that see themselves alone; or (that of q, that of k).
        block_mask: bool `[batch or 1, heads or 1, rows / 128, keys / 64]`, rounded up: False blocks are
            skipped, and cost nothing.
        head_shift: integers `[kv_heads]`, with `frames`: keys and values of head h are those of sample
            b + head_shift[h], where both are of the same run of `frames` samples, else its own (ZeroI2V, Li
            et al., 2023).
        key_mean: float32 `[batch or sequences, kv_heads, d]`, subtracted from the keys before they become
            codes, which leaves the softmax as it is; absent: their mean. An earlier step's saves a pass.
        layout: "blhd" for `[batch, tokens, heads, d]`.
        precision: "full": products of the dtype. "bf16": the same of q, k, v rounded to bfloat16. "int8": q
            and k as int8 codes with a scale per token, weights as eight bits times int8 codes of v
            (SageAttention, Zhang et al., 2024). "fp8": weights and v as e4m3 where the device multiplies
            them, else in 16 bits. "auto": "int8" for every head whose expected error is at most 2 %, else
            "full"; `rfkernels.explain()` tells which. Eight bits have the gradient of "full" (straight
            through).
        return_lse: return (out, lse) with the natural logarithm of the sum of exponentials, float32
            (float64) `[batch, heads, rows]`, packed `[heads, tokens]`; for `attention_merge`.

    A query that sees no key has the result 0 and lse -infinity. A NaN or an infinity makes NaN of the
    queries that see it and of no other (in full precision on CUDA an infinity follows IEEE 754: a score of
    -infinity has the weight 0). Results depend on the sample alone, not on what it is batched,
    padded or packed with, and are the same in every run.

    Gradients of q, k, v, bias and factor; that of packed CUDA sequences reads `cu_seqlens` on the host.

    Raises:
        ValueError: tensors that do not fit together; on the CPU lengths and starts out of range (on CUDA,
            where the host cannot see them, results are NaN).
    """
    _check_layout(layout)
    if precision not in PRECISIONS:
        raise ValueError(f"attention: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = q.dtype
    if precision == "bf16":
        q, k, v = (t.bfloat16() for t in (q, k, v))
        bias = bias.float() if bias is not None and bias.dtype in (torch.float64, torch.float16) else bias
        precision = "full"
    packed = cu_seqlens is not None
    q, k, v = (_heads_first(name, t, packed, layout) for name, t in (("q", q), ("k", k), ("v", v)))
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
    if block_mask is not None and block_mask.dtype != torch.bool:
        raise ValueError(f"attention: block_mask must be bool, got {block_mask.dtype}")
    starts = cu_seqlens if isinstance(cu_seqlens, (tuple, list)) else (cu_seqlens, cu_seqlens)
    extras = (bias, factor, key_lengths, cu_seqlens, block_mask, head_shift)
    if precision == "full" and not return_lse and delegates(q, extras):
        out = _torch_attention(q, k, v, scale)
        lse = None
    else:
        out, lse = run_attention(
            *(_adjacent(t) for t in (q, k, v)),
            None if bias is None else _adjacent(bias),
            None if factor is None else factor.contiguous(),
            *(_int32(t) for t in (key_lengths, *starts)),
            None if block_mask is None else _adjacent(block_mask.view(torch.uint8)),
            _int32(head_shift),
            key_mean,
            q.shape[-1] ** -0.5 if scale is None else float(scale),
            frames,
            precision,
        )
    out = out.to(dtype)
    if packed:
        out, lse = out[0].transpose(0, 1), None if lse is None else lse[0]
    elif layout == "blhd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _heads_first(name: str, t: Tensor, packed: bool, layout: str) -> Tensor:
    """A view `[batch, heads, tokens, d]`."""
    if t.ndim != (3 if packed else 4):
        axes = "[tokens, heads, d] beside cu_seqlens" if packed else f"four axes, {layout}"
        raise ValueError(f"attention: {name} must be {axes}, got {tuple(t.shape)}")
    if packed:
        return t.transpose(0, 1)[None]
    return t.transpose(1, 2) if layout == "blhd" else t


def delegates(q: Tensor, extras: tuple = ()) -> bool:
    """Whether torch's attention (cuDNN) runs a call: plain 16-bit ones on sm_90 and later, where it is the
    fastest there is."""
    plain = all(t is None for t in extras) and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    return plain and q.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"attention: layout must be 'bhld' or 'blhd', got {layout!r}")


def _adjacent(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _int32(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(torch.int32).contiguous()
