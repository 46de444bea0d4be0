"""What a forward of a block is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

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


_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def rotation_of(rotary: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """The `rotation` of `ops.qkv_norm_rope` from what a diffusers model hands to its blocks.

    Complex numbers `[.., tokens, d/2]` are seen as it is; of (cos, sin) `[tokens, d]` with every angle twice
    the table is made once per model call.
    """
    if isinstance(rotary, Tensor):
        return torch.view_as_real(rotary)
    cos, sin = rotary
    kept = None if torch.compiler.is_compiling() else _tables.get(cos)
    if kept is not None and kept[0] == (cos._version, sin._version) and kept[1] is sin:
        return kept[2]
    table = torch.stack([cos[..., ::2], sin[..., ::2]], -1)
    if not torch.compiler.is_compiling():
        _tables[cos] = ((cos._version, sin._version), sin, table)
    return table
