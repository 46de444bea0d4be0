"""Draws scenes in batches with torch: glyphs at fitting sizes, placed, tinted, and laid over each other."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels.train import concepts
from rfkernels.train.glyphs import Bank
from rfkernels.train.scenes import Scene

__all__ = ["MAX_ITEMS", "Packed", "Renderer"]

MAX_ITEMS = 4
LEVELS = 3  # the picture's edge, its half, its quarter
WHOLE = -1  # the level of a glyph that fills the picture as it is
NEAR_HUE = 50 / 360  # pixels this near to the dominant hue are tinted
MIN_SATURATION = 0.2  # if they are more saturated than this


class Packed(NamedTuple):
    """Scenes as arrays of fixed shapes.

    glyphs: int64[batch, 4], rows of the bank from back to front, -1 for none. levels: int64[batch, 4], which
    mip level is read. matrices: float32[batch, 4, 6], the map from picture to glyph, both in [-1, 1].
    tints: float32[batch, 4, 6]: the glyph's hue in turns (-1: no tint), saturation and value factors, and how
    far each of red, green, blue falls with saturation. grounds: float32[batch, 4], RGBA of the background.
    """

    glyphs: np.ndarray
    levels: np.ndarray
    matrices: np.ndarray
    tints: np.ndarray
    grounds: np.ndarray


def _falls(hue: float) -> list[float]:
    """w of red, green, blue in c = v (1 - s w) for a hue in degrees."""
    k = [(n + hue / 60) % 6 for n in (5, 3, 1)]
    return [max(0.0, min(x, 4 - x, 1.0)) for x in k]


FALLS = {name: _falls(hue) for name, (hue, _, _) in concepts.TINTS.items()}


def _turned(picture: Tensor, tints: Tensor) -> Tensor:
    """Premultiplied [n, 4, h, w] with the pixels near each glyph's dominant hue in the colour of `tints`."""
    alpha = picture[:, 3:]
    rgb = (picture[:, :3] / alpha.clamp(min=1e-6)).clamp(0, 1)
    r, g, b = rgb.unbind(1)
    value, low = rgb.amax(1), rgb.amin(1)
    spread = value - low
    safe = spread.clamp(min=1e-6)
    hue = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    saturation = spread / value.clamp(min=1e-6)
    own, more, light = (tints[:, i, None, None] for i in range(3))
    distance = ((hue / 6 - own + 0.5).remainder(1) - 0.5).abs()
    chosen = (distance < NEAR_HUE) & (saturation > MIN_SATURATION)
    s, v = (saturation * more).clamp(0, 1), (value * light).clamp(0, 1)
    new = v[:, None] * (1 - s[:, None] * tints[:, 3:, None, None])
    return torch.cat([torch.where(chosen[:, None], new * alpha, picture[:, :3]), alpha], 1)


