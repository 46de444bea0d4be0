"""What a forward of a block is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.integrations.families.once import once
from rfkernels.ops._register import accumulator

__all__ = ["Forward", "Unsupported", "refuse", "rotation_of"]


class Unsupported(Exception):
    """A call that the forward does not cover; raised before anything is computed. The text is the reason."""


@dataclass(frozen=True)
class Forward:
    """A forward in place of that of a class of blocks.

    `run(block, *args, **kwargs)` has the signature and results of the class' own forward, or raises
    `Unsupported`: the own one runs then. `processors` are the names of attention processors whose arithmetic
    it has; a block with another one keeps its forward.
    """

    run: Callable[..., Any]
    processors: tuple[str, ...]
    regions: tuple[str, ...]  # the ops that it runs, for `rfkernels.explain`

    def refusal(self, block: nn.Module) -> str | None:
        """Why a block cannot have this forward; None if it can."""
        for path, module in block.named_modules():
            processor = getattr(module, "processor", None)
            processor = getattr(processor, "replaced", processor)  # one of ours stands for it
            if processor is not None and type(processor).__name__ not in self.processors:
                return f"{path}.processor is {type(processor).__name__}, not {' or '.join(self.processors)}"
        return None


def refuse(**arguments: Any) -> None:
    """Raises `Unsupported` where an argument that the forward does not read is given."""
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, dict) and not value):
            what = f"{name} ({', '.join(value)})" if isinstance(value, dict) else name
            raise Unsupported(f"{what} was given")


def rotation_of(rotary: tuple[Tensor, Tensor] | Tensor, tokens: torch.dtype | None = None) -> Tensor:
    """The `rotation` of `ops.qkv_norm_rope` from what a diffusers model hands to its blocks.

    Complex numbers `[.., tokens, d/2]` are seen as it is. A table is made once per model call: of (cos, sin)
    `[tokens, d]` or `[1, tokens, 1, d]` with every angle twice, of matrices `[batch, tokens, 1, d/2, 2, 2]`,
    and where it is not of the dtype that `tokens` need.
    """
    wide = None if tokens is None else accumulator(tokens)
    if not isinstance(rotary, Tensor):
        return once(_pairs, *rotary, wide=wide)
    if not rotary.is_complex():
        return once(_first_columns, rotary, wide=wide)
    table = torch.view_as_real(rotary)
    return table if wide in (None, table.dtype) else once(torch.view_as_real, rotary).to(wide)


def _pairs(cos: Tensor, sin: Tensor, wide: torch.dtype | None) -> Tensor:
    table = torch.stack([cos[..., ::2], sin[..., ::2]], -1)
    return (table[0, :, 0] if table.ndim == 5 else table).to(wide or accumulator(table.dtype))


def _first_columns(matrices: Tensor, wide: torch.dtype | None) -> Tensor:
    """(cos, sin) of [[cos, -sin], [sin, cos]]."""
    return matrices[:, :, 0, ..., 0].contiguous().to(wide or accumulator(matrices.dtype))
