"""Lumina-Image 2.0 of diffusers."""

from torch import Tensor

from rfkernels.integrations.families.forward import Forward, rotation_of
from rfkernels.models import sandwich

__all__ = ["BLOCKS"]


def single(block, hidden_states, attention_mask, image_rotary_emb, temb=None) -> Tensor:
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb, hidden_states.dtype)
    bias = None if attention_mask is None else attention_mask.bool().view(len(hidden_states), 1, 1, -1)
    return sandwich.lumina2_block(block, hidden_states, temb, rotation, bias=bias)


REGIONS = ("norm_modulate", "qkv_norm_rope", "attention", "gated_residual_norm_modulate")
BLOCKS = {
    "Lumina2TransformerBlock": Forward(
        single, ("Lumina2AttnProcessor2_0",), (*REGIONS, "swiglu", "gated_residual")
    ),
}
