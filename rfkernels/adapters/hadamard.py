"""Walsh-Hadamard transforms of many lengths, and QWHA (Jeon et al., 2025), an adapter that is sparse in
that basis.

    y = f(x) + x dW^T,   dW = F H / n s / sqrt(out),   F sparse, H the +-1 Hadamard matrix of order n

`wht` multiplies rows by H^T, `iwht` by H / n, so that dW is `iwht(F)` and x dW^T is `wht(x) F^T / n`.

n = kappa 2^m, H = H_kappa (x) H_2 (x) .. (x) H_2. Of the orders kappa that QWHA's files use, ours are the
matrices that it took from Sloane's library: 12, 20, 60, 108, 140 (Paley I), 40 (H_2 (x) H_20), 28, 36
(Paley II). Those of 52, 156 and 172 (Williamson) are not constructed here: pass the matrix as `block`.
"""

import math

import torch
from torch import Tensor

from rfkernels.adapters.base import Additive, check_weight, wide
from rfkernels.ops._register import accumulator

__all__ = ["QWHA", "allocate", "hadamard_block", "hadamard_split", "iwht", "qwha_init", "wht"]

_ORDERS = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)  # QWHA tries them in this order: 5120 is 40 x 128
_PALEY_1, _PALEY_2, _WILLIAMSON = (12, 20, 60, 108, 140), (28, 36), (52, 156, 172)
_SPARSE_ROWS = (
    64  # tokens up to which the sparse product is taken: break-even of 3072 x 3072 at rank 64, two CPU cores
)


