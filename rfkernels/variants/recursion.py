"""Blocks applied again: sliced recursion (SReT), and recursions of a depth that routers choose (MoR).

    SReT   x <- F(x, slices_r),  between two applications x <- c1 x + c2 MLP(LN(x)), which is not shared
    MoR    expert choice:  x_sel <- x_sel + g F(x_sel),  g = alpha sigmoid(theta_r x), the best k_r of the
                           tokens that the recursion before chose; the others keep their bits
           token choice:   x <- x + g_i F^i(x),  i = argmax and g = max of softmax(theta x), once

F is a stack of blocks with its own residual branches. Shen et al., "Sliced Recursive Transformer", 2022; Bae
et al., "Mixture-of-Recursions", 2025. A flow has no order of tokens to respect, so the best k are taken in
inference too, and shapes are fixed.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.variants.dit import DiTBlock, DiTMlp
from rfkernels.variants.tokens import Selection, best_tokens, select

__all__ = [
    "ExpertChoice",
    "SlicedRecursion",
    "TokenChoice",
    "balance_loss",
    "capacity_at",
    "choice_loss",
    "layer_order",
    "z_loss",
]


# --- SReT ---


class _Between(nn.Module):
    """c1 x + c2 MLP(LN(x)), c1 = c2 = 1 at first."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.keep, self.change = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.norm, self.mlp = nn.LayerNorm(width), DiTMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.keep * x + self.change * self.mlp(self.norm(x))


