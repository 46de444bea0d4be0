"""Norm regions: what stands between the linear layers of a transformer block, each in one pass over memory.

Tokens `x` are `[*lead, width]`, float64, float32, float16 or bfloat16; neighbours along the last axis are
adjacent, the leading axes may have any strides (a slice of a fused buffer needs no copy). Parameters have the
dtype of the tokens, or are float32 beside 16-bit tokens:

- `weight`, `bias`: `[width]`;
- `scale`, `shift`, `gate`: `[*lead', width]`, where `lead'` are leading axes of `x`, each as long or 1:
  `[width]` for all, `[batch, width]` per sample, `[batch, frames, 1, width]` per frame, `[batch, tokens,
  width]` per token; chunks of a larger tensor are fine. With `index`, int64 or int32 with leading axes of
  `x`, they are `[groups, width]` tables and a token takes the row that its index names: no table is ever
  expanded to the tokens.

An index out of range is an error on the CPU; on CUDA the token becomes NaN, and `check_indices(True)` makes
it an error there too, at the price of a synchronisation.

`tier` says where 16-bit results are rounded. "fast": everything in float32, one rounding. "exact": where the
chain of torch ops rounds, so that the bits are eager's; where a mean or a tanh stands before a rounding its
last float32 bit may differ, and with it one element in thousands by one unit. "exact_before_weight" is exact
for an RMSNorm that rounds before it multiplies by its weight (diffusers' `RMSNorm`, BFL's);
`torch.nn.RMSNorm` is "exact".
"""

from torch import Tensor

from rfkernels import _C
from rfkernels.ops._norm_definitions import (
    gated_residual_norm_modulate_reference,
    gated_residual_reference,
    norm_modulate_reference,
)
from rfkernels.ops._norm_gradients import (
    gated_residual_backward,
    gated_residual_norm_modulate_backward,
    like,
    norm_modulate_backward,
)
from rfkernels.ops._register import define

__all__ = [
    "check_indices",
    "gated_residual",
    "gated_residual_norm_modulate",
    "gated_residual_norm_modulate_reference",
    "gated_residual_reference",
    "norm_modulate",
    "norm_modulate_reference",
]

_checks_indices = False


def check_indices(on: bool) -> None:
    """Debugging: `index` arguments on CUDA are checked too, which synchronises at every call."""
    global _checks_indices
    _checks_indices = on


def checked_index(op: str, index: Tensor | None, *tables: Tensor | None) -> Tensor | None:
    if _checks_indices and index is not None and index.is_cuda:
        groups = next((len(t) for t in tables if t is not None), 0)
        wrong = (index < 0) | (index >= groups)
        if wrong.any():
            raise ValueError(f"{op}: index must be in 0..{groups - 1}, got {index[wrong][0].item()}")
    return index


# --- the ops ---


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    tier: str = "fast",
    out: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`(N(x)\,w + b)(1 + \mathrm{scale}) + \mathrm{shift}`: a norm and its modulation.

    LayerNorm (Ba et al., 2016), :math:`N(x) = (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}`, or
    RMSNorm (Zhang and Sennrich, 2019), :math:`N(x) = x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`, over the last
    axis, modulated as in DiT (Peebles and Xie, 2022), with one table row per sample, frame, segment or token.

    Args:
        x: tokens, `[*lead, width]`.
        scale, shift: modulation tables; absent: 0.
        index: which table row serves which token.
        weight, bias: the affine parameters of the norm, `[width]`; absent: 1 and 0.
        norm: "layer", "rms", or "none" for modulation alone.
        eps: :math:`\epsilon`.
        tier: see the module.
        out: where to write, `x` itself allowed; no gradient then.

    Returns: Tokens in the dtype of `x`. Differentiable in x, scale, shift, weight and bias; the backward pass
        keeps the inputs and nothing else.

    Raises:
        ValueError: tensors that do not fit together, an index out of range, an unknown name.
    """
    index = checked_index("norm_modulate", index, scale, shift)
    return _norm_modulate(x, scale, shift, index, weight, bias, norm, eps, tier, out=out)


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    index: Tensor | None = None,
    gate_activation: str = "none",
    branch_norm: str = "none",
    branch_weight: Tensor | None = None,
    eps: float = 1e-6,
    tier: str = "fast",
    out: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`x + \mathrm{act}(\mathrm{gate})\, w\, N(y)`: a branch joins the residual stream.

    Args:
        x: tokens, `[*lead, width]`.
        y: what the branch made of them, like `x`.
        gate: a modulation table; absent: 1.
        index: which table row serves which token.
        gate_activation: "none", or "tanh" (Lumina-Image 2, Z-Image).
        branch_norm: the norm of the branch before it joins, "none", "rms" (sandwich norm) or "layer".
        branch_weight: `[width]`, the weight of that norm.
        eps, tier, out: as in `norm_modulate`; `out` may be `x` or `y`.

    Raises:
        ValueError: tensors that do not fit together, an index out of range, an unknown name.
    """
    index = checked_index("gated_residual", index, gate)
    return _gated_residual(x, y, gate, index, gate_activation, branch_norm, branch_weight, eps, tier, out=out)


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    index: Tensor | None = None,
    gate_activation: str = "none",
    branch_norm: str = "none",
    branch_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    tier: str = "fast",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns `(r, n)`: `r = gated_residual(x, y, gate)`, `n = norm_modulate(r, scale, shift)`, in one pass.

    To the bit what the two ops give one after the other: the norm reads `r` as it is stored. `index` serves
    gate, scale and shift. For the other arguments and errors see there; `out` is a pair.
    """
    index = checked_index("gated_residual_norm_modulate", index, gate, scale, shift)
    branch = (gate_activation, branch_norm, branch_weight)
    return _gated_residual_norm_modulate(
        x, y, gate, scale, shift, index, *branch, weight, bias, norm, eps, tier, out=out
    )


# --- registration ---

PARAMETERS = "Tensor? weight, Tensor? bias, str norm, float eps, str tier"
BRANCH = "str gate_activation, str branch_norm, Tensor? branch_weight"

_norm_modulate = define(
    "norm_modulate",
    f"Tensor x, Tensor? scale, Tensor? shift, Tensor? index, {PARAMETERS}",
    _C.norm_modulate,
    like,
    norm_modulate_reference,
    norm_modulate_backward,
)
_gated_residual = define(
    "gated_residual",
    f"Tensor x, Tensor y, Tensor? gate, Tensor? index, {BRANCH}, float eps, str tier",
    _C.gated_residual,
    like,
    gated_residual_reference,
    gated_residual_backward,
    saves=lambda out, x, y, gate, index, *others: (y, gate, index, *others[:-1]),
)
_gated_residual_norm_modulate = define(
    "gated_residual_norm_modulate",
    f"Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? index, {BRANCH}, {PARAMETERS}",
    _C.gated_residual_norm_modulate,
    lambda x, *_: (like(x), like(x)),
    gated_residual_norm_modulate_reference,
    gated_residual_norm_modulate_backward,
    saves=lambda out, x, *others: (out[0], *others[:-1]),
    outputs=("x_out", "out"),
)
