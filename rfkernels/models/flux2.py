"""FLUX.2 (Black Forest Labs, 2025): dev, and klein without guidance.

Like FLUX.1, the text first, but without biases and pooled text, with SwiGLU, and with one modulation for all
blocks of a kind. References are further image tokens, told apart by their ids. klein-kv computes them once:
they see themselves alone, and later steps see the keys and values that the first one left.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import (
    attend,
    beside,
    embed_time,
    finish,
    gated_residual_norm_modulate,
    joint,
    norm_modulate,
    project,
    swiglu_mlp,
)
from rfkernels.models.parts import MLP, AdaNorm, Attention, thousand

__all__ = [
    "DoubleBlock",
    "Flux2",
    "SingleBlock",
    "attend_first",
    "attend_later",
    "double_block",
    "single_block",
]

Pair = tuple[Tensor, Tensor]


def double_block(
    block: nn.Module,
    image: Tensor,
    text: Tensor,
    modulation: Tensor,
    c_modulation: Tensor,
    rotation: Tensor,
    index: Tensor | None = None,
    attention: Callable[..., Tensor] = attend,
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width], modulations [B, 6 width], rotation -> (text, image).

    modulation may be [G, 6 width] with index [B, N], the row of each image token; attention: `attend`,
    `attend_first` or `attend_later`.
    """
    attn, ff, c_ff = block.attn, block.ff, block.ff_context
    eps, row = {"eps": attn.norm_q.eps}, {} if index is None else {"index": index}
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation.chunk(6, -1)

    qkv, c_qkv = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    n = norm_modulate(image, scale, shift, to=qkv, **eps, **row)
    c_n = norm_modulate(text, c_scale, c_shift, to=c_qkv, **eps)
    q, k, v = ops.qkv_norm_rope(
        [project(c_n, *c_qkv), project(n, *qkv)],
        attn.heads,
        q_weight=[attn.norm_added_q.weight, attn.norm_q.weight],
        k_weight=[attn.norm_added_k.weight, attn.norm_k.weight],
        rotation=rotation,
        **eps,
    )
    c_y, y = attention(attn, q, k, v).split([text.shape[1], image.shape[1]], 1)
    y, c_y = attn.to_out[0](y), attn.to_add_out(c_y)

    up, c_up = (ff.linear_in,), (c_ff.linear_in,)
    image, n = gated_residual_norm_modulate(image, y, gate, scale_mlp, shift_mlp, to=up, **eps, **row)
    text, c_n = gated_residual_norm_modulate(text, c_y, c_gate, c_scale_mlp, c_shift_mlp, to=c_up, **eps)
    image = finish(image, swiglu_mlp(n, ff.linear_in), ff.linear_out, gate_mlp, **row)
    text = finish(text, swiglu_mlp(c_n, c_ff.linear_in), c_ff.linear_out, c_gate_mlp)
    return text, image


def single_block(
    block: nn.Module,
    x: Tensor,
    modulation: Tensor,
    rotation: Tensor,
    index: Tensor | None = None,
    attention: Callable[..., Tensor] = attend,
) -> Tensor:
    """x [B, T + N, width], text first, modulation [B, 3 width]: one matmul in, one matmul out.

    index and attention as in `double_block`, of all tokens.
    """
    attn = block.attn
    eps, row = {"eps": attn.norm_q.eps}, {} if index is None else {"index": index}
    layers = (attn.to_qkv_mlp_proj,)
    shift, scale, gate = modulation.chunk(3, -1)
    (h,) = project(norm_modulate(x, scale, shift, to=layers, **eps, **row), *layers)
    inner = attn.heads * len(attn.norm_q.weight)
    qkv, gate_up = h.split([3 * inner, h.shape[-1] - 3 * inner], -1)
    gate_mlp, up = gate_up.chunk(2, -1)
    q, k, v = ops.qkv_norm_rope(
        qkv,
        attn.heads,
        q_weight=attn.norm_q.weight,
        k_weight=attn.norm_k.weight,
        rotation=rotation,
        **eps,
    )
    y = beside(attention(attn, q, k, v), _swiglu, gate_mlp, up)
    return finish(x, y, attn.to_out, gate, **row)


