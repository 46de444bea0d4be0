"""Pairs and families of adapters of continual learning: LAE (Gao et al., 2023), MOS (Sun et al., 2025).

    LAE   theta_off <- beta theta_off + (1 - beta) theta_on after each step; answers: elementwise maximum
    of both
          softmaxes
    MOS   theta_t <- (1 - m) theta_t + m mean_i theta_i over the earlier tasks after each step; answers:
    the adapter
          that its own prediction asks for, iterated

All parameters of an adapter, or of a model's adapters, lie in one flat arena: an update is one launch.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

__all__ = ["Arena", "MomentumPair", "max_ensemble", "merge_earlier", "retrieve"]


class Arena:
    """The parameters of modules as views of one flat tensor.

    Args:
        modules: whose floating parameters move; all of one dtype and device.
    """

    def __init__(self, *modules: nn.Module):
        parameters = [p for m in modules for p in m.parameters()]
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(
                f"Arena: parameters of one dtype and device required, got {sorted(map(str, kinds))}"
            )
        self.flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        start = 0
        for p in parameters:
            p.data = self.flat[start : start + p.numel()].view(p.shape)
            start += p.numel()


class MomentumPair:
    """LAE's online and offline copies of adapters.

    Args:
        online: the adapters that train; their parameters become views of `online_arena.flat`.
        beta: 0.9999 in the paper.

    `offline` holds copies of the modules. Optimisers must be made after this, or keep the same parameters:
    only their storage changes.
    """

    def __init__(self, *online: nn.Module, beta: float = 0.9999):
        if not 0 <= beta <= 1:
            raise ValueError(f"MomentumPair: beta must lie in [0, 1], got {beta}")
        self.beta = beta
        self.online = online
        self.offline = tuple(deepcopy(m).requires_grad_(False) for m in online)
        self.online_arena, self.offline_arena = Arena(*self.online), Arena(*self.offline)

    @torch.no_grad()
    def update(self) -> None:
        """theta_off <- beta theta_off + (1 - beta) theta_on: one pass over one tensor."""
        self.offline_arena.flat.lerp_(self.online_arena.flat, 1 - self.beta)


def max_ensemble(*logits: Tensor) -> Tensor:
    """The elementwise maximum of the softmaxes: LAE's ensemble. Its rows do not sum to one."""
    return torch.stack([each.softmax(-1) for each in logits]).amax(0)


def merge_earlier(current: Tensor, earlier: Sequence[Tensor], share: float = 0.1) -> Tensor:
    """(1 - m) theta + m mean_i theta_i, a new tensor; theta itself for no earlier tasks.

    MOS' published code merges in place in every forward pass of every layer, so that it compounds; call
    this once a step.

    Args:
        current: an arena's `flat`, `[n]`.
        earlier: those of the tasks before.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"merge_earlier: share must lie in [0, 1], got {share}")
    if not earlier:
        return current.clone()
    if any(e.shape != current.shape for e in earlier):
        raise ValueError(
            f"merge_earlier: arenas of {list(current.shape)} required, got {[list(e.shape) for e in earlier]}"
        )
    return torch.lerp(current, torch.stack(tuple(earlier)).mean(0), share)


def retrieve(
    predict: Callable[[Tensor | None], Tensor], task_of: Tensor, rounds: int = 4
) -> tuple[Tensor, Tensor, int]:
    """MOS' self-refined retrieval: scores `[batch, classes]`, adapter ids `[batch]`, rounds used.

    ids come from the prediction without adapters, then from the prediction with the adapters that they
    name, until they stay; scores are the sum of the last softmax and the first.

    Args:
        predict: logits of the batch with the adapters of ids `[batch]`; without adapters for None. One
            call serves all ids, see `bottleneck.BottleneckStack`.
        task_of: `[classes]`, the task that a class belongs to.
        rounds: at most so many predictions with adapters.
    """
    if rounds < 1:
        raise ValueError(f"retrieve: rounds must be at least 1, got {rounds}")
    first = predict(None)
    if first.shape[-1] != len(task_of):
        raise ValueError(f"retrieve: task_of must be [{first.shape[-1]}], got {list(task_of.shape)}")
    ids = task_of[first.argmax(-1)]
    for used in range(1, rounds + 1):
        logits = predict(ids)
        asked = task_of[logits.argmax(-1)]
        if torch.equal(asked, ids):
            break
        if used < rounds:
            ids = asked
    return logits.softmax(-1) + first.softmax(-1), ids, used
