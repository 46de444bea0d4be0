"""LoHa and LoKr (LyCORIS, Yeh et al., 2023).

    LoHa   dW = s (w1a w1b) * (w2a w2b), elementwise (FedPara, Hyeon-Woo et al., 2021)
    LoKr   dW = s w1 (x) w2, Kronecker; either factor may be a product, w1 = w1a w1b

Tucker form of convolutions: w = einsum("ij..,ip,jq->pq..", t, wa, wb). A file with `dora_scale` goes on to
W' = k (W + dW), k = m / ||W + dW|| (`dora.decompose`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels.adapters.base import Adapter, Factors, add_bias, check_names, check_weight, weight_of, wide
from rfkernels.adapters.dora import decompose
from rfkernels.adapters.kronecker import kron_apply
from rfkernels.ops._register import accumulator

__all__ = ["LoHa", "LoKr"]

MAX_RANK = 64  # of a low-rank form: beyond it a branch costs more than the dense product that it replaces


class _Lycoris(Adapter):
    """What both share: alpha, `dora_scale`, the merge."""

    scale: float

    def delta(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__}: a family must define delta")

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        raise TypeError(f"{type(self).__name__}: a family must define delta_weight")

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """base(x) + delta(x); with `dora_scale` the merged layer, which needs the layer's weight."""
        if self.tensor("dora_scale") is None:
            return (wide(base(x)) + self.delta(x)).to(x.dtype)
        weight, bias = self.merged(*weight_of(base))
        y = wide(x).to(weight.dtype) @ weight.T
        return (y if bias is None else y + bias).to(x.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + dW, decomposed where the file says so; a convolution's weight keeps its shape."""
        weight = check_weight(self.kind, weight)
        delta = self.delta_weight(weight.dtype)
        if delta.numel() != weight.numel() or len(delta) != len(weight):
            raise ValueError(f"{self.kind} is for a weight {list(delta.shape)}, got {list(weight.shape)}")
        delta = delta.view(weight.shape)
        magnitude = self.tensor("dora_scale")
        merged = weight + delta if magnitude is None else decompose(weight, delta, magnitude)
        return merged, add_bias(bias, None, weight.dtype)


class LoHa(_Lycoris):
    """The Hadamard product of two low-rank matrices.

    Args:
        tensors: `hada_w1_a` `[out, r]`, `hada_w1_b` `[r, in]`, `hada_w2_a`, `hada_w2_b`; Tucker: `hada_t1`,
            `hada_t2` `[r, r, *kernel]`, then `hada_w*_a` is `[r, out]`. Optional `alpha`, `dora_scale`.
        alpha: where it is not among the tensors (PEFT); without any, s = 1.
    """

    kind = "LoHa"
    required = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    optional = ("hada_t1", "hada_t2", "alpha", "dora_scale")

    def __init__(self, tensors: dict[str, Tensor], alpha: float | None = None):
        super().__init__(tensors)
        if ("hada_t1" in tensors) != ("hada_t2" in tensors):
            raise ValueError("LoHa: hada_t1 and hada_t2 must come together")
        self.rank = len(self.tensor("hada_w1_b"))
        alpha = float(tensors["alpha"]) if "alpha" in tensors else alpha
        self.scale = 1.0 if alpha is None else alpha / self.rank

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """dW, `[out, in]` or `[out, in, *kernel]`."""
        halves = []
        for i in "12":
            a, b = (self.tensor(f"hada_w{i}_{side}").to(dtype) for side in "ab")
            t = self.tensor(f"hada_t{i}")
            halves.append(a @ b if t is None else _tucker(t.to(dtype), a, b))
        return self.scale * halves[0] * halves[1]

    def delta(self, x: Tensor) -> Tensor:
        """Through the low-rank form where there is one, else through dW."""
        form = self._khatri_rao()
        if form is None:
            return wide(x) @ self.delta_weight(accumulator(x.dtype)).flatten(1).T
        dtype = accumulator(x.dtype)
        return self.scale * ((wide(x) @ form.down.to(dtype).T) @ form.up.to(dtype).T)

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """Khatri-Rao factors of rank r^2, B[o, (i, j)] = w1a[o, i] w2a[o, j], for r <= 8; None beyond, and
        with `dora_scale`."""
        return self._khatri_rao() if self.tensor("dora_scale") is None else None

    def _khatri_rao(self) -> Factors | None:
        if self.rank**2 > MAX_RANK or self.tensor("hada_t1") is not None:
            return None
        up = wide(self.hada_w1_a)[:, :, None] * wide(self.hada_w2_a)[:, None, :]
        down = wide(self.hada_w1_b)[:, None] * wide(self.hada_w2_b)[None]
        return Factors(down.flatten(0, 1), up.flatten(1), self.scale)


class LoKr(_Lycoris):
    """A Kronecker product.

    Args:
        tensors: `lokr_w1` `[a, b]` or `lokr_w1_a` `[a, r]`, `lokr_w1_b` `[r, b]`; `lokr_w2` `[c, d]` or
            `lokr_w2_a`, `lokr_w2_b`; Tucker: `lokr_t2` `[r, r, *kernel]`, then `lokr_w2_a` is `[r, c]`.
            The weight is `[a c, b d]`. Optional `alpha`, `dora_scale`.
        alpha: where it is not among the tensors (PEFT).
        convention: "lycoris": s = alpha / r, but 1 where both factors are whole, whatever alpha says (such
            files store a meaningless one). "peft": alpha / r always.
        rank: r, for PEFT's files whose factors are both whole.
    """

    kind = "LoKr"
    optional = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
        "alpha",
        "dora_scale",
    )

    def __init__(
        self,
        tensors: dict[str, Tensor],
        alpha: float | None = None,
        convention: str = "lycoris",
        rank: int | None = None,
    ):
        if convention not in ("lycoris", "peft"):
            raise ValueError(f'LoKr: convention must be "lycoris" or "peft", got {convention!r}')
        for i in "12":
            names = [f"lokr_w{i}"] if f"lokr_w{i}" in tensors else [f"lokr_w{i}_a", f"lokr_w{i}_b"]
            if any(n not in tensors for n in names) or (len(names) == 1 and f"lokr_w{i}_a" in tensors):
                raise ValueError(
                    f"LoKr: lokr_w{i}, or lokr_w{i}_a and lokr_w{i}_b required, got {', '.join(tensors)}"
                )
        check_names(self.kind, tensors, (), self.optional)
        super().__init__(tensors)
        parts = [self.tensor(f"lokr_w{i}_b") for i in "12"]
        stored = next((len(p) for p in parts if p is not None), None)
        if stored is not None and rank is not None and rank != stored:
            raise ValueError(f"LoKr: the tensors have rank {stored}, got rank {rank}")
        self.rank = stored if stored is not None else rank
        alpha = float(tensors["alpha"]) if "alpha" in tensors else alpha
        whole = stored is None
        if alpha is None or (whole and convention == "lycoris"):
            self.scale = 1.0
        elif self.rank is None:
            raise ValueError("LoKr: PEFT's alpha / r needs rank where both factors are whole")
        else:
            self.scale = alpha / self.rank

    def _factor(self, i: str, dtype: torch.dtype) -> Tensor:
        whole = self.tensor(f"lokr_w{i}")
        if whole is not None:
            return whole.to(dtype)
        a, b = (self.tensor(f"lokr_w{i}_{side}").to(dtype) for side in "ab")
        t = self.tensor("lokr_t2") if i == "2" else None
        return a @ b.flatten(1) if t is None else _tucker(t.to(dtype), a, b)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """dW, `[out, in]` or `[out, in, *kernel]`."""
        w1, w2 = self._factor("1", dtype), self._factor("2", dtype)
        return self.scale * torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())

    def delta(self, x: Tensor) -> Tensor:
        """Two small products; dW is not formed."""
        w1, w2 = self._factor("1", accumulator(x.dtype)), self._factor("2", accumulator(x.dtype))
        return self.scale * kron_apply(wide(x), w1, w2.flatten(1))

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """(P (x) w2a) (Q (x) w2b), w1 = P Q the cheapest split, where w2 is a product and the rank <= 64."""
        if any(self.tensor(n) is not None for n in ("dora_scale", "lokr_t2", "lokr_w2")):
            return None
        w2a, w2b = wide(self.lokr_w2_a), wide(self.lokr_w2_b).flatten(1)
        if self.tensor("lokr_w1") is None:
            left, right = wide(self.lokr_w1_a), wide(self.lokr_w1_b)
        else:
            w1 = wide(self.lokr_w1)
            eye = torch.eye(min(w1.shape), dtype=w1.dtype, device=w1.device)
            left, right = (w1, eye) if w1.shape[1] <= w1.shape[0] else (eye, w1)
        if left.shape[1] * w2a.shape[1] > MAX_RANK:
            return None
        return Factors(torch.kron(right, w2b), torch.kron(left, w2a), self.scale)


def _tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ij...,ip,jq->pq...", t, a, b)
