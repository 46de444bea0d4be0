"""Muon: momentum whose update is orthogonalised, for hidden matrices (Jordan et al., 2024)."""

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearly orthogonal matrix U V^T of each g = U S V^T in [..., rows, cols], bfloat16.

    Quintic Newton-Schulz iteration with Jordan's coefficients: singular values end in about 0.7 .. 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / cols)); for 2-D parameters."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for p, u in zip(params, orthogonalise(updates), strict=True):
                    p.add_(u.to(p.dtype), alpha=-scale)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        buffer = state["momentum"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)
