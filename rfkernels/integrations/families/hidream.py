"""HiDream-I1 of diffusers."""

import torch
from torch import Tensor

from rfkernels.integrations.families.forward import Forward, Unsupported, rotation_of
from rfkernels.models import hidream

__all__ = ["BLOCKS"]


def double(
    block,
    hidden_states,
    hidden_states_masks=None,
    encoder_hidden_states=None,
    temb=None,
    image_rotary_emb=None,
) -> tuple[Tensor, Tensor]:
    rotation = rotation_of_all(block, image_rotary_emb, hidden_states.dtype)
    return hidream.double_block(
        block, hidden_states, encoder_hidden_states, temb, rotation, hidden_states_masks
    )


def single(
    block,
    hidden_states,
    hidden_states_masks=None,
    encoder_hidden_states=None,
    temb=None,
    image_rotary_emb=None,
) -> Tensor:
    rotation = rotation_of_all(block, image_rotary_emb, hidden_states.dtype)
    return hidream.single_block(block, hidden_states, temb, rotation, hidden_states_masks)


def rotation_of_all(block, matrices: Tensor, tokens: torch.dtype) -> Tensor:
    head_dim = block.attn1.to_q.out_features // block.attn1.heads
    if 2 * matrices.shape[-3] != head_dim:
        raise Unsupported(f"{2 * matrices.shape[-3]} of {head_dim} channels of a head are rotated")
    return rotation_of(matrices, tokens)


REGIONS = (
    "norm_modulate",
    "qkv_norm_rope",
    "attention",
    "gated_residual_norm_modulate",
    "swiglu",
    "gated_residual",
)
BLOCKS = {
    "HiDreamImageTransformerBlock": Forward(double, ("HiDreamAttnProcessor",), REGIONS),
    "HiDreamImageSingleTransformerBlock": Forward(single, ("HiDreamAttnProcessor",), REGIONS),
}
