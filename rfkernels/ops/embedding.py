"""What enters a transformer: embedded timesteps, and images cut into tokens."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import define

__all__ = ["patchify", "timestep_embedding", "timestep_embedding_reference", "unpatchify"]


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    scale: float = 1.0,
    max_period: float = 10000.0,
    downscale_freq_shift: float = 0.0,
    flip_sin_to_cos: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Returns :math:`[\cos a, \sin a]` with :math:`a_i = s\,(t\,f_i)`,
    :math:`f_i = P^{-i/(h - \delta)}`, :math:`i = 0, \dots, h - 1`, :math:`h = \lfloor dim/2 \rfloor`.

    Sinusoids of Ho et al., "Denoising diffusion probabilistic models", 2020, in the order of operations of
    diffusers' `get_timestep_embedding`; frequencies and angles in float32. An odd `dim` ends in a zero.

    Args:
        t: `[*lead]`, any floating or integer dtype, contiguous.
        dim: the width of the result, `[*lead, dim]`.
        scale: s.
        max_period: P.
        downscale_freq_shift: :math:`\delta`; 0 in most models, 1 in DDPM.
        flip_sin_to_cos: cosines first; False: sines first.
        dtype: of the result, float64, float32, float16 or bfloat16.

    Raises:
        ValueError: a width below 1, or h equal to `downscale_freq_shift`.
    """
    if dim < 1:
        raise ValueError(f"timestep_embedding: dim must be at least 1, got {dim}")
    if dim // 2 == downscale_freq_shift and dim > 1:
        raise ValueError(
            f"timestep_embedding: downscale_freq_shift must differ from dim // 2, got {downscale_freq_shift}"
        )
    return _timestep_embedding(
        t, dim, float(scale), float(max_period), float(downscale_freq_shift), flip_sin_to_cos, dtype
    )


def _frequencies(half: int, max_period: float, shift: float, device: torch.device) -> Tensor:
    """float32[half], by the operations of diffusers."""
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(exponent / (half - shift))


_cached_frequencies = lru_cache(64)(_frequencies)