def hadamard_block(order: int) -> Tensor:
    """H_order, float64 +-1, H H^T = order I. Orders: 1, 2, 12, 20, 28, 36, 40, 60, 108, 140."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order == 40:
        return torch.kron(hadamard_block(2), hadamard_block(20))
    if order in _PALEY_1:  # I + S, S skew with chi(i - j) inside
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = -1, 1, _jacobsthal(order - 1)
        return skew + torch.eye(order, dtype=torch.float64)
    if order in _PALEY_2:  # from the symmetric conference matrix C of order q + 1
        half = order // 2
        c = torch.zeros(half, half, dtype=torch.float64)
        c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(half - 1)
        eye = torch.eye(half, dtype=torch.float64)
        return torch.cat([torch.cat([c + eye, c - eye], 1), torch.cat([c - eye, -c - eye], 1)])
    if order in _WILLIAMSON:
        raise ValueError(
            f"hadamard_block: order {order} needs a table that is not built in, pass it as block"
        )
    supported = ", ".join(map(str, sorted((1, 2, 40, *_PALEY_1, *_PALEY_2))))
    raise ValueError(f"hadamard_block: order must be one of {supported}, got {order}")


def hadamard_split(n: int) -> tuple[int, int]:
    """(kappa, m) with n = kappa 2^m, as QWHA splits it. Raises ValueError for other lengths."""
    if n >= 1 and n & (n - 1) == 0:
        return 1, n.bit_length() - 1
    for order in _ORDERS:
        power = n // order
        if n > 0 and n % order == 0 and power & (power - 1) == 0:
            return order, power.bit_length() - 1
    orders = ", ".join(map(str, sorted(_ORDERS)))
    raise ValueError(f"Hadamard: length must be 2^m or kappa 2^m, kappa one of {orders}; got {n}")


def wht(x: Tensor, block: Tensor | None = None) -> Tensor:
    """x H^T along the last axis, not normalised, float32 (float64 for float64).

    Args:
        block: H_kappa, by default `hadamard_block(kappa)`.
    """
    return _transform(wide(x), block, transpose=False)


def iwht(x: Tensor, block: Tensor | None = None) -> Tensor:
    """x H / n along the last axis, the inverse of `wht`."""
    return _transform(wide(x), block, transpose=True) / x.shape[-1]


def _transform(x: Tensor, block: Tensor | None, transpose: bool) -> Tensor:
    n = x.shape[-1]
    order, bits = hadamard_split(n)
    if block is None:
        block = _cached(order, x)
    elif block.shape != (order, order):
        raise ValueError(
            f"Hadamard: block must be [{order}, {order}] for length {n}, got {list(block.shape)}"
        )
    y, stride = x.reshape(-1, n), 1
    while bits:  # dense factors of up to 64: 12 butterfly passes over 4096 become two small products
        step = min(bits, 6)
        y = _along(y, _cached(1 << step, y), stride)
        stride, bits = stride << step, bits - step
    if order > 1:
        y = _along(y, (block.T if transpose else block).to(y), stride)
    return y.reshape(x.shape)


def _along(rows: Tensor, matrix: Tensor, stride: int) -> Tensor:
    """`matrix` along the axis of that stride within each row."""
    n = rows.shape[1]
    if stride == 1:
        return (rows.reshape(-1, len(matrix)) @ matrix.T).view(-1, n)
    return (matrix @ rows.reshape(-1, len(matrix), stride)).reshape(-1, n)


_matrices: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _cached(order: int, like: Tensor) -> Tensor:
    """H of order 2^m or kappa on the device: made once, so that a call copies nothing from the host."""
    key = order, like.dtype, like.device
    if key not in _matrices:
        with torch.inference_mode(False):
            h = hadamard_block(order if order & (order - 1) else 1)
            for _ in range(0 if order & (order - 1) else order.bit_length() - 1):
                h = torch.kron(hadamard_block(2), h)
            _matrices[key] = h.to(like.device, like.dtype)
    return _matrices[key]


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = chi(i - j), the quadratic character of a prime q."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q).square() % q] = 1
    chi[0] = 0
    i = torch.arange(q)
    return chi[(i[:, None] - i) % q]


class QWHA(Additive):
    """An adapter with a sparse Walsh-Hadamard spectrum, beside a layer of any storage format.

    Args:
        tensors: `qhft_spectrum` `[K]`, `qhft_indices` `[2, K]` (output, frequency), `qhft_scaling` (a
            number), and optional `qhft_n_frequency`, `qhft_random_loc_seed`; files add the adapter's name,
            `qhft_spectrum.default`, `qhft_indices_default`, and may lack the indices, which the seed then
            gives.
        shape: (out, in).
        block: H_kappa where `in` needs one, by default `hadamard_block(kappa)`.
    """

    kind = "QWHA"
    _parts = ("spectrum", "indices", "scaling", "n_frequency", "random_loc_seed")

    def __init__(self, tensors: dict[str, Tensor], shape: tuple[int, int], block: Tensor | None = None):
        self._file_names = _match_names(tensors, self._parts)
        self.required = tuple(self._file_names.values())
        super().__init__(tensors)
        self.shape, self.block = tuple(shape), block
        self.scale = float(self._of("scaling")) / math.sqrt(shape[0])
        order, _ = hadamard_split(shape[1])
        if block is None:
            hadamard_block(order)  # refuses now what it cannot build
        spectrum = self.spectrum
        if "indices" in self._file_names:
            indices = self._of("indices").long()
        else:
            if "random_loc_seed" not in self._file_names:
                raise ValueError("QWHA: qhft_indices or qhft_random_loc_seed required")
            indices = random_indices(shape, len(spectrum), int(self._of("random_loc_seed")))
        _check_indices(indices, len(spectrum), self.shape)
        self.register_buffer("positions", indices, persistent=False)

    def _of(self, part: str) -> Tensor | None:
        return self.tensor(self._file_names[part]) if part in self._file_names else None

    @property
    def spectrum(self) -> Tensor:
        return self._of("spectrum")

    def dense_spectrum(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """F, `[out, in]`."""
        values = self.spectrum.to(dtype)
        return values.new_zeros(self.shape).index_put(tuple(self.positions), values)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """dW, `[out, in]`."""
        return self.scale * iwht(self.dense_spectrum(dtype), self.block)

    def delta(self, x: Tensor) -> Tensor:
        """The transform of x, which all adapters of a layer share, times F; sparse for few tokens."""
        return self.apply_spectrum(wht(x, self.block) / x.shape[-1])

    def apply_spectrum(self, u: Tensor) -> Tensor:
        """(s / sqrt(out)) u F^T for u = wht(x) / n."""
        rows = u.reshape(-1, u.shape[-1])
        if len(rows) <= _SPARSE_ROWS and not torch.compiler.is_compiling():  # which has no sparse tensors
            values = self.spectrum.to(u.dtype)  # the places were checked at the start
            f = torch.sparse_coo_tensor(self.positions, values, self.shape, check_invariants=False)
            y = torch.sparse.mm(f, rows.T).T
        else:
            y = rows @ self.dense_spectrum(u.dtype).T
        return self.scale * y.reshape(*u.shape[:-1], self.shape[0])

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + dW for a floating weight. Into codes it never merges: dW is what their rounding lost."""
        weight = check_weight(self.kind, weight, self.shape)
        return weight + self.delta_weight(weight.dtype), None if bias is None else bias.to(weight.dtype)


