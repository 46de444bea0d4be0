"""FLUX.3 (Black Forest Labs, 2026): text, noise and references in blocks of their own, then in one sequence.

Attention and MLP are side by side, without biases; one modulation for all blocks of a kind. Text and
references are modulated as at t = 0. A distilled model (a flow map) also knows the time that a step jumps to.

Blocks are functions of a module that holds the weights under the names of diffusers, ours or theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.models.flux2 import SwiGLU
from rfkernels.models.layers import attend, bounded, embed_time, norm_modulate, project, swiglu_mlp
from rfkernels.models.parts import MLP, AdaNorm, Attention, thousand

__all__ = ["Block", "Flux3", "parallel_block"]

KINDS = ("txt", "image", "image_cond")  # in the order of the sequence


def parallel_block(
    block: nn.Module, x: Tensor, modulation: Tensor, rotation: Tensor, index: Tensor | None = None
) -> Tensor:
    """x [B, L, width], rotation of all tokens; modulation [B, 3 width], per token [B, L, 3 width], or
    [G, 3 width] with index [B, L], the row of each token."""
    attn, ff = block.attn, block.ff
    eps, row = {"eps": attn.norm_q.eps}, {} if index is None else {"index": index}
    shift, scale, gate = modulation.chunk(3, -1)
    layers = (attn.to_q, attn.to_k, attn.to_v, ff.linear_in)
    n = norm_modulate(x, scale, shift, to=layers, **eps, **row)
    q, k, v = ops.qkv_norm_rope(
        project(n, *layers[:3]),
        attn.heads,
        q_weight=attn.norm_q.weight,
        k_weight=attn.norm_k.weight,
        rotation=rotation,
        **eps,
    )
    hidden = swiglu_mlp(n, ff.linear_in)
    y = attn.to_out[0](attend(attn, q, k, v)) + ff.linear_out(hidden)
    return bounded(ops.gated_residual(x, y, gate, **row))


class Block(nn.Module):
    """The weights of `parallel_block`."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.attn = Attention(width, heads, head_dim, bias=False, eps=eps)
        self.ff = SwiGLU(width, hidden)

    forward = parallel_block


class Flux3(nn.Module):
    """Arguments and the names of parameters are those of diffusers' Flux3Transformer2DModel.

    `flow_map`: a distilled model.
    """

    def __init__(
        self,
        in_channels: int = 128,
        cond_in_channels: int = 128,
        num_layers: int = 5,
        num_single_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 20480,
        timestep_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: Sequence[int] = (32, 32, 32, 32),
        rope_theta: float = 10000,
        eps: float = 1e-6,
        flow_map: bool = False,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes = (width, num_attention_heads, attention_head_dim, int(width * mlp_ratio), eps)
        channels = {"image": in_channels, "image_cond": cond_in_channels}

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(*sizes) for _ in range(count))

        def modulations() -> nn.ModuleDict:
            return nn.ModuleDict({kind: AdaNorm(width, 3, bias=False) for kind in KINDS})

        self.axes_dims, self.theta, self.eps = tuple(axes_dims_rope), rope_theta, eps
        self.timestep_embedder = MLP(timestep_channels, width, bias=False)
        self.target_timestep_embedder = MLP(timestep_channels, width, bias=False) if flow_map else None
        self.early_stream_modulations, self.single_stream_modulations = modulations(), modulations()
        self.x_embedders = nn.ModuleDict(
            {kind: nn.Linear(count, width, bias=False) for kind, count in channels.items()}
        )
        self.context_embedder = nn.Linear(joint_attention_dim, width, bias=False)
        self.mode_blocks = nn.ModuleDict({kind: blocks(num_layers) for kind in channels})
        self.txt_mode_blocks = blocks(num_layers)
        self.single_transformer_blocks = blocks(num_single_layers)
        self.norm_out = AdaNorm(width, 2, bias=False)
        self.proj_out = nn.Linear(width, in_channels, bias=False)

    def conditions(self, t: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """SiLU of the embedding of time, `[B, width]`, of every kind of token; t and target in 0 .. 1000."""
        noise, none = (embed_time(self.timestep_embedder, x, t.dtype) for x in (t, torch.zeros_like(t)))
        if target is not None:
            jump = embed_time(self.target_timestep_embedder, target, t.dtype)
            noise, none = noise + jump, none + jump
        noise, none = ops.silu(noise), ops.silu(none)
        return {"txt": none, "image": noise, "image_cond": none}

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        image_cond_hidden_states: Tensor | None = None,
        image_cond_ids: Tensor | None = None,
        target_timestep: Tensor | None = None,
    ) -> Tensor:
        """The velocity `[B, N, in_channels]`.

        Args:
            hidden_states: `[B, N, in_channels]`, packed latents.
            encoder_hidden_states: `[B, T, joint_attention_dim]` of Qwen3-VL.
            timestep: `[B]`, t of the flow in 0 .. 1.
            img_ids, txt_ids: `[N, 4]`, `[T, 4]`.
            image_cond_hidden_states, image_cond_ids: `[B, R, cond_in_channels]`, `[R, 4]`: references.
            target_timestep: `[B]`, the time that the step jumps to, of a flow map.

        Raises:
            ValueError: references without ids, or ids without them; target_timestep missing, or given to a
                model that is no flow map.
        """
        reference, dtype = image_cond_hidden_states, hidden_states.dtype
        if (reference is None) != (image_cond_ids is None):
            raise ValueError("image_cond_hidden_states, image_cond_ids: must be given together, got one")
        if (target_timestep is None) != (self.target_timestep_embedder is None):
            kind = "no flow map" if self.target_timestep_embedder is None else "a flow map"
            given = "none" if target_timestep is None else "one"
            raise ValueError(f"target_timestep: the model is {kind}, got {given}")
        target = None if target_timestep is None else thousand(target_timestep, dtype)
        conditions = self.conditions(thousand(timestep, dtype), target)
        streams = {
            "txt": (self.context_embedder(encoder_hidden_states), txt_ids, self.txt_mode_blocks),
            "image": (self.x_embedders["image"](hidden_states), img_ids, self.mode_blocks["image"]),
        }
        if reference is not None:
            embedded = self.x_embedders["image_cond"](reference)
            streams["image_cond"] = (embedded, image_cond_ids, self.mode_blocks["image_cond"])
        parts, rotations, rows = [], [], []
        for kind, (x, ids, blocks) in streams.items():
            rotation = ops.rotary_table(ids, self.axes_dims, self.theta)
            modulation = self.early_stream_modulations[kind].linear(conditions[kind])
            for block in blocks:
                x = block(x, modulation, rotation)
            parts.append(x)
            rotations.append(rotation)
            rows.append(self.single_stream_modulations[kind].linear(conditions[kind]))
        x, index = torch.cat(parts, 1), rows_of(parts)
        modulation, rotation = torch.cat(rows), torch.cat(rotations)
        for block in self.single_transformer_blocks:
            x = block(x, modulation, rotation, index)
        scale, shift = self.norm_out.linear(conditions["image"]).chunk(2, -1)
        first = encoder_hidden_states.shape[1]
        image = x[:, first : first + hidden_states.shape[1]]
        return self.proj_out(ops.norm_modulate(image, scale, shift, eps=self.eps))


def rows_of(parts: Sequence[Tensor]) -> Tensor:
    """int64 `[B, L]`: the row of every token in tables of the parts, B rows each, one behind the other."""
    batch, device = len(parts[0]), parts[0].device
    part = torch.cat([torch.full((x.shape[1],), i, device=device) for i, x in enumerate(parts)])
    return part * batch + torch.arange(batch, device=device)[:, None]
