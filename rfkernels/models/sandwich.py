"""The blocks of Lumina-Image 2.0 and Z-Image: RMS norms before and behind a branch, tanh of gates, no shift.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs. Without
modulation, as text is refined, scales are 0 and gates 1. Samples of different lengths are padded behind:
`key_lengths` [B] are the lengths; or `bias` [B or 1, 1, 1, L] masks keys.
"""

from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import (
    attend,
    bounded,
    gated_residual_norm_modulate,
    norm_modulate,
    project,
    swiglu_mlp,
    weight_of,
)

__all__ = ["lumina2_block", "zimage_block"]

UNMODULATED = (None, None, None, None)


def lumina2_block(
    block: nn.Module,
    x: Tensor,
    temb: Tensor | None,
    rotation: Tensor | None,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [B, L, width], temb [B, 1024 at most]; several heads of queries share one of keys and values."""
    norms, ff = (block.norm1, block.norm2, block.ffn_norm1, block.ffn_norm2), block.feed_forward
    modulation = UNMODULATED
    if hasattr(block.norm1, "linear"):
        norms = (block.norm1.norm, *norms[1:])
        modulation = block.norm1.linear(ops.silu(temb)).chunk(4, -1)
    layers = ff.linear_1, ff.linear_3, ff.linear_2
    return _block(x, block.attn, layers, norms, modulation, rotation, None, bias, key_lengths)


def zimage_block(
    block: nn.Module,
    x: Tensor,
    temb: Tensor | None,
    rotation: Tensor | None,
    index: Tensor | None = None,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [B, L, width], temb [B, 256 at most]; or [G, 256 at most] with index [B, L], the row of each token:
    noisy ones, and clean ones of a reference."""
    norms = block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2
    modulation, ff = UNMODULATED, block.feed_forward
    if hasattr(block, "adaLN_modulation"):
        modulation = block.adaLN_modulation[0](temb).chunk(4, -1)
    layers = ff.w1, ff.w3, ff.w2
    return _block(x, block.attention, layers, norms, modulation, rotation, index, bias, key_lengths)


def _block(x, attn, layers, norms, modulation, rotation, index, bias, key_lengths) -> Tensor:
    before, behind, mlp_before, mlp_behind = norms
    scale, gate, scale_mlp, gate_mlp = modulation
    qkv, (ff_gate, ff_up, ff_down) = (attn.to_q, attn.to_k, attn.to_v), layers
    table = {} if scale is None else {"index": index}
    activation = "none" if gate is None else "tanh"

    n = norm_modulate(x, scale, **table, **_rms(before), to=qkv)
    q, k, v = ops.qkv_norm_rope(
        project(n, *qkv),
        attn.heads,
        kv_heads=attn.heads * attn.to_k.out_features // attn.to_q.out_features,
        q_weight=weight_of(attn.norm_q),
        k_weight=weight_of(attn.norm_k),
        rotation=rotation,
        eps=1e-5 if attn.norm_q is None else attn.norm_q.eps,
    )
    y = attn.to_out[0](attend(attn, q, k, v, bias, key_lengths))
    x, n = gated_residual_norm_modulate(
        x,
        y,
        gate,
        scale_mlp,
        **table,
        gate_activation=activation,
        branch_norm="rms",
        branch_weight=behind.weight,
        **_rms(mlp_before),
        to=(ff_gate, ff_up),
    )
    return bounded(
        ops.gated_residual(
            x,
            ff_down(swiglu_mlp(n, ff_gate, ff_up)),
            gate_mlp,
            **table,
            gate_activation=activation,
            branch_norm="rms",
            branch_weight=mlp_behind.weight,
            eps=mlp_behind.eps,
        )
    )


def _rms(norm: nn.Module) -> dict:
    return {"norm": "rms", "weight": norm.weight, "eps": norm.eps}
