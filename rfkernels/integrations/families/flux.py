"""FLUX.1 of diffusers."""

from torch import Tensor

from rfkernels.integrations.families.forward import Forward, refuse, rotation_of
from rfkernels.models import flux
from rfkernels.models.layers import joint

__all__ = ["BLOCKS"]


def double(
    block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
) -> tuple[Tensor, Tensor]:
    refuse(joint_attention_kwargs=joint_attention_kwargs)
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    return flux.double_block(block, hidden_states, encoder_hidden_states, temb, rotation)


def single(
    block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
) -> tuple[Tensor, Tensor]:
    refuse(joint_attention_kwargs=joint_attention_kwargs)
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    text = encoder_hidden_states.shape[1]
    x = flux.single_block(block, joint(encoder_hidden_states, hidden_states), temb, rotation)
    return x[:, :text], x[:, text:]


REGIONS = ("norm_modulate", "qkv_norm_rope", "attention")
BLOCKS = {
    "FluxTransformerBlock": Forward(
        double, ("FluxAttnProcessor",), (*REGIONS, "gated_residual_norm_modulate", "gelu", "gated_residual")
    ),
    "FluxSingleTransformerBlock": Forward(
        single, ("FluxAttnProcessor",), (*REGIONS, "gelu", "gated_residual")
    ),
}
