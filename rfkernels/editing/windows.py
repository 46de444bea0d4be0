"""Long series and videos by windows: where they start, how they are cut, averaged and joined."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels.editing._launches import Velocity

__all__ = ["cut_windows", "join_windows", "window_average", "window_starts"]


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """0, stride, 2 stride, ..., and where they leave a rest one more window that ends at the end.

    Raises:
        ValueError: a window that does not fit, or a stride that leaves gaps.
    """
    if not (1 <= stride <= size <= length):
        raise ValueError(
            f"windows: 1 <= stride <= size <= length is required, got {stride}, {size}, {length}"
        )
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] + size == length else [*starts, length - size]


def cut_windows(x: Tensor, size: int, starts: Sequence[int]) -> Tensor:
    """`[batch, ..., length]` to `[batch, windows, ..., size]`."""
    return torch.stack([x[..., start : start + size] for start in starts], 1)


def join_windows(windows: Tensor, starts: Sequence[int]) -> Tensor:
    """The inverse of `cut_windows`: of each window what the windows before it do not hold."""
    size = windows.shape[-1]
    parts, end = [windows[:, 0]], starts[0] + size
    for i, start in enumerate(starts[1:], 1):
        parts.append(windows[:, i, ..., end - start :])
        end = start + size
    return torch.cat(parts, -1)


def window_average(velocity: Velocity, size: int, stride: int, *, dim: int = 2) -> Velocity:
    """The velocity of a long video from one of short ones: the mean over all windows that hold a frame.

    Windows run one after the other. In videos of `size` frames or fewer it is `velocity` itself. Noise levels
    per frame are cut as the frames are.

    Args:
        velocity: of `size` frames; a tensor, or (uncond, cond).
        size, stride: MOTIA 16 and 4.
        dim: the axis of frames, 2 of `[batch, channels, frames, height, width]`.
    """

    def averaged(x: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, ...]:
        length = x.shape[dim]
        if length <= size:
            return velocity(x, sigma)
        sums: list[Tensor] = []
        count = torch.zeros(length, dtype=torch.float32, device=x.device)
        single = True
        for start in window_starts(length, size, stride):
            per_frame = sigma.ndim > dim and sigma.shape[dim] == length
            level = sigma.narrow(dim, start, size) if per_frame else sigma
            result = velocity(x.narrow(dim, start, size).contiguous(), level)
            single = isinstance(result, Tensor)
            results = [result] if single else list(result)
            sums = sums or [torch.zeros_like(x, memory_format=torch.contiguous_format) for _ in results]
            for total, part in zip(sums, results, strict=True):
                total.narrow(dim, start, size).add_(part)
            count[start : start + size] += 1
        shape = [length if axis == dim else 1 for axis in range(x.ndim)]
        means = tuple(total.div_(count.view(shape)) for total in sums)
        return means[0] if single else means

    return averaged
