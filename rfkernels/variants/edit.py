r"""Editing by instruction: HiDream-E1 (HiDream-ai, 2025), source and result side by side, three velocities.

The transformer reads [noisy | source] along the width and answers with -v; `concat.beside(velocity, source,
dim=-1, negate=True)` makes the velocity of the result.
"""

import torch
from torch import Tensor

from rfkernels.ops._register import accumulator
from rfkernels.variants.concat import Velocity, beside

__all__ = ["edit_sources", "edit_velocity", "hidream_edit_guidance"]


def edit_sources(source: Tensor) -> Tensor:
    """The sources `[3 batch, ...]` of the three velocities (u, i, f): none, the source and the source."""
    return torch.cat([torch.zeros_like(source), source, source])


def hidream_edit_guidance(
    uncond: Tensor,
    image: Tensor,
    full: Tensor,
    s_image: float | Tensor,
    s_text: float | Tensor,
    clip_norm: bool = True,
) -> Tensor:
    r"""Returns the velocity that HiDream-E1 makes of three.

    With u without source, i with the source and without the instruction, f with both: without `clip_norm`
    :math:`u + s_i (i - u) + s_t (f - i)`, else

    .. math:: u + s_i (p' - u),\quad p = i + s_t (f - i),\quad
              p' = p \min(1, \|f\| / (\|p\| + 10^{-8}))

    with norms over the channels. With `clip_norm` the texts of (u, i, f) are (instruction, negative,
    instruction), without it (negative, negative, instruction).

    Args:
        uncond, image, full: u, i, f, `[batch, channels, ...]`.
        s_image, s_text: numbers, or tensors `[batch]`; released: 1.5 to 4, and 3 or 5.
    """
    if not uncond.shape == image.shape == full.shape or uncond.ndim < 2:
        shapes = ", ".join(str(list(t.shape)) for t in (uncond, image, full))
        raise ValueError(f"hidream_edit_guidance: three [batch, channels, ...] required, got {shapes}")
    u, i, f = (t.to(accumulator(t.dtype)) for t in (uncond, image, full))
    s_image, s_text = (_rows(s, u) for s in (s_image, s_text))
    if clip_norm:
        p = i + s_text * (f - i)
        ratio = _norm(f) / (_norm(p) + 1e-8)
        out = u + s_image * (p * ratio.clamp(0, 1) - u)
    else:
        out = u + s_image * (i - u) + s_text * (f - i)
    return out.to(uncond.dtype)


def edit_velocity(
    velocity: Velocity,
    source: Tensor,
    s_image: float | Tensor,
    s_text: float | Tensor,
    *,
    clip_norm: bool = True,
    negate: bool = True,
) -> Velocity:
    """Returns the guided velocity of the result, for `sample`: one evaluation of a batch of three.

    Args:
        velocity: of `[3 batch, channels, height, 2 width]`, samples in the order u, i, f, whose texts are its
            own matter (see `hidream_edit_guidance`).
        source: latents `[batch, channels, height, width]`.
        negate: the model answers with -v.
    """
    joint = beside(velocity, edit_sources(source), dim=-1, negate=negate)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        three = joint(torch.cat([x] * 3), torch.cat([sigma] * 3)).chunk(3)
        return hidream_edit_guidance(*three, s_image, s_text, clip_norm)

    return guided


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=1, keepdim=True)


def _rows(scale: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return scale
    if scale.shape not in (torch.Size([]), like.shape[:1]):
        raise ValueError(
            f"hidream_edit_guidance: scales must be numbers or [{len(like)}], got {list(scale.shape)}"
        )
    return scale.to(like).reshape(-1, *[1] * (like.ndim - 1))
