"""ZeroI2V (Li et al., 2024): linear adapters around the layers of an image model, and heads that look at
other frames.

    T(x) = x + s (W_2 (W_1 x + b_1) + b_2)

Before a layer f(T(x)), after it T(f(x)). There is no activation, so both merge exactly, at no cost:

    before   W' = W (I + s W_2 W_1),   b' = b + s W (W_2 b_1 + b_2)      q, k and v that share T: each of them
    after    W' = (I + s W_2 W_1) W,   b' = (I + s W_2 W_1) b + s (W_2 b_1 + b_2)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels.adapters.base import Adapter, Factors, apply_factors, check_weight, shrink, wide
from rfkernels.ops._register import accumulator

__all__ = ["LinearAdapter", "shift_heads"]


class LinearAdapter(Adapter):
    """T before or after one linear layer.

    Args:
        tensors: `D_fc1.weight` W_1 `[r, d]`, `D_fc1.bias`, `D_fc2.weight` W_2 `[d, r]`, `D_fc2.bias` (of
            `T_Adapter_in`, `S_Adapter`, `MLP_Adapter`, `MLP_Adapter_out`). d is the layer's in or out.
        position: "before" or "after".
        scale: s.
    """

    kind = "a linear adapter"
    required = ("D_fc1.weight", "D_fc1.bias", "D_fc2.weight", "D_fc2.bias")

    def __init__(self, tensors: dict[str, Tensor], position: str = "before", scale: float = 1.0):
        super().__init__(tensors)
        if position not in ("before", "after"):
            raise ValueError(f'{self.kind}: position must be "before" or "after", got {position!r}')
        self.position, self.scale = position, scale
        first, second = self.tensor("D_fc1.weight"), self.tensor("D_fc2.weight")
        if first.shape != second.shape[::-1]:
            raise ValueError(
                f"{self.kind}: W_1 [r, d], W_2 [d, r] required, got {list(first.shape)}, {list(second.shape)}"
            )

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(self.tensor(name).to(dtype) for name in self.required)

    def transform(self, x: Tensor) -> Tensor:
        """T(x), not rounded."""
        w1, b1, w2, b2 = self._parts(accumulator(x.dtype))
        return wide(x) + self.scale * ((shrink(x, w1) + b1) @ w2.T + b2)

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """f(T(x)), T(x) rounded to the dtype of x; or T(f(x))."""
        if self.position == "before":
            return base(self.transform(x).to(x.dtype))
        return self.transform(base(x)).to(x.dtype)

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """A LoRA of rank r: (W_1, W W_2) before, (W_1 W, W_2) after, and a bias. Needs the layer's weight."""
        if weight is None:
            raise ValueError(f"{self.kind}: factors need the layer's weight (and bias)")
        weight = check_weight(self.kind, weight)
        w1, b1, w2, b2 = self._parts(weight.dtype)
        width = weight.shape[1 if self.position == "before" else 0]
        if width != len(w2):
            raise ValueError(f"{self.kind} of width {len(w2)} {self.position} a weight {list(weight.shape)}")
        if self.position == "before":
            return Factors(w1, weight @ w2, self.scale, self.scale * (weight @ (w2 @ b1 + b2)))
        inner = b1 if bias is None else b1 + w1 @ bias.to(weight.dtype)
        return Factors(w1 @ weight, w2, self.scale, self.scale * (w2 @ inner + b2))

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W' and b', which there is then always. A fused qkv weight `[3 d, d]` merges as one."""
        return apply_factors(weight, bias, self.factors(weight, bias))


def shift_heads(
    tokens: Tensor, frames: int, divisor: int = 12, stride: int = 1, long_divisor: int | None = None
) -> Tensor:
    """Keys or values whose leading channels come from neighbouring frames (STDHA); queries stay.

    Of C channels the first C // divisor come from frame t - stride, the next as many from t + stride, and,
    with `long_divisor`, the next C // long_divisor from t - 2. Frames without that neighbour keep their
    own. With divisor = heads, whole heads attend to another frame at no arithmetic.

    Args:
        tokens: k or v behind the qkv product, `[batch * frames, n, C]`.
    """
    if tokens.ndim != 3 or frames < 1 or tokens.shape[0] % frames:
        raise ValueError(f"shift_heads: [batch * {frames}, n, C] required, got {list(tokens.shape)}")
    fold = tokens.shape[2] // divisor
    far = 0 if long_divisor is None else tokens.shape[2] // long_divisor
    if stride < 1 or 2 * fold + far > tokens.shape[2]:
        raise ValueError(
            f"shift_heads: stride >= 1 and 2 C // divisor + C // long_divisor <= C required, got C = "
            f"{tokens.shape[2]}, divisor {divisor}, stride {stride}, long_divisor {long_divisor}"
        )
    seen = tokens.unflatten(0, (-1, frames))
    out = seen.clone()
    out[:, stride:, :, :fold] = seen[:, : max(frames - stride, 0), :, :fold]
    out[:, : max(frames - stride, 0), :, fold : 2 * fold] = seen[:, stride:, :, fold : 2 * fold]
    out[:, 2:, :, 2 * fold : 2 * fold + far] = seen[:, : max(frames - 2, 0), :, 2 * fold : 2 * fold + far]
    return out.flatten(0, 1)
