"""The blocks of FLUX.2: no biases, SwiGLU, one modulation for all blocks of a kind; the text comes first.

`block` holds the weights: diffusers' Flux2TransformerBlock, Flux2SingleTransformerBlock.
The modulations come from layers of the model, rotation from `ops.rotary_table`.
"""

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import attend, project

__all__ = ["double_block", "single_block"]


def double_block(
    block: nn.Module, image: Tensor, text: Tensor, modulation: Tensor, c_modulation: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width], modulations [B, 6 width] -> (text, image)."""
    attn = block.attn
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation.chunk(6, -1)
    n = ops.norm_modulate(image, scale, shift)
    c_n = ops.norm_modulate(text, c_scale, c_shift)
    q, k, v = ops.qkv_norm_rope(
        [
            project(c_n, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            project(n, attn.to_q, attn.to_k, attn.to_v),
        ],
        attn.heads,
        q_weight=[attn.norm_added_q.weight, attn.norm_q.weight],
        k_weight=[attn.norm_added_k.weight, attn.norm_k.weight],
        rotation=rotation,
    )
    c_y, y = attend(attn, q, k, v).split([text.shape[1], image.shape[1]], 1)
    image, n = ops.gated_residual_norm_modulate(image, attn.to_out[0](y), gate, scale_mlp, shift_mlp)
    text, c_n = ops.gated_residual_norm_modulate(text, attn.to_add_out(c_y), c_gate, c_scale_mlp, c_shift_mlp)
    image = ops.gated_residual(image, feed_forward(n, block.ff), gate_mlp)
    text = ops.gated_residual(text, feed_forward(c_n, block.ff_context), c_gate_mlp)
    return text, image


def single_block(block: nn.Module, x: Tensor, modulation: Tensor, rotation: Tensor) -> Tensor:
    """x [B, T + N, width], text first, modulation [B, 3 width]: one matmul in, one matmul out."""
    attn = block.attn
    shift, scale, gate = modulation.chunk(3, -1)
    h = attn.to_qkv_mlp_proj(ops.norm_modulate(x, scale, shift))
    qkv, gate_up = h.split([3 * attn.inner_dim, 2 * attn.mlp_hidden_dim], -1)
    q, k, v = ops.qkv_norm_rope(
        qkv,
        attn.heads,
        q_weight=attn.norm_q.weight,
        k_weight=attn.norm_k.weight,
        rotation=rotation,
    )
    y = attn.to_out(torch.cat([attend(attn, q, k, v), ops.swiglu(gate_up)], -1))
    return ops.gated_residual(x, y, gate)


def feed_forward(x: Tensor, ff: nn.Module) -> Tensor:
    return ff.linear_out(ops.swiglu(ff.linear_in(x)))
