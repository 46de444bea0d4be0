"""The joint block of Stable Diffusion 3 and 3.5; no rotation, the image comes first.

`block` holds the weights: diffusers' JointTransformerBlock. temb [B, width].
"""

from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import attend, finish, gelu_mlp, project

__all__ = ["joint_block"]


def joint_block(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor] | tuple[Tensor]:
    """image [B, N, width], text [B, T, width] -> (image, text); the last block gives (image,) alone."""
    attn, condition = block.attn, ops.silu(temb)
    modulation = block.norm1.linear(condition).chunk(9 if block.use_dual_attention else 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
    c_modulation = block.norm1_context.linear(condition)
    if block.context_pre_only:
        c_scale, c_shift = c_modulation.chunk(2, -1)  # in this order
    else:
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation.chunk(6, -1)

    n = ops.norm_modulate(image, scale, shift)
    c_n = ops.norm_modulate(text, c_scale, c_shift)
    q, k, v = ops.qkv_norm_rope(
        [
            project(n, attn.to_q, attn.to_k, attn.to_v),
            project(c_n, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        ],
        attn.heads,
        q_weight=[weight(attn.norm_q), weight(attn.norm_added_q)],
        k_weight=[weight(attn.norm_k), weight(attn.norm_added_k)],
    )
    y, c_y = attend(attn, q, k, v).split([image.shape[1], text.shape[1]], 1)
    y = attn.to_out[0](y)

    if block.use_dual_attention:  # a second attention, of the image alone, from the same input
        shift2, scale2, gate2 = modulation[6:]
        attn2 = block.attn2
        n2 = ops.norm_modulate(image, scale2, shift2)
        q, k, v = ops.qkv_norm_rope(
            project(n2, attn2.to_q, attn2.to_k, attn2.to_v),
            attn2.heads,
            q_weight=weight(attn2.norm_q),
            k_weight=weight(attn2.norm_k),
        )
        image = ops.gated_residual(image, y, gate)
        y, gate = attn2.to_out[0](attend(attn2, q, k, v)), gate2

    image, n = ops.gated_residual_norm_modulate(image, y, gate, scale_mlp, shift_mlp)
    image = finish(image, *gelu_mlp(n, block.ff), gate_mlp)
    if block.context_pre_only:
        return (image,)
    text, c_n = ops.gated_residual_norm_modulate(text, attn.to_add_out(c_y), c_gate, c_scale_mlp, c_shift_mlp)
    text = finish(text, *gelu_mlp(c_n, block.ff_context), c_gate_mlp)
    return image, text


def weight(norm: nn.Module | None) -> Tensor | None:
    """SD3 has no norm of queries and keys, SD3.5 has."""
    return None if norm is None else norm.weight
