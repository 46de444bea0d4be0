"""Kronecker products: their application, their SVD, and SoKA.

    (U (x) V) x,  U [a, c'], V [c, d]:  reshape x to [c', d], multiply by V^T, then by U

KPSVD (Van Loan and Pitsianis, 1993): the best sum of r Kronecker products (Frobenius) is the truncated SVD
of the rearranged weight, R[(i, j), (k, l)] = W[i c + k, j d + l].

SoKA (Kronecker-product SVD adapter): dW = sum_k sigma_k U_k (x) V_k. No files of it are public: the names
`soka_u`, `soka_v`, `soka_sigma` are ours. So are the constants of the rank choice, which the paper does
not give.
"""

import torch
from torch import Tensor

from rfkernels.adapters.base import Additive, check_weight, wide

__all__ = ["SoKA", "choose_rank", "factorization", "kpsvd", "kron_apply", "kron_sum", "soka_init"]


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `dimension`, the smaller first, as LyCORIS and PEFT split a layer.

    Args:
        factor: one of the two where it divides `dimension` (PEFT then returns it first even if it is the
            larger); else the smaller is the largest divisor up to it. -1: near the square root.
    """
    if dimension < 1 or factor == 0 or factor < -1:
        raise ValueError(f"factorization: dimension >= 1, factor -1 or >= 1, got {dimension}, {factor}")
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor == -1 else factor
    small = max(m for m in range(1, int(dimension**0.5) + 1) if dimension % m == 0 and m <= limit)
    return small, dimension // small


def kron_apply(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (sum_k left_k (x) right_k)^T, `[*lead, a c]`, by two small products; no `[a c, b d]` matrix is
    formed.

    Args:
        x: `[*lead, b d]`.
        left: `[r, a, b]` or `[a, b]`.
        right: `[r, c, d]` or `[c, d]`.
    """
    left, right = left.to(x.dtype), right.to(x.dtype)
    if left.ndim == 2:
        left, right = left[None], right[None]
    r, a, b = left.shape
    c, d = right.shape[1:]
    if x.shape[-1] != b * d:
        raise ValueError(f"kron_apply: x must be [*lead, {b * d}], got {list(x.shape)}")
    t = x.reshape(-1, b, d) @ right.reshape(r * c, d).T  # [M, b, r c]
    t = t.view(-1, b * r, c)
    y = left.permute(1, 2, 0).reshape(a, b * r) @ t  # [M, a, c]
    return y.reshape(*x.shape[:-1], a * c)


def kron_sum(left: Tensor, right: Tensor) -> Tensor:
    """sum_k left_k (x) right_k, `[a c, b d]`."""
    dense = torch.einsum("kab,kcd->acbd", left, right)
    return dense.reshape(left.shape[1] * right.shape[1], -1)


