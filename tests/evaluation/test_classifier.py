import dataclasses

import numpy as np
import torch

from rfkernels.evaluation.classifier import accuracy, on_white, train_judge
from rfkernels.train.data import Entry
from tests.tiny import disc, tiny_dataset


def test_judge_learns_colours_and_ranks_the_right_label_first():
    tiny = tiny_dataset()
    colours = {"red circle": (230, 30, 30), "blue circle": (40, 80, 230), "pizza": (240, 190, 60)}
    images, entries = [], []
    for i in range(16):
        for label, colour in colours.items():
            images.append(disc(tuple(np.clip(np.array(colour) + i - 8, 0, 255)), 16))
            entries.append(Entry(label, f"style{i}", (), (), 1.0, "train" if i < 12 else "held-out", False))
    data = dataclasses.replace(tiny, images=np.stack(images), entries=tuple(entries))
    judge, scores = train_judge(data, epochs=30)
    assert judge.labels == ("blue circle", "pizza", "red circle")
    assert scores["renders"] == 12 and scores["top1"] == 1.0
    x = torch.from_numpy(np.stack(images[:3])).permute(0, 3, 1, 2) / 127.5 - 1
    assert judge.ranks(x, list(colours)).tolist() == [0, 0, 0]
    assert min(judge.ranks(x, ["pizza", "pizza", "red circle"]).tolist()) > 0


def test_clear_ground_is_white():
    x = torch.from_numpy(disc((0, 0, 0), 64)).permute(2, 0, 1)[None] / 127.5 - 1
    y = on_white(x)
    assert y.shape == (1, 3, 32, 32) and (y[0, :, 0, 0] == 1).all() and (y[0, :, 16, 16] == -1).all()


def test_accuracy_counts_ranks():
    assert accuracy(torch.tensor([0, 0, 3, 9])) == {"top1": 0.5, "top5": 0.75}
