"""Bytes that a block moves outside of its matmuls and its attention, counted op by op without running them.

    python -m tests.blocks.traffic  # the table of docs/blocks.md

An op reads its tensors once and writes its results once; views are free, there are no caches, parameters do
not count. bfloat16, one sample, at the sizes of the released models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models import attention
from diffusers.models.transformers import transformer_flux as d_flux
from diffusers.models.transformers import transformer_lumina2 as d_lumina2
from diffusers.models.transformers import transformer_wan as d_wan
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rfkernels.models import flux, sandwich, sd3, wan

__all__ = ["SIZES", "Size", "moved_bytes", "table"]

FREE = {"attention", "mm", "addmm", "bmm", "empty", "empty_like", "new_empty", "_unsafe_view"}


@dataclass(frozen=True)
class Size:
    """A block at its size in a released model: forward(module, *inputs)."""

    name: str
    tokens: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    theirs: Callable
    ours: Callable


class Counter(TorchDispatchMode):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.parameters = {id(p) for p in module.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        name = op._schema.name.split("::")[1]
        moved = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and id(x) not in self.parameters
        ]
        if name not in FREE and not op.is_view and moved:  # without inputs: the joining of weights, a fill
            storages = {x.untyped_storage()._cdata for x in moved}
            made = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
            # a cast that changes nothing returns its input; what is written in place is an input already
            moved += [x for x in made if x.untyped_storage()._cdata not in storages]
            if len(moved) > 1 or op._schema.is_mutable:
                self.bytes += sum(x.numel() * x.itemsize for x in moved)
        return results

    def rms_norm(self, x: Tensor, shape, weight=None, eps=None) -> Tensor:
        """One kernel on a GPU, a chain of ops where nothing is run."""
        self.bytes += 2 * x.nbytes
        return torch.empty_like(x)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        return torch.empty_like(query)  # in the layout of the query, as flash attention answers


def moved_bytes(size: Size, forward: Callable) -> int:
    with torch.device("meta"):
        module = size.build().eval()
        inputs = size.inputs()
        counter = Counter(module)
        with (
            mock.patch.object(F, "rms_norm", counter.rms_norm),
            mock.patch.object(F, "scaled_dot_product_attention", counter.attention),
            counter,
        ):
            forward(module, *inputs)
    return counter.bytes


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def two_streams(image: int, text: int, width: int) -> tuple[Tensor, ...]:
    return random(1, image, width), random(1, text, width), random(1, width)


def cos_sin(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The table of diffusers, every value twice."""
    return torch.empty(length, head_dim), torch.empty(length, head_dim)


def flux_size(single: bool, image: int = 4096, text: int = 512, heads: int = 24, head_dim: int = 128) -> Size:
    width, length = heads * head_dim, image + text
    block = d_flux.FluxSingleTransformerBlock if single else d_flux.FluxTransformerBlock

    def build():
        return block(width, heads, head_dim).bfloat16()

    def theirs(module, image, text, temb):
        return module(image, text, temb, cos_sin(length, head_dim))

    def ours(module, image, text, temb):
        rotation = torch.empty(length, head_dim // 2, 2)
        if single:  # diffusers joins and parts the two streams in every block
            return flux.single_block(module, random(1, length, width), temb, rotation)
        return flux.double_block(module, image, text, temb, rotation)

    name = "FLUX.1 single" if single else "FLUX.1 double"
    inputs = partial(two_streams, image, text, width)
    return Size(name, f"{image} + {text}", build, inputs, theirs, ours)


def sd3_size(image: int = 4096, text: int = 333, heads: int = 24, head_dim: int = 64) -> Size:
    width = heads * head_dim

    def build():
        block = attention.JointTransformerBlock(
            width, heads, head_dim, qk_norm="rms_norm", use_dual_attention=True
        )
        return block.bfloat16()

    def theirs(module, image, text, temb):
        return module(image, text, temb)

    inputs = partial(two_streams, image, text, width)
    return Size("SD3.5 medium, dual", f"{image} + {text}", build, inputs, theirs, sd3.joint_block)


def wan_size(
    rows: int, tokens: int = 32760, heads: int = 12, head_dim: int = 128, hidden: int = 8960
) -> Size:
    width = heads * head_dim

    def build():
        block = d_wan.WanTransformerBlock(width, hidden, heads, cross_attn_norm=True).bfloat16()
        block.norm2.float()
        block.scale_shift_table.data = block.scale_shift_table.data.float()
        return block

    def inputs():
        temb = random(rows, 6, width, dtype=torch.float32)
        return random(1, tokens, width), random(1, 512, width), temb

    def theirs(module, x, text, temb):
        cos, sin = (t[None, :, None] for t in cos_sin(tokens, head_dim))
        if rows > 1:  # diffusers gets the condition of every token
            temb = random(1, tokens, 6, width, dtype=torch.float32)
        return module(x, text, temb, (cos, sin))

    def ours(module, x, text, temb):
        index = torch.empty(1, tokens, dtype=torch.int64) if rows > 1 else None
        return wan.video_block(module, x, text, temb, torch.empty(tokens, head_dim // 2, 2), index)

    name = "Wan 1.3B" + (", a timestep per token" if rows > 1 else "")
    return Size(name, f"{tokens}", build, inputs, theirs, ours)


def lumina2_size(tokens: int = 4352, heads: int = 24, kv_heads: int = 8, head_dim: int = 96) -> Size:
    width = heads * head_dim

    def build():
        return d_lumina2.Lumina2TransformerBlock(width, heads, kv_heads, 256, 1.0, 1e-5).bfloat16()

    def inputs():
        return random(1, tokens, width), random(1, 1024)

    def theirs(module, x, temb):
        return module(x, None, torch.empty(1, tokens, head_dim // 2, dtype=torch.complex64), temb)

    def ours(module, x, temb):
        return sandwich.lumina2_block(module, x, temb, torch.empty(tokens, head_dim // 2, 2))

    return Size("Lumina-Image 2.0", f"{tokens}", build, inputs, theirs, ours)


SIZES = [
    flux_size(single=False),
    flux_size(single=True),
    sd3_size(),
    wan_size(rows=1),
    wan_size(rows=2),
    lumina2_size(),
]


def table() -> str:
    lines = ["| block | tokens | diffusers | with these ops | |", "| --- | --- | --- | --- | --- |"]
    for size in SIZES:
        theirs, ours = moved_bytes(size, size.theirs) / 1e9, moved_bytes(size, size.ours) / 1e9
        lines.append(
            f"| {size.name} | {size.tokens} | {theirs:.2f} GB | {ours:.2f} GB | {theirs / ours:.1f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
