"""FLUX.3 of diffusers."""

import torch
from torch import Tensor

from rfkernels.integrations.families.forward import Forward, rotation_of
from rfkernels.integrations.families.once import once
from rfkernels.models import flux3
from rfkernels.models.layers import joint

__all__ = ["BLOCKS"]


def alone(block, hidden_states, temb_mod, image_rotary_emb) -> Tensor:
    return flux3.parallel_block(block, hidden_states, temb_mod, rotation_of(image_rotary_emb))


def together(
    block, hidden_states, encoder_hidden_states, temb_mod, temb_mod_context, image_rotary_emb
) -> tuple[Tensor, Tensor]:
    modulation = once(_behind, temb_mod, temb_mod_context)
    x = joint(encoder_hidden_states, hidden_states)
    x = flux3.parallel_block(block, x, modulation, rotation_of(image_rotary_emb))
    text = encoder_hidden_states.shape[1]
    return x[:, :text], x[:, text:]


def _behind(second: Tensor, first: Tensor) -> Tensor:
    return torch.cat([first, second], 1)


REGIONS = ("norm_modulate", "qkv_norm_rope", "attention", "swiglu", "gated_residual")
BLOCKS = {
    "Flux3ModeTransformerBlock": Forward(alone, ("Flux3AttnProcessor",), REGIONS),
    "Flux3SingleTransformerBlock": Forward(together, ("Flux3AttnProcessor",), REGIONS),
}
