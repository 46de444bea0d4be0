"""DiT (Peebles and Xie, "Scalable diffusion models with transformers", 2022) and SiT (Ma et al., 2024).

Images of a class. SiT is the same network with t of the flow, in 0 .. 1.

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
from rfkernels.models.parts import MLP, AdaNorm, Attention, FeedForward
from rfkernels.models.positions import PatchEmbedding

__all__ = ["DiT", "SiT", "class_conditional_block", "from_diffusers"]


def class_conditional_block(block: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
    """x [B, L, width], temb [B, width]: the embeddings of time and class, added."""
    attn = block.attn1
    modulation = block.norm1.linear(ops.silu(temb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    qkv, up = (attn.to_q, attn.to_k, attn.to_v), (block.ff.net[0].proj,)
    n = norm_modulate(x, scale, shift, to=qkv)
    q, k, v = ops.qkv_norm_rope(project(n, *qkv), attn.heads)
    y = attn.to_out[0](attend(attn, q, k, v))
    x, n = gated_residual_norm_modulate(x, y, gate, scale_mlp, shift_mlp, to=up, eps=block.norm3.eps)
    return finish(x, *gelu_mlp(n, block.ff), gate_mlp)


class Block(nn.Module):
    """The weights of `class_conditional_block`."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool = True, eps: float = 1e-6):
        super().__init__()
        self.norm1 = AdaNorm(width, 6)
        self.attn1 = Attention(width, heads, head_dim, norm=None, bias=bias, out_bias=True)
        self.norm3 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.ff = FeedForward(width)

    forward = class_conditional_block


class _Table(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes, width)


class TimeClassEmbedding(nn.Module):
    """The condition: time plus class; the class behind the last one is that of no class."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.timestep_embedder = MLP(256, width)
        self.class_embedder = _Table(classes + 1, width)

    def forward(self, t: Tensor, label: Tensor, dtype: torch.dtype, shift: float) -> Tensor:
        """t and label [B] -> [B, width]"""
        time = embed_time(self.timestep_embedder, t, dtype, downscale_freq_shift=shift)
        return time + self.class_embedder.embedding_table(label)


class DiT(nn.Module):
    """DiT: arguments are those of diffusers' DiTTransformer2DModel.

    diffusers has the embeddings of time and class in every block, all the same: here they are once, `emb`;
    `from_diffusers` is the way from its weights.

    The original (facebookresearch/DiT) has other conventions than diffusers, which ran on its weights:
    `downscale_freq_shift` 0 (the frequencies of the sinusoids are divided by 128, not by 127) and `norm_eps`
    1e-6. With learned variances `out_channels` is twice `in_channels`.
    """

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        norm_eps: float = 1e-5,
        *,
        downscale_freq_shift: float = 1.0,
    ):
        super().__init__()
        heads, head_dim = num_attention_heads, attention_head_dim
        width = heads * head_dim
        self.channels, self.patch, self.freq_shift = in_channels, patch_size, downscale_freq_shift
        self.pos_embed = PatchEmbedding(in_channels, width, patch_size, sample_size)
        self.emb = TimeClassEmbedding(width, num_embeds_ada_norm)
        self.transformer_blocks = nn.ModuleList(
            Block(width, heads, head_dim, attention_bias, norm_eps) for _ in range(num_layers)
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """`[B, out_channels, H, W]`: the noise or the velocity, and behind it what variances are made of.

        Args:
            hidden_states: latents `[B, in_channels, H, W]`.
            timestep, class_labels: `[B]`; t as it was trained, 0 .. 1000 or, in SiT, 0 .. 1.

        Raises:
            ValueError: a size that patches do not divide.
        """
        x = self.pos_embed(hidden_states)
        temb = self.emb(timestep, class_labels, x.dtype, self.freq_shift)
        for block in self.transformer_blocks:
            x = block(x, temb)
        shift, scale = self.proj_out_1(ops.silu(temb)).chunk(2, -1)  # in this order
        tokens = self.proj_out_2(ops.norm_modulate(x, scale, shift))
        return ops.unpatchify(tokens, hidden_states.shape[-2:], self.patch, "pc")

    def forward_with_cfg(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, cfg_scale: float
    ) -> Tensor:
        """Classifier-free guidance as in the original: of the first three channels alone.

        The batch is the samples with their classes, then the same ones with none, whose latents are not read;
        the guided channels of both halves of the result are the same.
        """
        if len(hidden_states) % 2:
            raise ValueError(f"forward_with_cfg: the batch must be even, got {len(hidden_states)}")
        half = hidden_states[: len(hidden_states) // 2]
        out = self(torch.cat([half, half]), timestep, class_labels)
        with_class, without = out[:, :3].chunk(2)
        guided = without + cfg_scale * (with_class - without)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], 1)


class SiT(DiT):
    """SiT of willisma/SiT: t in 0 .. 1, the conventions of the original DiT; variances are left out."""

    def __init__(
        self, *arguments, norm_eps: float = 1e-6, downscale_freq_shift: float = 0.0, **configuration
    ):
        super().__init__(
            *arguments, norm_eps=norm_eps, downscale_freq_shift=downscale_freq_shift, **configuration
        )

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """The velocity `[B, in_channels, H, W]`."""
        return super().forward(hidden_states, timestep, class_labels)[:, : self.channels]


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `DiT` from that of diffusers' model: the embeddings of its blocks once.

    Raises:
        ValueError: embeddings that differ between blocks.
    """
    taken = {}
    for name, value in state.items():
        block, found, part = name.partition(".norm1.emb.")
        kept = taken.setdefault(f"emb.{part}" if found else name, value)
        if found and not torch.equal(kept, value):
            raise ValueError(f"from_diffusers: {part} of {block} differs from that of the first block")
    return taken
