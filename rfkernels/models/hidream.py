"""The blocks of HiDream-I1; the image comes first, queries and keys are normed over the full width.

`block` holds the weights: diffusers' HiDreamImageTransformerBlock, HiDreamImageSingleTransformerBlock.
temb [B, width]; rotation of all tokens from `ops.rotary_table`. The feed-forward of the image is a mixture of
experts in the released models: routing and experts are the caller's, here diffusers' module.
"""

from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import attend, project, swiglu_mlp

__all__ = ["double_block", "single_block"]


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
    q, k, v = ops.qkv_norm_rope(
        [project(n, attn.to_q, attn.to_k, attn.to_v), project(c_n, attn.to_q_t, attn.to_k_t, attn.to_v_t)],
        attn.heads,
        q_weight=[attn.q_rms_norm.weight, attn.q_rms_norm_t.weight],
        k_weight=[attn.k_rms_norm.weight, attn.k_rms_norm_t.weight],
        rotation=rotation,
        eps=attn.q_rms_norm.eps,
    )
    y, c_y = attend(attn, q, k, v).split([image.shape[1], text.shape[1]], 1)

    image, n = ops.gated_residual_norm_modulate(image, attn.to_out(y), gate, scale_mlp, shift_mlp)
    text, c_n = ops.gated_residual_norm_modulate(text, attn.to_out_t(c_y), c_gate, c_scale_mlp, c_shift_mlp)
    image = ops.gated_residual(image, block.ff_i(n), gate_mlp)
    text = ops.gated_residual(text, feed_forward(c_n, block.ff_t), c_gate_mlp)
    return image, text


def single_block(block: nn.Module, x: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
    """x [B, N + T, width], image first."""
    attn = block.attn1
    modulation = block.adaLN_modulation[1](ops.silu(temb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    n = ops.norm_modulate(x, scale, shift)
    q, k, v = ops.qkv_norm_rope(
        project(n, attn.to_q, attn.to_k, attn.to_v),
        attn.heads,
        q_weight=attn.q_rms_norm.weight,
        k_weight=attn.k_rms_norm.weight,
        rotation=rotation,
        eps=attn.q_rms_norm.eps,
    )
    y = attn.to_out(attend(attn, q, k, v))
    x, n = ops.gated_residual_norm_modulate(x, y, gate, scale_mlp, shift_mlp)
    return ops.gated_residual(x, block.ff_i(n), gate_mlp)


def feed_forward(x: Tensor, ff: nn.Module) -> Tensor:
    return ff.w2(swiglu_mlp(x, ff.w1, ff.w3))
