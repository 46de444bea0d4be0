"""HiDream-I1 and E1 (HiDream.ai, 2025): full, dev and fast.

Image and text tokens have their own weights, then they are one sequence; the image comes first. Every block
reads the text with tokens of its own behind, from a layer of Llama of its own. The feed-forward of the image,
and of the joint sequence, is a mixture of experts.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.layers import (
    Codes,
    attend,
    bounded,
    embed_time,
    finish,
    gated_residual_norm_modulate,
    is_plain,
    norm_modulate,
    project,
    swiglu_mlp,
)
from rfkernels.models.parts import MLP, SwiGLU, latents_of, patches_of
from rfkernels.ops._register import accumulator

__all__ = ["DoubleBlock", "HiDream", "SingleBlock", "double_block", "moe", "single_block"]


def double_block(
    block: nn.Module,
    image: Tensor,
    text: Tensor,
    temb: Tensor,
    rotation: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """image [B, N, width], text [B, T, width], temb [B, width] -> (image, text).

    rotation of all tokens, or of the first ones alone where others have the position 0; mask [B or 1, keys]
    multiplies the first keys, bias [B or 1, 1, 1, N + T] is added to their logits.
    """
    attn = block.attn1
    modulation = block.adaLN_modulation[1](ops.silu(temb)).chunk(12, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = modulation[6:]

    qkv, c_qkv = (attn.to_q, attn.to_k, attn.to_v), (attn.to_q_t, attn.to_k_t, attn.to_v_t)
    n = norm_modulate(image, scale, shift, to=qkv)
    c_n = norm_modulate(text, c_scale, c_shift, to=c_qkv)
    q, k, v = ops.qkv_norm_rope(
        [project(n, *qkv), project(c_n, *c_qkv)],
        attn.heads,
        q_weight=[attn.q_rms_norm.weight, attn.q_rms_norm_t.weight],  # over the full width
        k_weight=[attn.k_rms_norm.weight, attn.k_rms_norm_t.weight],
        rotation=rotation,
        eps=attn.q_rms_norm.eps,
    )
    y, c_y = attend(attn, q, _masked(k, mask), v, bias).split([image.shape[1], text.shape[1]], 1)
    y, c_y = attn.to_out(y), attn.to_out_t(c_y)

    up, c_up = _readers(block.ff_i), _readers(block.ff_t)
    image, n = gated_residual_norm_modulate(image, y, gate, scale_mlp, shift_mlp, to=up)
    text, c_n = gated_residual_norm_modulate(text, c_y, c_gate, c_scale_mlp, c_shift_mlp, to=c_up)
    image = _feed_forward(image, n, block.ff_i, gate_mlp)
    return image, _feed_forward(text, c_n, block.ff_t, c_gate_mlp)


def single_block(
    block: nn.Module,
    x: Tensor,
    temb: Tensor,
    rotation: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [B, N + T, width], image first; the others as in `double_block`."""
    attn = block.attn1
    modulation = block.adaLN_modulation[1](ops.silu(temb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    qkv = attn.to_q, attn.to_k, attn.to_v
    q, k, v = ops.qkv_norm_rope(
        project(norm_modulate(x, scale, shift, to=qkv), *qkv),
        attn.heads,
        q_weight=attn.q_rms_norm.weight,
        k_weight=attn.k_rms_norm.weight,
        rotation=rotation,
        eps=attn.q_rms_norm.eps,
    )
    y = attn.to_out(attend(attn, q, _masked(k, mask), v, bias))
    x, n = gated_residual_norm_modulate(x, y, gate, scale_mlp, shift_mlp, to=_readers(block.ff_i))
    return _feed_forward(x, n, block.ff_i, gate_mlp)


def moe(x: Tensor, ff: nn.Module) -> Tensor:
    r"""Returns :math:`S(x) + \sum_{e \in \mathrm{top}(p)} p_e E_e(x)`, a mixture of experts.

    p = softmax(G x); E and the shared S are SwiGLUs; the chosen p are not normalised again. No shape depends
    on data, nothing synchronises: tokens are sorted by expert on the device. Experts whose layers are not
    plain (quantised, with adapters) all see all tokens, with weights that are 0 where they were not chosen.
    """
    logits, top_k, y = F.linear(x, ff.gate.weight), ff.gate.top_k, _swiglu(x, ff.shared_experts)
    w1, w3, w2 = ([getattr(expert, name) for expert in ff.experts] for name in ("w1", "w3", "w2"))
    if all(is_plain(layer, nn.Linear) for layer in (*w1, *w3, *w2)):
        routing = ops.moe_route(logits.flatten(0, -2), top_k)
        w1, w3, w2 = ([layer.weight for layer in layers] for layers in (w1, w3, w2))
        rows, offsets, index = x.flatten(0, -2), routing.offsets, routing.order // top_k
        hidden = ops.grouped_linear(rows, w1, offsets, index=index, activation="swiglu", up=w3)
        experts = ops.grouped_linear(hidden, w2, offsets)
        return ops.moe_combine(experts, routing, residual=y.flatten(0, -2)).view_as(x)
    p, chosen = logits.softmax(-1).topk(top_k, -1)
    for i, expert in enumerate(ff.experts):
        y = torch.addcmul(y, (p * (chosen == i)).sum(-1, keepdim=True), _swiglu(x, expert))
    return y


def _swiglu(x: Tensor, ff: nn.Module) -> Tensor:
    return ff.w2(swiglu_mlp(x, ff.w1, ff.w3))


def _readers(ff: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that may read codes; the gate of a mixture reads the tokens themselves."""
    return () if hasattr(ff, "experts") else (ff.w1, ff.w3)


def _feed_forward(x: Tensor, tokens: Tensor | Codes, ff: nn.Module, gate: Tensor) -> Tensor:
    """x + gate * ff(tokens)."""
    if hasattr(ff, "experts"):
        return bounded(ops.gated_residual(x, moe(tokens, ff), gate))
    return finish(x, swiglu_mlp(tokens, ff.w1, ff.w3), ff.w2, gate)


def _masked(k: Tensor, mask: Tensor | None) -> Tensor:
    """Keys [B, keys, heads, d] times the mask of the first of them."""
    if mask is None:
        return k
    mask = F.pad(mask, (0, k.shape[1] - mask.shape[1]), value=1)
    return k * mask[..., None, None].to(k.dtype)


class Gate(nn.Module):
    """The layer that chooses `top_k` experts."""

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(experts, width) / width**0.5)


class MixtureOfExperts(nn.Module):
    """The weights of `moe`."""

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        self.shared_experts = SwiGLU(width, _hidden(2 * width))
        self.experts = nn.ModuleList(SwiGLU(width, _hidden(4 * width)) for _ in range(experts))
        self.gate = Gate(width, experts, top_k)

    forward = lambda self, x: moe(x, self)


def _hidden(width: int) -> int:
    """Two thirds, rounded up to a multiple of 256."""
    return -(-int(2 * width / 3) // 256) * 256


def _mlp(width: int, experts: int, top_k: int) -> nn.Module:
    return MixtureOfExperts(width, experts, top_k) if experts else SwiGLU(width, _hidden(4 * width))


class Attention(nn.Module):
    """Projections and norms of one stream, or with `text` of two."""

    def __init__(self, width: int, heads: int, text: bool, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        for suffix in ("", "_t") if text else ("",):
            for name in ("to_q", "to_k", "to_v", "to_out"):
                self.add_module(name + suffix, nn.Linear(width, width))
            for name in ("q_rms_norm", "k_rms_norm"):
                self.add_module(name + suffix, nn.RMSNorm(width, eps))


def _modulation(width: int, chunks: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Identity(), nn.Linear(width, chunks * width)])


class DoubleBlock(nn.Module):
    """The weights of `double_block`; `experts` 0 has a dense feed-forward."""

    def __init__(self, width: int, heads: int, experts: int = 4, top_k: int = 2):
        super().__init__()
        self.adaLN_modulation = _modulation(width, 12)
        self.attn1 = Attention(width, heads, text=True)
        self.ff_i, self.ff_t = _mlp(width, experts, top_k), SwiGLU(width, _hidden(4 * width))

    forward = double_block


class SingleBlock(nn.Module):
    """The weights of `single_block`."""

    def __init__(self, width: int, heads: int, experts: int = 4, top_k: int = 2):
        super().__init__()
        self.adaLN_modulation = _modulation(width, 6)
        self.attn1 = Attention(width, heads, text=False)
        self.ff_i = _mlp(width, experts, top_k)

    forward = single_block


class _Named(nn.Module):
    """A module under a name."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class HiDream(nn.Module):
    """HiDream: arguments and the names of parameters are those of diffusers' HiDreamImageTransformer2DModel.

    Its pipeline negates the result. E1 puts the picture to edit beside the noise, along the width, and reads
    the left half of the result; E1.1 with `max_seq` 8192. `force_inference_output` is not read: the result is
    that of inference.

    Latents that are not square have, in the model as it was trained, empty patches behind them, up to
    `max_seq`, whose keys are zeros. All are one and the same row in every layer: here they are one row, with
    the logarithm of their number added to its logits.
    """

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 16,
        num_single_layers: int = 32,
        attention_head_dim: int = 128,
        num_attention_heads: int = 20,
        caption_channels: Sequence[int] = (4096, 4096),
        text_emb_dim: int = 2048,
        num_routed_experts: int = 4,
        num_activated_experts: int = 2,
        axes_dims_rope: Sequence[int] = (64, 32, 32),
        max_resolution: Sequence[int] = (128, 128),
        llama_layers: Sequence[int] | None = None,
        force_inference_output: bool = False,
    ):
        super().__init__()
        heads, width = num_attention_heads, num_attention_heads * attention_head_dim
        blocks = num_layers + num_single_layers
        self.patch, self.axes_dims = patch_size, tuple(axes_dims_rope)
        self.llama_layers = tuple(range(blocks) if llama_layers is None else llama_layers)
        self.max_seq = max_resolution[0] * max_resolution[1] // patch_size**2
        if sum(self.axes_dims) != attention_head_dim or len(self.llama_layers) != blocks:
            raise ValueError(
                f"HiDream: axes_dims_rope must add up to {attention_head_dim}, and llama_layers name one for "
                f"each of {blocks} blocks; got {self.axes_dims} and {len(self.llama_layers)} layers"
            )
        values, mixture = patch_size**2, (num_routed_experts, num_activated_experts)
        self.t_embedder = _Named(timestep_embedder=MLP(256, width))
        self.p_embedder = _Named(pooled_embedder=MLP(text_emb_dim, width))
        self.x_embedder = _Named(proj=nn.Linear(in_channels * values, width))
        self.double_stream_blocks = nn.ModuleList(
            _Named(block=DoubleBlock(width, heads, *mixture)) for _ in range(num_layers)
        )
        self.single_stream_blocks = nn.ModuleList(
            _Named(block=SingleBlock(width, heads, *mixture)) for _ in range(num_single_layers)
        )
        self.final_layer = _Named(
            linear=nn.Linear(width, values * (out_channels or in_channels)),
            adaLN_modulation=_modulation(width, 2),
        )
        t5, llama = caption_channels
        self.caption_projection = nn.ModuleList(
            _Named(linear=nn.Linear(channels, width, bias=False)) for channels in [llama] * blocks + [t5]
        )

    def captions(self, t5: Tensor, llama: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The tokens of the text as the blocks read them: `captions=` of every step that has this text.

        Args:
            t5, llama: `[B, T, channels]`, and as many `[B, S, channels]` as `llama_layers` choose from.
        """
        chosen = [*(llama[i] for i in self.llama_layers), t5]
        return [p.linear(x) for p, x in zip(self.caption_projection, chosen, strict=True)]

    def rotation(self, latents: Tensor) -> Tensor:
        """The angles of the tokens of latents `[B, C, H, W]`; those of all others are 0."""
        rows, columns = (torch.arange(n // self.patch, device=latents.device) for n in latents.shape[2:])
        ids = torch.cartesian_prod(rows.new_zeros(1), rows, columns)
        return ops.rotary_table(ids, self.axes_dims, dtype=accumulator(latents.dtype))

    def forward(
        self,
        hidden_states: Tensor,
        timesteps: Tensor,
        encoder_hidden_states_t5: Tensor | None = None,
        encoder_hidden_states_llama3: Sequence[Tensor] | Tensor | None = None,
        pooled_embeds: Tensor | None = None,
        *,
        rotation: Tensor | None = None,
        captions: list[Tensor] | None = None,
    ) -> Tensor:
        """The negative velocity `[B, C, H, W]`.

        Args:
            hidden_states: `[B, in_channels, H, W]` latents.
            timesteps: `[B]`, 0 .. 1000.
            encoder_hidden_states_t5, encoder_hidden_states_llama3: as `t5` and `llama` of `captions`; not
                read where their `captions` are given.
            pooled_embeds: `[B, text_emb_dim]` of both CLIPs.

        Raises:
            ValueError: sizes that patches do not divide; latents that are not square of more than `max_seq`
                tokens.
        """
        if pooled_embeds is None or (captions is None and encoder_hidden_states_t5 is None):
            raise ValueError("HiDream: pooled_embeds, and captions or both texts, must be given, got none")
        height, width = hidden_states.shape[2:]
        tokens = patches_of(hidden_states, self.patch)
        if captions is None:
            captions = self.captions(encoder_hidden_states_t5, encoder_hidden_states_llama3)
        *captions, t5 = captions
        length, text = tokens.shape[1], t5.shape[1] + captions[-1].shape[1]
        pads = 0 if height == width else self.max_seq - length
        if pads < 0:
            most = f"at most {self.max_seq} tokens where they are not square"
            raise ValueError(f"HiDream: latents must have {most}, got {length} of {height} x {width}")
        x = self.x_embedder.proj(F.pad(tokens, (0, 0, 0, min(pads, 1))))
        temb = embed_time(self.t_embedder.timestep_embedder, timesteps, x.dtype)
        temb = temb + self.p_embedder.pooled_embedder(pooled_embeds)
        rotation = self.rotation(hidden_states) if rotation is None else rotation

        pad = _pad(x, length, pads, text + captions[0].shape[1])
        blocks = iter(captions)
        image, context = x, torch.cat([t5, captions[-1]], 1)
        for layer in self.double_stream_blocks:
            context = _behind(context, text, next(blocks))
            image, context = layer.block(image, context, temb, rotation, *pad)
        x, joint = torch.cat([image, context[:, :text]], 1), image.shape[1] + text
        for layer in self.single_stream_blocks:
            x = _behind(x, joint, next(blocks))
            x = layer.block(x, temb, rotation, *pad)

        shift, scale = self.final_layer.adaLN_modulation[1](ops.silu(temb)).chunk(2, -1)
        x = self.final_layer.linear(norm_modulate(x[:, :length], scale, shift))
        return latents_of(x, height // self.patch, width // self.patch, self.patch)


def _behind(x: Tensor, length: int, tail: Tensor) -> Tensor:
    """The first tokens of x and then the tail: in place of the tail of the block before, where x has it."""
    if x.shape[1] != length + tail.shape[1] or torch.is_grad_enabled():
        return torch.cat([x[:, :length], tail], 1)
    x[:, length:] = tail
    return x


def _pad(x: Tensor, at: int, pads: int, text: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Mask and bias of the keys of x and a text that make `pads` tokens of one, with zeros for a key."""
    if not pads:
        return None, None
    keys = torch.arange(x.shape[1] + text, device=x.device)[None] == at
    return ~keys, keys[:, None, None].to(accumulator(x.dtype)) * math.log(pads)
