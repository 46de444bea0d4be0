"""Stacks of any depth from two blocks: linear expansion of a learngene (TLEG, Xia et al., 2024).

    W_l = W_base + (l / L) W_layer,   l = 0 .. L - 1, for every parameter of a block

So layer 0 is the base at any depth, and a family of models of all depths is stored as two blocks.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Learngene", "expanded_linear", "learngene_names"]


class Learngene(nn.Module):
    """The two blocks; as a module, the stack of L layers that they make, trained through that sum.

    Args:
        block: what a layer is. Its matrices begin as a normal distribution of 0.02 cut at two, its vectors
            (of norms, biases) as they are, in the base; the slope begins as 0.02 normal matrices and zeros.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.base, self.slope = block, copy.deepcopy(block)
        for part, vectors in ((self.base, False), (self.slope, True)):
            for p in part.parameters():
                if p.ndim > 1:
                    nn.init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04)
                elif vectors:
                    nn.init.zeros_(p)

    def layer(self, index: int, depth: int) -> dict[str, Tensor]:
        """The parameters of layer `index` of `depth`."""
        if not 0 <= index < depth:
            raise ValueError(f"Learngene: layer must be in 0 .. depth - 1, got {index} of {depth}")
        slope = dict(self.slope.named_parameters())
        share = index / depth
        return {name: p + share * slope[name] for name, p in self.base.named_parameters()}

    @torch.no_grad()
    def expand(self, depth: int) -> nn.ModuleList:
        """`depth` blocks of their own, for inference or as the start of a training."""
        blocks = nn.ModuleList(copy.deepcopy(self.base) for _ in range(depth))
        for i, block in enumerate(blocks):
            layer = self.layer(i, depth)
            for name, p in block.named_parameters():
                p.copy_(layer[name])
        return blocks

    def forward(self, x: Tensor, *args: Tensor, depth: int) -> Tensor:
        """x behind `depth` layers, each called as block(x, *args); gradients reach both blocks."""
        for i in range(depth):
            x = torch.func.functional_call(self.base, self.layer(i, depth), (x, *args))
        return x


def expanded_linear(x: Tensor, base: nn.Linear, slope: nn.Linear, share: float) -> Tensor:
    """[x, share x] [W_base, W_layer]^T + b_base + share b_layer: layer l = share L without its weight.

    Twice the products and 2 / L of a stack's memory: for devices that have no room for the layers.
    """
    weight = torch.cat([base.weight, slope.weight], 1)
    bias = None if base.bias is None else base.bias + share * slope.bias
    return nn.functional.linear(torch.cat([x, share * x], -1), weight, bias)


def learngene_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names in TLEG's files, `<path>.weight_base` and `.weight_ilayer` (and `bias_`), by the parameter that
    they make: `{"<path>.weight": (base, ilayer)}`.

    Raises:
        ValueError: one of a pair without the other.
    """
    names = set(names)
    pairs = {}
    for name in sorted(names):
        stem, _, part = name.rpartition("_")
        if part not in ("base", "ilayer"):
            continue
        pair = (f"{stem}_base", f"{stem}_ilayer")
        if not names.issuperset(pair):
            raise ValueError(f"learngene_names: {pair[0]} and {pair[1]} required, got {name} alone")
        pairs[stem] = pair
    return pairs
