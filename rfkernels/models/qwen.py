"""Qwen-Image, -Edit and -Layered (Wu et al., "Qwen-Image technical report", 2025).

Text and image tokens have their own weights and one attention; the text comes first. Images that are edited
follow the noise as further tokens; in -Edit-2511 they are modulated as at t = 0.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.flux import two_streams
from rfkernels.models.layers import (
    embed_time,
)
from rfkernels.models.parts import MLP, AdaNorm, Attention, FeedForward

__all__ = ["Block", "QwenImage", "double_block", "image_shapes", "text_bias"]

Shape = tuple[int, int, int]


def double_block(
    block: nn.Module,
    image: Tensor,
    text: Tensor,
    temb: Tensor,
    rotation: Tensor,
    index: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width], rotation of all tokens -> (text, image).

    temb [B, width]; or [G, width], B rows of the samples first, with index [B, N], the row of each image
    token: those of a reference are at t = 0. bias [B, 1, 1, T + N]: `text_bias`.
    """
    modulation = block.img_mod[1](ops.silu(temb)).chunk(6, -1)
    c_modulation = block.txt_mod[1](ops.silu(temb[: len(text)])).chunk(6, -1)
    row = {} if index is None else {"index": index}
    ff, c_ff = block.img_mlp, block.txt_mlp
    return two_streams(block.attn, image, text, modulation, c_modulation, ff, c_ff, rotation, bias, **row)


