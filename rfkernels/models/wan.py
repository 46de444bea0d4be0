"""The block of Wan 2.1 and 2.2: self-attention over a video, cross-attention to its text, MLP.

`block` holds the weights: diffusers' WanTransformerBlock, its modulation table and norms in float32 beside
16-bit tokens.
"""

from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import attend, finish, gelu_mlp, project

__all__ = ["video_block"]


def video_block(
    block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, rotation: Tensor, index: Tensor | None = None
) -> Tensor:
    """x [B, L, width], text [B, T, width]. temb float32 [B, 6, width], a row per sample; or [G, 6, width] and
    index [B, L], the row of each token: two rows where the first frame is given (Wan 2.2 5B)."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (block.scale_shift_table + temb).unbind(1)

    attn = block.attn1
    n = ops.norm_modulate(x, scale, shift, index=index)
    q, k, v = ops.qkv_norm_rope(
        project(n, attn.to_q, attn.to_k, attn.to_v),
        attn.heads,
        q_weight=attn.norm_q.weight,  # over the full width
        k_weight=attn.norm_k.weight,
        rotation=rotation,
    )
    y = attn.to_out[0](attend(attn, q, k, v))
    x, n = ops.gated_residual_norm_modulate(
        x, y, gate, index=index, weight=block.norm2.weight, bias=block.norm2.bias
    )

    attn = block.attn2
    k, v = project(text, attn.to_k, attn.to_v)  # the same in every step: a sampler keeps them
    q = ops.norm_modulate(attn.to_q(n), norm="rms", weight=attn.norm_q.weight)
    k = ops.norm_modulate(k, norm="rms", weight=attn.norm_k.weight)
    y = attn.to_out[0](attend(attn, *(t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))))
    x, n = ops.gated_residual_norm_modulate(x, y, None, scale_mlp, shift_mlp, index=index)

    return finish(x, *gelu_mlp(n, block.ffn), gate_mlp, index=index)
