"""Z-Image of diffusers."""

import torch
from torch import Tensor

from rfkernels.integrations.families.forward import Forward, rotation_of
from rfkernels.models import sandwich

__all__ = ["BLOCKS"]


def single(
    block,
    x,
    attn_mask,
    freqs_cis,
    adaln_input=None,
    noise_mask=None,
    adaln_noisy=None,
    adaln_clean=None,
) -> Tensor:
    rotation = None if freqs_cis is None else rotation_of(freqs_cis, x.dtype)
    bias = attn_mask[:, None, None] if attn_mask is not None and attn_mask.ndim == 2 else attn_mask
    temb, index = adaln_input, None
    if block.modulation and noise_mask is not None:  # rows of clean tokens, then of noisy ones
        samples = torch.arange(len(x), device=x.device)[:, None]
        temb, index = torch.cat([adaln_clean, adaln_noisy]), samples + len(x) * (noise_mask == 1)
    return sandwich.zimage_block(block, x, temb, rotation, index, bias=bias)


REGIONS = ("norm_modulate", "qkv_norm_rope", "attention", "gated_residual_norm_modulate")
BLOCKS = {
    "ZImageTransformerBlock": Forward(
        single, ("ZSingleStreamAttnProcessor",), (*REGIONS, "swiglu", "gated_residual")
    ),
}
