"""Where the objects of a picture are: foreground, connected blobs, boxes, crops. No learned part.

Pictures are [batch, 4, size, size] in [-1, 1], RGBA with premultiplied colour. Places are shares of the
picture, x to the right, y down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["blobs", "boxes", "centres", "crop", "cut_out", "foreground"]

CORNER = 6 / 64  # edge of a corner patch, as a share
OPAQUE = 0.9
CONTRAST = 0.1  # distance in RGB of 0 .. 1 that parts an object from its background
FIELD = 64  # pixels a side in which blobs are found
MARGIN = 0.06  # around a crop, as a share of its object
SMALL = 0.3  # a blob below this share of the largest one is a detail


def unit(pictures: Tensor) -> Tensor:
    """float32 on the CPU in 0 .. 1."""
    return (pictures.detach().float().cpu().clamp(-1, 1) + 1) / 2


def corners(c: Tensor) -> Tensor:
    """[batch, channels, 4]: the mean of each corner patch."""
    k = max(1, round(c.shape[-1] * CORNER))
    patches = (c[..., :k, :k], c[..., :k, -k:], c[..., -k:, :k], c[..., -k:, -k:])
    return torch.stack([p.mean((-2, -1)) for p in patches], -1)


def foreground(pictures: Tensor, grounded: Tensor) -> Tensor:
    """bool[batch, size, size]: opaque pixels; on an opaque ground those whose colour is not the corners'.

    grounded: bool[batch], which pictures should have a ground.
    """
    c = unit(pictures)
    ground = corners(c).median(-1).values
    solid = (grounded & (ground[:, 3] > OPAQUE))[:, None, None]
    far = (c[:, :3] - ground[:, :3, None, None]).square().sum(1).sqrt() > CONTRAST
    return torch.where(solid, far, c[:, 3] > 0.5)


def cut_out(pictures: Tensor, masks: Tensor) -> Tensor:
    """The pictures with nothing outside of the masks."""
    return torch.where(masks[:, None], pictures, -1.0)


def blobs(masks: Tensor, close: float = 0.0) -> list[Tensor]:
    """The 8-connected parts of each mask [batch, size, size], largest first: bool[parts, size, size] each.

    Parts below 0.3 of the largest are left out.

    Args:
        close: gaps up to this share of the picture are bridged: parts are found on the mask grown by it.
    """
    size = masks.shape[-1]
    field = F.adaptive_max_pool2d(masks[:, None].float(), min(size, FIELD))
    k = 2 * round(close * field.shape[-1] / 2) + 1
    field = F.max_pool2d(field, k, 1, k // 2) if k > 1 else field
    names = _labels(field)
    names = F.interpolate(names, size=(size, size), mode="nearest")[:, 0] * masks
    return [_parts(n) for n in names]


def _labels(field: Tensor) -> Tensor:
    """[batch, 1, h, w]: a number for each connected part, 0 where the field is 0."""
    count = field[0].numel()
    names = torch.arange(1, count + 1, dtype=torch.float32).view(1, *field.shape[1:]) * field
    while True:
        grown = names
        for _ in range(8):
            grown = F.max_pool2d(grown, 3, 1, 1) * field
        if torch.equal(grown, names):
            return names
        names = grown


def _parts(names: Tensor) -> Tensor:
    found, areas = names[names > 0].unique(return_counts=True)
    if not len(found):
        return torch.zeros(0, *names.shape, dtype=torch.bool)
    order = areas.argsort(descending=True, stable=True)
    order = order[areas[order] >= SMALL * areas.max()]
    return names[None] == found[order][:, None, None]


def boxes(masks: Tensor) -> Tensor:
    """[batch, 4]: left, top, right, bottom of each mask as shares; all 0 where it is empty."""
    size = masks.shape[-1]
    edges = []
    for axis in (1, 2):  # columns, rows
        seen = masks.any(axis).float()
        edges += [(seen.argmax(1), size - seen.flip(1).argmax(1))]
    (left, right), (top, bottom) = edges
    found = torch.stack([left, top, right, bottom], 1).float() / size
    return found * masks.any(1).any(1)[:, None]


def centres(masks: Tensor) -> Tensor:
    """[batch, 2]: x and y of each mask's middle, that of its box; 0.5 of the empty one's."""
    box = boxes(masks)
    middle = (box[:, :2] + box[:, 2:]) / 2
    return torch.where((box[:, 2:] > box[:, :2]).all(1, keepdim=True), middle, 0.5)


def crop(pictures: Tensor, box: Tensor, side: int, margin: float = MARGIN) -> Tensor:
    """[batch, channels, side, side]: the square around each box [batch, 4], by area and bilinear means.

    Beyond the picture there is nothing.
    """
    span = (box[:, 2:] - box[:, :2]).amax(1).clamp(min=0.05) * (1 + 2 * margin)
    middle = (box[:, 2:] + box[:, :2]) / 2
    fine = 4 if pictures.shape[-1] > side else 1
    at = (torch.arange(side * fine) + 0.5) / (side * fine) - 0.5
    x = middle[:, :1] + span[:, None] * at
    y = middle[:, 1:] + span[:, None] * at
    places = torch.stack([x[:, None].expand(-1, len(at), -1), y[:, :, None].expand(-1, -1, len(at))], -1)
    taken = F.grid_sample(
        pictures + 1, 2 * places - 1, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return F.avg_pool2d(taken, fine) - 1
