"""DoRA (Liu et al., 2024): magnitude and direction of the weight apart.

    V = W + s B A,   W' = m V / ||V||

The norm runs over the inputs, one m per output ("output" axis: PEFT's `lora_magnitude_vector` `[out]`,
LyCORIS' `dora_scale` `[out, 1]`), or over the outputs, one m per input (`dora_scale` `[1, in]`). As a
branch beside the layer:

    output axis   y = k (x W^T) + b + k s (x A^T) B^T,   k = m / ||V||
    input axis    y = f(k x) + s ((k x) A^T) B^T
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rfkernels.adapters.base import Adapter, Factors, check_names, check_weight, shrink, weight_of, wide
from rfkernels.adapters.lora import lora_scale
from rfkernels.ops._register import accumulator

__all__ = ["DoRA", "decompose", "merged_norm", "strength_scale"]

_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale")
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))


def merged_norm(weight: Tensor, down: Tensor, up: Tensor, scale: float, axis: str = "output") -> Tensor:
    """||W + s B A|| per output `[out]`, or per input `[in]`, without forming B A.

    ||v||^2 = ||w||^2 + 2 s rowsum(B (W A^T)) + s^2 rowsum(B (B A A^T)): O(out in rank).
    """
    if axis == "input":
        return merged_norm(weight.T, up.T, down.T, scale)
    square = weight.square().sum(1)
    cross = (up * (weight @ down.T)).sum(1)
    own = (up * (up @ (down @ down.T))).sum(1)
    return (square + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()


def strength_scale(k: Tensor, strength: float) -> Tensor:
    """LyCORIS' strength of a decomposition: 1 + w (k - 1)."""
    return 1 + strength * (k - 1) if strength != 1 else k


def magnitude_axis(magnitude: Tensor, shape: torch.Size) -> str:
    """Which axis a stored magnitude belongs to, by its shape."""
    out, features = shape[:2]
    if magnitude.shape in ((out,), (out, *[1] * (len(shape) - 1))):
        return "output"
    if magnitude.shape == (1, features, *[1] * (len(shape) - 2)):
        return "input"
    raise ValueError(
        f"DoRA: the magnitude must be [{out}], [{out}, 1] or [1, {features}] for a weight {list(shape)}, "
        f"got {list(magnitude.shape)}"
    )


def decompose(weight: Tensor, delta: Tensor, magnitude: Tensor, strength: float = 1.0) -> Tensor:
    """(1 + w (k - 1)) V, V = W + delta, k = m / ||V||: the weight of LyCORIS files with `dora_scale`."""
    total = wide(weight) + delta.to(accumulator(weight.dtype))
    dims = tuple(range(1, total.ndim))
    if magnitude_axis(magnitude, total.shape) == "input":
        dims = (0, *dims[1:])
        magnitude = magnitude.reshape(1, -1, *[1] * (total.ndim - 2))
    else:
        magnitude = magnitude.reshape(-1, *[1] * (total.ndim - 1))
    norm = torch.linalg.vector_norm(total, dim=dims, keepdim=True)
    return strength_scale(_ratio(magnitude.to(norm.dtype), norm), strength) * total


