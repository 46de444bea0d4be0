"""Whether pictures show what their scenes say: attributes by measurement, objects by the judge.

What is measured of a kind of scene:

    plain, background   the ground, and the colour in the object's name
    tint                the colour of the object
    count               the number of connected parts
    relation            which side of a cut shows which object, or which is larger
    corner              the cell of a 3 x 3 grid that holds the object's middle, and that it is small
    turned              the angle at which the object's own glyphs match best
    accessory           which accessory, or none, on the face's own glyphs matches best

The ground counts in every kind: a named background must be there.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels.evaluation import measures, shapes
from rfkernels.evaluation.classifier import SIDE, Judge
from rfkernels.models.text import words
from rfkernels.train.concepts import TINTS
from rfkernels.train.glyphs import Bank
from rfkernels.train.layouts import Item, accessory_items, slot_of
from rfkernels.train.render import Renderer
from rfkernels.train.scenes import ANGLES, POINTS, Scene

__all__ = ["Examiner", "Verdict", "named_colour"]

CUTS = torch.linspace(0.3, 0.7, 9)  # where two objects may part, as shares of the picture
LARGEST_SMALL = 0.55  # edge of an object that still stands in a corner
BIGGER = 1.25  # least ratio of edges
FIELD, SHIFT = 64, 3  # pixels a side in which renders are compared, and by how many they may be moved
THIRDS = (0.38, 0.62)  # borders of left, middle, right


@dataclass(frozen=True)
class Verdict:
    """What is right in one picture; colour is None where the scene names none."""

    attribute: bool
    object: bool
    colour: bool | None = None

    @property
    def right(self) -> bool:
        return self.attribute and self.object


def named_colour(scene: Scene, bank: Bank) -> str | None:
    """The colour asked of a scene's object: its tint, or the one in both its label and the caption."""
    if scene.kind not in ("plain", "tint"):
        return None
    item = scene.items[0]
    label = bank.concepts[bank.glyphs[item.glyph].concept].label
    both = set(words(label)) & set(words(scene.caption))
    return item.tint or next((name for name in TINTS if name in both), None)


