"""AuraFlow (fal, 2024): blocks of two streams, then of one; learned positions, hardly any bias.

Text comes first, registers before it. What the attention makes reaches the stream through the MLP alone.

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
    joint,
    norm_modulate,
    project,
    swiglu_mlp,
)
from rfkernels.models.parts import MLP, AdaNorm, Attention

__all__ = ["AuraFlow", "JointBlock", "SingleBlock", "joint_block", "single_block"]

EPS = 1e-5


def joint_block(block: nn.Module, image: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width], temb [B, width] -> (text, image)."""
    attn, condition = block.attn, ops.silu(temb)
    shift, scale, *rest = block.norm1.linear(condition).chunk(6, -1)
    c_shift, c_scale, *c_rest = block.norm1_context.linear(condition).chunk(6, -1)
    qkv, c_qkv = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    streams = [
        heads_of(project(norm_modulate(text, c_scale, c_shift, to=c_qkv, eps=EPS), *c_qkv), attn.heads),
        heads_of(project(norm_modulate(image, scale, shift, to=qkv, eps=EPS), *qkv), attn.heads),
    ]
    q, k, v = (torch.cat(parts, 1) for parts in zip(*streams, strict=True))
    c_y, y = attend(attn, q, k, v).split([text.shape[1], image.shape[1]], 1)
    return (
        through_mlp(block.ff_context, text, attn.to_add_out(c_y), *c_rest),
        through_mlp(block.ff, image, attn.to_out[0](y), *rest),
    )


def single_block(block: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
    """x [B, T + N, width], text first."""
    attn = block.attn
    shift, scale, *rest = block.norm1.linear(ops.silu(temb)).chunk(6, -1)
    qkv = (attn.to_q, attn.to_k, attn.to_v)
    n = norm_modulate(x, scale, shift, to=qkv, eps=EPS)
    y = attend(attn, *heads_of(project(n, *qkv), attn.heads))
    return through_mlp(block.ff, x, attn.to_out[0](y), *rest)


def heads_of(qkv: tuple[Tensor, Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each as `[B, L, heads, d]`, queries and keys with a LayerNorm per head."""
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in qkv)
    return ops.norm_modulate(q, eps=EPS), ops.norm_modulate(k, eps=EPS), v


def through_mlp(
    ff: nn.Module, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor
) -> Tensor:
    """`x + gate_mlp MLP(modulated LN(x + gate y))`"""
    up = (ff.linear_1, ff.linear_2)
    _, n = gated_residual_norm_modulate(x, y, gate, scale, shift, to=up, eps=EPS)
    return finish(x, swiglu_mlp(n, *up), ff.out_projection, gate_mlp)


class SwiGLU(nn.Module):
    """`out_projection(silu(linear_1 x) * linear_2 x)`, 8/3 as wide within, rounded up to 256."""

    def __init__(self, width: int):
        super().__init__()
        hidden = -(-int(8 * width / 3) // 256) * 256
        self.linear_1 = nn.Linear(width, hidden, bias=False)
        self.linear_2 = nn.Linear(width, hidden, bias=False)
        self.out_projection = nn.Linear(hidden, width, bias=False)


class JointBlock(nn.Module):
    """The weights of `joint_block`."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1, self.norm1_context = AdaNorm(width, 6, bias=False), AdaNorm(width, 6, bias=False)
        self.attn = Attention(width, heads, head_dim, added=width, norm=None, bias=False)
        self.ff, self.ff_context = SwiGLU(width), SwiGLU(width)

    forward = joint_block


class SingleBlock(nn.Module):
    """The weights of `single_block`."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1 = AdaNorm(width, 6, bias=False)
        self.attn = Attention(width, heads, head_dim, norm=None, bias=False)
        self.ff = SwiGLU(width)

    forward = single_block


class LearnedPatchEmbedding(nn.Module):
    """A linear layer of every patch, plus its learned position: of the middle of a square of `count`."""

    def __init__(self, channels: int, width: int, patch: int, count: int):
        super().__init__()
        self.patch, self.side = patch, int(count**0.5)
        self.proj = nn.Linear(patch**2 * channels, width)
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, count, width))

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, H/p W/p, width]`"""
        rows, columns = (n // self.patch for n in latents.shape[-2:])
        if max(rows, columns) > self.side:
            raise ValueError(
                f"latents: at most {self.side} x {self.side} patches have a position, got {rows} x {columns}"
            )
        top, left = self.side // 2 - rows // 2, self.side // 2 - columns // 2
        table = self.pos_embed[0, : self.side**2].view(self.side, self.side, -1)
        positions = table[top : top + rows, left : left + columns].flatten(0, 1)
        return self.proj(ops.patchify(latents, self.patch)) + positions


class AuraFlow(nn.Module):
    """Arguments and the names of parameters are those of diffusers' AuraFlowTransformer2DModel."""

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 4,
        num_mmdit_layers: int = 4,
        num_single_dit_layers: int = 32,
        attention_head_dim: int = 256,
        num_attention_heads: int = 12,
        joint_attention_dim: int = 2048,
        caption_projection_dim: int = 3072,
        out_channels: int | None = 4,
        pos_embed_max_size: int = 1024,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes = (width, num_attention_heads, attention_head_dim)
        if caption_projection_dim != width:
            raise ValueError(
                f"AuraFlow: caption_projection_dim must be the width {width}, got {caption_projection_dim}"
            )
        self.patch = patch_size
        self.pos_embed = LearnedPatchEmbedding(in_channels, width, patch_size, pos_embed_max_size)
        self.context_embedder = nn.Linear(joint_attention_dim, width, bias=False)
        self.time_step_proj = MLP(256, width)
        self.joint_transformer_blocks = nn.ModuleList(JointBlock(*sizes) for _ in range(num_mmdit_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(*sizes) for _ in range(num_single_dit_layers)
        )
        self.norm_out = AdaNorm(width, 2, bias=False)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels), bias=False)
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, 8, width))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The velocity `[B, channels, H, W]`.

        Args:
            hidden_states: latents `[B, in_channels, H, W]`.
            encoder_hidden_states: `[B, T, 2048]` of T5.
            timestep: `[B]`, t of the flow in 0 .. 1.

        Raises:
            ValueError: a size that patches do not divide, or larger than the table of positions.
        """
        image, text = self.pos_embed(hidden_states), self.context_embedder(encoder_hidden_states)
        text = torch.cat([self.register_tokens.to(text.dtype).expand(len(text), -1, -1), text], 1)
        temb = embed_time(self.time_step_proj, timestep, image.dtype, scale=1000.0)
        for block in self.joint_transformer_blocks:
            text, image = block(image, text, temb)
        if self.single_transformer_blocks:
            x = joint(text, image)
            for block in self.single_transformer_blocks:
                x = block(x, temb)
            image = x[:, text.shape[1] :]
        scale, shift = self.norm_out.linear(ops.silu(temb)).chunk(2, -1)
        tokens = self.proj_out(ops.norm_modulate(image, scale, shift, norm="none"))
        return ops.unpatchify(tokens, hidden_states.shape[-2:], self.patch, "pc")
