"""Wan 2.1 and 2.2 (Wan Team, 2025): video from a text, and from a text and an image; PUSA's times per frame.

A block is self-attention over the video, cross-attention to the text and a tokens' MLP. Modulation is float32
beside 16-bit tokens, and so may be the time embedder, the tables and the norms.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import (
    attend,
    bounded,
    embed_time,
    finish,
    gated_residual_norm_modulate,
    gelu_mlp,
    norm_modulate,
    project,
)
from rfkernels.models.parts import MLP, Attention, FeedForward
from rfkernels.ops._register import accumulator

__all__ = ["Context", "VideoBlock", "Wan", "context_of", "video_block"]


class Context(NamedTuple):
    """What a cross-attention reads, `[B, T, heads, d]` each: the same in every step of a sampler."""

    k: Tensor
    v: Tensor
    image_k: Tensor | None = None
    image_v: Tensor | None = None


def context_of(attn: nn.Module, text: Tensor, image: Tensor | None = None) -> Context:
    """Keys and values of text [B, T, width] and image [B, I, width], the keys normed over the full width."""
    found = [(*project(text, attn.to_k, attn.to_v), attn.norm_k)]
    if image is not None:
        found.append((*project(image, attn.add_k_proj, attn.add_v_proj), attn.norm_added_k))
    return Context(*(t.unflatten(-1, (attn.heads, -1)) for k, v, norm in found for t in (_rms(k, norm), v)))


def video_block(
    block: nn.Module,
    x: Tensor,
    text: Tensor | Context,
    temb: Tensor,
    rotation: Tensor | None,
    index: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """x [B, L, width]; text [B, T, width] and image [B, I, width], or the `Context` that `context_of` made.

    temb [B, 6, width], a row per sample; or [G, 6, width] and index [B, L], the row of each token: two rows
    where the first frame is given (Wan 2.2 5B). Or a row per token, [B, L, 6, width], of much memory.
    """
    modulation = block.scale_shift_table + temb.to(accumulator(x.dtype))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(-2)

    attn = block.attn1
    qkv = attn.to_q, attn.to_k, attn.to_v
    q, k, v = ops.qkv_norm_rope(
        project(norm_modulate(x, scale, shift, index=index, eps=block.norm1.eps, to=qkv), *qkv),
        attn.heads,
        q_weight=attn.norm_q.weight,  # over the full width
        k_weight=attn.norm_k.weight,
        rotation=rotation,
        eps=attn.norm_q.eps,
    )
    y = attn.to_out[0](attend(attn, q, k, v))

    attn = block.attn2
    if isinstance(block.norm2, nn.Identity):
        x = n = bounded(ops.gated_residual(x, y, gate, index=index))
    else:
        norm = block.norm2
        affine = {"weight": norm.weight.to(gate.dtype), "bias": norm.bias.to(gate.dtype), "eps": norm.eps}
        x, n = gated_residual_norm_modulate(x, y, gate, index=index, **affine, to=(attn.to_q,))
    k, v, *of_image = text if isinstance(text, Context) else context_of(attn, text, image)
    q = _rms(*project(n, attn.to_q), attn.norm_q).unflatten(-1, (attn.heads, -1))
    y = attend(attn, q, k, v)
    if of_image[0] is not None:
        y = y + attend(attn, q, *of_image)
    y = attn.to_out[0](y)

    up, eps = (block.ffn.net[0].proj,), block.norm3.eps
    x, n = gated_residual_norm_modulate(x, y, None, scale_mlp, shift_mlp, index=index, eps=eps, to=up)
    options = {} if index is None and gate_mlp.ndim == 2 else {"index": index}  # none: one row a sample
    return finish(x, *gelu_mlp(n, block.ffn), gate_mlp, **options)


def _rms(x: Tensor, norm: nn.Module) -> Tensor:
    return ops.norm_modulate(x, norm="rms", weight=norm.weight, eps=norm.eps)


class CrossAttention(Attention):
    """Projections of a cross-attention; with `added`, the width of image tokens, keys and values of these."""

    def __init__(self, width: int, heads: int, head_dim: int, eps: float, added: int | None):
        super().__init__(width, heads, head_dim, norm="width", eps=eps)
        self.add_k_proj = nn.Linear(added, heads * head_dim) if added else None
        self.add_v_proj = nn.Linear(added, heads * head_dim) if added else None
        self.norm_added_k = nn.RMSNorm(heads * head_dim, eps=eps) if added else None


class VideoBlock(nn.Module):
    """The weights of `video_block`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        *,
        cross_norm: bool = True,
        eps: float = 1e-6,
        added: int | None = None,
    ):
        super().__init__()
        head_dim = width // heads
        self.norm1 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(width, heads, head_dim, norm="width", eps=eps)
        self.norm2 = nn.LayerNorm(width, eps) if cross_norm else nn.Identity()
        self.attn2 = CrossAttention(width, heads, head_dim, eps, added)
        self.norm3 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = FeedForward(width, hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    forward = video_block


class TextEmbedding(nn.Module):
    """`linear_2(gelu(linear_1(x)))` with the tanh GELU."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width_in, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(ops.gelu(self.linear_1(x), "tanh"))


class ImageEmbedding(nn.Module):
    """CLIP tokens between two affine norms; with `length`, learned positions of those of two pictures."""

    def __init__(self, width_in: int, width: int, length: int | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width_in), nn.LayerNorm(width)
        self.ff = FeedForward(width_in, width_in, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, width_in)) if length else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, width_in], or of the first picture and the last [2 B, I, width_in] -> [B, 2 I, width]."""
        if self.pos_embed is not None:
            x = x.reshape(-1, 2 * x.shape[1], x.shape[2]) + self.pos_embed
        x = self.ff.net[0].proj(_affine(x, self.norm1))
        return _affine(self.ff.net[2](ops.gelu(x)), self.norm2)


def _affine(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return ops.norm_modulate(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


class ConditionEmbedding(nn.Module):
    """Embeddings of time, text and image."""

    def __init__(self, width: int, freq_dim: int, text_dim: int, image_dim: int | None, length: int | None):
        super().__init__()
        self.time_embedder, self.time_proj = MLP(freq_dim, width), nn.Linear(width, 6 * width)
        self.text_embedder = TextEmbedding(text_dim, width)
        self.image_embedder = ImageEmbedding(image_dim, width, length) if image_dim else None


class Wan(nn.Module):
    """Wan: arguments and the names of parameters are those of diffusers' WanTransformer3DModel.

    Positions have no limit: `rope_max_seq_len` is not read, nor is `qk_norm`, which has one value.
    """

    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ):
        super().__init__()
        width, self.patch, self.eps = num_attention_heads * attention_head_dim, tuple(patch_size), eps
        side = 2 * (attention_head_dim // 6)
        self.axes_dims = (attention_head_dim - 2 * side, side, side)
        self.patch_embedding = nn.Conv3d(in_channels, width, self.patch, self.patch)
        self.condition_embedder = ConditionEmbedding(width, freq_dim, text_dim, image_dim, pos_embed_seq_len)
        options = {"cross_norm": cross_attn_norm, "eps": eps, "added": added_kv_proj_dim}
        self.blocks = nn.ModuleList(
            VideoBlock(width, ffn_dim, num_attention_heads, **options) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(width, (out_channels or in_channels) * math.prod(self.patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def grid(self, latents: Tensor) -> tuple[int, ...]:
        """Frames, rows and columns of the tokens of latents `[B, C, F, H, W]`."""
        return tuple(n // p for n, p in zip(latents.shape[2:], self.patch, strict=True))

    def rotation(self, latents: Tensor) -> Tensor:
        """The angles of all tokens of latents `[B, C, F, H, W]`: the same in every step, made once."""
        axes = (torch.arange(n, device=latents.device) for n in self.grid(latents))
        ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return ops.rotary_table(ids, self.axes_dims, dtype=accumulator(latents.dtype))

    def context(self, text: Tensor, image: Tensor | None = None) -> list[Context]:
        """Keys and values of all cross-attentions: `context=` of every step that has this text and image.

        Args:
            text, image: `[B, T, text_dim]` of UMT5, and `[B, I, image_dim]` of CLIP for a model that has the
                embedding of them (Wan 2.1 I2V).
        """
        conditions = self._conditions(text, image)
        return [context_of(block.attn2, *conditions) for block in self.blocks]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        *,
        index: Tensor | None = None,
        rotation: Tensor | None = None,
        context: list[Context] | None = None,
    ) -> Tensor:
        """The velocity `[B, C, F, H, W]`.

        Args:
            hidden_states: `[B, in_channels, F, H, W]` latents; I2V has mask and image behind the noise.
            timestep: 0 .. 1000. `[B]`; or `[B, frames]` (PUSA); or `[B, tokens]` (Wan 2.2 5B), whose distinct
                values are found, which synchronises a GPU: `index` saves that. Modulation is computed for
                distinct times alone.
            encoder_hidden_states, encoder_hidden_states_image: as `text` and `image` of `context`; not read
                where their `context` is given.
            index: integers `[B, tokens]`, which of the times `[G]` in `timestep` a token has.

        Raises:
            ValueError: image tokens given to a model without their embedding, or not given to one that has
                it; sizes that patches do not divide; timesteps of another number.
        """
        if encoder_hidden_states is None and context is None:
            raise ValueError("Wan: encoder_hidden_states or context must be given, got none")
        x = self._embed(hidden_states)
        t, index = self._times(timestep, index, self.grid(hidden_states))
        embedder = self.condition_embedder
        of_time = next(p.dtype for p in embedder.time_embedder.parameters())  # float32, or that of the model
        temb = embed_time(embedder.time_embedder, t, of_time).to(x.dtype)
        modulation = embedder.time_proj(ops.silu(temb)).unflatten(1, (6, -1))
        rotation = self.rotation(hidden_states) if rotation is None else rotation
        if context is None:
            text, image = self._conditions(encoder_hidden_states, encoder_hidden_states_image)
        for i, block in enumerate(self.blocks):
            read = (text, image) if context is None else (context[i], None)
            x = block(x, read[0], modulation, rotation, index, read[1])
        shift, scale = (self.scale_shift_table + temb.to(accumulator(x.dtype))[:, None]).unbind(1)
        x = self.proj_out(norm_modulate(x, scale, shift, index=index, eps=self.eps))
        return ops.unpatchify(x, hidden_states.shape[2:], self.patch, "pc")

    def _embed(self, latents: Tensor) -> Tensor:
        """Patches as one matmul."""
        tokens, layer = ops.patchify(latents, self.patch), self.patch_embedding
        return F.linear(tokens, layer.weight.flatten(1), layer.bias)

    def _conditions(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text and image as the blocks read them."""
        embedder = self.condition_embedder
        if (image is None) != (embedder.image_embedder is None):
            has = "no" if embedder.image_embedder is None else "an"
            got = "none" if image is None else "some"
            raise ValueError(f"Wan: the model has {has} embedding of image tokens, got {got}")
        return embedder.text_embedder(text), None if image is None else embedder.image_embedder(image)

    def _times(self, t: Tensor, index: Tensor | None, grid: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Times `[G]`, and which one each token has; None where they are those of the samples."""
        frames, tokens = grid[0], math.prod(grid)
        if t.ndim == 1:
            return t, index
        if t.ndim != 2 or t.shape[1] not in (frames, tokens) or index is not None:
            beside = "" if index is None else " beside index"
            raise ValueError(
                f"Wan: timestep must be [B], [B, {frames}] or [B, {tokens}], or [G] with index, "
                f"got {list(t.shape)}{beside}"
            )
        if t.shape[1] == tokens > frames:
            return torch.unique(t, return_inverse=True)
        index = torch.arange(t.numel(), device=t.device).view(t.shape)
        return t.flatten(), index.repeat_interleave(tokens // frames, 1)
