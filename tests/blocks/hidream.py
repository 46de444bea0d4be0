"""The blocks of HiDream-I1; the image comes first, queries and keys are normed over the full width.

`block` holds the weights: diffusers' HiDreamImageTransformerBlock, HiDreamImageSingleTransformerBlock.
temb [B, width]; rotation of all tokens from `ops.rotary_table`. The feed-forward of the image is a mixture of
experts in the released models: routing and experts are the caller's, here diffusers' module.
"""

from torch import Tensor, nn

from rfkernels import ops
from tests.blocks.layers import attend, joined

__all__ = ["double_block", "single_block"]

Triple = tuple[Tensor, Tensor, Tensor]


def double_block(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width] -> (image, text)."""
    attn = block.attn1
    modulation = block.adaLN_modulation[1](ops.silu(temb)).chunk(12, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = modulation[6:]

    n = ops.norm_modulate(image, scale, shift)
    c_n = ops.norm_modulate(text, c_scale, c_shift)
    streams = [
        normed(joined(n, attn.to_q, attn.to_k, attn.to_v), attn.q_rms_norm, attn.k_rms_norm),
        normed(joined(c_n, attn.to_q_t, attn.to_k_t, attn.to_v_t), attn.q_rms_norm_t, attn.k_rms_norm_t),
    ]
    q, k, v = ops.qkv_norm_rope(streams, attn.heads, rotation=rotation)
    y, c_y = attend(q, k, v).split([image.shape[1], text.shape[1]], 1)

    image, n = ops.gated_residual_norm_modulate(image, attn.to_out(y), gate, scale_mlp, shift_mlp)
    text, c_n = ops.gated_residual_norm_modulate(text, attn.to_out_t(c_y), c_gate, c_scale_mlp, c_shift_mlp)
    image = ops.gated_residual(image, block.ff_i(n), gate_mlp)
    text = ops.gated_residual(text, swiglu_mlp(c_n, block.ff_t), c_gate_mlp)
    return image, text


def single_block(block: nn.Module, x: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
    """x [B, N + T, width], image first."""
    attn = block.attn1
    modulation = block.adaLN_modulation[1](ops.silu(temb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    n = ops.norm_modulate(x, scale, shift)
    qkv = normed(joined(n, attn.to_q, attn.to_k, attn.to_v), attn.q_rms_norm, attn.k_rms_norm)
    y = attn.to_out(attend(*ops.qkv_norm_rope(qkv, attn.heads, rotation=rotation)))
    x, n = ops.gated_residual_norm_modulate(x, y, gate, scale_mlp, shift_mlp)
    return ops.gated_residual(x, block.ff_i(n), gate_mlp)


def normed(qkv: Tensor, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm) -> Triple:
    q, k, v = qkv.chunk(3, -1)
    return (
        ops.norm_modulate(q, norm="rms", weight=q_norm.weight, eps=q_norm.eps),
        ops.norm_modulate(k, norm="rms", weight=k_norm.weight, eps=k_norm.eps),
        v,
    )


def swiglu_mlp(x: Tensor, ff: nn.Module) -> Tensor:
    return ff.w2(ops.swiglu(joined(x, ff.w1, ff.w3)))
