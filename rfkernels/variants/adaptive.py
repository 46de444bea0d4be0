"""Width by token: Adaptive Computation Modules (Wojcik et al., 2023).

    h(x, k) = sum_{i <= k} s_i(x),   s_i(x) = V_i gelu(W_i x + b_i) + d_i,   k by a gate per token, of 0 .. N

The learners of an MLP are neighbouring stretches of its hidden channels, so the first k are a prefix of one
wide MLP. Tokens are sorted by k; each run of equal k is one product with that prefix. An ACM made of an MLP
computes, with all learners, what the MLP does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.ops.activation import activation

__all__ = ["ACM", "budget_loss", "distillation_loss", "gate_labels"]


class ACM(nn.Module):
    """An MLP in N learners and the gate that says how many of them a token gets.

    Args:
        width, hidden, learners: N divides the hidden width.
        least: the smallest k that the gate may choose, 0 or 1.
        gate_hidden: of the gate's own MLP, by default width / 4.
    """

    def __init__(
        self, width: int, hidden: int, learners: int = 4, *, least: int = 0, gate_hidden: int | None = None
    ):
        super().__init__()
        if learners < 1 or hidden % learners or least not in (0, 1):
            raise ValueError(
                "ACM: learners that divide the hidden width and least 0 or 1 required, got "
                f"{learners}, {hidden}, {least}"
            )
        self.learners, self.least = learners, least
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(learners, width))
        inner = gate_hidden or max(1, width // 4)
        self.gate = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, learners + 1 - least))

    @classmethod
    @torch.no_grad()
    def from_mlp(cls, fc1: nn.Linear, fc2: nn.Linear, learners: int = 4, *, least: int = 0) -> "ACM":
        """The learners of a trained MLP (GELU tanh), its channels sorted by |W row| |V column|, the strongest
        first; the first learner has the bias of fc2."""
        made = cls(fc1.in_features, fc1.out_features, learners, least=least).to(fc1.weight)
        order = (fc1.weight.norm(dim=1) * fc2.weight.norm(dim=0)).argsort(descending=True, stable=True)
        made.fc1.weight.copy_(fc1.weight[order])
        made.fc1.bias.copy_(fc1.bias[order])
        made.fc2.weight.copy_(fc2.weight[:, order])
        made.bias[0].copy_(fc2.bias)
        return made

    def choose(self, x: Tensor) -> Tensor:
        """k of every token, int64 `[..]`."""
        return self.gate(x).argmax(-1) + self.least

    def prefixes(self, x: Tensor) -> Tensor:
        """h(x, k) for k = 0 .. N, `[N + 1, .., width]`: what distillation and labels need, in one pass."""
        h = activation(self.fc1(x), "gelu_tanh").chunk(self.learners, -1)
        v = self.fc2.weight.chunk(self.learners, 1)
        parts = [F.linear(*pair, bias) for *pair, bias in zip(h, v, self.bias, strict=True)]
        return torch.stack([torch.zeros_like(parts[0]), *parts]).cumsum(0)

    def forward(self, x: Tensor, k: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """x `[.., width]` with k learners each, by default those that the gate chooses.

        In training mode all learners run and the choice, with Gumbel noise, has the gradient of its softmax.
        Else tokens are sorted, which waits for the device: how many there are of each k.
        """
        if k is None and self.training:
            u = torch.rand((*x.shape[:-1], self.gate[2].out_features), generator=generator, device=x.device)
            noise = -(-u.clamp(1e-6, 1 - 1e-6).log()).log()
            soft = (self.gate(x) + noise.to(x.dtype)).softmax(-1)
            hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(x.dtype) + (soft - soft.detach())
            return torch.einsum("...k, k...d -> ...d", hard, self.prefixes(x)[self.least :])
        k = self.choose(x) if k is None else k
        if k.shape != x.shape[:-1] or k.is_floating_point():
            raise ValueError(f"ACM: k must be integers {list(x.shape[:-1])}, got {k.dtype} {list(k.shape)}")
        return self._sorted(x.reshape(-1, x.shape[-1]), k.reshape(-1)).view(x.shape)

    def _sorted(self, x: Tensor, k: Tensor) -> Tensor:
        k, order = k.long().sort(stable=True)
        ends = torch.searchsorted(
            k, torch.arange(-1, self.learners + 1, device=k.device), right=True
        ).tolist()
        if ends[0] or ends[-1] != len(k):
            raise ValueError(f"ACM: k must lie in 0 .. {self.learners}, got {int(k[0])} .. {int(k[-1])}")
        share = self.fc1.out_features // self.learners
        biases, rows, out = self.bias.cumsum(0), x[order], torch.zeros_like(x)
        parts = [rows.new_zeros(ends[1], x.shape[-1])]
        for count in range(1, self.learners + 1):
            h = slice(0, count * share)
            run = rows[ends[count] : ends[count + 1]]
            hidden = activation(F.linear(run, self.fc1.weight[h], self.fc1.bias[h]), "gelu_tanh")
            parts.append(F.linear(hidden, self.fc2.weight[:, h], biases[count - 1]))
        return out.index_copy(0, order, torch.cat(parts))


def distillation_loss(prefixes: Tensor, teacher: Tensor, least: int = 1) -> Tensor:
    """sum_{k >= least} |h(x, k) - teacher|^2, a mean over tokens: every prefix learns to be the whole."""
    return (prefixes[least:] - teacher).square().sum(-1).flatten(1).mean(1).sum()


@torch.no_grad()
def gate_labels(prefixes: Tensor, teacher: Tensor, tolerance: float, least: int = 0) -> Tensor:
    """The smallest k >= least whose squared error is within `tolerance` of the best k's, int64 `[..]`.

    Args:
        prefixes: of `ACM.prefixes`, `[N + 1, .., width]`; teacher: `[.., width]`.
    """
    if not tolerance >= 0:
        raise ValueError(f"gate_labels: tolerance must be 0 or more, got {tolerance}")
    error = (prefixes[least:] - teacher).square().sum(-1)
    return (error <= error.amin(0) + tolerance).to(torch.uint8).argmax(0) + least


def budget_loss(logits: Tensor, target: float, least: int = 0) -> Tensor:
    """(the mean expected share of learners - target)^2 for a gate's logits `[.., choices]`."""
    learners = logits.shape[-1] - 1 + least
    counts = torch.arange(least, learners + 1, device=logits.device, dtype=logits.dtype)
    return ((logits.softmax(-1) @ counts).mean() / learners - target).square()
