"""Lumina-Image 2.0 (Qin et al., 2025).

Image and text are refined on their own, then they are one sequence. The image comes first here, so that the
padding of a batch of captions is behind it, in a place that all samples have in common: nothing is gathered,
and no length is read by the host. The order of tokens changes no result; their positions are those of a
caption with the image behind it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import embed_time, joint, norm_modulate
from rfkernels.models.parts import MLP, Attention, latents_of, patches_of
from rfkernels.models.sandwich import lumina2_block
from rfkernels.ops._register import accumulator

__all__ = ["Lumina2", "Lumina2Block"]

CONDITION = 1024  # the width of the embedded time, at most


class SwiGLU(nn.Module):
    """`linear_2(silu(linear_1 x) * linear_3 x)`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, width, bias=False)
        self.linear_3 = nn.Linear(width, hidden, bias=False)


class ModulatedNorm(nn.Module):
    """A norm, and the layer that makes the modulation of a block."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.linear = nn.Linear(min(width, CONDITION), 4 * width)
        self.norm = nn.RMSNorm(width, eps)


class Lumina2Block(nn.Module):
    """The weights of `lumina2_block`."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, hidden: int, eps: float, modulated: bool = True
    ):
        super().__init__()
        options = {"kv_heads": kv_heads, "eps": 1e-5, "bias": False}
        self.attn = Attention(width, heads, width // heads, **options)
        self.feed_forward = SwiGLU(width, hidden)
        self.norm1 = ModulatedNorm(width, eps) if modulated else nn.RMSNorm(width, eps)
        self.norm2, self.ffn_norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.ffn_norm1 = nn.RMSNorm(width, eps)

    forward = lumina2_block


class Embedding(nn.Module):
    """Embeddings of the time and of captions."""

    def __init__(self, width: int, captions: int, eps: float):
        super().__init__()
        self.timestep_embedder = MLP(256, min(width, CONDITION))
        self.caption_embedder = nn.ModuleList([nn.RMSNorm(captions, eps), nn.Linear(captions, width)])


class Output(nn.Module):
    """The norm, scaled by the time, and the layer behind it."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(min(width, CONDITION), width)
        self.linear_2 = nn.Linear(width, out)


class Lumina2(nn.Module):
    """Lumina-Image 2.0: arguments and names of parameters are those of diffusers' Lumina2Transformer2DModel.

    Its pipeline negates the result. Positions have no limit: `axes_lens` is not read, nor are `sample_size`
    and `scaling_factor`.
    """

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2304,
        num_layers: int = 26,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 24,
        num_kv_heads: int = 8,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        scaling_factor: float = 1.0,
        axes_dim_rope: Sequence[int] = (32, 32, 32),
        axes_lens: Sequence[int] = (300, 512, 512),
        cap_feat_dim: int = 1024,
    ):
        super().__init__()
        width, values = hidden_size, patch_size**2
        hidden = int((ffn_dim_multiplier or 1) * 4 * width)
        hidden = -(-hidden // multiple_of) * multiple_of
        self.patch, self.axes_dims = patch_size, tuple(axes_dim_rope)
        self.x_embedder = nn.Linear(values * in_channels, width)
        self.time_caption_embed = Embedding(width, cap_feat_dim, norm_eps)
        blocks = lambda count, modulated: nn.ModuleList(
            Lumina2Block(width, num_attention_heads, num_kv_heads, hidden, norm_eps, modulated)
            for _ in range(count)
        )
        self.noise_refiner = blocks(num_refiner_layers, True)
        self.context_refiner = blocks(num_refiner_layers, False)
        self.layers = blocks(num_layers, True)
        self.norm_out = Output(width, values * (out_channels or in_channels))

    def rotation(self, latents: Tensor, lengths: Tensor, words: int) -> tuple[Tensor, Tensor]:
        """The angles of image tokens and of captions: the same in every step.

        Args:
            latents: `[B, C, H, W]`.
            lengths: `[B]`, of the captions without padding; `words` with it.
        """
        rows, columns = (torch.arange(n // self.patch, device=latents.device) for n in latents.shape[2:])
        grid = torch.cartesian_prod(rows, columns).expand(len(lengths), -1, -1)
        at = lengths[:, None, None].expand(-1, grid.shape[1], -1)
        caption = torch.arange(words, device=latents.device)[:, None]
        caption = torch.cat([caption, caption.new_zeros(words, 2)], -1)
        dtype = accumulator(latents.dtype)
        image = ops.rotary_table(torch.cat([at, grid], -1), self.axes_dims, dtype=dtype)
        return image, ops.rotary_table(caption, self.axes_dims, dtype=dtype).expand(len(lengths), -1, -1, -1)

    def captions(self, features: Tensor, lengths: Tensor | None, rotation: Tensor) -> Tensor:
        """Captions `[B, T, cap_feat_dim]` as the layers read them: `captions=` of every step with these."""
        norm, linear = self.time_caption_embed.caption_embedder
        x = linear(norm_modulate(features, norm="rms", weight=norm.weight, eps=norm.eps))
        for block in self.context_refiner:
            x = block(x, None, rotation, lengths)
        return x

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        captions: Tensor | None = None,
    ) -> Tensor:
        """The negative velocity `[B, C, H, W]`.

        Args:
            hidden_states: `[B, in_channels, H, W]` latents.
            timestep: `[B]`, 0 at noise and 1 at data.
            encoder_hidden_states: `[B, T, cap_feat_dim]` of Gemma.
            encoder_attention_mask: `[B, T]`, 1 for a token and 0 for padding, which is behind; None: all are
                tokens, which is faster.
        """
        batch, words = encoder_hidden_states.shape[:2]
        lengths = None if encoder_attention_mask is None else encoder_attention_mask.sum(1)
        if rotation is None:
            given = torch.full((batch,), words, device=hidden_states.device) if lengths is None else lengths
            rotation = self.rotation(hidden_states, given, words)
        if captions is None:
            captions = self.captions(encoder_hidden_states, lengths, rotation[1])
        temb = embed_time(self.time_caption_embed.timestep_embedder, timestep, hidden_states.dtype)
        x = self.x_embedder(patches_of(hidden_states, self.patch))
        for block in self.noise_refiner:
            x = block(x, temb, rotation[0])
        length, x = x.shape[1], joint(x, captions)
        keys, rotation = None if lengths is None else lengths + length, torch.cat(rotation, 1)
        for block in self.layers:
            x = block(x, temb, rotation, keys)
        out = self.norm_out
        x = out.linear_2(norm_modulate(x[:, :length], out.linear_1(ops.silu(temb))))
        rows, columns = (n // self.patch for n in hidden_states.shape[2:])
        return latents_of(x, rows, columns, self.patch)
