"""A judge of objects without weights from outside: oriented gradients and colours, and a small network.

It is trained in about a minute from the training pictures and kept beside them.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.evaluation.shapes import MARGIN, unit
from rfkernels.train.concepts import BACKGROUNDS, TINTS
from rfkernels.train.glyphs import Bank
from rfkernels.train.layouts import Item, accessory_items, box_of, slot_of
from rfkernels.train.render import Renderer
from rfkernels.train.scenes import Scene

__all__ = ["Judge", "Study", "accuracy", "kind_of", "on_white", "open_judge", "train_judge"]

SIDE = 32  # pixels that the judge sees
CELL, ANGLES = 4, 8  # a histogram of 8 directions in every 4 x 4 pixels
PLAIN = {*TINTS, *BACKGROUNDS, "large", "medium", "small"}  # words that do not name a shape


@dataclass(frozen=True)
class Study:
    """How a judge is trained."""

    rounds: int = 30  # new views of every glyph
    passes: int = 3  # over the views of a round
    batch: int = 256
    width: int = 1024
    rate: float = 2e-3
    seed: int = 0
    version: int = 1  # of this file's features and views


@dataclass(frozen=True)
class Judge:
    """A network over [batch, 3, 32, 32] and the kinds of objects, see `kind_of`, that it tells apart."""

    network: nn.Module
    kinds: tuple[str, ...]

    @torch.no_grad()
    def scores(self, pictures: Tensor) -> Tensor:
        """Log probabilities [batch, kinds] of pictures [batch, 4, height, width] that one object fills."""
        return self.network(on_white(pictures)).float().log_softmax(-1)

    def ranks(self, pictures: Tensor, labels: list[str]) -> Tensor:
        """int64[batch]: how many kinds the judge prefers to that of the right label; 0 is a hit."""
        scores = self.scores(pictures)
        right = scores.gather(1, torch.tensor([[self.index(label)] for label in labels]))
        return (scores > right).sum(1)

    def index(self, label: str) -> int:
        """The number of the kind of a label."""
        return self.kinds.index(kind_of(label))


def kind_of(label: str) -> str:
    """A label without words of colour and size, unless nothing is left: the judge looks at shapes."""
    return " ".join(w for w in label.split() if w not in PLAIN) or label


def on_white(pictures: Tensor) -> Tensor:
    """[batch, 3, 32, 32] in [-1, 1]: premultiplied RGBA in [-1, 1] laid on white and shrunk."""
    c = unit(pictures)
    c = c[:, :3] + (1 - c[:, 3:])
    return F.interpolate(c, size=(SIDE, SIDE), mode="area") * 2 - 1


class Features(nn.Module):
    """[batch, 3, 32, 32] -> [batch, 704]: histograms of gradients' directions, and colours."""

    size = (SIDE // CELL) ** 2 * (ANGLES + 3)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        # twice the angle of the gradient, summed over colours: contrast either way is one direction
        real, turn = (across**2 - down**2).sum(1), (2 * across * down).sum(1)
        length = (real**2 + turn**2 + 1e-8).sqrt()
        at = torch.arange(ANGLES, device=x.device) * (2 * math.pi / ANGLES)
        along = real[:, None] * at.cos()[:, None, None] + turn[:, None] * at.sin()[:, None, None]
        along = (along / length[:, None]).clamp(min=0) ** 4 * length[:, None].sqrt()
        cells = F.avg_pool2d(along, CELL + 2, CELL, 1).flatten(1).sqrt()
        cells = F.normalize(cells) * cells.shape[1] ** 0.5
        return torch.cat([cells, F.avg_pool2d(x, CELL).flatten(1)], 1)


def _network(kinds: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(Features.size, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(0.2),
        nn.Linear(width, width // 2), nn.LayerNorm(width // 2), nn.GELU(), nn.Dropout(0.2),
        nn.Linear(width // 2, kinds),
    )  # fmt: skip


def accuracy(ranks: Tensor) -> dict[str, float]:
    """Shares of hits and of ranks below 5."""
    return {"top1": (ranks == 0).float().mean().item(), "top5": (ranks < 5).float().mean().item()}


def train_judge(bank: Bank, study: Study = Study()) -> Judge:
    """A judge of the bank's kinds, from views of its training glyphs; a function of both arguments."""
    views = _Views(bank, study.seed)
    kinds = tuple(sorted(set(views.kinds)))
    numbers = torch.tensor([kinds.index(kind) for kind in views.kinds])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        body, head = Features(), _network(len(kinds), study.width)
        batch = min(study.batch, len(numbers))
        steps = study.rounds * study.passes * (len(numbers) // batch)
        optimizer = torch.optim.AdamW(head.parameters(), lr=study.rate, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, study.rate, total_steps=max(steps, 2))
        for _ in range(study.rounds):
            seen = torch.cat([body(_blurred(on_white(x))) for x in views.round()])
            for chosen in (c for _ in range(study.passes) for c in _batches(len(seen), batch)):
                with torch.autocast("cpu", torch.bfloat16):
                    scores = head(seen[chosen])
                loss = F.cross_entropy(scores.float(), numbers[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return Judge(nn.Sequential(body, head).eval().requires_grad_(False), kinds)


def _batches(count: int, batch: int) -> list[Tensor]:
    order = torch.randperm(count)
    return [order[i : i + batch] for i in range(0, count - batch + 1, batch)]


class _Views:
    """Pictures of the training glyphs as `crop` shows objects: the visible box fills the picture."""

    def __init__(self, bank: Bank, seed: int):
        self.bank, self.rng = bank, np.random.default_rng(seed)
        self.rows = bank.indices("train").tolist()
        self.labels = [bank.concepts[g.concept].label for g in bank.glyphs]
        self.kinds = [kind_of(self.labels[row]) for row in self.rows]
        self.boxes = [box_of(bank, row) for row in range(len(bank.glyphs))]
        self.worn: dict[str, list[int]] = {}
        for row, label in enumerate(self.labels):
            if slot_of(label):
                self.worn.setdefault(bank.glyphs[row].style, []).append(row)
        self.renderer = Renderer(bank, "cpu", size=SIDE)

    def round(self, batch: int = 256) -> Iterator[Tensor]:
        """One new view of every glyph, in order: [<= batch, 4, 32, 32] each."""
        for first in range(0, len(self.rows), batch):
            yield self.renderer([self._view(row) for row in self.rows[first : first + batch]])

    def _view(self, row: int) -> Scene:
        """The glyph, at times tinted or turned; a face at times with what it wears."""
        rng, glyph = self.rng, self.bank.glyphs[row]
        tinted = glyph.hue is not None and rng.random() < 0.3
        worn = self.worn.get(glyph.style) if self.bank.concepts[glyph.concept].face else None
        items = ()
        if worn and rng.random() < 0.4:
            thing = worn[rng.integers(len(worn))]
            items = accessory_items(self.bank, row, thing, slot_of(self.labels[thing]))
        if not items:  # also where the thing does not suit the face
            tint = tuple(TINTS)[rng.integers(len(TINTS))] if tinted else None
            items = (Item(row, tint, angle=float(rng.normal(0, 25 if rng.random() < 0.2 else 3))),)
        return Scene("plain", self._filling(items))

    def _filling(self, items: tuple[Item, ...]) -> tuple[Item, ...]:
        """The items moved and scaled, with a little chance, so that their common box fills the picture."""
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        for i in items:
            box, at = np.array(self.boxes[i.glyph]) - 0.5, np.array([i.x, i.y])
            low, high = np.minimum(low, at + box[:2] * i.size), np.maximum(high, at + box[2:] * i.size)
        scale = float(self.rng.uniform(0.9, 1.04) / ((high - low).max() * (1 + 2 * MARGIN)))
        middle = (low + high) / 2 + self.rng.normal(0, 0.015, 2)
        at = [(0.5 + (np.array([i.x, i.y]) - middle) * scale).tolist() for i in items]
        return tuple(replace(i, size=i.size * scale, x=x, y=y) for i, (x, y) in zip(items, at, strict=True))


def _blurred(x: Tensor) -> Tensor:
    """Views as of small objects and soft samples: a third loses half of its pixels, all get some noise."""
    third = len(x) // 3
    coarse = F.interpolate(F.avg_pool2d(x[:third], 2), scale_factor=2, mode="bilinear", align_corners=False)
    x = torch.cat([coarse, x[third:]])
    light = torch.empty(len(x), 1, 1, 1).uniform_(0.8, 1.1)
    return (x * light + 0.08 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def open_judge(bank: Bank, folder: Path | None = None, study: Study = Study()) -> Judge:
    """The judge of a bank and a study: read from `folder` if it was trained before, else trained and kept."""
    if folder is None:
        return train_judge(bank, study)
    names = [(bank.concepts[g.concept].label, g.style, g.split) for g in bank.glyphs]
    seen = hashlib.sha256(json.dumps([asdict(study), names, bank.sources]).encode())
    path = Path(folder) / f"judge-{seen.hexdigest()[:12]}.pt"
    if path.exists():
        record = torch.load(path, weights_only=True)
        network = nn.Sequential(Features(), _network(len(record["kinds"]), study.width))
        network.load_state_dict(record["network"])
        return Judge(network.eval().requires_grad_(False), tuple(record["kinds"]))
    judge = train_judge(bank, study)
    partial = path.with_suffix(".partial")
    torch.save({"network": judge.network.state_dict(), "kinds": list(judge.kinds)}, partial)
    partial.replace(path)
    return judge
