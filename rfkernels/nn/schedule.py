r"""Two factors that change apart over the time of a flow (DyDiT++'s TD-LoRA in its widest reading).

:math:`\Delta W(t) = s\,B(t)\,\mathrm{diag}(m(t))\,A(t)`, :math:`A(t) = \sum_i a_i(t) A_i`,
:math:`B(t) = \sum_j b_j(t) B_j`: with its cross terms one stack of rank I J r whose columns are weighted anew
at every step. `LoRALinear.write` takes the coefficients on the device, so that one captured graph serves all
steps. Experts of one coefficient each (TSM, T-LoRA) are `rfkernels.adapters.timestep`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels.adapters.base import Factors

__all__ = ["mixed_coefficients", "mixed_factors"]


def mixed_factors(downs: Sequence[Tensor], ups: Sequence[Tensor], scale: float = 1.0) -> Factors:
    r"""The stack of :math:`s \sum_{ij} b_j a_i\, B_j\, \mathrm{diag}(m)\, A_i`.

    Args:
        downs: the A_i, `[r, in]`; one that is shared, or several.
        ups: the B_j, `[out, r]`.

    `mixed_coefficients` weights its `len(downs) len(ups) r` columns.
    """
    down = torch.cat([a for a in downs for _ in ups])
    return Factors(down, torch.cat(list(ups) * len(downs), 1), scale)


def mixed_coefficients(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a_i b_j m_r in the order of `mixed_factors`: a `[*, I]`, b `[*, J]`, mask `[*, r]` to `[*, I J r]`."""
    return (a[..., :, None, None] * b[..., None, :, None] * mask[..., None, None, :]).flatten(-3)
