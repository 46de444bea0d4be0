"""Scores of the text-to-emoji model, from its own samples with fixed seeds, without weights from outside."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfkernels.evaluation import measures
from rfkernels.evaluation.classifier import accuracy, train_judge
from rfkernels.evaluation.draw import draw
from rfkernels.models.emoji import EmojiFlow, load_emoji
from rfkernels.train import concepts
from rfkernels.train.data import DataError, Dataset, open_data

__all__ = ["evaluate"]

SEED = 20_000
OBJECT = {
    "heart": "heart",
    "circle": "circle",
    "square": "square",
    "star": "star",
    "car": "automobile",
    "balloon": "balloon",
}


def evaluate(
    model: EmojiFlow | str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    data: Dataset | Path | None = None,
    steps: int = 8,
    guidance: float = 3.0,
    count: int = 128,
) -> dict[str, float | str]:
    """The scores of a model by name.

    Without data: `held_out_colour`, the share of samples for colour x object captions that training never
    showed whose main colour is the one asked for; `background` and `background_never_seen`, the share whose
    corners have the named colour (the second for objects that training never showed on blue); `transparent`,
    the share of clear corners where no background is named.

    With the training data: `held_out_overlap`, the mean intersection over union of those held-out samples
    with the best silhouette of the same object in training; `nearest_*`, distance of samples to the nearest
    training picture (root mean square over RGBA in 0 .. 1; 0 would be a copy) and the share where that one
    has the right label or style; `judge_*`, hits of a small classifier trained here: on renders held out from
    it, on samples of captions that were trained on, of the popular ones among them, and of (style, label)
    pairs that were not.

    Args:
        model: a model, a weights file, or None for the weights of the package.
        device: where a loaded model samples.
        data: the data set, the folder of it, or None for the default folder (fetched and built if need be).
        steps, guidance: of the AB2 sampler.
        count: samples of each of the three kinds that the judge sees.
    """
    if not isinstance(model, EmojiFlow):
        model = load_emoji(model, device=device)
    settings = {"steps": steps, "guidance": guidance}
    scores: dict[str, float | str] = {"steps": steps, "guidance": guidance}
    captions, held_out = _held_out_captions(model.config.styles), []
    held_out = draw(model, [c for c, _ in captions], seed=SEED, **settings)
    colours = measures.colour_names(held_out)
    scores["held_out_colour"] = _share(
        [c.split()[0] == got for (c, _), got in zip(captions, colours, strict=True)]
    )
    scores |= _background_scores(model, settings)
    try:
        dataset = data if isinstance(data, Dataset) else open_data(data, size=model.config.size)
    except DataError as error:
        return {**scores, "data": f"not available, the other scores need it: {error}"}
    scores["held_out_overlap"] = _overlap(held_out, captions, dataset)
    return {**scores, **_judge_scores(model, dataset, count, settings)}


def _share(hits: list[bool]) -> float:
    return float(np.mean(hits))


def _held_out_captions(styles: tuple[str, ...]) -> list[tuple[str, str]]:
    """(caption, style): every held-out colour x object in every style, three times."""
    return [
        (f"{caption} {style}", style) for caption in concepts.HELD_OUT for style in styles for _ in range(3)
    ]


def _background_scores(model: EmojiFlow, settings: dict) -> dict[str, float]:
    objects, styles = sorted(concepts.NEVER_ON_BLUE), model.config.styles
    seen = [(name, o) for name in concepts.BACKGROUNDS if name != "blue" for o in objects]
    never = [("blue", o) for o in objects for _ in styles]
    wanted = [name for name, _ in seen + never]
    lines = [
        f"{o} {styles[i % len(styles)]} on a {name} background" for i, (name, o) in enumerate(seen + never)
    ]
    got = measures.background_names(draw(model, lines, seed=SEED + 1000, **settings))
    hits = [a == b for a, b in zip(wanted, got, strict=True)]
    plain = [f"{o} {style}" for o in objects for style in styles]
    clear = measures.transparent_corners(draw(model, plain, seed=SEED + 2000, **settings))
    return {
        "background": _share(hits[: len(seen)]),
        "background_never_seen": _share(hits[len(seen) :]),
        "transparent": clear.float().mean().item(),
    }


def _pictures(data: Dataset, rows: list[int]) -> Tensor:
    return torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1


def _overlap(samples: Tensor, captions: list[tuple[str, str]], data: Dataset) -> float:
    """Mean best silhouette overlap of held-out samples with training pictures of their object and style."""
    best = []
    for i, (caption, style) in enumerate(captions):
        word = OBJECT[caption.split()[1]]
        rows = [
            k
            for k, e in enumerate(data.entries)
            if e.split == "train" and e.style == style and e.label.split()[-1] == word and not e.tinted
        ]
        if rows:
            best.append(measures.silhouette_overlap(samples[i : i + 1], _pictures(data, rows)).item())
    return float(np.mean(best))


def _judge_scores(model: EmojiFlow, data: Dataset, count: int, settings: dict) -> dict[str, float]:
    judge, renders = train_judge(data)
    rng = np.random.default_rng(SEED)
    plain = [i for i, e in enumerate(data.entries) if not e.tinted and e.label in judge.labels]
    train = [i for i in plain if data.entries[i].split == "train"]
    kinds = {
        "seen": train,
        "popular": [i for i in train if data.entries[i].label in concepts.POPULAR],
        "held_out_pair": [i for i in plain if data.entries[i].split != "train"],
    }
    scores = {"judge_labels": renders["labels"], "judge_held_out_renders_top1": renders["top1"]}
    scores["judge_held_out_renders_top5"] = renders["top5"]
    all_train = data.indices("train")
    references = _pictures(data, all_train.tolist())
    for offset, (kind, rows) in enumerate(kinds.items()):
        chosen = rng.choice(rows, min(count, len(rows)), replace=False)
        entries = [data.entries[i] for i in chosen]
        lines = [f"{e.label} {e.style}".lower() for e in entries]
        samples = draw(model, lines, seed=SEED + 3000 + 1000 * offset, **settings)
        hits = accuracy(judge.ranks(samples, [e.label for e in entries]))
        scores |= {f"judge_{kind}_top1": hits["top1"], f"judge_{kind}_top5": hits["top5"]}
        if kind != "popular":
            distance, index = measures.nearest(samples, references)
            found = [data.entries[all_train[i]] for i in index.tolist()]
            scores[f"nearest_{kind}_distance"] = distance.median().item()
            scores[f"nearest_{kind}_label"] = _share(
                [a.label == b.label for a, b in zip(entries, found, strict=True)]
            )
            scores[f"nearest_{kind}_style"] = _share(
                [a.style == b.style for a, b in zip(entries, found, strict=True)]
            )
    return scores