def kpsvd(weight: Tensor, left_shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """U `[r, a, b]`, sigma `[r]` descending, V `[r, c, d]` with W = sum sigma_k U_k (x) V_k, r = min(a b,
    c d).

    Args:
        weight: `[a c, b d]`.
        left_shape: (a, b).
    """
    a, b = left_shape
    if weight.ndim != 2 or weight.shape[0] % a or weight.shape[1] % b:
        raise ValueError(f"kpsvd: ({a}, {b}) must divide the weight's axes, got {list(weight.shape)}")
    c, d = weight.shape[0] // a, weight.shape[1] // b
    rearranged = wide(weight).view(a, c, b, d).permute(0, 2, 1, 3).reshape(a * b, c * d)
    u, s, vt = torch.linalg.svd(rearranged, full_matrices=False)
    return u.T.reshape(-1, a, b), s, vt.reshape(-1, c, d)


def choose_rank(sigma: Tensor, energy: float = 0.9) -> int:
    """The rank of a truncation: the smaller of two rules.

    Smallest r whose terms hold `energy` of the squared spectrum; and the elbow, where log sigma lies furthest
    below the chord from its first to its last value. Both rules and 0.9 are our choice: the paper names an
    energy share and an elbow without constants.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"choose_rank: energy must lie in (0, 1], got {energy}")
    sigma = sigma.double()
    sigma = sigma[sigma > sigma[0] * 1e-15] if len(sigma) and sigma[0] > 0 else sigma[:1]
    share = sigma.square().cumsum(0) / sigma.square().sum()
    by_energy = int((share < energy * (1 - 1e-12)).sum()) + 1
    if len(sigma) < 3:
        return min(by_energy, len(sigma))
    log = sigma.log()
    chord = torch.lerp(log[0], log[-1], torch.linspace(0, 1, len(log), dtype=log.dtype, device=log.device))
    gap = chord - log
    by_elbow = int(gap.argmax()) + 1 if gap.max() > 1e-9 else len(sigma)
    return min(by_energy, by_elbow)


class SoKA(Additive):
    """sum_k sigma_k U_k (x) V_k beside a linear layer, merged always.

    Args:
        tensors: `soka_u` `[r, a, b]`, `soka_v` `[r, c, d]`, `soka_sigma` `[r]`, for a weight `[a c, b d]`.
    """

    kind = "SoKA"
    required = ("soka_u", "soka_v", "soka_sigma")

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        u, v, sigma = self.soka_u, self.soka_v, self.soka_sigma
        if u.ndim != 3 or v.ndim != 3 or sigma.ndim != 1 or not len(u) == len(v) == len(sigma):
            shapes = ", ".join(str(list(t.shape)) for t in (u, v, sigma))
            raise ValueError(f"SoKA: u [r, a, b], v [r, c, d], sigma [r] required, got {shapes}")

    @property
    def _left(self) -> Tensor:
        return self.soka_sigma[:, None, None] * self.soka_u

    def delta(self, x: Tensor) -> Tensor:
        """Two small products."""
        return kron_apply(wide(x), self._left, self.soka_v)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum itself, `[out, in]`."""
        return kron_sum(self._left.to(dtype), self.soka_v.to(dtype))

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + sum_k sigma_k U_k (x) V_k."""
        shape = [m * n for m, n in zip(self.soka_u.shape[1:], self.soka_v.shape[1:], strict=True)]
        weight = check_weight(self.kind, weight, shape)
        return weight + self.delta_weight(weight.dtype), None if bias is None else bias.to(weight.dtype)


def soka_init(
    weight: Tensor,
    left_shape: tuple[int, int] | None = None,
    rank: int | None = None,
    method: str = "zero",
    energy: float = 0.9,
) -> tuple[SoKA, Tensor]:
    """A fresh SoKA and the weight that it belongs to.

    Args:
        weight: `[out, in]`.
        left_shape: (a, b); by default the smaller near-square factors of out and in.
        rank: by default `choose_rank` of the weight's Kronecker spectrum.
        method: "zero": U from the weight's leading terms, V = 0, the weight as it is. "pissa": the leading
            terms themselves, taken out of the weight (the paper does not say its target; PiSSA's is ours).
    """
    if method not in ("zero", "pissa"):
        raise ValueError(f'soka_init: method must be "zero" or "pissa", got {method!r}')
    if left_shape is None:
        left_shape = (factorization(weight.shape[0])[0], factorization(weight.shape[1])[0])
    u, sigma, v = kpsvd(weight, left_shape)
    rank = choose_rank(sigma, energy) if rank is None else rank
    if not 1 <= rank <= len(sigma):
        raise ValueError(f"soka_init: rank must be 1 .. {len(sigma)}, got {rank}")
    u, sigma, v = u[:rank].contiguous(), sigma[:rank].contiguous(), v[:rank].contiguous()
    if method == "zero":
        return SoKA({"soka_u": u, "soka_v": torch.zeros_like(v), "soka_sigma": sigma}), wide(weight)
    adapter = SoKA({"soka_u": u, "soka_v": v, "soka_sigma": sigma})
    return adapter, wide(weight) - adapter.delta_weight(u.dtype)
