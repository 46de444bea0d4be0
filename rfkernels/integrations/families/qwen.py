"""Qwen-Image of diffusers."""

import torch
from torch import Tensor

from rfkernels.integrations.families.forward import Forward, Unsupported, refuse
from rfkernels.integrations.families.once import once
from rfkernels.models import qwen

__all__ = ["BLOCKS"]


def double(
    block,
    hidden_states,
    encoder_hidden_states,
    encoder_hidden_states_mask,
    temb,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
    modulate_index=None,
) -> tuple[Tensor, Tensor]:
    refuse(joint_attention_kwargs=joint_attention_kwargs)
    if block.zero_cond_t != (modulate_index is not None):
        given = "without" if modulate_index is None else "with"
        raise Unsupported(f"zero_cond_t is {block.zero_cond_t}, {given} modulate_index")
    text, length = encoder_hidden_states, hidden_states.shape[1]
    rotation = index = bias = None
    if image_rotary_emb is not None:
        rotation = once(_rotation, *image_rotary_emb, dtype=text.dtype)
    if modulate_index is not None:
        index = once(_rows, modulate_index)
    if encoder_hidden_states_mask is not None:
        bias = once(qwen.text_bias, encoder_hidden_states_mask, dtype=text.dtype, length=length)
    return qwen.double_block(block, hidden_states, text, temb, rotation, index, bias)


def _rotation(image: Tensor, text: Tensor, dtype: torch.dtype) -> Tensor:
    table = torch.view_as_real(torch.cat([text, image]))
    return table.double() if dtype == torch.float64 else table


def _rows(index: Tensor) -> Tensor:
    """The rows of the condition, two kinds of every sample, from the kind of every token."""
    batch = len(index)
    return torch.arange(batch, device=index.device)[:, None] + batch * (index != 0)


BLOCKS = {
    "QwenImageTransformerBlock": Forward(
        double,
        ("QwenDoubleStreamAttnProcessor2_0",),
        (
            "silu",
            "norm_modulate",
            "qkv_norm_rope",
            "attention",
            "gated_residual_norm_modulate",
            "gelu",
            "gated_residual",
        ),
    )
}
