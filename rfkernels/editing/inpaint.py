r"""Pictures from pictures: a start at some noise level, known regions, time travel, outpainting.

Meng et al., "SDEdit", 2021; Lugmayr et al., "RePaint", 2022; Wang et al., "Be-Your-Outpainter" (MOTIA), 2024.
The last two were written for diffusion models; the forms for a rectified flow follow from
:math:`x_\sigma = (1-\sigma)x_0 + \sigma\epsilon`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfkernels.editing._launches import Launches, Velocity, evaluate, falling, levels, like, weight_of
from rfkernels.ops import noise_keys, renoise
from rfkernels.samplers import sample

__all__ = ["Travel", "image_to_image", "inpaint", "outpaint_weights", "travel_coefficients"]


def image_to_image(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    strength: float,
    method: str = "euler",
    guidance: float | Tensor | None = None,
    seeds: int | Sequence[int] = 0,
) -> Tensor:
    r"""Returns the picture `x` drawn again from the noise level that `strength` of the steps leave to go.

    SDEdit: of N steps the last :math:`\lceil strength\,N\rceil` run, from :math:`(1-\sigma)x + \sigma z`. 1
    starts from pure noise, if the grid starts at 1.

    Args:
        velocity, method, guidance: as of `sample`.
        x: the picture, `[batch, ...]`.
        sigmas: falling, strictly, within 0 .. 1.
        strength: above 0, at most 1.
        seeds: one for all or one for each sample.

    Raises:
        ValueError: a strength or a grid that is none; as `sample`.
    """
    grid = falling("image_to_image", sigmas)
    if not 0 < strength <= 1:
        raise ValueError(f"image_to_image: strength must be above 0 and at most 1, got {strength}")
    count = len(grid) - 1
    first = count - math.ceil(count * strength - 1e-9)
    keys = noise_keys(seeds, len(x), device=x.device)
    noisy = renoise(x.contiguous(), 1 - grid[first], grid[first], keys)
    rest = torch.tensor(grid[first:], dtype=torch.float64)
    return sample(velocity, noisy, rest, method=method, guidance=guidance)


def travel_coefficients(sigma: float, end: float) -> tuple[float, float]:
    r"""k, c of :math:`x' = k x + c z` from level `sigma` up to `end`: for `rfkernels.ops.renoise`.

    :math:`k = (1-\sigma')/(1-\sigma)`, :math:`c = \sqrt{\sigma'^2 - k^2\sigma^2}`.

    Raises:
        ValueError: an end below sigma, or levels outside 0 .. 1 (sigma below 1).
    """
    if not (0 <= sigma < 1 and sigma <= end <= 1):
        raise ValueError(f"travel: 0 <= sigma <= end <= 1, sigma below 1, is required, got {sigma} to {end}")
    k = (1 - end) / (1 - sigma)
    return k, math.sqrt(max(end**2 - (k * sigma) ** 2, 0.0))


@dataclass(frozen=True)
class Travel:
    """Time travel: after every `jump` steps back up by as many, `repeat` times, in the first part of the
    steps.

    The steps harmonise what is made with what is known; RePaint uses 10 and 9, MOTIA 3 and 4 until .6.
    """

    jump: int = 3
    repeat: int = 4
    until: float = 0.6

    def __post_init__(self) -> None:
        if self.jump < 1 or self.repeat < 0:
            got = f"{self.jump}, {self.repeat}"
            raise ValueError(f"Travel: jump >= 1 and repeat >= 0 are required, got {got}")

    def path(self, steps: int) -> list[tuple[int, int]]:
        """(index of the level to evaluate at, index of the level to go on from), in order."""
        path: list[tuple[int, int]] = []
        for first in range(0, steps, self.jump):
            last = min(first + self.jump, steps)
            segment = [(i, i + 1) for i in range(first, last)]
            again = self.repeat if last - first == self.jump and last - 1 < self.until * steps else 0
            path += ([*segment[:-1], (last - 1, first)]) * again + segment
        return path


@torch.no_grad()
def inpaint(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    known: Tensor,
    mask: Tensor,
    travel: Travel | None = None,
    guidance: float | Tensor | None = None,
    seeds: int | Sequence[int] = 0,
) -> Tensor:
    r"""Returns data equal to `known` where `mask` is 1, to the bit, and drawn by the flow elsewhere.

    Each step is one launch, :math:`x' = m((1-\sigma')y + \sigma'z) + (1-m)(x + (\sigma'-\sigma)v)` with fresh
    noise z, which is never stored; a step that ends in time travel up to a higher level is one launch too.

    Args:
        velocity: `velocity(x, sigma)`; (uncond, cond) with `guidance`.
        x: the state at `sigmas[0]`, `[batch, ...]`; left as it is.
        sigmas: falling, strictly, within 0 .. 1; the result is exact where the last is 0.
        known, mask: y and m, broadcast to `x`. Between 0 and 1 the mask blends.
        travel: time travel, None for none.
        guidance: scale of classifier-free guidance, a number or `[batch]`.
        seeds: one for all or one for each sample.

    Raises:
        ValueError: a grid that does not fall within 0 .. 1, tensors that do not broadcast, a velocity of the
            wrong kind.
    """
    name = "inpaint"
    grid = falling(name, sigmas)
    count = len(grid) - 1
    path = (travel or Travel(count, 0)).path(count)
    free, held = [], []
    for i, to in path:
        k, c = travel_coefficients(grid[i + 1], grid[to]) if to <= i else (1.0, 0.0)
        free.append([{"x": k, "v": k * (grid[i + 1] - grid[i]), "z": c}])
        held.append([{"y": 1 - grid[to], "z": grid[to]}])
    weight = weight_of(name, guidance, x)
    launch = Launches(x, ["x", "v", "y"], free, inside=held, weight=weight, noise="moving")
    y, mask = like(name, "known", known, x), like(name, "mask", mask, x)
    keys = noise_keys(seeds, len(x), step=1, device=x.device)
    sigma, x, out = levels(grid, x), x.contiguous(), None
    for at, (i, _) in enumerate(path):
        v = evaluate(name, velocity, x, sigma[i], guidance is not None)
        (x,) = out = launch(at, [x, *v, y], mask=mask, keys=keys, out=out)
    return x


def outpaint_weights(height: int, width: int, known: tuple[int, int, int, int], *, k: float = 1.0) -> Tensor:
    r"""Weights of tokens by which MOTIA multiplies what a LoRA adds: 1 where known, fading outside.

    :math:`\exp(-d/(k d_{max}))` with d the distance from the token to the known box and :math:`d_{max}` the
    widest margin around it. A LoRA trained on the known part is trusted less far from it.

    Args:
        height, width: of the grid of tokens.
        known: top, left, bottom, right of the box, the last two not in it.
        k: how far the LoRA reaches.

    Returns:
        float32 `[height * width]`, in the order of the tokens of a picture.

    Raises:
        ValueError: a box that is empty or leaves the grid, or k that is not positive.
    """
    top, left, bottom, right = known
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"outpaint_weights: known must be a box in {height} x {width}, got {known}")
    if not k > 0:
        raise ValueError(f"outpaint_weights: k must be positive, got {k}")
    d_y = _distance(height, top, bottom)
    d_x = _distance(width, left, right)
    margin = max(top, left, height - bottom, width - right, 1)
    return (-torch.hypot(d_y[:, None], d_x) / (k * margin)).exp().flatten()


def _distance(n: int, start: int, stop: int) -> Tensor:
    """Of the places 0 .. n - 1 from start .. stop - 1."""
    place = torch.arange(n, dtype=torch.float32)
    return torch.maximum(start - place, place - (stop - 1)).clamp(min=0)
