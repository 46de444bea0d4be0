"""The block of Qwen-Image and Qwen-Image-Edit; the text comes first.

`block` holds the weights: diffusers' QwenImageTransformerBlock; rotation from `ops.rotary_table`.
"""

from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import attend, finish, gelu_mlp, project

__all__ = ["double_block"]


def double_block(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, rotation: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width] -> (text, image). temb [B, width]; or [G, width], B rows of the
    samples first, with index [B, N], the row of each image token: those of a reference are at t = 0."""
    attn = block.attn
    modulation = block.img_mod[1](ops.silu(temb))
    c_modulation = block.txt_mod[1](ops.silu(temb[: len(text)]))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation.chunk(6, -1)

    n = ops.norm_modulate(image, scale, shift, index=index)
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
    y, c_y = attn.to_out[0](y), attn.to_add_out(c_y)

    image, n = ops.gated_residual_norm_modulate(image, y, gate, scale_mlp, shift_mlp, index=index)
    text, c_n = ops.gated_residual_norm_modulate(text, c_y, c_gate, c_scale_mlp, c_shift_mlp)
    image = finish(image, *gelu_mlp(n, block.img_mlp), gate_mlp, index=index)
    text = finish(text, *gelu_mlp(c_n, block.txt_mlp), c_gate_mlp)
    return text, image
