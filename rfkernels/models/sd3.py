"""Stable Diffusion 3 and 3.5 (Esser et al., "Scaling rectified flow transformers", 2024).

Image and text tokens have their own weights and one attention, without a rotation; the image comes first.
Layers of 3.5-medium have a second attention, of the image alone.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

from collections.abc import Collection

from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import (
    attend,
    finish,
    gated_residual_norm_modulate,
    gelu_mlp,
    norm_modulate,
    project,
    weight_of,
)
from rfkernels.models.parts import AdaNorm, Attention, FeedForward, TimeTextEmbedding
from rfkernels.models.positions import PatchEmbedding

__all__ = ["SD3", "JointBlock", "joint_block"]


def joint_block(block: nn.Module, image: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor | None, Tensor]:
    """image [B, N, width], text [B, T, width], temb [B, width] -> (text or, at the end, None; image)."""
    attn, condition = block.attn, ops.silu(temb)
    modulation = block.norm1.linear(condition).chunk(9 if block.use_dual_attention else 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
    c_modulation = block.norm1_context.linear(condition)
    if block.context_pre_only:
        c_scale, c_shift = c_modulation.chunk(2, -1)  # in this order
    else:
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation.chunk(6, -1)

    qkv, c_qkv = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    n = norm_modulate(image, scale, shift, to=qkv)
    c_n = norm_modulate(text, c_scale, c_shift, to=c_qkv)
    q, k, v = ops.qkv_norm_rope(
        [project(n, *qkv), project(c_n, *c_qkv)],
        attn.heads,
        q_weight=[weight_of(attn.norm_q), weight_of(attn.norm_added_q)],
        k_weight=[weight_of(attn.norm_k), weight_of(attn.norm_added_k)],
    )
    y, c_y = attend(attn, q, k, v).split([image.shape[1], text.shape[1]], 1)
    out = attn.to_out[0]
    if block.use_dual_attention:  # of the image alone, from the same input
        shift2, scale2, gate2 = modulation[6:]
        y2 = _attend_image(block.attn2, image, scale2, shift2)
        image = finish(image, y, out, gate)
        y, out, gate = y2, block.attn2.to_out[0], gate2

    up = (block.ff.net[0].proj,)
    image, n = gated_residual_norm_modulate(image, out(y), gate, scale_mlp, shift_mlp, to=up)
    image = finish(image, *gelu_mlp(n, block.ff), gate_mlp)
    if block.context_pre_only:
        return None, image
    c_y, c_up = attn.to_add_out(c_y), (block.ff_context.net[0].proj,)
    text, c_n = gated_residual_norm_modulate(text, c_y, c_gate, c_scale_mlp, c_shift_mlp, to=c_up)
    return finish(text, *gelu_mlp(c_n, block.ff_context), c_gate_mlp), image


def _attend_image(attn: nn.Module, image: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    qkv = (attn.to_q, attn.to_k, attn.to_v)
    q, k, v = ops.qkv_norm_rope(
        project(norm_modulate(image, scale, shift, to=qkv), *qkv),
        attn.heads,
        q_weight=weight_of(attn.norm_q),
        k_weight=weight_of(attn.norm_k),
    )
    return attend(attn, q, k, v)


class JointBlock(nn.Module):
    """The weights of `joint_block`; `dual`: with a second attention, `last`: text ends in the attention."""

    def __init__(
        self, width: int, heads: int, head_dim: int, *, qk_norm: bool = False, dual: bool = False, last: bool
    ):
        super().__init__()
        norm = "head" if qk_norm else None
        self.use_dual_attention, self.context_pre_only = dual, last
        self.norm1, self.norm1_context = AdaNorm(width, 9 if dual else 6), AdaNorm(width, 2 if last else 6)
        self.attn = Attention(width, heads, head_dim, added=width, norm=norm, added_out=not last)
        self.attn2 = Attention(width, heads, head_dim, norm=norm) if dual else None
        self.ff, self.ff_context = FeedForward(width), None if last else FeedForward(width)

    forward = joint_block


class SD3(nn.Module):
    """SD3 and SD3.5: arguments and the names of parameters are those of diffusers' SD3Transformer2DModel."""

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Collection[int] = (),
        qk_norm: str | None = None,
    ):
        super().__init__()
        heads, head_dim = num_attention_heads, attention_head_dim
        width = heads * head_dim
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"SD3: qk_norm must be None or rms_norm, got {qk_norm!r}")
        if caption_projection_dim != width:
            raise ValueError(
                f"SD3: caption_projection_dim must be the width {width}, got {caption_projection_dim}"
            )
        self.patch = patch_size
        self.pos_embed = PatchEmbedding(
            in_channels, width, patch_size, sample_size, largest=pos_embed_max_size
        )
        self.time_text_embed = TimeTextEmbedding(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                width,
                heads,
                head_dim,
                qk_norm=qk_norm is not None,
                dual=i in dual_attention_layers,
                last=i == num_layers - 1,
            )
            for i in range(num_layers)
        )
        self.norm_out = AdaNorm(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        *,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """The velocity `[B, channels, H, W]`.

        Args:
            hidden_states: latents `[B, in_channels, H, W]`.
            encoder_hidden_states, pooled_projections: `[B, T, 4096]` of CLIP and T5, `[B, 2048]` of CLIP.
            timestep: `[B]` in 0 .. 1000.
            skip_layers: blocks that are left out, for skip-layer guidance.

        Raises:
            ValueError: a size that patches do not divide, or larger than the table of positions.
        """
        image, text = self.pos_embed(hidden_states), self.context_embedder(encoder_hidden_states)
        temb = self.time_text_embed(timestep, None, pooled_projections)
        for i, block in enumerate(self.transformer_blocks):
            if i not in skip_layers:
                text, image = block(image, text, temb)
        scale, shift = self.norm_out.linear(ops.silu(temb)).chunk(2, -1)
        tokens = self.proj_out(ops.norm_modulate(image, scale, shift))
        return ops.unpatchify(tokens, hidden_states.shape[-2:], self.patch, "pc")
