r"""Vectorised timesteps: every frame of a video at a noise level of its own.

Liu et al., "PUSA V1.0: surpassing Wan-I2V by vectorised timestep adaptation", 2025. A model that takes one
timestep for each frame conditions on frames by giving them less noise: frame f runs along :math:`m_f s_i` of
the grid s with a multiplier 0 .. 1, 1 for a frame to generate, 0 for one that is kept as it is. On the device
a grid is a row of levels `[batch, 1, frames]` a step, so a step stays one launch.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rfkernels.editing._launches import Velocity, like
from rfkernels.ops import linear_combination, noise_keys, philox_normal
from rfkernels.ops._register import accumulator
from rfkernels.samplers import sample

__all__ = [
    "extend_video",
    "extension",
    "frame_levels",
    "image_to_video",
    "pusa_start",
    "sample_video",
    "start_end",
]

FRAMES = 2  # the axis of frames in [batch, channels, frames, height, width]


def image_to_video(m: float = 0.2) -> dict[int, float]:
    """Multipliers of known frames for a video from its first; 0 keeps the picture to the bit."""
    return {0: m}


def start_end(frames: int, m: Sequence[float] = (0.2, 0.5)) -> dict[int, float]:
    """Those for a video between its first and last of `frames` latent frames (Wan: 21 of 81 frames)."""
    return {0: m[0], frames - 1: m[1]}


def extension(m: Sequence[float] = (0.0, 0.3, 0.4, 0.5)) -> dict[int, float]:
    """Those for a video that goes on from its first few latent frames."""
    return dict(enumerate(m))


def frame_levels(sigmas: Tensor, frames: int, known: Mapping[int, float]) -> Tensor:
    r"""The grid of every frame, :math:`m_f s_i`: float64 `[steps + 1, 1, 1, frames]` for `sample`.

    Args:
        sigmas: s, `[steps + 1]`.
        known: multipliers of known frames; that of the others is 1.

    Raises:
        ValueError: a frame that there is not, or a multiplier outside 0 .. 1.
    """
    m = _multipliers(frames, known)
    return torch.as_tensor(sigmas, dtype=torch.float64)[:, None, None, None] * m


def pusa_start(noise: Tensor, video: Tensor, known: Mapping[int, float], *, level: float = 1.0) -> Tensor:
    r"""Returns the first state, :math:`(1-m_f s_0)z + m_f s_0\epsilon` for known frames and noise for the
    others.

    Args:
        noise: `[batch, channels, frames, height, width]`.
        video: z, broadcast to `noise`; only its known frames are read.
        known: multipliers of known frames.
        level: :math:`s_0`.

    Raises:
        ValueError: as `frame_levels`, or a video that does not broadcast.
    """
    frames = noise.shape[FRAMES]
    m = _multipliers(frames, known) * level
    given = torch.zeros(frames, dtype=torch.bool)
    given[list(known)] = True
    coefs = torch.stack([torch.where(given, m, 1.0), torch.where(given, 1 - m, 0.0)])
    coefs = coefs[:, None, None].to(noise.device, accumulator(noise.dtype))
    video = like("pusa_start", "video", video, noise)
    if not given.all():  # what is not known may be anything, infinities included
        video = video.masked_fill(~given.to(video.device).view(1, 1, -1, 1, 1), 0)
    return linear_combination([noise.contiguous(), video.contiguous()], coefs)


def sample_video(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    *,
    video: Tensor | None = None,
    known: Mapping[int, float] | None = None,
    method: str = "euler",
    guidance: float | Tensor | None = None,
    seeds: int | Sequence[int] | None = None,
) -> Tensor:
    r"""Returns a video in which `known` frames are those of `video`: exactly for multiplier 0, else nearly.

    A step is :math:`x_f \mathrel{+}= v_f m_f (s_{i+1} - s_i)`, one launch. With all multipliers 1 it is
    `sample` to the bit.

    Args:
        velocity: `velocity(x, sigma)` with `sigma: [batch or 1, 1, frames]`, the level of every frame;
            (uncond, cond) with guidance.
        noise: `[batch, channels, frames, height, width]`.
        sigmas: s, from 1 (or below) to 0.
        video: known frames, broadcast to `noise`.
        known: {frame: multiplier}, see `image_to_video`, `start_end` and `extension`.
        method, guidance, seeds: as of `sample`; PUSA Euler with guidance 3.

    Raises:
        ValueError: one of `video` and `known` without the other; as `frame_levels`.
    """
    if (video is None) != (not known):
        raise ValueError("sample_video: video and known go together, got one of them")
    if noise.ndim != 5:
        got = list(noise.shape)
        raise ValueError(f"sample_video: noise must be [batch, channels, frames, height, width], got {got}")
    known = known or {}
    rows = frame_levels(sigmas, noise.shape[FRAMES], known)
    x = noise if video is None else pusa_start(noise, video, known, level=float(sigmas[0]))
    return sample(velocity, x, rows, method=method, guidance=guidance, seeds=seeds)


def extend_video(
    velocity: Velocity,
    video: Tensor,
    sigmas: Tensor,
    *,
    frames: int,
    total: int,
    m: Sequence[float] = (0.0, 0.3, 0.4, 0.5),
    guidance: float | Tensor | None = None,
    seeds: int | Sequence[int] = 0,
) -> Tensor:
    """Returns `video` made longer, to `total` latent frames, by windows that go on from its last few.

    Each window of `frames` frames is conditioned on the last `len(m)` frames so far, which stay as they are;
    its own version of them is dropped. The last window is cut.

    Args:
        velocity: as of `sample_video`, of `frames` frames.
        video: `[batch, channels, some frames, height, width]`, at least as many as `m`.
        m: multipliers of the frames to go on from.
        seeds: one for all or one for each sample; window i draws with key step i.

    Raises:
        ValueError: a window without new frames, fewer frames than `m`; as `sample_video`.
    """
    if not 0 < len(m) < frames:
        raise ValueError(f"extend_video: 1 to {frames - 1} frames to go on from are required, got {len(m)}")
    if video.shape[FRAMES] < len(m):
        raise ValueError(f"extend_video: at least {len(m)} frames are required, got {video.shape[FRAMES]}")
    window, shape = 0, [*video.shape[:2], frames, *video.shape[3:]]
    parts, length = [video], video.shape[FRAMES]
    while length < total:
        last = torch.cat(parts, FRAMES)[:, :, -len(m) :]
        keys = noise_keys(seeds, len(video), step=window, device=video.device)
        noise = philox_normal(shape, keys, dtype=video.dtype)
        start = torch.cat([last, noise[:, :, len(m) :]], FRAMES)
        made = sample_video(velocity, noise, sigmas, video=start, known=extension(m), guidance=guidance)
        parts.append(made[:, :, len(m) :])
        length, window = length + frames - len(m), window + 1
    return torch.cat(parts, FRAMES)[:, :, : max(total, video.shape[FRAMES])]


def _multipliers(frames: int, known: Mapping[int, float]) -> Tensor:
    m = torch.ones(frames, dtype=torch.float64)
    for frame, value in known.items():
        if not 0 <= frame < frames:
            raise ValueError(f"known frames must be 0 .. {frames - 1}, got {frame}")
        if not 0 <= value <= 1:
            raise ValueError(f"multipliers of frames must be 0 .. 1, got {value} for frame {frame}")
        m[frame] = value
    return m
