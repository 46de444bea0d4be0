"""How many blocks a sample runs, and which: ECO-M2F's exits and DAS's skipped modules.

    exit   k* = argmax_k (q_k - beta k): q_k the quality at exit k; a gate predicts k* from pooled tokens and
           time. Another price beta needs new labels and a new gate, nothing else
    skip   scores z_m, p = sigmoid(z_m); of sampled sets S_j with losses: r_j = exp(-loss_j),
           z_m <- z_m + lr (r_j - mean r) p (1 - p) for m in S_j; a skipped module becomes an adapter

Yao et al., "Efficient Transformer Encoders for Mask2Former-style models" (ECO-M2F), 2024; Wu et al.,
"Parameter and Computation Efficient Transfer Learning" (DAS), 2023.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ExitGate", "SkipAdapter", "SkipScores", "SkippedStack", "exit_labels", "exit_loss", "run_to_exit"]


# --- exits ---


def exit_labels(quality: Tensor, beta: float) -> Tensor:
    """argmax_k (q_k - beta k), the first of equal ones: int64 `[samples]` of quality `[samples, exits]`.

    Raises:
        ValueError: a price that is negative or infinite, or a quality that is not finite.
    """
    if not 0 <= beta < float("inf") or quality.ndim != 2 or not bool(quality.isfinite().all()):
        raise ValueError(f"exit_labels: finite quality [samples, exits], beta >= 0 required, got beta {beta}")
    price = beta * torch.arange(quality.shape[1], dtype=torch.float64, device=quality.device)
    worth = quality.double() - price
    return (worth == worth.amax(1, keepdim=True)).to(torch.uint8).argmax(1)


def exit_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k w_k loss_k: trains the parent so that every exit is of use."""
    if len(losses) != len(weights) or not losses:
        raise ValueError(f"exit_loss: a weight for each of {len(losses)} losses required, got {len(weights)}")
    return sum(w * loss for w, loss in zip(weights, losses, strict=True))


class ExitGate(nn.Module):
    """Logits of the exits, `[batch, exits]`, from the mean of the tokens and the conditioning."""

    def __init__(self, width: int, exits: int):
        super().__init__()
        self.net = nn.Linear(2 * width, exits)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x `[batch, tokens, width]`, c `[batch, width]`."""
        return self.net(torch.cat([x.mean(1), c], -1))

    def loss(self, x: Tensor, c: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy against `exit_labels`."""
        return F.cross_entropy(self(x, c), labels)


def run_to_exit(
    blocks: Sequence[nn.Module], x: Tensor, c: Tensor, choice: Tensor, exits: Sequence[int]
) -> Tensor:
    """Each sample behind the first `exits[choice]` blocks, in the order of the batch.

    Samples are sorted by depth, and the batch shrinks as they leave; reading `choice` waits for the device.

    Args:
        blocks: called as block(x, c). exits: numbers of blocks, rising, e.g. (2, 3, 4, 5, 6).
        choice: an exit's index per sample, integers `[batch]`.

    Raises:
        ValueError: exits that do not rise within 0 .. blocks, or a choice among others.
    """
    rising = list(exits) == sorted(set(exits)) and exits and exits[0] >= 0 and exits[-1] <= len(blocks)
    chosen = choice.tolist()
    if not rising or len(chosen) != len(x) or not all(0 <= k < len(exits) for k in chosen):
        raise ValueError(
            f"run_to_exit: exits rising within 0 .. {len(blocks)} and an index of one for each of {len(x)} "
            f"samples required, got {list(exits)}, {chosen}"
        )
    depth = torch.tensor([exits[k] for k in chosen])
    depth, order = depth.sort(descending=True, stable=True)
    index = order.to(x.device)
    y, c = x[index], c[index]
    for i, block in enumerate(blocks):
        running = int((depth > i).sum())
        if not running:
            break
        y = torch.cat([block(y[:running], c[:running]), y[running:]])
    return torch.empty_like(y).index_copy(0, index, y)


# --- skipping ---


