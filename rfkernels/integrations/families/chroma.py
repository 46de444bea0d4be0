"""Chroma of diffusers."""

from torch import Tensor

from rfkernels.integrations.families.forward import Forward, refuse, rotation_of
from rfkernels.integrations.families.once import once
from rfkernels.models import chroma

__all__ = ["BLOCKS"]


def double(
    block,
    hidden_states,
    encoder_hidden_states,
    temb,
    image_rotary_emb=None,
    attention_mask=None,
    joint_attention_kwargs=None,
) -> tuple[Tensor, Tensor]:
    refuse(joint_attention_kwargs=joint_attention_kwargs)
    image, text = hidden_states, encoder_hidden_states
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    return chroma.double_block(block, image, text, temb, rotation, bias_of(attention_mask, image))


def single(
    block, hidden_states, temb, image_rotary_emb=None, attention_mask=None, joint_attention_kwargs=None
) -> Tensor:
    refuse(joint_attention_kwargs=joint_attention_kwargs)
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    return chroma.single_block(block, hidden_states, temb, rotation, bias_of(attention_mask, hidden_states))


def bias_of(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else once(chroma.pair_bias, mask, dtype=x.dtype)


REGIONS = ("norm_modulate", "qkv_norm_rope", "attention", "gelu", "gated_residual")
BLOCKS = {
    "ChromaTransformerBlock": Forward(
        double, ("FluxAttnProcessor",), (*REGIONS, "gated_residual_norm_modulate")
    ),
    "ChromaSingleTransformerBlock": Forward(single, ("FluxAttnProcessor",), REGIONS),
}