def timestep_embedding_reference(
    t: Tensor,
    dim: int,
    scale: float = 1.0,
    max_period: float = 10000.0,
    downscale_freq_shift: float = 0.0,
    flip_sin_to_cos: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition of `timestep_embedding` in plain torch."""
    freqs = _frequencies(dim // 2, max_period, downscale_freq_shift, t.device)
    angle = scale * (t.float()[..., None] * freqs)
    parts = [angle.cos(), angle.sin()][:: 1 if flip_sin_to_cos else -1]
    parts += [angle.new_zeros((*t.shape, dim % 2))]
    return torch.cat(parts, -1).to(dtype)


def _timestep_embedding_kernel(out, t, dim, scale, max_period, shift, flip, dtype):
    # A tensor made while a CUDA graph is captured belongs to the graph.
    captured = t.is_cuda and torch.cuda.is_current_stream_capturing()
    frequencies = _frequencies if captured else _cached_frequencies
    _C.timestep_embedding(out, t, frequencies(dim // 2, max_period, shift, t.device), scale, flip)


def _timestep_embedding_backward(grad, needs, t, dim, scale, max_period, shift, flip, dtype):
    half = dim // 2
    rates = scale * _frequencies(half, max_period, shift, t.device)
    angle = t.float()[..., None] * rates
    cosine, sine = (grad[..., :half], grad[..., half : 2 * half])[:: 1 if flip else -1]
    grad_t = ((sine * angle.cos() - cosine * angle.sin()) * rates).sum(-1).to(t.dtype)
    return (grad_t, *[None] * 6)


_timestep_embedding = define(
    "timestep_embedding",
    "Tensor t, int dim, float scale, float max_period, float shift, bool flip, ScalarType dtype",
    _timestep_embedding_kernel,
    lambda t, dim, scale, max_period, shift, flip, dtype: t.new_empty((*t.shape, dim), dtype=dtype),
    timestep_embedding_reference,
    _timestep_embedding_backward,
)


def patchify(x: Tensor, patch: int | Sequence[int], order: str = "cp") -> Tensor:
    """Cuts an image or a video into tokens: one copy, by torch.

    Args:
        x: `[B, C, H, W]` or `[B, C, F, H, W]`.
        patch: the size of a patch along every axis behind the channels, or one size for all of them.
        order: of the values of a token: "cp" has channels slowest (FLUX, Qwen-Image), "pc" fastest (HiDream,
            Lumina2, Z-Image).

    Returns:
        `[B, tokens, C * patch]`, tokens in the order of the image, row by row.

    Raises:
        ValueError: sizes that patches do not divide, another number of axes, another order.
    """
    if x.ndim not in (4, 5):
        raise ValueError(f"patchify: x must be [B, C, H, W] or [B, C, F, H, W], got {list(x.shape)}")
    patch = _patch("patchify", patch, x.ndim - 2)
    grid = _grid("patchify", x.shape[2:], patch)
    axes = [n for pair in zip(grid, patch, strict=True) for n in pair]
    cut = x.reshape(*x.shape[:2], *axes).permute(_to_tokens("patchify", order, len(grid)))
    return cut.reshape(x.shape[0], math.prod(grid), x.shape[1] * math.prod(patch))


def unpatchify(tokens: Tensor, size: Sequence[int], patch: int | Sequence[int], order: str = "cp") -> Tensor:
    """Puts tokens together to an image or a video, the inverse of `patchify`: one copy, by torch.

    Args:
        tokens: `[B, tokens, C * patch]`.
        size: of the result behind the channels, `(H, W)` or `(F, H, W)`.
        patch, order: as in `patchify`; the output of SD3, PixArt and DiT is "pc".

    Returns:
        `[B, C, *size]`.

    Raises:
        ValueError: a size that patches do not divide, or tokens of another number or width.
    """
    if len(size) not in (2, 3):
        raise ValueError(f"unpatchify: size must be (H, W) or (F, H, W), got {tuple(size)}")
    patch = _patch("unpatchify", patch, len(size))
    grid = _grid("unpatchify", size, patch)
    count, values = math.prod(grid), math.prod(patch)
    if tokens.ndim != 3 or tokens.shape[1] != count or tokens.shape[2] % values:
        raise ValueError(
            f"unpatchify: tokens must be [B, {count}, {values} C] for size {tuple(size)} and patch {patch}, "
            f"got {list(tokens.shape)}"
        )
    channels = tokens.shape[2] // values
    inside = (channels, *patch) if order == "cp" else (*patch, channels)
    permutation = _to_tokens("unpatchify", order, len(grid))
    inverse = [permutation.index(axis) for axis in range(len(permutation))]
    return tokens.reshape(-1, *grid, *inside).permute(inverse).reshape(tokens.shape[0], channels, *size)


def _patch(op: str, patch: int | Sequence[int], axes: int) -> tuple[int, ...]:
    sizes = (patch,) * axes if isinstance(patch, int) else tuple(patch)
    if len(sizes) != axes or min(sizes) < 1:
        raise ValueError(f"{op}: patch must be a positive size or {axes} of them, got {patch}")
    return sizes


def _grid(op: str, size: Sequence[int], patch: tuple[int, ...]) -> tuple[int, ...]:
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"{op}: patch {patch} must divide the size, got {tuple(size)}")
    return tuple(n // p for n, p in zip(size, patch, strict=True))


def _to_tokens(op: str, order: str, axes: int) -> list[int]:
    """The permutation of [B, C, grid 0, patch 0, grid 1, patch 1, ...] to [B, *grid, values of a token]."""
    grid, patch = [2 + 2 * i for i in range(axes)], [3 + 2 * i for i in range(axes)]
    if order == "cp":
        return [0, *grid, 1, *patch]
    if order == "pc":
        return [0, *grid, *patch, 1]
    raise ValueError(f"{op}: order must be cp or pc, got {order}")
