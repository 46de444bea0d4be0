"""The blocks of FLUX.1: text and image tokens with their own weights, then as one sequence.

The text comes first, in attention and in the joint sequence. `block` holds the weights: diffusers'
FluxTransformerBlock, FluxSingleTransformerBlock. temb [B, width]; rotation from `ops.rotary_table`, of all
tokens.
"""

import torch
from torch import Tensor, nn

from rfkernels import ops
from tests.blocks.layers import attend, joined, mlp

__all__ = ["double_block", "single_block"]


def double_block(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width] -> (text, image)."""
    attn, condition = block.attn, ops.silu(temb)
    modulation = block.norm1.linear(condition)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    c_modulation = block.norm1_context.linear(condition)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation.chunk(6, -1)

    n = ops.norm_modulate(image, scale, shift)
    c_n = ops.norm_modulate(text, c_scale, c_shift)
    q, k, v = ops.qkv_norm_rope(
        [
            joined(c_n, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            joined(n, attn.to_q, attn.to_k, attn.to_v),
        ],
        attn.heads,
        q_weight=[attn.norm_added_q.weight, attn.norm_q.weight],
        k_weight=[attn.norm_added_k.weight, attn.norm_k.weight],
        rotation=rotation,
    )
    c_y, y = attend(q, k, v).split([text.shape[1], image.shape[1]], 1)
    y, c_y = attn.to_out[0](y), attn.to_add_out(c_y)

    image, n = ops.gated_residual_norm_modulate(image, y, gate, scale_mlp, shift_mlp)
    text, c_n = ops.gated_residual_norm_modulate(text, c_y, c_gate, c_scale_mlp, c_shift_mlp)
    image = ops.gated_residual(image, mlp(n, block.ff), gate_mlp)
    text = ops.gated_residual(text, mlp(c_n, block.ff_context), c_gate_mlp)
    return text, image


def single_block(block: nn.Module, x: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
    """x [B, T + N, width], text first: attention and MLP side by side, from one matmul into one matmul."""
    attn = block.attn
    shift, scale, gate = block.norm.linear(ops.silu(temb)).chunk(3, -1)
    n = ops.norm_modulate(x, scale, shift)
    h = joined(n, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    qkv, hidden = h.split([3 * x.shape[-1], block.mlp_hidden_dim], -1)
    q, k, v = ops.qkv_norm_rope(
        qkv,
        attn.heads,
        q_weight=attn.norm_q.weight,
        k_weight=attn.norm_k.weight,
        rotation=rotation,
    )
    y = block.proj_out(torch.cat([attend(q, k, v), ops.gelu(hidden, "tanh")], -1))
    return ops.gated_residual(x, y, gate)
