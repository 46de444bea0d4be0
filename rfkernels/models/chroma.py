"""Chroma (lodestones, 2025): FLUX.1 without pooled text and guidance.

One small network makes the modulations of all blocks from t, so that the blocks have no layers for them.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.flux import one_stream, two_streams
from rfkernels.models.layers import (
    joint,
)
from rfkernels.models.parts import MLP, Attention, FeedForward, thousand

__all__ = ["Chroma", "DoubleBlock", "SingleBlock", "double_block", "pair_bias", "single_block"]


def double_block(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, rotation: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width], temb [B, 12, width], of the image first -> (text, image)."""
    modulation, c_modulation = temb.unbind(1)[:6], temb.unbind(1)[6:]
    ff, c_ff = block.ff, block.ff_context
    return two_streams(block.attn, image, text, modulation, c_modulation, ff, c_ff, rotation, bias)


def single_block(
    block: nn.Module, x: Tensor, temb: Tensor, rotation: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [B, T + N, width], text first, temb [B, 3, width]."""
    return one_stream(block, x, temb.unbind(1), rotation, bias)


def pair_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, 1, L, L]`, added to the scores, of a mask of all tokens `[B, L]`.

    What a bool mask hides neither sees nor is seen. Numbers are multiplied and added, as diffusers does: its
    pipeline has a 1 for each token of a text, and pairs of these see each other by that much more.
    """
    pairs = mask[:, None, None, :] * mask[:, None, :, None]
    if mask.dtype != torch.bool:
        return pairs.to(dtype)
    return torch.zeros_like(pairs, dtype=dtype).masked_fill_(~pairs, -torch.inf)


class DoubleBlock(nn.Module):
    """The weights of `double_block`."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.attn = Attention(width, heads, head_dim, added=width)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    forward = double_block


class SingleBlock(nn.Module):
    """The weights of `single_block`."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp: int = 4):
        super().__init__()
        self.proj_mlp = nn.Linear(width, mlp * width)
        self.proj_out = nn.Linear((1 + mlp) * width, width)
        self.attn = Attention(width, heads, head_dim, out=False)

    forward = single_block


class Approximator(nn.Module):
    """The network that makes the modulations, `[B, rows, channels]` -> `[B, rows, width]`."""

    def __init__(self, channels: int, width: int, hidden: int, layers: int):
        super().__init__()
        self.in_proj = nn.Linear(channels, hidden)
        self.layers = nn.ModuleList(MLP(hidden, hidden) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(layers))  # epsilon: that of the dtype
        self.out_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class Chroma(nn.Module):
    """Arguments and the names of parameters are those of diffusers' ChromaTransformer2DModel."""

    def __init__(
        self,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes = (width, num_attention_heads, attention_head_dim)
        self.axes_dims, self.channels = tuple(axes_dims_rope), approximator_num_channels
        self.distilled_guidance_layer = Approximator(
            approximator_num_channels, width, approximator_hidden_dim, approximator_layers
        )
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(*sizes) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*sizes) for _ in range(num_single_layers))
        self.proj_out = nn.Linear(width, out_channels or in_channels)

    def rotation(self, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        """The angles of all tokens: the same in every step, made once."""
        ids = torch.cat([t[0] if t.ndim == 3 else t for t in (txt_ids, img_ids)])
        return ops.rotary_table(ids, self.axes_dims)

    def modulations(self, t: Tensor) -> Tensor:
        """t [B] as sinusoids take it -> [B, rows, width]: of single blocks 3 rows each, of the image and then
        of the text in double blocks 6 each, of the last norm 2. They depend on t alone."""
        rows = 3 * len(self.single_transformer_blocks) + 12 * len(self.transformer_blocks) + 2
        channels, dtype = self.channels // 4, t.dtype
        time = ops.timestep_embedding(t, channels, dtype=dtype)
        none = ops.timestep_embedding(torch.zeros_like(t), channels, dtype=dtype)  # of a guidance
        row = 1000 * torch.arange(rows, device=t.device)
        row = ops.timestep_embedding(row, 2 * channels, dtype=dtype).expand(len(t), -1, -1)
        of_sample = torch.cat([time, none], -1)[:, None].expand(-1, rows, -1)
        return self.distilled_guidance_layer(torch.cat([of_sample, row], -1))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """The velocity `[B, N, channels]`.

        Args:
            hidden_states: `[B, N, in_channels]`, packed latents.
            encoder_hidden_states: `[B, T, 4096]` of T5.
            timestep: `[B]`, t of the flow in 0 .. 1.
            img_ids, txt_ids: `[N, 3]`, `[T, 3]`; not read where their `rotation` is given.
            attention_mask: `[B, T + N]`, as in `pair_bias`.

        Raises:
            ValueError: a mask of another shape.
        """
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        mask, (batch, length), dtype = attention_mask, text.shape[:2], image.dtype
        if mask is not None and mask.shape != (batch, length + image.shape[1]):
            raise ValueError(
                f"attention_mask: must be {[batch, length + image.shape[1]]}, got {list(mask.shape)}"
            )
        bias = None if mask is None else pair_bias(mask, dtype)
        rotation = self.rotation(img_ids, txt_ids) if rotation is None else rotation
        singles, doubles = len(self.single_transformer_blocks), len(self.transformer_blocks)
        counts = [3] * singles + [6] * 2 * doubles + [2]
        of_blocks = self.modulations(thousand(timestep, dtype)).split(counts, 1)
        of_images, of_texts = of_blocks[singles : singles + doubles], of_blocks[singles + doubles : -1]
        for block, *modulation in zip(self.transformer_blocks, of_images, of_texts, strict=True):
            text, image = block(image, text, torch.cat(modulation, 1), rotation, bias)
        x = joint(text, image)
        for block, modulation in zip(self.single_transformer_blocks, of_blocks[:singles], strict=True):
            x = block(x, modulation, rotation, bias)
        shift, scale = of_blocks[-1].unbind(1)  # in this order
        return self.proj_out(ops.norm_modulate(x[:, length:], scale, shift))
