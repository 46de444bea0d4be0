"""Hydra (Kim et al., 2024): a parallel and a sequential low-rank branch.

    f = x W^T + b,   y = f + s (B_p (A_p x + a_p) + b_p) + s (B_s (A_s f + a_s) + b_s)

The sequential branch acts on the output, but A_s f = (A_s W) x + A_s b: the whole is a LoRA of rank 2r with
A = [A_p; A_s W], B = [B_p, B_s] and a bias, exactly.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels.adapters.base import Adapter, Factors, apply_factors, check_weight, shrink, wide

__all__ = ["Hydra"]

_DIALECTS = {  # of language and of vision code: (down, up) of a branch, and the branches' names
    "hydra": ("hydra_A", "hydra_B", "hydra_par", "hydra_seq"),
    "adapter": ("down_proj", "up_proj", "adapter_par", "adapter_seq"),
}


class Hydra(Adapter):
    """Hydra of one linear layer.

    Args:
        tensors: `hydra_par.hydra_A` `[r, in]`, `hydra_par.hydra_B` `[out, r]`, `hydra_seq.hydra_A` `[r,
            out]`, `hydra_seq.hydra_B` `[out, r]`; or `adapter_par.down_proj.weight`, `.bias`,
            `adapter_par.up_proj.weight`, `.bias` and the same of `adapter_seq`. Biases may be absent.
        scale: s of both branches.
    """

    kind = "Hydra"

    def __init__(self, tensors: dict[str, Tensor], scale: float = 1.0):
        vision = any(name.startswith("adapter_") for name in tensors)
        self._names = _DIALECTS["adapter" if vision else "hydra"]
        down, up, *branches = self._names
        weight = ".weight" if vision else ""
        self.required = tuple(f"{b}.{side}{weight}" for b in branches for side in (down, up))
        self.optional = tuple(f"{b}.{side}.bias" for b in branches for side in (down, up)) if vision else ()
        super().__init__(tensors)
        self.scale = scale
        a_p, b_p, a_s, b_s = (self.tensor(name) for name in self.required)
        out = len(b_p)
        if not (a_s.shape[1] == out == len(b_s) and len(a_p) == b_p.shape[1] and len(a_s) == b_s.shape[1]):
            shapes = ", ".join(str(list(t.shape)) for t in (a_p, b_p, a_s, b_s))
            raise ValueError(f"Hydra: [r, in], [out, r] and [r, out], [out, r] required, got {shapes}")

    def _branch(self, branch: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, a, b of "par" or "seq", zeros for absent biases."""
        down, up, parallel, sequential = self._names
        name = parallel if branch == "par" else sequential
        weights, biases = [], []
        for side in (down, up):
            module = f"{name}.{side}"
            vision = f"{module}.weight" in self.required
            weight = self.tensor(f"{module}.weight" if vision else module).to(dtype)
            bias = self.tensor(f"{module}.bias") if vision else None
            weights.append(weight)
            biases.append(weight.new_zeros(len(weight)) if bias is None else bias.to(dtype))
        return (*weights, *biases)

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Both branches, the second on the layer's output."""
        y = base(x)
        out = wide(y)
        for branch, tokens in (("par", x), ("seq", y)):
            down, up, down_bias, up_bias = self._branch(branch, out.dtype)
            out = out + self.scale * ((shrink(tokens, down) + down_bias) @ up.T + up_bias)
        return out.to(x.dtype)

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """The LoRA of rank 2r; needs the layer's weight and bias."""
        if weight is None:
            raise ValueError("Hydra: factors need the layer's weight (and bias), for A_s W")
        shape = (len(self.tensor(self.required[1])), self.tensor(self.required[0]).shape[1])
        weight = check_weight(self.kind, weight, shape)
        a_p, b_p, bias_ap, bias_bp = self._branch("par", weight.dtype)
        a_s, b_s, bias_as, bias_bs = self._branch("seq", weight.dtype)
        inner = bias_as if bias is None else bias_as + a_s @ bias.to(weight.dtype)
        extra = b_p @ bias_ap + bias_bp + b_s @ inner + bias_bs
        return Factors(
            torch.cat([a_p, a_s @ weight]), torch.cat([b_p, b_s], 1), self.scale, self.scale * extra
        )

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + s B_p A_p + s B_s A_s W, and the bias, which there is then always."""
        return apply_factors(weight, bias, self.factors(weight, bias))
