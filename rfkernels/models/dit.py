"""The blocks of DiT (and SiT) and of PixArt.

`block` holds the weights: diffusers' BasicTransformerBlock, as PixArtTransformer2DModel makes it, or as
DiTTransformer2DModel, where every block has its own embeddings of time and class.
"""

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import attend, finish, gelu_mlp, project

__all__ = ["class_conditional_block", "condition_of", "pixart_block"]


def class_conditional_block(block: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """x [B, L, width], t [B] in 0 .. 1000, label [B]."""
    attn = block.attn1
    modulation = block.norm1.linear(ops.silu(condition_of(block.norm1.emb, t, label, x.dtype)))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    n = ops.norm_modulate(x, scale, shift)
    q, k, v = ops.qkv_norm_rope(project(n, attn.to_q, attn.to_k, attn.to_v), attn.heads)
    y = attn.to_out[0](attend(attn, q, k, v))
    x, n = ops.gated_residual_norm_modulate(x, y, gate, scale_mlp, shift_mlp, eps=block.norm3.eps)
    return finish(x, *gelu_mlp(n, block.ff), gate_mlp)


def pixart_block(block: nn.Module, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """x [B, L, width], text [B, T, width], temb [B, 6 width], the same for all blocks."""
    modulation = block.scale_shift_table + temb.unflatten(-1, (6, -1))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(1)
    attn = block.attn1
    n = ops.norm_modulate(x, scale, shift)
    q, k, v = ops.qkv_norm_rope(project(n, attn.to_q, attn.to_k, attn.to_v), attn.heads)
    x = ops.gated_residual(x, attn.to_out[0](attend(attn, q, k, v)), gate)

    attn = block.attn2  # reads x itself, no norm
    k, v = project(text, attn.to_k, attn.to_v)  # the same in every step: a sampler keeps them
    y = attn.to_out[0](attend(attn, *(t.unflatten(-1, (attn.heads, -1)) for t in (attn.to_q(x), k, v))))
    x, n = ops.gated_residual_norm_modulate(x, y, None, scale_mlp, shift_mlp)
    return finish(x, *gelu_mlp(n, block.ff), gate_mlp)


def condition_of(emb: nn.Module, t: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
    """Embedding of time plus embedding of the class; diffusers' divisor is 127 where the original has 128."""
    sinusoid = ops.timestep_embedding(t, 256, downscale_freq_shift=1, dtype=dtype)
    embedder = emb.timestep_embedder
    hidden = ops.silu(embedder.linear_1(sinusoid))
    return embedder.linear_2(hidden) + emb.class_embedder.embedding_table(label)
