"""From the projection of a block to its attention: `qkv_norm_rope`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import DTYPES, Case, nbytes, random_tensor, row_values, tolerance

# batch, tokens, heads, head dim
MODELS = {
    "DiT-S/2 256x256": (1, 256, 6, 64),
    "SD3.5 medium 1024x1024": (2, 4096 + 333, 24, 64),
    "FLUX 1024x1024": (1, 4096 + 512, 24, 128),
    "Wan 1.3B 480p 81 frames": (1, 21 * 30 * 52, 12, 128),
}
FULL = [(label, dtype) for label in MODELS for dtype in ("f32", "bf16")]
QUICK = [("DiT-S/2 256x256", "bf16"), ("FLUX 1024x1024", "bf16")]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """q, k and v of named models, side by side in a fused projection; norms and rotation for all."""
    for label, dtypes in QUICK if quick else FULL:
        yield _qkv(label, MODELS[label], dtypes, device)


def _qkv(label: str, sizes: tuple[int, int, int, int], dtypes: str, device: str) -> Case:
    """Results `[batch, tokens, heads, d]`, as in diffusers, where v is a view: here all sides copy it."""
    from rfkernels.ops import qkv_norm_rope, rotary_table

    batch, tokens, heads, d = sizes
    dtype = DTYPES[dtypes][0]
    q_weight, k_weight = (row_values((d,), device, seed).to(dtype) for seed in (1, 2))
    table = rotary_table(torch.arange(tokens, device=device)[:, None], (d,))
    cos, sin = (t.repeat_interleave(2, -1)[None, :, None, :] for t in table.unbind(-1))

    def rotated(x: Tensor, weight: Tensor) -> Tensor:  # diffusers: RMSNorm, then apply_rotary_emb
        x = torch.nn.functional.rms_norm(x, (d,), weight, 1e-6)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x.float() * cos + torch.stack([-b, a], -1).flatten(-2).float() * sin

    def formula(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.unflatten(-1, (heads, d)) for t in qkv.chunk(3, -1))
        return rotated(q, q_weight).to(dtype), rotated(k, k_weight).to(dtype), v.contiguous()

    def formula_out(out: Tensor, qkv: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, d)) for t in qkv.chunk(3, -1))
        out[0].copy_(rotated(q, q_weight))
        out[1].copy_(rotated(k, k_weight))
        out[2].copy_(v)
        return out

    def ours(out: Tensor | None, qkv: Tensor) -> tuple[Tensor, ...]:
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        into = torch.empty(shape, dtype=dtype, device=device) if out is None else out
        return qkv_norm_rope(qkv, heads, **weights, rotation=table, out=tuple(into.unbind(0)))

    shape = (3, batch, tokens, heads, d)
    return Case(
        room="rope",
        op="qkv_norm_rope",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(2 * torch.Size(shape).numel(), dtype),  # qkv -> q, k, v
        inputs=lambda: (random_tensor((batch, tokens, 3 * heads * d), dtype, device, 3),),
        ours=ours,
        formula=formula,
        formula_out=formula_out,
        tolerance=tolerance(dtypes),
    )
