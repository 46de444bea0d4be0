"""Measures of pictures without a learned judge: colours, backgrounds, distance to training.

Pictures are [batch, 4, height, width] in [-1, 1], RGBA with premultiplied colour, as the model makes them.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rfkernels.evaluation.shapes import OPAQUE, corners, unit
from rfkernels.models.emoji import to_images
from rfkernels.train.concepts import BACKGROUNDS, TINTS

__all__ = ["background_names", "colour_names", "nearest", "transparent_corners"]

CRIMSON = (334, 0.72)  # a hue and a saturation from which on pink is called red


def colour_names(pictures: Tensor, masks: Tensor | None = None) -> list[str]:
    """The word of TINTS whose hue is nearest to the main hue of the opaque, saturated pixels; "" for none.

    masks: bool[batch, height, width], the pixels that count; all by default.
    """
    images = to_images(pictures)
    masks = [True] * len(images) if masks is None else masks.numpy()
    return [_colour_name(image, mask) for image, mask in zip(images, masks, strict=True)]


def _colour_name(image: Image.Image, mask: np.ndarray | bool) -> str:
    alpha = np.asarray(image)[..., 3] / 255 * mask
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(np.float64) / 255
    chosen = (alpha > OPAQUE) & (hsv[..., 1] > 0.25) & (hsv[..., 2] > 0.2)
    if chosen.mean() < 0.02:
        return ""
    bins = np.bincount((hsv[..., 0][chosen] * 71.99).astype(int), hsv[..., 1][chosen], minlength=72)
    smooth = sum(np.roll(bins, k) for k in range(-2, 3))
    centre = (smooth.argmax() + 0.5) * 5.0
    turn = (hsv[..., 0][chosen] * 360 - centre + 180) % 360 - 180
    main = np.abs(turn) < 15
    hue = centre + np.average(turn[main])
    name = min(TINTS, key=lambda name: abs((hue - TINTS[name][0] + 180) % 360 - 180))
    deep = hue % 360 > CRIMSON[0] and hsv[..., 1][chosen][main].mean() > CRIMSON[1]
    return "red" if name == "pink" and deep else name


def background_names(pictures: Tensor) -> list[str]:
    """The background word whose colour is nearest to the corners' median; "" where they are not opaque."""
    ground = corners(unit(pictures)).median(-1).values
    names = list(BACKGROUNDS)
    palette = torch.tensor([BACKGROUNDS[n] for n in names]) / 255
    index = torch.cdist(ground[:, :3], palette).argmin(1).tolist()
    solid = (ground[:, 3] > OPAQUE).tolist()
    return [names[i] if opaque else "" for i, opaque in zip(index, solid, strict=True)]


def transparent_corners(pictures: Tensor) -> Tensor:
    """bool[batch]: whether at least three of the four corners let 90 % of the ground through."""
    return (corners(unit(pictures))[:, 3] < 1 - OPAQUE).sum(-1) >= 3


def nearest(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (RMS over RGBA in [0, 1]) and index of the nearest reference of each picture, both [batch]."""
    a, b = unit(pictures).flatten(1), unit(references).flatten(1)
    squared = (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp(min=0)
    best, index = squared.min(1)
    return best.sqrt() / math.sqrt(a.shape[1]), index
