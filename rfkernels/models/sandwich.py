"""The blocks of Lumina-Image 2.0 and Z-Image: RMS norms before and behind a branch, tanh of gates, no shift.

`block` holds the weights: diffusers' Lumina2TransformerBlock, ZImageTransformerBlock.
"""

from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import attend, project, swiglu_mlp

__all__ = ["lumina2_block", "zimage_block"]

EPS = 1e-5


def lumina2_block(block: nn.Module, x: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
    """x [B, L, width], temb [B, 1024 at most]; three heads of queries share one of keys and values."""
    attn, ff = block.attn, block.feed_forward
    kv_heads = attn.to_k.out_features // (attn.to_q.out_features // attn.heads)
    scale, gate, scale_mlp, gate_mlp = block.norm1.linear(ops.silu(temb)).chunk(4, -1)
    n = ops.norm_modulate(x, scale, norm="rms", weight=block.norm1.norm.weight, eps=EPS)
    q, k, v = ops.qkv_norm_rope(
        project(n, attn.to_q, attn.to_k, attn.to_v),
        attn.heads,
        kv_heads=kv_heads,
        q_weight=attn.norm_q.weight,
        k_weight=attn.norm_k.weight,
        rotation=rotation,
        eps=EPS,
    )
    y = attn.to_out[0](attend(attn, q, k, v))
    x, n = ops.gated_residual_norm_modulate(
        x,
        y,
        gate,
        scale_mlp,
        gate_activation="tanh",
        branch_norm="rms",
        branch_weight=block.norm2.weight,
        norm="rms",
        weight=block.ffn_norm1.weight,
        eps=EPS,
    )
    y = ff.linear_2(swiglu_mlp(n, ff.linear_1, ff.linear_3))
    return ops.gated_residual(
        x,
        y,
        gate_mlp,
        gate_activation="tanh",
        branch_norm="rms",
        branch_weight=block.ffn_norm2.weight,
        eps=EPS,
    )


def zimage_block(
    block: nn.Module, x: Tensor, temb: Tensor, rotation: Tensor, index: Tensor | None = None
) -> Tensor:
    """x [B, L, width], temb [B, 256 at most]; or [G, 256 at most] with index [B, L], the row of each token:
    noisy ones, and clean ones of a reference."""
    attn, ff = block.attention, block.feed_forward
    scale, gate, scale_mlp, gate_mlp = block.adaLN_modulation[0](temb).chunk(4, -1)
    n = ops.norm_modulate(x, scale, index=index, norm="rms", weight=block.attention_norm1.weight, eps=EPS)
    q, k, v = ops.qkv_norm_rope(
        project(n, attn.to_q, attn.to_k, attn.to_v),
        attn.heads,
        q_weight=attn.norm_q.weight,
        k_weight=attn.norm_k.weight,
        rotation=rotation,
        eps=EPS,
    )
    y = attn.to_out[0](attend(attn, q, k, v))
    x, n = ops.gated_residual_norm_modulate(
        x,
        y,
        gate,
        scale_mlp,
        index=index,
        gate_activation="tanh",
        branch_norm="rms",
        branch_weight=block.attention_norm2.weight,
        norm="rms",
        weight=block.ffn_norm1.weight,
        eps=EPS,
    )
    y = ff.w2(swiglu_mlp(n, ff.w1, ff.w3))
    return ops.gated_residual(
        x,
        y,
        gate_mlp,
        index=index,
        gate_activation="tanh",
        branch_norm="rms",
        branch_weight=block.ffn_norm2.weight,
        eps=EPS,
    )