class Examiner:
    """Looks at pictures with a judge and, for turned objects and accessories, at renders of the bank."""

    def __init__(self, bank: Bank, judge: Judge):
        self.bank, self.judge = bank, judge
        self.labels = [bank.concepts[g.concept].label for g in bank.glyphs]
        self.renderer = Renderer(bank, "cpu", size=FIELD)
        self.styles: dict[int, list[int]] = {}  # concept -> rows
        self.worn: dict[str, list[int]] = {}  # style -> rows of what faces wear
        for row, glyph in enumerate(bank.glyphs):
            self.styles.setdefault(glyph.concept, []).append(row)
            if slot_of(self.labels[row]):
                self.worn.setdefault(glyph.style, []).append(row)

    def examine(self, scenes: list[Scene], pictures: Tensor) -> list[Verdict]:
        """A verdict for each scene and its picture [scenes, 4, size, size]."""
        if len(scenes) != len(pictures):
            raise ValueError(f"examine: {len(scenes)} scenes need as many pictures, got {len(pictures)}")
        grounded = torch.tensor([s.background is not None for s in scenes])
        masks = shapes.foreground(pictures, grounded)
        grounds = measures.background_names(pictures)
        colours = measures.colour_names(pictures, masks)
        verdicts = []
        for i, scene in enumerate(scenes):
            look = getattr(self, f"_{scene.kind}")
            attribute, thing = look(scene, pictures[i : i + 1], masks[i : i + 1])
            named = named_colour(scene, self.bank)
            colour = None if named is None else colours[i] == named
            ground = scene.background is None or grounds[i] == scene.background
            verdicts.append(Verdict(bool(attribute and ground and colour is not False), bool(thing), colour))
        return verdicts

    # Each kind: whether its attribute and its object are right in a picture [1, 4, size, size] and its mask.

    def _plain(self, scene: Scene, picture: Tensor, mask: Tensor) -> tuple[bool, bool]:
        return True, self._shows(scene, picture, mask)

    _tint = _plain

    def _corner(self, scene: Scene, picture: Tensor, mask: Tensor) -> tuple[bool, bool]:
        box = shapes.boxes(mask)[0]
        small = (box[2:] - box[:2]).max() <= LARGEST_SMALL
        cell = lambda place: [(c > THIRDS[0]) + (c > THIRDS[1]) for c in place]
        there = cell(shapes.centres(mask)[0].tolist()) == cell(POINTS[scene.relation])
        return bool(small) and there, self._shows(scene, picture, mask)

    def _count(self, scene: Scene, picture: Tensor, mask: Tensor) -> tuple[bool, bool]:
        parts = shapes.blobs(mask)[0]
        if not len(parts):
            return False, False
        views = self.views(picture.expand(len(parts), -1, -1, -1), parts)
        best = self.judge.scores(views).mean(0).argmax()
        return len(parts) == len(scene.items), int(best) == self._kind(scene.items[0])

    def _relation(self, scene: Scene, picture: Tensor, mask: Tensor) -> tuple[bool, bool]:
        at = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1]
        before = at < CUTS[:, None]  # [cuts, size]
        sides = torch.cat([before[:, None, :] & mask, before[:, :, None] & mask])  # left parts, upper parts
        halves = torch.stack([sides, mask & ~sides], 1)  # [18, 2, size, size]
        views = self.views(picture.expand(2 * len(halves), -1, -1, -1), halves.flatten(0, 1))
        scores = self.judge.scores(views).unflatten(0, (-1, 2))  # [18, 2, kinds]
        a, b = (self._kind(item) for item in scene.items[:2])
        fit = torch.stack([scores[:, 0, a] + scores[:, 1, b], scores[:, 0, b] + scores[:, 1, a]], 1)
        cut, swapped = divmod(int(fit.argmax()), 2)
        hits = scores[cut].argmax(-1).tolist()
        upright = cut >= len(CUTS)
        box = shapes.boxes(halves[cut])
        edges = (box[:, 2:] - box[:, :2]).amax(1)
        edges = edges.flip(0) if swapped else edges
        right = {
            "left": not upright and not swapped,
            "above": upright and not swapped,
            "beside": not upright,
            "on": upright and bool(swapped),  # the lower one is the first item
            "bigger": bool(edges[0] > BIGGER * edges[1]),
        }[scene.relation]
        return right, hits == ([b, a] if swapped else [a, b])

    def _turned(self, scene: Scene, picture: Tensor, mask: Tensor) -> tuple[bool, bool]:
        item = scene.items[0]
        options = {
            turn: [(replace(item, glyph=g, angle=angle),) for g in self._rows(item)]
            for turn, angle in {"": 0, **ANGLES}.items()
        }
        upright, seen = (_turned_back(x, item.angle) for x in (picture, 2.0 * mask[:, None] - 1))
        views = self.views(upright, seen[:, 0] > 0)
        return self._nearest(scene, picture, options) == scene.relation, self._hit(views, item)

    def _accessory(self, scene: Scene, picture: Tensor, mask: Tensor) -> tuple[bool, bool]:
        face, worn = scene.items
        options: dict[str, list[tuple[Item, ...]]] = {}
        for row in self._rows(face):
            for thing in (None, *self.worn.get(self.bank.glyphs[row].style, ())):
                label = "" if thing is None else self.labels[thing]
                both = accessory_items(self.bank, row, thing, slot_of(label)) if label else (Item(row),)
                if both:  # not every thing suits every face
                    options.setdefault(label, []).append(both)
        best = self._nearest(scene, picture, options)
        return best == self.labels[worn.glyph], self._shows(scene, picture, mask)

    # Parts.

    def _kind(self, item: Item) -> int:
        return self.judge.index(self.labels[item.glyph])

    def _rows(self, item: Item) -> list[int]:
        """The glyphs of an item's concept in every style: a caption need not name its style."""
        return self.styles[self.bank.glyphs[item.glyph].concept]

    def views(self, pictures: Tensor, masks: Tensor) -> Tensor:
        """Each mask's part of its picture, as the judge sees objects."""
        return shapes.crop(shapes.cut_out(pictures, masks), shapes.boxes(masks), SIDE)

    def _hit(self, views: Tensor, item: Item) -> bool:
        return int(self.judge.scores(views)[0].argmax()) == self._kind(item)

    def _shows(self, scene: Scene, picture: Tensor, mask: Tensor) -> bool:
        return self._hit(self.views(picture, mask), scene.items[0])

    def _nearest(self, scene: Scene, picture: Tensor, options: dict[str, list[tuple[Item, ...]]]) -> str:
        """The option with the render, on the scene's ground, that the picture differs least from.

        The difference is the mean square of RGBA at 64 pixels, the least over shifts of up to 3 pixels.
        """
        names = [name for name, sets in options.items() for _ in sets]
        drawn = self.renderer([replace(scene, items=s) for sets in options.values() for s in sets]).flatten(1)
        own = F.pad(F.adaptive_avg_pool2d(picture, FIELD), [SHIFT] * 4, mode="replicate")[0]
        moved = own.unfold(1, FIELD, 1).unfold(2, FIELD, 1).permute(1, 2, 0, 3, 4).reshape(-1, drawn.shape[1])
        apart = moved.square().sum(1)[:, None] + drawn.square().sum(1) - 2 * moved @ drawn.T
        return names[int(apart.amin(0).argmin())]


def _turned_back(x: Tensor, angle: float) -> Tensor:
    """[1, channels, size, size] in [-1, 1] turned by -angle degrees about its middle, -1 around it."""
    turn = torch.deg2rad(torch.tensor(float(angle)))
    cos, sin = turn.cos().item(), turn.sin().item()
    grid = F.affine_grid(
        torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), list(x.shape), align_corners=False
    )
    return F.grid_sample(x + 1, grid, align_corners=False) - 1
