"""FLUX.1 (Black Forest Labs, 2024): dev, schnell, Fill, Depth, Canny and Kontext.

Text and image tokens have their own weights, then they are one sequence; the text comes first.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import (
    attend,
    beside,
    finish,
    gated_residual_norm_modulate,
    gelu_mlp,
    joint,
    norm_modulate,
    project,
)
from rfkernels.models.parts import AdaNorm, Attention, FeedForward, TimeTextEmbedding, thousand

__all__ = ["DoubleBlock", "Flux", "SingleBlock", "double_block", "one_stream", "single_block", "two_streams"]


def two_streams(
    attn: nn.Module,
    image: Tensor,
    text: Tensor,
    modulation: Sequence[Tensor],
    c_modulation: Sequence[Tensor],
    ff: nn.Module,
    c_ff: nn.Module,
    rotation: Tensor | None,
    bias: Tensor | None = None,
    **row: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention of text and image as one sequence, then the MLP of each -> (text, image).

    modulation of the image, c_modulation of the text: shift, scale, gate of attention, then of the MLP;
    `index=`: their row for each image token.
    """
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation
    qkv, c_qkv = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    n = norm_modulate(image, scale, shift, to=qkv, **row)
    c_n = norm_modulate(text, c_scale, c_shift, to=c_qkv)
    q, k, v = ops.qkv_norm_rope(
        [project(c_n, *c_qkv), project(n, *qkv)],
        attn.heads,
        q_weight=[attn.norm_added_q.weight, attn.norm_q.weight],
        k_weight=[attn.norm_added_k.weight, attn.norm_k.weight],
        rotation=rotation,
    )
    c_y, y = attend(attn, q, k, v, bias).split([text.shape[1], image.shape[1]], 1)
    y, c_y = attn.to_out[0](y), attn.to_add_out(c_y)

    up, c_up = (ff.net[0].proj,), (c_ff.net[0].proj,)
    image, n = gated_residual_norm_modulate(image, y, gate, scale_mlp, shift_mlp, to=up, **row)
    text, c_n = gated_residual_norm_modulate(text, c_y, c_gate, c_scale_mlp, c_shift_mlp, to=c_up)
    image = finish(image, *gelu_mlp(n, ff), gate_mlp, **row)
    text = finish(text, *gelu_mlp(c_n, c_ff), c_gate_mlp)
    return text, image


def double_block(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width], temb [B, width], rotation of all tokens -> (text, image)."""
    condition = ops.silu(temb)
    modulation = block.norm1.linear(condition).chunk(6, -1)
    c_modulation = block.norm1_context.linear(condition).chunk(6, -1)
    ff, c_ff = block.ff, block.ff_context
    return two_streams(block.attn, image, text, modulation, c_modulation, ff, c_ff, rotation)


def one_stream(
    block: nn.Module,
    x: Tensor,
    modulation: Sequence[Tensor],
    rotation: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [B, T + N, width], text first: attention and MLP side by side, from one matmul into one matmul.

    modulation: shift, scale and gate.
    """
    attn = block.attn
    shift, scale, gate = modulation
    layers = (attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    *qkv, hidden = project(norm_modulate(x, scale, shift, to=layers), *layers)
    q, k, v = ops.qkv_norm_rope(
        tuple(qkv),
        attn.heads,
        q_weight=attn.norm_q.weight,
        k_weight=attn.norm_k.weight,
        rotation=rotation,
    )
    y = beside(attend(attn, q, k, v, bias), partial(ops.activation, kind="gelu_tanh"), hidden)
    return finish(x, y, block.proj_out, gate)


def single_block(block: nn.Module, x: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
    """`one_stream` with the modulation of temb [B, width]."""
    return one_stream(block, x, block.norm.linear(ops.silu(temb)).chunk(3, -1), rotation)


class DoubleBlock(nn.Module):
    """The weights of `double_block`."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1, self.norm1_context = AdaNorm(width, 6), AdaNorm(width, 6)
        self.attn = Attention(width, heads, head_dim, added=width)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    forward = double_block


class SingleBlock(nn.Module):
    """The weights of `single_block`."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp: int = 4):
        super().__init__()
        self.norm = AdaNorm(width, 3)
        self.proj_mlp = nn.Linear(width, mlp * width)
        self.proj_out = nn.Linear((1 + mlp) * width, width)
        self.attn = Attention(width, heads, head_dim, out=False)

    forward = single_block


class Flux(nn.Module):
    """FLUX.1: arguments and the names of parameters are those of diffusers' FluxTransformer2DModel.

    Fill has `in_channels` 384 (64 noise, 64 image, 256 mask), Depth and Canny 128; Kontext appends the tokens
    of its reference, whose ids have a 1 on their first axis, and reads the first ones of the result.
    """

    def __init__(
        self,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ):
        super().__init__()
        heads, head_dim = num_attention_heads, attention_head_dim
        width = heads * head_dim
        self.axes_dims = tuple(axes_dims_rope)
        self.time_text_embed = TimeTextEmbedding(width, pooled_projection_dim, guidance_embeds)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(width, heads, head_dim) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, heads, head_dim) for _ in range(num_single_layers)
        )
        self.norm_out = AdaNorm(width, 2)
        self.proj_out = nn.Linear(width, out_channels or in_channels)

    def rotation(self, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        """The angles of all tokens: the same in every step, made once."""
        return ops.rotary_table(torch.cat([txt_ids, img_ids]), self.axes_dims)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        *,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """The velocity `[B, N, channels]`.

        Args:
            hidden_states: `[B, N, in_channels]`, packed latents.
            encoder_hidden_states, pooled_projections: `[B, T, 4096]` of T5, `[B, 768]` of CLIP.
            timestep, guidance: `[B]`; t of the flow in 0 .. 1, the guidance of a distilled model.
            img_ids, txt_ids: `[N, 3]`, `[T, 3]`; not read where their `rotation` is given.

        Raises:
            ValueError: guidance given to a model without its embedding, or not given to one that has it.
        """
        dtype = hidden_states.dtype
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        guidance = None if guidance is None else thousand(guidance, dtype)
        temb = self.time_text_embed(thousand(timestep, dtype), guidance, pooled_projections)
        rotation = self.rotation(img_ids, txt_ids) if rotation is None else rotation
        for block in self.transformer_blocks:
            text, image = block(image, text, temb, rotation)
        x = joint(text, image)
        for block in self.single_transformer_blocks:
            x = block(x, temb, rotation)
        scale, shift = self.norm_out.linear(ops.silu(temb)).chunk(2, -1)
        return self.proj_out(ops.norm_modulate(x[:, text.shape[1] :], scale, shift))
