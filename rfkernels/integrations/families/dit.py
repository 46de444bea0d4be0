"""DiT and PixArt of diffusers, which share a class of blocks with other models."""

from torch import Tensor, nn

from rfkernels.integrations.families.forward import Forward, Unsupported, refuse
from rfkernels.models import dit, pixart

__all__ = ["BLOCKS"]


def basic(
    block,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
) -> Tensor:
    refuse(attention_mask=attention_mask, cross_attention_kwargs=cross_attention_kwargs)
    if reason := unlike(block):
        raise Unsupported(reason)
    if hidden_states.ndim != 3:
        raise Unsupported(f"hidden_states have {hidden_states.ndim} axes, not 3")
    x = hidden_states.contiguous()  # they are channels of an image, seen as tokens, in the first block
    text, mask = encoder_hidden_states, encoder_attention_mask
    if block.norm_type == "ada_norm_zero":
        temb = block.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        return dit.class_conditional_block(block, x, temb)
    if text is None:
        raise Unsupported("a cross-attention without encoder_hidden_states")
    if mask is not None and mask.shape != (len(text), 1, text.shape[1]):
        raise Unsupported(f"encoder_attention_mask is {list(mask.shape)}, not one row per sample")
    bias = None if mask is None else pixart.mask_bias(mask, x.dtype)
    return pixart.cross_block(block, x, text, timestep.view(len(x), -1), bias)


def unlike(block: nn.Module) -> str | None:
    """How a block differs from those of DiT and PixArt; None if it does not."""
    cross = {"ada_norm_zero": False, "ada_norm_single": True}.get(block.norm_type)
    up = block.ff.net[0]
    if cross is None:
        return f"norm_type is {block.norm_type}"
    if cross != (block.attn2 is not None) or block.only_cross_attention or block.double_self_attention:
        return "its attentions are not those of DiT or PixArt"
    if block.norm_elementwise_affine or block.pos_embed is not None or hasattr(block, "fuser"):
        return "it has affine norms, positions or a fuser"
    if type(up).__name__ != "GELU" or up.approximate != "tanh":
        return f"the activation is {type(up).__name__}, not GELU by tanh"
    if block._chunk_size is not None or (block.training and block.dropout):
        return "its feed-forward is chunked, or a dropout is on"
    return None


class BasicForward(Forward):
    """`basic`, of a class that other models have too."""

    def refusal(self, block: nn.Module) -> str | None:
        return super().refusal(block) or unlike(block)


BLOCKS = {
    "BasicTransformerBlock": BasicForward(
        basic,
        ("AttnProcessor2_0",),
        (
            "norm_modulate",
            "qkv_norm_rope",
            "attention",
            "gated_residual_norm_modulate",
            "gelu",
            "gated_residual",
        ),
    )
}
