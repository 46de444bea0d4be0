"""FLUX.2 of diffusers."""

from torch import Tensor

from rfkernels.integrations.families.forward import Forward, Unsupported, refuse, rotation_of
from rfkernels.models import flux2
from rfkernels.models.layers import joint

__all__ = ["BLOCKS"]


def double(
    block,
    hidden_states,
    encoder_hidden_states,
    temb_mod_img,
    temb_mod_txt,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
) -> tuple[Tensor, Tensor]:
    refuse(joint_attention_kwargs=joint_attention_kwargs)
    refuse_tokens(temb_mod_img, temb_mod_txt)
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    image, text = hidden_states, encoder_hidden_states
    return flux2.double_block(block, image, text, temb_mod_img, temb_mod_txt, rotation)


def single(
    block,
    hidden_states,
    encoder_hidden_states,
    temb_mod,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
    split_hidden_states=False,
    text_seq_len=None,
) -> tuple[Tensor, Tensor] | Tensor:
    refuse(joint_attention_kwargs=joint_attention_kwargs)
    refuse_tokens(temb_mod)
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    x, text = hidden_states, text_seq_len
    if encoder_hidden_states is not None:
        x, text = joint(encoder_hidden_states, hidden_states), encoder_hidden_states.shape[1]
    x = flux2.single_block(block, x, temb_mod, rotation)
    return (x[:, :text], x[:, text:]) if split_hidden_states else x


def refuse_tokens(*modulations: Tensor) -> None:
    """Raises `Unsupported` where tokens are modulated apart, as while keys of references are extracted."""
    if any(modulation.ndim != 2 for modulation in modulations):
        raise Unsupported("every token has its own modulation")


REGIONS = ("norm_modulate", "qkv_norm_rope", "attention", "swiglu", "gated_residual")
BLOCKS = {
    "Flux2TransformerBlock": Forward(
        double, ("Flux2AttnProcessor",), (*REGIONS, "gated_residual_norm_modulate")
    ),
    "Flux2SingleTransformerBlock": Forward(single, ("Flux2ParallelSelfAttnProcessor",), REGIONS),
}