class Renderer:
    """Draws scenes of a bank on a device: `renderer(scenes)` is float32[batch, 4, size, size] in [-1, 1].

    Pictures are RGBA, premultiplied, and independent of the batch that they are in. Glyphs are kept as uint8
    at the picture's size, half and a quarter of it, each a mean over areas of the bank's pictures.

    Args:
        bank: the glyphs; its size may be another than that of the pictures.
        device: where pictures are made.
        size: edge of the pictures in pixels, a multiple of 4; default the bank's.
    """

    def __init__(self, bank: Bank, device: str | torch.device = "cpu", size: int | None = None):
        self.bank, self.device, self.size = bank, torch.device(device), bank.size if size is None else size
        if self.size < 4 or self.size % 4:
            raise ValueError(f"Renderer: size was required to be a multiple of 4, got {self.size}")
        self.hues = np.array([-1.0 if g.hue is None else g.hue / 360 for g in bank.glyphs])
        images = torch.from_numpy(bank.images)
        self.levels = [self._level(images, self.size >> n) for n in range(LEVELS)]

    def _level(self, images: Tensor, edge: int) -> Tensor:
        """uint8[n, edge, edge, 4] on the device."""
        if edge == images.shape[1]:
            return images.to(self.device)
        mode = {"mode": "area"} if edge < images.shape[1] else {"mode": "bilinear", "align_corners": False}
        parts = []
        for part in images.split(256):
            x = F.interpolate(part.to(self.device).permute(0, 3, 1, 2).float(), (edge, edge), **mode)
            parts.append(x.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous())
        return torch.cat(parts)

    def __call__(self, scenes: list[Scene]) -> Tensor:
        return self.draw(self.pack(scenes))

    def pack(self, scenes: list[Scene]) -> Packed:
        """The scenes as arrays; ValueError for more than 4 items or a tint of a glyph without hue."""
        n = len(scenes)
        glyphs, levels = np.full((n, MAX_ITEMS), -1), np.zeros((n, MAX_ITEMS), np.int64)
        places, tints = np.zeros((n, MAX_ITEMS, 4)), np.zeros((n, MAX_ITEMS, 6), np.float32)
        grounds = np.zeros((n, 4), np.float32)
        places[..., 0], tints[..., 0] = 1, -1
        for i, scene in enumerate(scenes):
            if not 1 <= len(scene.items) <= MAX_ITEMS:
                raise ValueError(f"Renderer: 1 to {MAX_ITEMS} items were required, got {len(scene.items)}")
            for k, item in enumerate(scene.items):
                glyphs[i, k] = item.glyph
                if (item.size, item.x, item.y, item.angle) == (1, 0.5, 0.5, 0):
                    levels[i, k] = WHOLE
                else:
                    places[i, k] = item.size, item.x, item.y, item.angle
                    levels[i, k] = (item.size <= 0.66) + (item.size <= 0.33)
                if item.tint is not None:
                    tints[i, k] = self._tint(item.glyph, item.tint)
            if scene.rgb is not None:
                grounds[i] = *scene.rgb, 1
        return Packed(glyphs, levels, _matrices(places), tints, grounds)

    def _tint(self, glyph: int, colour: str) -> tuple[float, ...]:
        if colour not in concepts.TINTS or self.hues[glyph] < 0:
            raise ValueError(
                f"Renderer: a tint of {', '.join(concepts.TINTS)} and a glyph with a hue were required, "
                f"got {colour!r} for glyph {glyph} of hue {self.bank.glyphs[glyph].hue}"
            )
        return (self.hues[glyph], *concepts.TINTS[colour][1:], *FALLS[colour])

    @torch.no_grad()
    def draw(self, arrays: Packed) -> Tensor:
        """float32[batch, 4, size, size] in [-1, 1] of packed scenes (numpy arrays or CPU tensors)."""
        glyphs, levels, matrices, tints, grounds = (np.asarray(a) for a in arrays)
        ground = torch.from_numpy(grounds).to(self.device)[..., None, None]
        out = ground.expand(-1, -1, self.size, self.size).clone()
        for slot in range(MAX_ITEMS):
            present = glyphs[:, slot] >= 0
            for level in range(WHOLE, LEVELS):
                (which,) = np.nonzero(present & (levels[:, slot] == level))
                if len(which):
                    parts = (a[which, slot] for a in (glyphs, matrices, tints))
                    self._over(out, which, self._items(level, *parts))
        return out.mul_(2).sub_(1)

    def _items(self, level: int, glyphs: np.ndarray, matrices: np.ndarray, tints: np.ndarray) -> Tensor:
        """Premultiplied [n, 4, size, size] in 0..1 of glyphs of one level."""
        rows = torch.from_numpy(glyphs).to(self.device)
        picture = self.levels[max(level, 0)][rows].permute(0, 3, 1, 2).to(torch.float32) / 255
        (tinted,) = np.nonzero(tints[:, 0] >= 0)
        if len(tinted):
            at = torch.from_numpy(tinted).to(self.device)
            picture[at] = _turned(picture[at], torch.from_numpy(tints[tinted]).to(self.device))
        if level == WHOLE:
            return picture
        grid = self._grid(torch.from_numpy(matrices).to(self.device))
        return F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _grid(self, matrices: Tensor) -> Tensor:
        """[n, size, size, 2] points of the glyphs; no matrix product, whose sums depend on the batch."""
        axis = (torch.arange(self.size, device=self.device, dtype=torch.float32) * 2 + 1) / self.size - 1
        x, y = axis[None, None, :], axis[None, :, None]
        a, b, c, d, e, f = (m[:, None, None] for m in matrices.unbind(1))
        return torch.stack([a * x + b * y + c, d * x + e * y + f], -1)

    def _over(self, out: Tensor, which: np.ndarray, top: Tensor) -> None:
        """Lays premultiplied pictures over the scenes `which` of `out`: top + (1 - alpha) below."""
        at = torch.from_numpy(which).to(self.device)
        out[at] = top + (1 - top[:, 3:]) * out[at]


def _matrices(places: np.ndarray) -> np.ndarray:
    """float32[..., 6]: glyph point = R(-angle) (picture point - centre) / size, all in [-1, 1], y down."""
    size, x, y, angle = np.moveaxis(places, -1, 0)
    cos, sin = np.cos(np.deg2rad(angle)) / size, np.sin(np.deg2rad(angle)) / size
    x, y = 2 * x - 1, 2 * y - 1
    rows = (cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y)
    return np.stack(rows, -1).astype(np.float32)