class SkipScores:
    """The search for modules that a task does not need.

    Args:
        modules: how many there are; rate: lr. `z` float64 `[modules]`, on the host.
    """

    def __init__(self, modules: int, rate: float = 0.1):
        self.z, self.rate = torch.zeros(modules, dtype=torch.float64), rate

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` modules to skip, drawn without replacement by p: int64 `[count]`."""
        self._check(count)
        return torch.multinomial(self.z.sigmoid(), count, generator=generator)

    def update(self, skipped: Sequence[Tensor], losses: Sequence[float]) -> None:
        """One step for the sets of a batch of `sample` and what the model lost without each."""
        reward = (-torch.tensor([float(y) for y in losses], dtype=torch.float64)).exp()
        if len(skipped) != len(reward) or not len(reward) or not bool(reward.isfinite().all()):
            raise ValueError(f"SkipScores: a finite loss for each set required, got {list(losses)}")
        p = self.z.sigmoid()
        slope = p * (1 - p)
        for modules, gain in zip(skipped, reward - reward.mean(), strict=True):
            self.z[modules] += self.rate * gain * slope[modules]

    def mask(self, count: int) -> Tensor:
        """bool `[modules]`, False for the `count` of the highest scores; of equal ones the first."""
        self._check(count)
        keep = torch.ones(len(self.z), dtype=torch.bool)
        keep[self.z.argsort(descending=True, stable=True)[:count]] = False
        return keep

    def _check(self, count: int) -> None:
        if not 0 < count <= len(self.z):
            raise ValueError(f"SkipScores: 1 .. {len(self.z)} modules can be skipped, got {count}")


class SkipAdapter(nn.Module):
    """x + up relu(down LN(x)) in place of a skipped module, x at first.

    The published code adds LN(x) once more, by a residual inside its adapter: `compat=True`.
    """

    def __init__(self, width: int, rank: int, compat: bool = False):
        super().__init__()
        self.norm, self.compat = nn.LayerNorm(width), compat
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        change = self.up(self.down(y).relu())
        return x + (y + change if self.compat else change)


class SkippedStack(nn.Module):
    """Blocks of which some are skipped, by interval of time.

    Args:
        blocks: called as block(x, c). keep: bool `[intervals, blocks]`.
        bounds: `[intervals + 1]`, rising; interval i is bounds[i] <= t < bounds[i + 1], the last closed.
        adapters: what runs instead of each block, x -> x; a block that is never skipped may have None.
            Absent: nothing runs instead.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        keep: Tensor,
        bounds: Sequence[float] = (0.0, 1.0),
        adapters: Sequence[nn.Module | None] | None = None,
    ):
        super().__init__()
        fits = keep.dtype == torch.bool and keep.shape == (len(bounds) - 1, len(blocks))
        if not fits or not all(a < b for a, b in pairwise(bounds)):
            shape = f"bool[{len(bounds) - 1}, {len(blocks)}] and rising bounds"
            raise ValueError(f"SkippedStack: keep {shape} required, got {list(keep.shape)}, {list(bounds)}")
        adapters = [None] * len(blocks) if adapters is None else list(adapters)
        self.blocks = nn.ModuleList(blocks)
        self.adapters = nn.ModuleList(nn.Identity() if a is None else a for a in adapters)
        if len(self.adapters) != len(blocks):
            raise ValueError(f"SkippedStack: {len(blocks)} adapters required, got {len(adapters)}")
        self.keep, self.bounds = keep.tolist(), tuple(bounds)

    def forward(self, x: Tensor, c: Tensor, t: float) -> Tensor:
        """The blocks and adapters of the interval of t. Raises ValueError for a t outside the bounds."""
        if not self.bounds[0] <= t <= self.bounds[-1]:
            raise ValueError(f"SkippedStack: t must lie in {self.bounds[0]} .. {self.bounds[-1]}, got {t}")
        interval = max(i for i, bound in enumerate(self.bounds[:-1]) if bound <= t)
        for block, adapter, keep in zip(self.blocks, self.adapters, self.keep[interval], strict=True):
            x = block(x, c) if keep else adapter(x)
        return x