class Block(nn.Module):
    """The weights of `double_block`."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attn = Attention(width, heads, head_dim, added=width)
        self.img_mlp, self.txt_mlp = FeedForward(width), FeedForward(width)

    forward = double_block


class TimeEmbedding(nn.Module):
    """The condition: t, and in -Layered which of two kinds of image is made."""

    def __init__(self, width: int, additional: bool):
        super().__init__()
        self.timestep_embedder = MLP(256, width)
        self.addition_t_embedding = nn.Embedding(2, width) if additional else None

    def forward(self, t: Tensor, additional: Tensor | None, dtype: torch.dtype) -> Tensor:
        """t [B] in 0 .. 1, additional int64[B] -> [B, width]"""
        if (additional is None) != (self.addition_t_embedding is None):
            has = "no" if self.addition_t_embedding is None else "an"
            given = "none" if additional is None else "one"
            raise ValueError(f"additional_t_cond: the model has {has} embedding of it, got {given}")
        temb = embed_time(self.timestep_embedder, t, dtype, scale=1000.0)
        return temb if additional is None else temb + self.addition_t_embedding(additional).to(dtype)


class QwenImage(nn.Module):
    """Arguments and the names of parameters are those of diffusers' QwenImageTransformer2DModel."""

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ):
        super().__init__()
        heads, head_dim = num_attention_heads, attention_head_dim
        width = heads * head_dim
        self.axes_dims, self.zero_cond_t, self.layered = tuple(axes_dims_rope), zero_cond_t, use_layer3d_rope
        self.time_text_embed = TimeEmbedding(width, use_additional_t_cond)
        self.txt_norm = nn.RMSNorm(joint_attention_dim, eps=1e-6)
        self.img_in, self.txt_in = nn.Linear(in_channels, width), nn.Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(Block(width, heads, head_dim) for _ in range(num_layers))
        self.norm_out = AdaNorm(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def rotation(
        self, img_shapes: Sequence[Shape | Sequence[Shape]], text: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The angles of `text` tokens and of all images: the same in every step, made once."""
        ids = positions(image_shapes(img_shapes), text, self.layered).to(device)
        return ops.rotary_table(ids, self.axes_dims)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence[Shape | Sequence[Shape]] | None = None,
        additional_t_cond: Tensor | None = None,
        *,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """The velocity `[B, N, channels]`, of the tokens of all images.

        Args:
            hidden_states: `[B, N, in_channels]`, packed latents, images one behind the other.
            encoder_hidden_states: `[B, T, 3584]` of Qwen2.5-VL.
            encoder_hidden_states_mask: `[B, T]`, not 0 where a text token is one; absent: all are.
            timestep: `[B]`, t of the flow in 0 .. 1.
            img_shapes: (frames, rows, columns) in tokens of every image of every sample, the same for all
                samples: a list of them, or of one of them, per sample.
            additional_t_cond: int64 `[B]`, for -Layered.

        Raises:
            ValueError: timestep or img_shapes missing, shapes that differ between samples or do not have N
                tokens, a mask of another shape, additional_t_cond that the model does not want or misses.
        """
        if timestep is None or img_shapes is None:
            raise ValueError("QwenImage: timestep and img_shapes must be given")
        shapes, (batch, length, _) = image_shapes(img_shapes), hidden_states.shape
        if sum(map(prod, shapes)) != length:
            raise ValueError(f"img_shapes: must have {length} tokens, got {shapes}")
        image, dtype = self.img_in(hidden_states), hidden_states.dtype
        norm = self.txt_norm
        text = self.txt_in(
            ops.norm_modulate(encoder_hidden_states, norm="rms", weight=norm.weight, eps=norm.eps)
        )
        t, index = timestep.to(dtype), None
        if self.zero_cond_t:
            t = torch.cat([t, t * 0])
            samples = torch.arange(batch, device=t.device)[:, None]
            index = samples + batch * (torch.arange(length, device=t.device) >= prod(shapes[0]))
        temb = self.time_text_embed(t, additional_t_cond, dtype)
        if rotation is None:
            rotation = self.rotation(img_shapes, text.shape[1], t.device)
        mask = encoder_hidden_states_mask
        if mask is not None and mask.shape != text.shape[:2]:
            raise ValueError(
                f"encoder_hidden_states_mask: must be {list(text.shape[:2])}, got {list(mask.shape)}"
            )
        bias = None if mask is None else text_bias(mask, dtype, length)
        for block in self.transformer_blocks:
            text, image = block(image, text, temb, rotation, index, bias)
        scale, shift = self.norm_out.linear(ops.silu(temb[:batch])).chunk(2, -1)
        return self.proj_out(ops.norm_modulate(image, scale, shift))


def image_shapes(img_shapes: Sequence[Shape | Sequence[Shape]]) -> list[Shape]:
    """The images of a sample, from those of all samples as diffusers takes them."""
    samples = [[s] if isinstance(s[0], int) else list(s) for s in img_shapes]
    if not samples or any([tuple(s) for s in sample] != [tuple(s) for s in samples[0]] for sample in samples):
        raise ValueError(f"img_shapes: must be the same for all samples, at least one, got {img_shapes}")
    return [tuple(s) for s in samples[0]]


def positions(shapes: Sequence[Shape], text: int, layered: bool = False) -> Tensor:
    """int64 `[text + N, 3]`: frame, row and column of every token.

    Rows and columns of an image are counted from its middle, its frames from its place among the images
    (`layered`: the last image is at -1); the text goes on behind the largest of them on all three axes.
    """
    ids, first = [], 0
    for place, (frames, rows, columns) in enumerate(shapes):
        start = -1 if layered and place == len(shapes) - 1 else place
        axes = (
            torch.arange(frames) + start,
            torch.arange(rows) - (rows - rows // 2),
            torch.arange(columns) - (columns - columns // 2),
        )
        ids.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3))
        first = max(first, rows // 2, columns // 2)
    first = max(first, len(shapes) - 1) if layered else first
    return torch.cat([torch.arange(first, first + text)[:, None].expand(-1, 3), *ids])


def text_bias(mask: Tensor, dtype: torch.dtype, length: int) -> Tensor | None:
    """`[B, 1, 1, T + length]`, -infinity where a mask `[B, T]` hides a token of the text; None: none.

    Looking waits for the device, so while a CUDA graph is recorded or a model compiled nothing is left out.
    """
    seen = mask.bool()
    recorded = torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    if not recorded and seen.all():
        return None
    bias = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return torch.nn.functional.pad(bias, (0, length))[:, None, None]