class DoRA(Adapter):
    """DoRA of one linear layer.

    Args:
        tensors: `lora_A.weight`, `lora_B.weight` (or `lora_down.weight`, `lora_up.weight`, `alpha`) and
            `lora_magnitude_vector` `[out]` or `dora_scale` `[out, 1]` or `[1, in]`.
        alpha, rslora: as in `LoRA`.
        norm_of: "merged": k = m / ||W + s B A||, as PEFT and LyCORIS do. "base": k = m / ||W||, as ComfyUI
            (2025) did for the output axis.
        strength: a user's w. PEFT scales s; LyCORIS scales k, to 1 + w (k - 1), and leaves s. They agree at
            w = 1 only, and at w = 0 PEFT still has k = m / ||W||.
        convention: "peft" or "lycoris".

    A direction of norm zero has k = 0. The gradient takes ||V|| for a constant, as the paper does.
    """

    kind = "DoRA"

    def __init__(
        self,
        tensors: dict[str, Tensor],
        alpha: float | None = None,
        rslora: bool = False,
        norm_of: str = "merged",
        strength: float = 1.0,
        convention: str = "peft",
    ):
        pair = next((p for p in _PAIRS if p[0] in tensors), _PAIRS[0])
        magnitude = next((m for m in _MAGNITUDES if m in tensors), _MAGNITUDES[0])
        check_names(self.kind, tensors, (*pair, magnitude), ("alpha",))
        if norm_of not in ("merged", "base"):
            raise ValueError(f'DoRA: norm_of must be "merged" or "base", got {norm_of!r}')
        if convention not in ("peft", "lycoris"):
            raise ValueError(f'DoRA: convention must be "peft" or "lycoris", got {convention!r}')
        self.required, self.optional = (*pair, magnitude), ("alpha",)
        super().__init__(tensors)
        self._pair, self._magnitude = pair, magnitude
        down, up = self.tensor(pair[0]), self.tensor(pair[1])
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"DoRA: A [r, in], B [out, r] required, got {list(down.shape)}, {list(up.shape)}"
            )
        self.shape = torch.Size((up.shape[0], down.shape[1]))
        self.axis = magnitude_axis(self.magnitude, self.shape)
        alpha = float(tensors["alpha"]) if "alpha" in tensors else alpha
        self.scale = lora_scale(down.shape[0], alpha, rslora) * (strength if convention == "peft" else 1.0)
        self.norm_of, self.strength, self.convention = norm_of, strength, convention

    @property
    def down(self) -> Tensor:
        return self.tensor(self._pair[0])

    @property
    def up(self) -> Tensor:
        return self.tensor(self._pair[1])

    @property
    def magnitude(self) -> Tensor:
        return self.tensor(self._magnitude)

    def column_scale(self, weight: Tensor) -> Tensor:
        """k, `[out]` or `[in]` by the axis."""
        weight = check_weight(self.kind, weight, self.shape)
        with torch.no_grad():
            scale = self.scale if self.norm_of == "merged" else 0.0
            norm = merged_norm(weight, self.down.to(weight), self.up.to(weight), scale, self.axis)
        k = _ratio(self.magnitude.reshape(-1).to(norm.dtype), norm)
        return strength_scale(k, self.strength) if self.convention == "lycoris" else k

    def forward(self, x: Tensor, base: nn.Module | Callable[[Tensor], Tensor]) -> Tensor:
        """The branch form; `base` has a weight, or `dequantized()`."""
        weight, bias = weight_of(base)
        k = self.column_scale(weight).to(accumulator(x.dtype))
        if self.axis == "input":
            scaled = (wide(x) * k).to(x.dtype)
            return (wide(base(scaled)) + self._branch(scaled)).to(x.dtype)
        y = wide(base(x))
        if bias is None:
            return (k * (y + self._branch(x))).to(x.dtype)
        bias = bias.to(y.dtype)
        return (k * (y - bias + self._branch(x)) + bias).to(x.dtype)

    def _branch(self, x: Tensor) -> Tensor:
        hidden = shrink(x, self.down)
        return self.scale * (hidden @ self.up.to(hidden.dtype).T)

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """k (W + s B A), always exact."""
        k = self.column_scale(weight)
        weight = wide(weight)
        total = torch.addmm(weight, self.up.to(weight), self.down.to(weight), alpha=self.scale)
        total = k[:, None] * total if self.axis == "output" else total * k
        return total, None if bias is None else bias.to(total.dtype)

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """A, B, s and k as `column_scale`. None for the input axis, which scales x and has no such form."""
        if self.axis == "input":
            return None
        if weight is None:
            raise ValueError("DoRA: factors need the layer's weight, for its norm")
        return Factors(self.down, self.up, self.scale, None, self.column_scale(weight))


def _ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    return torch.where(
        norm > 0, magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm)
    )
