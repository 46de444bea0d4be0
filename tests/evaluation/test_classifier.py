import torch

from rfkernels.evaluation import classifier, shapes
from rfkernels.evaluation.classifier import accuracy, kind_of, on_white, open_judge
from rfkernels.train.layouts import Item
from rfkernels.train.render import Renderer
from rfkernels.train.scenes import Scene
from tests.evaluation.conftest import SHORT
from tests.train.banks import draw

UNLIKE = ("red heart", "blue heart", "green square", "pizza", "automobile", "grinning face")


def views(bank, rows, **more):
    x = Renderer(bank, "cpu")([Scene("plain", (Item(row, **more),)) for row in rows])
    masks = shapes.foreground(x, torch.zeros(len(x), dtype=torch.bool))
    return shapes.crop(shapes.cut_out(x, masks), shapes.boxes(masks), classifier.SIDE)


def test_judge_knows_glyphs_small_and_large_and_those_held_out(bank, judge):
    labels = [bank.concepts[g.concept].label for g in bank.glyphs]
    rows = [i for i, label in enumerate(labels) if label in UNLIKE]
    for size in (1.0, 0.5):
        ranks = judge.ranks(views(bank, rows, size=size), [labels[r] for r in rows])
        assert (ranks == 0).float().mean() >= 0.9
    assert judge.ranks(views(bank, rows[:2]), ["pizza", "star"]).min() > 0


def test_kinds_are_labels_without_colours(judge):
    assert kind_of("red heart") == kind_of("blue heart") == "heart" and kind_of("orange") == "orange"
    assert judge.kinds == tuple(sorted(set(judge.kinds))) and "circle" in judge.kinds
    assert judge.index("green circle") == judge.index("red circle")


def test_features_see_shapes_of_any_colour():
    hearts = [torch.from_numpy(draw("heart", c, 32)) for c in ((220, 30, 40), (40, 80, 230))]
    square = torch.from_numpy(draw("square", (220, 30, 40), 32))
    x = torch.stack([*hearts, square]).permute(0, 3, 1, 2) / 127.5 - 1
    f = classifier.Features()(on_white(x))[:, : 64 * classifier.ANGLES]
    same, other = (f[0] - f[1]).norm(), (f[0] - f[2]).norm()
    assert f.shape[1] == 512 and classifier.Features()(on_white(x)).shape[1] == classifier.Features.size
    assert same < 0.4 * other


def test_a_judge_is_kept_beside_its_data(bank, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "train_judge", lambda *_: judge)
    first = open_judge(bank, tmp_path, SHORT)
    monkeypatch.setattr(classifier, "train_judge", None)
    again = open_judge(bank, tmp_path, SHORT)
    x = views(bank, range(4))
    assert again.kinds == first.kinds and torch.equal(again.scores(x), first.scores(x))
    assert len(list(tmp_path.iterdir())) == 1


def test_training_is_a_function_of_its_arguments(bank):
    short = classifier.Study(rounds=1, width=16, batch=16)
    x = views(bank, range(3))
    a, b = (classifier.train_judge(bank, short).scores(x) for _ in range(2))
    assert torch.equal(a, b)


def test_accuracy_counts_ranks():
    assert accuracy(torch.tensor([0, 0, 3, 9])) == {"top1": 0.5, "top5": 0.75}


def test_clear_ground_is_white():
    x = torch.from_numpy(draw("disc", (0, 0, 0), 64)).permute(2, 0, 1)[None] / 127.5 - 1
    y = on_white(x)
    assert y.shape == (1, 3, 32, 32) and (y[0, :, 0, 0] == 1).all() and (y[0, :, 16, 16] == -1).all()
