"""LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023), and sums of LoRAs.

    W' = W + s B A,   s = alpha / r (rsLoRA: alpha / sqrt(r)); a file without alpha means s = 1

PiSSA, OLoRA and CorDA start from B_0 A_0 taken out of the weight, W - s B_0 A_0: their files fit the
mutated weight only. `pissa_to_lora` makes a LoRA of rank 2r for the weight as published: [A; A_0], [B, -B_0].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels.adapters.base import (
    Additive,
    Factors,
    add_bias,
    check_names,
    check_weight,
    shrink,
    wide,
)

__all__ = ["LoRA", "concatenate", "lora_scale", "pissa_to_lora", "truncate"]

_DIALECTS = (
    ("lora_A.weight", "lora_B.weight", "lora_B.bias"),  # PEFT, diffusers
    ("lora_down.weight", "lora_up.weight", "lora_up.bias"),  # Kohya
    ("lora.down.weight", "lora.up.weight", "lora.up.bias"),  # old diffusers
)


def lora_scale(rank: int, alpha: float | None, rslora: bool = False) -> float:
    """alpha / rank, alpha / sqrt(rank) for rsLoRA; 1 without alpha."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRA(Additive):
    """The adapter of one linear or convolution layer.

    Args:
        tensors: `lora_A.weight` `[r, in]` and `lora_B.weight` `[out, r]`, or Kohya's `lora_down.weight` and
            `lora_up.weight`, with `alpha` (a number); optional `lora_B.bias`. Convolutions: `[r, in,
            *kernel]` and `[out, r, 1, ..]`, Tucker form with Kohya's `lora_mid.weight` `[r, r, *kernel]`.
        alpha: where it is not among the tensors.
        rslora: s = alpha / sqrt(r).
    """

    kind = "LoRA"

    def __init__(self, tensors: dict[str, Tensor], alpha: float | None = None, rslora: bool = False):
        for names in _DIALECTS:
            if names[0] in tensors:
                break
        else:
            names = _DIALECTS[0]
        mid = ("lora_mid.weight",) if names[0].startswith("lora_down") else ()
        check_names(self.kind, tensors, names[:2], (names[2], "alpha", *mid))
        self.required, self.optional = names[:2], (names[2], "alpha", *mid)
        super().__init__(tensors)
        self._names = names
        down, up = self.down, self.up
        if down.shape[0] != up.shape[1]:
            raise ValueError(f"LoRA: A [r, in] and B [out, r] must share r, got {_shapes(down, up)}")
        if "alpha" in tensors:
            alpha = float(tensors["alpha"])
        self.alpha_value, self.rslora = alpha, rslora
        self.scale = lora_scale(down.shape[0], alpha, rslora)

    @property
    def down(self) -> Tensor:
        return self.tensor(self._names[0])

    @property
    def up(self) -> Tensor:
        return self.tensor(self._names[1])

    @property
    def up_bias(self) -> Tensor | None:
        return self.tensor(self._names[2])

    def delta(self, x: Tensor) -> Tensor:
        """s (x A^T) B^T + s b_B."""
        if self.down.ndim != 2:
            raise ValueError(f"LoRA: a convolution's {list(self.down.shape)} runs merged only")
        hidden = shrink(x, self.down)
        y = hidden @ self.up.to(hidden.dtype).T
        if self.up_bias is not None:
            y = y + self.up_bias.to(y.dtype)
        return self.scale * y

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A, `[out, in]` or `[out, in, *kernel]`."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        mid = self.tensor("lora_mid.weight")
        if mid is not None:
            return self.scale * torch.einsum(
                "op,pq...,qi->oi...", up.flatten(1), mid.to(dtype), down.flatten(1)
            )
        return self.scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, b + s b_B; of a convolution with groups the shapes do not fit, which is refused."""
        mid = self.tensor("lora_mid.weight")
        kernel = (self.down if mid is None else mid).shape[2:]
        weight = check_weight(self.kind, weight, (self.up.shape[0], self.down.shape[1], *kernel))
        extra = None if self.up_bias is None else self.scale * self.up_bias.to(weight.dtype)
        return weight + self.delta_weight(weight.dtype), add_bias(bias, extra, weight.dtype)

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """A, B, s; bias s b_B. None for a convolution with a kernel."""
        if self.down.shape[2:].numel() != 1 or self.tensor("lora_mid.weight") is not None:
            return None
        extra = None if self.up_bias is None else self.scale * self.up_bias
        return Factors(self.down.flatten(1), self.up.flatten(1), self.scale, extra)


def concatenate(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """sum_i w_i s_i B_i A_i as one low-rank form of rank sum_i r_i, exactly: [A_1; ..], [w_1 s_1 B_1, ..].

    PEFT's `linear`, `ties` and `dare` combinations scale A and B apart and so contain cross terms B_i A_j;
    its `svd` ones apply s twice. This sum, and `truncate` after it, do not.
    """
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if not parts or len(parts) != len(weights):
        raise ValueError(
            f"concatenate: one weight per adapter, got {len(parts)} adapters, {len(weights)} weights"
        )
    if any(p.column_scale is not None for p in parts):
        raise ValueError("concatenate: an adapter with column_scale (DoRA) is no plain sum")
    biases = [w * p.bias for p, w in zip(parts, weights, strict=True) if p.bias is not None]
    return Factors(
        torch.cat([p.down for p in parts]),
        torch.cat([(w * p.scale) * wide(p.up) for p, w in zip(parts, weights, strict=True)], 1),
        1.0,
        sum(biases) if biases else None,
    )


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best low-rank form of rank `rank` (Frobenius), and its relative error.

    QR of both factors and the SVD of the R x R core; the `[out, in]` product is never formed.
    """
    if rank < 1 or rank > factors.down.shape[0]:
        raise ValueError(f"truncate: rank must be 1 .. {factors.down.shape[0]}, got {rank}")
    up, down = wide(factors.up) * factors.scale, wide(factors.down)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T)
    u, vt = u[:, : len(s)], vt[: len(s)]
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    small = Factors(root[:, None] * (vt[:rank] @ q_down.T), (q_up @ u[:, :rank]) * root, 1.0, factors.bias)
    total = s.square().sum()
    error = 0.0 if total == 0 else float((s[rank:].square().sum() / total).sqrt())
    return small, error


def pissa_to_lora(trained: LoRA, initial: LoRA) -> LoRA:
    """A LoRA for the original weight from a PiSSA-type one, whose base had s B_0 A_0 taken out: rank 2r.

    Args:
        trained: the adapter after training, for the mutated weight.
        initial: the adapter before training, with the same scale.
    """
    if trained.scale != initial.scale:
        raise ValueError(f"pissa_to_lora: both must have one scale, got {trained.scale} and {initial.scale}")
    tensors = {
        "lora_A.weight": torch.cat([trained.down, initial.down]),
        "lora_B.weight": torch.cat([trained.up, -initial.up], 1),
    }
    if trained.up_bias is not None:
        tensors["lora_B.bias"] = trained.up_bias
    rank = len(tensors["lora_A.weight"])
    return LoRA(
        tensors, alpha=trained.scale * (math.sqrt(rank) if trained.rslora else rank), rslora=trained.rslora
    )


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(list(t.shape)) for t in tensors)