def random_indices(shape: tuple[int, int], count: int, seed: int = 777) -> Tensor:
    """The positions that QWHA's code draws, `[2, count]`."""
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([order // shape[1], order % shape[1]])


def allocate(weights: Tensor, budget: int, limit: int) -> Tensor:
    """Integers that sum to `budget`, proportional to `weights` (floored), none above `limit`.

    What flooring and the limit leave over goes evenly to the rows with room, then one each to the smallest.
    """
    rows = len(weights)
    if not 0 <= budget <= rows * limit:
        raise ValueError(f"allocate: budget must be 0 .. {rows * limit}, got {budget}")
    total = weights.sum()
    share = weights / total if total > 0 else torch.full_like(weights, 1 / rows)
    counts = (share * budget).floor().long().clamp_max(limit)
    while (left := budget - int(counts.sum())) > 0:
        room = (counts < limit).nonzero().flatten()
        if left >= len(room):
            counts[room] = (counts[room] + left // len(room)).clamp_max(limit)
        else:
            counts[room[counts[room].sort(stable=True).indices[:left]]] += 1
    return counts


def qwha_init(
    weight: Tensor,
    quantized: Tensor,
    inputs: Tensor,
    rank: int = 64,
    scaling: float = 0.25,
    alpha: float = 1.0,
    block: Tensor | None = None,
) -> QWHA:
    """The quantisation-aware start: the sparse F that best repairs W - W_q on calibration inputs.

    With G = X^T X and F_0 = wht(W - W_q): budget rank (in + out), row i gets a share like
    ||F_0[i]||^alpha; it keeps the entries of largest ||phi_j||^2 F_0[i, j]^2; their values are refitted by
    least squares. phi_j is the image of frequency j, phi_i . phi_j = (H G H^T)[i, j] / n^2, so no root of
    G is needed.

    Args:
        weight: W, `[out, in]`.
        quantized: W_q as numbers, `[out, in]`.
        inputs: X, `[*lead, in]`.
        rank: the LoRA rank whose parameters it matches.
        scaling: s.
    """
    if weight.shape != quantized.shape or inputs.shape[-1] != weight.shape[1]:
        shapes = ", ".join(str(list(t.shape)) for t in (weight, quantized, inputs))
        raise ValueError(f"qwha_init: weights [out, in] twice and inputs [*lead, in] required, got {shapes}")
    out, n = weight.shape
    rows = inputs.reshape(-1, n).double()
    gram = rows.T @ rows
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    lost = weight.double() - quantized.double()
    start = wht(lost, block)
    inner = wht(wht(gram, block).T, block) / n**2
    target = wht(lost @ gram, block) / n
    counts = allocate(start.norm(dim=1) ** alpha, min(rank * (n + out), out * n), n)
    score = inner.diagonal() * start.square()
    places, values = [], []
    for i, count in enumerate(counts.tolist()):
        chosen = score[i].topk(count).indices
        values.append(torch.linalg.solve(inner[chosen][:, chosen], target[i, chosen]))
        places.append(torch.stack([torch.full_like(chosen, i), chosen]))
    tensors = {
        "qhft_spectrum": (torch.cat(values) * (math.sqrt(out) / scaling)).to(accumulator(weight.dtype)),
        "qhft_indices": torch.cat(places, 1),
        "qhft_scaling": torch.tensor(scaling),
        "qhft_n_frequency": torch.tensor(int(counts.sum())),
    }
    return QWHA(tensors, (out, n), block)


def _match_names(tensors: dict[str, Tensor], parts: tuple[str, ...]) -> dict[str, str]:
    """part -> the file's name of it, with or without the adapter's name behind."""
    found = {}
    for name in tensors:
        part = next(
            (p for p in parts if name == f"qhft_{p}" or name.startswith((f"qhft_{p}_", f"qhft_{p}."))), None
        )
        if part is None or part in found:
            raise ValueError(
                f"QWHA: one each of {', '.join(f'qhft_{p}' for p in parts)} expected, got {name}"
            )
        found[part] = name
    missing = [f"qhft_{p}" for p in ("spectrum", "scaling") if p not in found]
    if missing:
        raise ValueError(f"QWHA: missing: {', '.join(missing)}")
    return found


def _check_indices(indices: Tensor, count: int, shape: tuple[int, int]) -> None:
    if indices.shape != (2, count):
        raise ValueError(f"QWHA: indices must be [2, {count}], got {list(indices.shape)}")
    limits = torch.tensor(shape, device=indices.device)[:, None]
    if count and bool(((indices < 0) | (indices >= limits)).any()):
        raise ValueError(f"QWHA: indices must lie in a weight {list(shape)}")
    flat = indices[0] * shape[1] + indices[1]
    if len(flat.unique()) != count:
        raise ValueError("QWHA: indices must be distinct")
