"""PixArt-alpha and -Sigma (Chen et al., 2023 and 2024).

DiT with a cross-attention to the text; one modulation for all blocks, to which each adds a table of its own.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import (
    attend,
    embed_time,
    finish,
    gated_residual_norm_modulate,
    gelu_mlp,
    norm_modulate,
    project,
)
from rfkernels.models.parts import MLP, Attention, FeedForward
from rfkernels.models.positions import PatchEmbedding

__all__ = ["Block", "PixArt", "cross_block", "mask_bias"]


def cross_block(
    block: nn.Module, x: Tensor, text: Tensor, temb: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [B, L, width], text [B, T, context], temb [B, 6 width] of all blocks, bias [B, 1, 1, T]."""
    modulation = block.scale_shift_table + temb.unflatten(-1, (6, -1))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(1)
    eps, up = {"eps": block.norm2.eps}, (block.ff.net[0].proj,)
    attn = block.attn1
    qkv = (attn.to_q, attn.to_k, attn.to_v)
    q, k, v = ops.qkv_norm_rope(project(norm_modulate(x, scale, shift, to=qkv, **eps), *qkv), attn.heads)
    x = finish(x, attend(attn, q, k, v), attn.to_out[0], gate)

    attn = block.attn2  # reads x itself, no norm
    q, k, v = attn.to_q(x), *project(text, attn.to_k, attn.to_v)
    y = attend(attn, *(t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v)), bias)
    x, n = gated_residual_norm_modulate(x, attn.to_out[0](y), None, scale_mlp, shift_mlp, to=up, **eps)
    return finish(x, *gelu_mlp(n, block.ff), gate_mlp)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, 1, 1, T]`: of a mask `[B, T]`, 1 where a token is read, or of what is added `[B, 1, T]`."""
    bias = (1 - mask.to(dtype))[:, None] * -10000.0 if mask.ndim == 2 else mask.to(dtype)
    return bias[:, None]


class Block(nn.Module):
    """The weights of `cross_block`."""

    def __init__(
        self, width: int, heads: int, head_dim: int, context: int, bias: bool = True, eps: float = 1e-6
    ):
        super().__init__()
        self.attn1 = Attention(width, heads, head_dim, norm=None, bias=bias, out_bias=True)
        self.attn2 = Attention(width, heads, head_dim, norm=None, bias=bias, out_bias=True, context=context)
        self.norm2 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.ff = FeedForward(width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    forward = cross_block


class SizeEmbedding(nn.Module):
    """The condition: time, and in PixArt-alpha of 1024 pixels the size and the aspect ratio."""

    def __init__(self, width: int, sizes: bool):
        super().__init__()
        self.timestep_embedder = MLP(256, width)
        self.resolution_embedder = MLP(256, width // 3) if sizes else None
        self.aspect_ratio_embedder = MLP(256, width // 3) if sizes else None

    def forward(self, t: Tensor, sizes: dict[str, Tensor] | None, dtype: torch.dtype) -> Tensor:
        """t [B] in 0 .. 1000 -> [B, width]"""
        temb = embed_time(self.timestep_embedder, t, dtype)
        if self.resolution_embedder is None:
            return temb
        names = ("resolution", "aspect_ratio")
        if sizes is None or any(sizes.get(name) is None for name in names):
            given = [name for name in names if (sizes or {}).get(name) is not None]
            raise ValueError(f"added_cond_kwargs: must have {' and '.join(names)}, got {given}")
        sides = embed_time(self.resolution_embedder, sizes["resolution"].flatten(), dtype)
        ratio = embed_time(self.aspect_ratio_embedder, sizes["aspect_ratio"].flatten(), dtype)
        return temb + torch.cat([sides.view(len(temb), -1), ratio.view(len(temb), -1)], 1)


class Modulation(nn.Module):
    """The condition, and the modulation that all blocks share."""

    def __init__(self, width: int, sizes: bool):
        super().__init__()
        self.emb = SizeEmbedding(width, sizes)
        self.linear = nn.Linear(width, 6 * width)

    def forward(
        self, t: Tensor, sizes: dict[str, Tensor] | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The modulation `[B, 6 width]`, and the condition `[B, width]`."""
        temb = self.emb(t, sizes, dtype)
        return self.linear(ops.silu(temb)), temb


class TextProjection(nn.Module):
    """`linear_2(gelu(linear_1 x))`"""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(ops.gelu(self.linear_1(text), "tanh"))


class PixArt(nn.Module):
    """PixArt: arguments and the names of parameters are those of diffusers' PixArtTransformer2DModel."""

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
    ):
        super().__init__()
        heads, head_dim = num_attention_heads, attention_head_dim
        width, sizes = heads * head_dim, use_additional_conditions
        self.patch = patch_size
        scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        self.pos_embed = PatchEmbedding(in_channels, width, patch_size, sample_size, scale=scale)
        self.adaln_single = Modulation(width, sample_size == 128 if sizes is None else sizes)
        self.caption_projection = (
            None if caption_channels is None else TextProjection(caption_channels, width)
        )
        self.transformer_blocks = nn.ModuleList(
            Block(width, heads, head_dim, cross_attention_dim, attention_bias, norm_eps)
            for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, out_channels, H, W]`: the noise or the velocity, and behind it what variances are made of.

        Args:
            hidden_states: latents `[B, in_channels, H, W]`.
            encoder_hidden_states: `[B, T, caption_channels]` of T5.
            timestep: `[B]` in 0 .. 1000.
            added_cond_kwargs: "resolution" `[B, 2]` and "aspect_ratio" `[B, 1]`, where the model has them.
            encoder_attention_mask: `[B, T]`, 1 where a token of the text is one; or `[B, 1, T]`, added to
                scores.

        Raises:
            ValueError: a size that patches do not divide, no added_cond_kwargs where the model has them, a
                mask of another shape.
        """
        x, text, mask = self.pos_embed(hidden_states), encoder_hidden_states, encoder_attention_mask
        if mask is not None and mask.shape not in (text.shape[:2], (len(text), 1, text.shape[1])):
            raise ValueError(
                f"encoder_attention_mask: must be {list(text.shape[:2])}, or have a 1 between, "
                f"got {list(mask.shape)}"
            )
        bias = None if mask is None else mask_bias(mask, x.dtype)
        modulation, temb = self.adaln_single(timestep, added_cond_kwargs, x.dtype)
        text = text if self.caption_projection is None else self.caption_projection(text)
        for block in self.transformer_blocks:
            x = block(x, text, modulation, bias)
        shift, scale = (self.scale_shift_table + temb[:, None]).unbind(1)  # in this order
        tokens = self.proj_out(ops.norm_modulate(x, scale, shift))
        return ops.unpatchify(tokens, hidden_states.shape[-2:], self.patch, "pc")
