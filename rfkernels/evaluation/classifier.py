"""A tiny classifier of emoji, trained here in a minute: a judge of samples without weights from outside."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.train.data import Dataset

__all__ = ["Judge", "accuracy", "on_white", "train_judge"]

SIDE = 32  # pixels that the judge sees


@dataclass(frozen=True)
class Judge:
    """A convolutional network over [batch, 3, 32, 32] and the labels that it tells apart."""

    network: nn.Module
    labels: tuple[str, ...]

    @torch.no_grad()
    def ranks(self, pictures: Tensor, labels: list[str]) -> Tensor:
        """int64[batch]: how many labels the judge prefers to the right one; 0 is a hit.

        pictures: [batch, 4, height, width] as the model makes them.
        """
        number = {label: i for i, label in enumerate(self.labels)}
        scores = self.network(on_white(pictures))
        right = scores.gather(1, torch.tensor([[number[label]] for label in labels]))
        return (scores > right).sum(1)


def on_white(pictures: Tensor) -> Tensor:
    """[batch, 3, 32, 32] in [-1, 1]: premultiplied RGBA in [-1, 1] laid on white and shrunk."""
    c = (pictures.float().clamp(-1, 1) + 1) / 2
    c = c[:, :3] + (1 - c[:, 3:])
    return F.interpolate(c, size=(SIDE, SIDE), mode="area") * 2 - 1


def accuracy(ranks: Tensor) -> dict[str, float]:
    """Shares of hits and of ranks below 5."""
    return {"top1": (ranks == 0).float().mean().item(), "top5": (ranks < 5).float().mean().item()}


def train_judge(data: Dataset, *, seed: int = 0, epochs: int = 20) -> tuple[Judge, dict[str, float]]:
    """A judge trained on the training split, and its accuracy on the renders that were held out.

    Held-out renders are (style, label) pairs whose label it knows from other styles only. Tinted copies take
    no part.
    """
    rows = np.array([i for i, e in enumerate(data.entries) if not e.tinted])
    train = [i for i in rows if data.entries[i].split == "train"]
    labels = tuple(sorted({data.entries[i].label for i in train}))
    test = [i for i in rows if data.entries[i].split != "train" and data.entries[i].label in labels]
    number = {label: i for i, label in enumerate(labels)}
    pictures = torch.from_numpy(data.images[train]).permute(0, 3, 1, 2).float() / 127.5 - 1
    targets = torch.tensor([number[data.entries[i].label] for i in train])
    network = _fit(on_white(pictures), targets, len(labels), seed, epochs)
    judge = Judge(network, labels)
    held_out = torch.from_numpy(data.images[test]).permute(0, 3, 1, 2).float() / 127.5 - 1
    ranks = judge.ranks(held_out, [data.entries[i].label for i in test])
    return judge, {**accuracy(ranks), "renders": len(test), "labels": len(labels)}


def _network(classes: int) -> nn.Module:
    def block(inside: int, outside: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outside), nn.ReLU()]

    body = [*block(3, 32, 1), *block(32, 64, 2), *block(64, 128, 2), *block(128, 192, 2)]
    return nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * 192, classes)
    )


def _fit(
    pictures: Tensor, targets: Tensor, classes: int, seed: int, epochs: int, batch: int = 64
) -> nn.Module:
    """Trains with shifts, small noise and brightness changes; fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, batch = _network(classes), min(batch, len(pictures))
        steps = epochs * (len(pictures) // batch)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
        for _ in range(epochs):
            order = torch.randperm(len(pictures))
            for i in range(0, len(order) - batch + 1, batch):
                chosen = order[i : i + batch]
                loss = F.cross_entropy(
                    network(_augment(pictures[chosen])), targets[chosen], label_smoothing=0.1
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _augment(x: Tensor) -> Tensor:
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    top, left = torch.randint(0, 7, (2,)).tolist()
    x = padded[:, :, top : top + SIDE, left : left + SIDE]
    x = x * torch.empty(len(x), 1, 1, 1).uniform_(0.8, 1.1)
    return (x + 0.1 * torch.randn_like(x)).clamp(-1, 1)
