r"""Control features for a video transformer: the dual-branch connector of Vivid-VR (Bai et al., 2025).

Behind main block i of L, with control feature :math:`\lfloor i / \lceil L / L_c \rceil \rfloor` of
:math:`L_c` as c,

    h + O(attention(N(Q(h)), N(K(c)), c)) + M(c)

Q, K, O, M two linear layers with SiLU between, N a LayerNorm per head; the values are c itself. The last
layers of O and M are zero at initialisation, so that h comes back to the bit.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rfkernels.nn import run_linear
from rfkernels.ops import attention, norm_modulate

__all__ = ["Connector", "Connectors", "control_index"]


def control_index(block: int, blocks: int, controls: int) -> int:
    """Which of the control features block `block` reads: block // ceil(blocks / controls)."""
    if not 0 <= block < blocks or controls < 1:
        raise ValueError(
            f"control_index: block must be in 0..{blocks - 1} and controls 1 or more, got {block}, {controls}"
        )
    return block // -(-blocks // controls)


class Connector(nn.Module):
    """One connector; parameters have the released names (`to_q.0`, `norm_q`, `out_layer.2`, ...).

    Args:
        width: of the tokens.
        heads: 48 in the released model, whatever those of the transformer are.
        hidden: between the layers of a pair.
    """

    def __init__(self, width: int, heads: int = 48, hidden: int = 512):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"Connector: heads must divide the width {width}, got {heads}")
        self.heads = heads
        pair = lambda: nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.to_q, self.to_k, self.out_layer, self.c_mlp = (pair() for _ in range(4))
        self.norm_q, self.norm_k = (nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2))
        for layer in (self.out_layer[2], self.c_mlp[2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, c: Tensor, *, precision: str = "full") -> Tensor:
        """Returns h with the control in it.

        Args:
            h: `[batch, tokens, width]`.
            c: like h.
            precision: of `ops.attention`.
        """
        if h.shape != c.shape:
            raise ValueError(f"Connector: c must be like h {list(h.shape)}, got {list(c.shape)}")
        q = self._heads(_pair(self.to_q, h), self.norm_q)
        k = self._heads(_pair(self.to_k, c), self.norm_k)
        out = attention(q, k, self._heads(c), layout="blhd", precision=precision).flatten(2)
        return _pair(self.c_mlp, c, residual=_pair(self.out_layer, out, residual=h))

    def _heads(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1))
        return x if norm is None else norm_modulate(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


class Connectors(nn.ModuleList):
    """A connector for each of `blocks` main blocks; `connectors.i` as attribute of that name, as released.

    >>> connectors.attach(model.transformer_blocks)  # once
    >>> connectors.controls = controls               # before every evaluation
    """

    def __init__(self, blocks: int, width: int, heads: int = 48, hidden: int = 512):
        super().__init__(Connector(width, heads, hidden) for _ in range(blocks))
        self.controls: Sequence[Tensor] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def forward(self, block: int, h: Tensor, controls: Sequence[Tensor]) -> Tensor:
        """h behind main block `block`, with its part of the control features."""
        return self[block](h, controls[control_index(block, len(self), len(controls))])

    def attach(self, blocks: Iterable[nn.Module]) -> None:
        """Puts a connector behind every block, which returns h, or h first (diffusers' `CogVideoXBlock`).

        Without `controls` the blocks do what they did.

        Raises:
            ValueError: blocks of another number, or connectors that are attached.
        """
        blocks = list(blocks)
        if len(blocks) != len(self) or self._handles:
            state = "attached" if self._handles else "free"
            raise ValueError(
                f"Connectors: {len(self)} blocks, free connectors required, got {len(blocks)}, {state} ones"
            )
        for i, block in enumerate(blocks):
            hook = lambda _, args, out, i=i: self._behind(i, out)
            self._handles.append(block.register_forward_hook(hook))

    def detach(self) -> None:
        """Takes the connectors out of the blocks, which are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _behind(self, block: int, out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if self.controls is None:
            return out
        if isinstance(out, Tensor):
            return self(block, out, self.controls)
        return self(block, out[0], self.controls), *out[1:]


def _pair(layers: nn.Sequential, x: Tensor, residual: Tensor | None = None) -> Tensor:
    hidden = run_linear(layers[0], x, activation="silu")
    return run_linear(layers[2], hidden, residual=residual)
