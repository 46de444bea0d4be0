"""Stable Diffusion 3 and 3.5 of diffusers."""

from torch import Tensor, nn

from rfkernels.integrations.families.forward import Forward, Unsupported, refuse
from rfkernels.models import sd3

__all__ = ["BLOCKS"]


def joint(
    block, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None
) -> tuple[Tensor | None, Tensor]:
    refuse(joint_attention_kwargs=joint_attention_kwargs, chunked_feed_forward=block._chunk_size)
    refuse_norms(block)
    return sd3.joint_block(block, hidden_states, encoder_hidden_states, temb)


def refuse_norms(block: nn.Module) -> None:
    """Raises `Unsupported` where queries and keys have another norm than RMSNorm."""
    for attn in (block.attn, block.attn2):
        norm = None if attn is None else attn.norm_q
        if norm is not None and type(norm).__name__ != "RMSNorm":
            raise Unsupported(f"the norm of queries is {type(norm).__name__}, not RMSNorm")


BLOCKS = {
    "JointTransformerBlock": Forward(
        joint,
        ("JointAttnProcessor2_0",),
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
