"""Wan 2.1 and 2.2 of diffusers."""

from torch import Tensor

from rfkernels.integrations.families.forward import Forward, rotation_of
from rfkernels.models import wan

__all__ = ["BLOCKS"]

TEXT = 512  # tokens; those of an image stand before them


def video(block, hidden_states, encoder_hidden_states, temb, rotary_emb) -> Tensor:
    rotation = None if rotary_emb is None else rotation_of(rotary_emb, hidden_states.dtype)
    text, image = encoder_hidden_states, None
    if block.attn2.add_k_proj is not None:
        image, text = text.tensor_split([text.shape[1] - TEXT], 1)
    return wan.video_block(block, hidden_states, text, temb, rotation, image=image)


BLOCKS = {
    "WanTransformerBlock": Forward(
        video,
        ("WanAttnProcessor",),
        (
            "norm_modulate",
            "qkv_norm_rope",
            "attention",
            "gated_residual_norm_modulate",
            "gelu",
            "gated_residual",
        ),
    ),
}