class SlicedRecursion(nn.Module):
    """One block, applied once for each entry of `slices`, to tokens that see their slice alone.

    The first application slices neighbours, later ones strides (token i with i + s, i + 2 s ..): a fixed
    permutation where the paper's code draws one at random, in inference too.

    Args:
        block: shared by all applications; slices: how many, each dividing the tokens; 1 is full attention.
        hidden: of the MLP between two applications, by default the width.
    """

    def __init__(self, block: DiTBlock, slices: Sequence[int], hidden: int | None = None):
        super().__init__()
        if not slices or min(slices) < 1:
            raise ValueError(f"SlicedRecursion: a number of slices per application required, got {slices}")
        self.block, self.slices = block, tuple(slices)
        self.between = nn.ModuleList(_Between(block.width, hidden or block.width) for _ in slices[1:])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x `[batch, tokens, width]`, c `[batch, width]`."""
        x = self.block(x, c, slices=self.slices[0])
        for between, slices in zip(self.between, self.slices[1:], strict=True):
            x = self.block(between(x), c, slices=slices, strided=True)
        return x


# --- Mixture-of-Recursions ---


def layer_order(scheme: str, layers: int, recursions: int) -> list[int]:
    """Which of `layers` layers each position of the unrolled network runs.

    "cycle" 012 012, "sequence" 00 11 22; "middle-cycle" and "middle-sequence" do so with all but the first
    and the last, which run once.
    """
    name = scheme.removeprefix("middle-")
    ends = 2 if name != scheme else 0
    if name not in ("cycle", "sequence") or layers <= ends or recursions < 1:
        raise ValueError(
            "layer_order: cycle, sequence, middle-cycle or middle-sequence, more layers than those that run "
            f"once, and a recursion required, got {scheme!r}, {layers}, {recursions}"
        )
    shared = range(ends // 2, layers - ends // 2)
    order = list(shared) * recursions
    order = order if name == "cycle" else sorted(order)
    return [0, *order, layers - 1] if ends else order


class _Recursions(nn.Module):
    """The shared stack, and keys and values of its first pass."""

    def __init__(self, blocks: Sequence[DiTBlock], share_kv: bool):
        super().__init__()
        if not blocks:
            raise ValueError(f"{type(self).__name__}: one block or more required, got none")
        self.blocks, self.share_kv = nn.ModuleList(blocks), share_kv

    def run(self, x: Tensor, c: Tensor, cache: list[list[Tensor]], **keys: Tensor) -> Tensor:
        """F(x). `cache` is empty at the first pass; later ones read it, if keys and values are shared."""
        first = not cache
        for i, block in enumerate(self.blocks):
            if self.share_kv:
                if first:
                    cache.append(block.keys_values(x, c))
                keys = {"kv": cache[i]}
            x = block(x, c, **keys)
        return x


class ExpertChoice(_Recursions):
    """Every recursion's router takes its share of the tokens that are still active.

    Args:
        blocks: F. capacities: the share of all tokens of each recursion, not rising.
        alpha: of the gate.
        share_kv: active tokens see the keys and values of all tokens, from the first recursion (which then
            must take all); else each recursion's own active tokens.
    """

    def __init__(
        self,
        blocks: Sequence[DiTBlock],
        capacities: Sequence[float],
        *,
        alpha: float = 0.1,
        share_kv: bool = True,
    ):
        super().__init__(blocks, share_kv)
        self.alpha, self.capacities = alpha, tuple(capacities)
        self._check(self.capacities, len(self.capacities))
        self.routers = nn.ModuleList(nn.Linear(blocks[0].width, 1, bias=False) for _ in self.capacities)

    def _check(self, capacities: Sequence[float], count: int) -> None:
        falls = all(0 < b <= a <= 1 for a, b in zip((1.0, *capacities), capacities, strict=False))
        if not falls or len(capacities) != count or not count or (self.share_kv and capacities[0] != 1):
            first = ", the first 1 where keys and values are shared" if self.share_kv else ""
            raise ValueError(
                f"ExpertChoice: {count or 'one or more'} capacities in (0, 1] that do not rise{first}, "
                f"required, got {list(capacities)}"
            )

    def forward(
        self, x: Tensor, c: Tensor, capacities: Sequence[float] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Selection]]]:
        """x behind all recursions, and of each the logits of the active tokens and which of them it took.

        Args:
            capacities: instead of the module's, while they warm up: `capacity_at`.
        """
        capacities = self.capacities if capacities is None else capacities
        self._check(capacities, len(self.routers))
        tokens, rows, index = x.shape[1], x, None
        cache: list[list[Tensor]] = []
        routing = []
        for router, capacity in zip(self.routers, capacities, strict=True):
            logits = router(rows)[..., 0]
            chosen = best_tokens(logits, max(1, int(capacity * tokens + 1e-9)))
            rows = chosen.take(rows)
            gate = self.alpha * chosen.take(logits).sigmoid()
            rows = rows + gate[..., None] * self.run(rows, c, cache)
            index = chosen.index if index is None else index.gather(1, chosen.index)
            x = Selection(index).put(x, rows)
            routing.append((logits, chosen))
        return x, routing


class TokenChoice(_Recursions):
    """One router gives every token its number of recursions, 1 .. depth.

    Args:
        blocks: F; share_kv: as of `ExpertChoice`; else a recursion's tokens see those that still run.
    """

    def __init__(self, blocks: Sequence[DiTBlock], depth: int, *, share_kv: bool = True):
        super().__init__(blocks, share_kv)
        if depth < 1:
            raise ValueError(f"TokenChoice: depth must be 1 or more, got {depth}")
        self.depth = depth
        self.router = nn.Linear(blocks[0].width, depth, bias=False)

    def forward(self, x: Tensor, c: Tensor, room: int | None = None) -> tuple[Tensor, Tensor]:
        """x behind all recursions, and the router's logits `[batch, tokens, depth]`.

        Args:
            room: rows of each sample from the second recursion on, as of `tokens.select`: fixed, and nothing
                waits for the device; of more tokens those with the greatest gates go on.
        """
        logits = self.router(x)
        gate, level = logits.softmax(-1).max(-1)
        cache: list[list[Tensor]] = []
        y = self.run(x, c, cache)
        for i in range(1, self.depth):
            chosen = select(level >= i, room, gate)
            keys = {} if self.share_kv else {"key_lengths": chosen.lengths}
            y = chosen.put(y, self.run(chosen.take(y), c, cache, **keys))
        return x + gate[..., None] * y, logits


def capacity_at(step: int, steps: int, final: float) -> float:
    """The capacity while it warms up: from 1 to `final` along half a cosine."""
    done = min(max(step / steps, 0.0), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def choice_loss(routing: Sequence[tuple[Tensor, Selection]]) -> Tensor:
    """The binary cross entropy of logits against being taken, a mean over recursions: trains the routers of
    `ExpertChoice` to tell by a threshold."""
    losses = []
    for logits, chosen in routing:
        taken = torch.zeros_like(logits).scatter(1, chosen.index, 1.0)
        losses.append(F.binary_cross_entropy_with_logits(logits, taken))
    return torch.stack(losses).mean()


def balance_loss(logits: Tensor) -> Tensor:
    """depth sum_i f_i P_i of `TokenChoice`: f_i the share of tokens of depth i, P_i their mean probability; 1
    where depths are equally used, more elsewhere (Fedus et al., "Switch Transformers", 2021)."""
    p = logits.softmax(-1).flatten(0, -2)
    used = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype).mean(0)
    return p.shape[-1] * (used * p.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """The mean of logsumexp(logits)^2, which keeps them small."""
    return logits.logsumexp(-1).square().mean()