def _swiglu(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    return ops.gated_activation(gate, "silu", up=up, out=out)


def attend_first(
    attn: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text: int,
    references: int,
    keep: Callable[[nn.Module, Pair], None],
) -> Tensor:
    """`attend` of text, references and noise: references see themselves alone; `keep` takes their (k, v)."""
    q_text, q_own, q_noise = q.split([text, references, q.shape[1] - text - references], 1)
    own = tuple(t[:, text : text + references].clone() for t in (k, v))
    keep(attn, own)
    y = attend(attn, torch.cat([q_text, q_noise], 1), k, v)
    return torch.cat([y[:, :text], attend(attn, q_own, *own), y[:, text:]], 1)


def attend_later(
    attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, kept: Callable[[nn.Module], Pair]
) -> Tensor:
    """`attend` of text and noise to themselves and to what `attend_first` kept."""
    return attend(attn, q, *(torch.cat(pair, 1) for pair in zip((k, v), kept(attn), strict=True)))


class SwiGLU(nn.Module):
    """`linear_out(silu(a) * b)`, a and b the halves of `linear_in x`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * hidden, bias=False)
        self.linear_out = nn.Linear(hidden, width, bias=False)


class ParallelAttention(nn.Module):
    """Attention and SwiGLU side by side, between two layers."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, eps: float):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_qkv_mlp_proj = nn.Linear(width, 3 * inner + 2 * hidden, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=eps), nn.RMSNorm(head_dim, eps=eps)
        self.to_out = nn.Linear(inner + hidden, width, bias=False)


class DoubleBlock(nn.Module):
    """The weights of `double_block`."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.attn = Attention(width, heads, head_dim, added=width, bias=False, eps=eps)
        self.ff, self.ff_context = SwiGLU(width, hidden), SwiGLU(width, hidden)

    forward = double_block


class SingleBlock(nn.Module):
    """The weights of `single_block`."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.attn = ParallelAttention(width, heads, head_dim, hidden, eps)

    forward = single_block


class TimeGuidanceEmbedding(nn.Module):
    """The condition: time, and guidance of a distilled model."""

    def __init__(self, width: int, sinusoids: int, guidance: bool):
        super().__init__()
        self.timestep_embedder = MLP(sinusoids, width, bias=False)
        self.guidance_embedder = MLP(sinusoids, width, bias=False) if guidance else None

    def forward(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        """t and guidance `[B]` as sinusoids take them -> `[B, width]`."""
        temb = embed_time(self.timestep_embedder, t, t.dtype)
        if self.guidance_embedder is None:
            return temb
        if guidance is None:
            raise ValueError("guidance: the model has an embedding of it, got none")
        return temb + embed_time(self.guidance_embedder, guidance, t.dtype)


class Flux2(nn.Module):
    """FLUX.2: arguments and the names of parameters are those of diffusers' Flux2Transformer2DModel.

    klein-4B has `num_layers` 5, `num_single_layers` 20, 24 heads and `joint_attention_dim` 7680, klein-9B 8,
    24, 32 and 12288; both have no `guidance_embeds`.
    """

    def __init__(
        self,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 8,
        num_single_layers: int = 48,
        attention_head_dim: int = 128,
        num_attention_heads: int = 48,
        joint_attention_dim: int = 15360,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: Sequence[int] = (32, 32, 32, 32),
        rope_theta: float = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = True,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes = (width, num_attention_heads, attention_head_dim, int(width * mlp_ratio), eps)
        self.axes_dims, self.theta, self.eps = tuple(axes_dims_rope), rope_theta, eps
        self.time_guidance_embed = TimeGuidanceEmbedding(width, timestep_guidance_channels, guidance_embeds)
        self.double_stream_modulation_img = AdaNorm(width, 6, bias=False)
        self.double_stream_modulation_txt = AdaNorm(width, 6, bias=False)
        self.single_stream_modulation = AdaNorm(width, 3, bias=False)
        self.x_embedder = nn.Linear(in_channels, width, bias=False)
        self.context_embedder = nn.Linear(joint_attention_dim, width, bias=False)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(*sizes) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*sizes) for _ in range(num_single_layers))
        self.norm_out = AdaNorm(width, 2, bias=False)
        self.proj_out = nn.Linear(width, out_channels or in_channels, bias=False)

    def rotation(self, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        """The angles of all tokens: the same in every step, made once."""
        ids = torch.cat([t[0] if t.ndim == 3 else t for t in (txt_ids, img_ids)])
        return ops.rotary_table(ids, self.axes_dims, self.theta)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        kv_cache: dict[nn.Module, Pair] | None = None,
        num_ref_tokens: int = 0,
        ref_fixed_timestep: float = 0.0,
        *,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """The velocity `[B, N, channels]`; that of references is left out where there is a `kv_cache`.

        Args:
            hidden_states: `[B, N, in_channels]`, packed latents.
            encoder_hidden_states: `[B, T, joint_attention_dim]` of Mistral 3 (dev) or Qwen3 (klein).
            timestep, guidance: `[B]`; t of the flow in 0 .. 1, the guidance of a distilled model, which
                klein does not read.
            img_ids, txt_ids: `[N, 4]`, `[T, 4]`, those of diffusers with a batch of equal ones in front; not
                read where their `rotation` is given.
            kv_cache: an empty dict, with `num_ref_tokens`: so many references stand before the noise, and it
                takes their keys and values of all blocks; with 0 later, they are seen though no longer there.
            ref_fixed_timestep: the time of these references.

        Raises:
            ValueError: no guidance for a model that has an embedding of it; an empty `kv_cache` without
                references, references without one, or more than there are tokens.
        """
        dtype, t, length = hidden_states.dtype, timestep, encoder_hidden_states.shape[1]
        attention = self._attention(kv_cache, num_ref_tokens, length, hidden_states.shape[1])
        guidance, rows = None if guidance is None else thousand(guidance, dtype), (None, None)
        temb = self.time_guidance_embed(thousand(t, dtype), guidance)
        condition = condition_of_image = ops.silu(temb)
        if num_ref_tokens:
            fixed = thousand(torch.full_like(t, ref_fixed_timestep), dtype)
            fixed = ops.silu(self.time_guidance_embed(fixed, guidance))
            condition_of_image = torch.cat([condition, fixed])
            rows = reference_rows(len(t), length, num_ref_tokens, hidden_states.shape[1], t.device)
        modulation = self.double_stream_modulation_img.linear(condition_of_image)
        c_modulation = self.double_stream_modulation_txt.linear(condition)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        rotation = self.rotation(img_ids, txt_ids) if rotation is None else rotation
        for block in self.transformer_blocks:
            text, image = block(image, text, modulation, c_modulation, rotation, rows[0], attention)
        x, modulation = joint(text, image), self.single_stream_modulation.linear(condition_of_image)
        for block in self.single_transformer_blocks:
            x = block(x, modulation, rotation, rows[1], attention)
        scale, shift = self.norm_out.linear(condition).chunk(2, -1)
        return self.proj_out(ops.norm_modulate(x[:, length + num_ref_tokens :], scale, shift, eps=self.eps))

    @staticmethod
    def _attention(kv_cache: dict | None, references: int, text: int, tokens: int) -> Callable[..., Tensor]:
        if not 0 <= references <= tokens or (references and kv_cache is None):
            raise ValueError(
                f"num_ref_tokens: must be 0 to {tokens}, and 0 without a kv_cache, got {references}"
            )
        if references:
            return partial(attend_first, text=text, references=references, keep=kv_cache.__setitem__)
        if kv_cache is None:
            return attend
        if not kv_cache:
            raise ValueError("kv_cache: must be filled by a call with num_ref_tokens, got an empty one")
        return partial(attend_later, kept=kv_cache.__getitem__)


def reference_rows(
    batch: int, text: int, references: int, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """int64 `[B, tokens]` of the image and `[B, text + tokens]` of all: b, or B + b of a reference."""
    place = torch.arange(-text, tokens, device=device)
    rows = torch.arange(batch, device=device)[:, None] + batch * ((place >= 0) & (place < references))
    return rows[:, text:], rows
