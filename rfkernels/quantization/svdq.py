"""SVDQuant (Li et al., 2024): four-bit weights beside a low-rank branch that takes their outliers."""

import torch
from torch import Tensor

from rfkernels.ops.linear import dequantize_weight
from rfkernels.quantization.int4 import quantize_int4

__all__ = ["quantize_svdq", "truncated_svd"]

_DENSE = 1024  # up to here a full SVD
_SIGMAS = 4  # of a channel of tokens, in its largest magnitude
_ROWS = 256  # evenly spaced, that choose the smoothing
_CHUNK = 1 << 19  # numbers that are quantised at a time
_ALPHAS = (None, *(i / 10 for i in range(11)))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors U sqrt(S) `[m, rank]` and sqrt(S) V^T `[rank, n]`, float64, of the nearest matrix of that rank.

    A shorter side above 1024 takes six subspace iterations from a fixed start instead of a full SVD (Halko et
    al., 2011): seconds instead of minutes for a layer of 3072 x 12288, and the same where the spectrum falls.
    """
    matrix, rank = matrix.double(), min(rank, *matrix.shape)
    if min(matrix.shape) > _DENSE:
        width = min(2 * rank + 8, *matrix.shape)
        start = torch.randn(
            matrix.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        basis = matrix @ start.to(matrix.device)
        for _ in range(6):
            basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
        basis = torch.linalg.qr(basis).Q
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()


def quantize_svdq(
    weight: Tensor,
    rank: int = 32,
    group: int = 64,
    input_max: Tensor | None = None,
    iterations: int = 0,
) -> dict[str, Tensor]:
    r"""W = Q(R) / λ + U D with Ŵ = W λ, U D λ its truncated SVD and R = Ŵ - U D λ in four bits.

    λ = m^α / amax(W)^(1 - α) per input, over its geometric mean; of α = 0, 0.1 .. 1 and λ = 1 the one with
    the least expected error of the output: that of the weight's rounding, under independent tokens of
    deviation m / 4, plus that of the tokens' rounding to int8.

    Args:
        weight: floating `[out, in]`; its dtype is that of scales, λ and factors.
        input_max: m `[in]`, the largest magnitude of each input; absent: the same of all.
        iterations: up to how often U D is fitted anew to Ŵ - Q(R), while the error falls.

    Returns:
        weight uint8 `[out, in / 2]`, weight_scale `[out, in / group]`, smooth λ `[in]`, proj_up U
        `[out, rank]`, proj_down D `[rank, in]`, for x and not x / λ.
    """
    scaled, dtype = weight.to(torch.float64, copy=True), weight.dtype
    top = torch.ones_like(scaled[0]) * _SIGMAS if input_max is None else input_max.to(scaled)
    some = weight[:: -(-len(weight) // _ROWS)].float()
    smooth = min(_candidates(scaled, top), key=lambda s: _error(some * s.float(), s, top, group, dtype)).to(
        dtype
    )
    scaled *= smooth
    best, least = _split(scaled, scaled, rank, group, dtype), None
    for _ in range(iterations):
        if least is None:
            least = _split_error(best, scaled, smooth, top)
        residual = dequantize_weight(best["weight"], best["weight_scale"], dtype=torch.float64)
        found = _split(scaled, scaled - residual, rank, group, dtype)
        error = _split_error(found, scaled, smooth, top)
        if error >= least:
            break
        best, least = found, error
    best["proj_down"] = (best["proj_down"] / smooth.double()).to(dtype)
    return {**best, "proj_up": best["proj_up"].to(dtype), "smooth": smooth}


def _candidates(weight: Tensor, top: Tensor) -> list[Tensor]:
    low, high = weight.aminmax(dim=0)
    columns, found = torch.maximum(-low, high), []
    for alpha in _ALPHAS:
        smooth = torch.ones_like(top) if alpha is None else top**alpha / columns ** (1 - alpha)
        smooth = torch.where(smooth.isfinite() & (smooth > 0), smooth, 1)
        found.append(smooth / smooth.log().mean().exp())
    return found


def _error(scaled: Tensor, smooth: Tensor, top: Tensor, group: int, dtype: torch.dtype) -> float:
    """Expected squared error of the output when all of `scaled` is stored in four bits."""
    codes, scale, _ = quantize_int4(scaled, group, scale_dtype=dtype)
    return _expected(dequantize_weight(codes, scale) - scaled, scaled, smooth, top)


def _expected(wrong: Tensor, scaled: Tensor, smooth: Tensor, top: Tensor) -> float:
    tokens = top / smooth.double()
    weights = (wrong * (tokens / _SIGMAS)).square().sum()
    rounding = (tokens.amax() / 127).square() / 12 * scaled.square().sum()
    return float(weights + rounding)


def _split(scaled: Tensor, target: Tensor, rank: int, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    up, down = truncated_svd(target, rank)
    count = max(1, _CHUNK // scaled.shape[1])
    pieces = zip(scaled.split(count), up.split(count), strict=True)
    parts = [quantize_int4(rows - u @ down, group, scale_dtype=dtype)[:2] for rows, u in pieces]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"weight": codes, "weight_scale": scale, "proj_down": down, "proj_up": up}


def _split_error(split: dict[str, Tensor], scaled: Tensor, smooth: Tensor, top: Tensor) -> float:
    stored = dequantize_weight(split["weight"], split["weight_scale"], dtype=torch.float64)
    return _expected(stored + split["proj_up"] @ split["proj_down"] - scaled, scaled, smooth, top)
