"""Scores of the text-to-emoji model, from its own samples with fixed seeds, without weights from outside."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfkernels.evaluation import measures, shapes
from rfkernels.evaluation.classifier import SIDE, Study, accuracy, open_judge
from rfkernels.evaluation.composition import Examiner, Verdict
from rfkernels.evaluation.draw import draw
from rfkernels.evaluation.few_steps import compare_steps, reference_of, straightness_of
from rfkernels.evaluation.forms import FORMS, bytes_of, compare_forms, timed_draw
from rfkernels.evaluation.quality import sharpness
from rfkernels.models.emoji import EmojiFlow, load_emoji
from rfkernels.train.glyphs import Bank
from rfkernels.train.layouts import Item
from rfkernels.train.render import Renderer
from rfkernels.train.scenes import KINDS, Scene, evaluation_scenes

__all__ = ["EVALUATED", "evaluate", "evaluate_bank"]

SEED = 20_000
EVALUATED = (*KINDS, "background")
QUICK = Study(rounds=3)


def evaluate(
    model: EmojiFlow | str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    data: Bank | Path | None = None,
    lora: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    count: int = 32,
    kinds: Sequence[str] = EVALUATED,
    forms: Sequence[str] = FORMS,
    quick: bool = False,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """The scores of a model by name.

    `kinds`: for each kind of held-out scene the shares of pictures whose `attribute`, whose `object` and
    where both are `right`, see `rfkernels.evaluation.composition`, and those of the scenes' true renders,
    slightly moved and blurred, by the same rulers (`ruler_attribute`, ...). `composition`: the mean
    of `right` over kinds; `composition_ruler` that of the true renders. `colour_right`: the share of named
    colours that are there.

    `seen`: of captions that training showed: hits of the judge (`top1`, `top5`), and distance to the nearest
    training render (root mean square over RGBA in 0 .. 1 at 32 pixels; 0 would be a copy) and the shares
    where that has the right label or style. `sharpness`: mean gradient of held-out samples over that of their
    true renders; 1 is as sharp. `straightness`, `steps`: see `few_steps`. `forms`: see `forms`.

    Args:
        model: a model, a weights file, or None for the weights of the package.
        device: where a loaded model samples.
        data: the bank of glyphs, its file or folder, or None for the default folder (fetched and built if
            need be). The judge is trained once and kept beside it.
        lora: a file of adapters for few steps; then all scores are with it, but for the reference of 25
            steps and `steps_without_lora`.
        steps, guidance: of the samples; None means the model's own.
        count: scenes of each kind.
        kinds: of scenes.
        forms: of the model.
        quick: a judge of a tenth of the training.
        sheet: a file for the held-out samples, each marked right or wrong.

    Raises:
        ValueError: another kind, or a count below 1.
        DataError: the data is missing and cannot be fetched.
    """
    unknown = [kind for kind in kinds if kind not in EVALUATED]
    if unknown or not kinds or count < 1:
        raise ValueError(
            f"evaluate: kinds of {', '.join(EVALUATED)} and a count of 1 or more required, got "
            f"{', '.join(unknown) or 'no kind' if unknown or not kinds else count}"
        )
    if not isinstance(model, EmojiFlow):
        model = load_emoji(model, device=device)
    bank, folder = _bank(data, model.config.size)
    judge = open_judge(bank, folder, QUICK if quick else Study())
    return evaluate_bank(
        model, bank, Examiner(bank, judge), lora=lora, count=count, kinds=tuple(kinds), forms=tuple(forms),
        sheet=sheet, settings={"steps": steps, "guidance": guidance},
    )  # fmt: skip


def _bank(data: Bank | Path | None, size: int) -> tuple[Bank, Path | None]:
    """The bank at the model's size, and the folder where its judge is kept."""
    if isinstance(data, Bank):
        return data, None
    from rfkernels.train.glyphs import DEFAULT_FOLDER, open_bank

    source = Path(data or DEFAULT_FOLDER)
    bank = open_bank(source, size)
    return bank, source if source.is_dir() else source.parent


def evaluate_bank(
    model: EmojiFlow,
    bank: Bank,
    examiner: Examiner,
    *,
    kinds: tuple[str, ...],
    forms: tuple[str, ...],
    count: int,
    settings: dict,
    lora: str | Path | None = None,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """The scores of `evaluate` for a bank and an examiner at hand; `settings` are of `draw`."""
    c = model.config
    scenes = [scene for kind in kinds for scene in evaluation_scenes(bank, kind, count, _seed(kind))]
    names = [kind for kind in kinds for _ in range(count)]
    captions = [scene.caption for scene in scenes]
    few = [i for i in range(len(scenes)) if i % count < max(1, count // 8)]
    some = [captions[i] for i in few]
    right_of = lambda chosen: lambda x: _share(v.right for v in examiner.examine(chosen, x))
    score_few = right_of([scenes[i] for i in few])

    scores: dict[str, Any] = {k: getattr(c, k) if v is None else v for k, v in settings.items()}
    reference, scores["straightness"] = reference_of(model, some, seed=SEED)
    by_steps = lambda **more: compare_steps(model, some, reference, score_few, seed=SEED, **more)
    if lora is not None:
        scores["steps_without_lora"] = by_steps()
        _load(model, lora)
        scores["straightness_lora"] = straightness_of(model, some, seed=SEED, **settings)
    scores["steps_table"] = by_steps(guidance=settings["guidance"])

    pictures, milliseconds = timed_draw(model, captions, seed=SEED, **settings)
    verdicts = examiner.examine(scenes, pictures)
    truth = Renderer(bank, "cpu", size=c.size)(scenes)
    scores |= _composition(names, verdicts, examiner.examine(scenes, moved(truth)))
    scores["transparent"] = _transparent(scenes, pictures)
    scores["sharpness"] = (sharpness(pictures).mean() / sharpness(truth).mean()).item()
    scores["seen"] = _seen(model, bank, examiner, min(4 * count, 128), settings)
    whole = {"psnr": 100.0, "right": _share(v.right for v in verdicts)}
    scores["forms"] = {"float32": {**whole, "bytes": bytes_of(model), "ms": milliseconds}} | compare_forms(
        model, captions, pictures, right_of(scenes), forms, seed=SEED, **settings
    )
    if sheet is not None:
        from rfkernels.evaluation.report import write_sheet

        write_sheet(sheet, captions, pictures, [v.right for v in verdicts])
    return scores


def _seed(kind: str) -> int:
    return SEED + zlib.crc32(kind.encode()) % 1000


def _load(model: EmojiFlow, lora: str | Path) -> None:
    from rfkernels.adapters import load_lora

    load_lora(model, lora)


def moved(pictures: Tensor) -> Tensor:
    """True renders as a good model might draw them: moved by 2 % of the edge and softer."""
    k = max(1, round(0.02 * pictures.shape[-1]))
    x = torch.roll(pictures, (k, -k), (2, 3))
    return (x + torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)) / 2


def _share(hits) -> float:
    return float(np.mean(list(hits)))


def _composition(names: list[str], verdicts: list[Verdict], ruler: list[Verdict]) -> dict[str, Any]:
    """Shares by kind, and their means."""
    table = {}
    for kind in dict.fromkeys(names):
        own = [v for v, name in zip(verdicts, names, strict=True) if name == kind]
        true = [v for v, name in zip(ruler, names, strict=True) if name == kind]
        table[kind] = {
            "right": _share(v.right for v in own),
            "attribute": _share(v.attribute for v in own),
            "object": _share(v.object for v in own),
            "ruler_attribute": _share(v.attribute for v in true),
            "ruler_object": _share(v.object for v in true),
            "ruler_right": _share(v.right for v in true),
        }
    found = {
        "kinds": table,
        "composition": _share(row["right"] for row in table.values()),
        "composition_ruler": _share(row["ruler_right"] for row in table.values()),
    }
    for key, list_ in (("colour_right", verdicts), ("colour_ruler", ruler)):
        named = [v.colour for v in list_ if v.colour is not None]
        if named:
            found[key] = _share(named)
    return found


def _transparent(scenes: list[Scene], pictures: Tensor) -> float:
    """The share of pictures without a named background whose corners are clear."""
    clear = measures.transparent_corners(pictures).tolist()
    return _share([c for scene, c in zip(scenes, clear, strict=True) if scene.background is None] or [0.0])


def _seen(model: EmojiFlow, bank: Bank, examiner: Examiner, count: int, settings: dict) -> dict[str, float]:
    """The scores of captions that training showed: label and style of a training glyph."""
    rows = [r for r in bank.indices("train").tolist() if bank.concepts[bank.glyphs[r].concept].weight >= 1]
    chosen = np.random.default_rng(SEED).choice(rows, min(count, len(rows)), replace=False).tolist()
    labels = [examiner.labels[row] for row in chosen]
    styles = [bank.glyphs[row].style for row in chosen]
    captions = [f"{label} {style}" for label, style in zip(labels, styles, strict=True)]
    pictures = draw(model, captions, seed=SEED + 5000, **settings)
    masks = shapes.foreground(pictures, torch.zeros(len(pictures), dtype=torch.bool))
    hits = accuracy(examiner.judge.ranks(examiner.views(pictures, masks), labels))
    distance, found = _nearest(pictures, bank)
    return {
        **hits,
        "nearest_distance": distance.median().item(),
        "nearest_label": _share(examiner.labels[r] == label for r, label in zip(found, labels, strict=True)),
        "nearest_style": _share(bank.glyphs[r].style == s for r, s in zip(found, styles, strict=True)),
    }


def _nearest(pictures: Tensor, bank: Bank) -> tuple[Tensor, list[int]]:
    """Distance to and row of the nearest training render of each picture, at 32 pixels."""
    rows, renderer = bank.indices("train").tolist(), Renderer(bank, "cpu", size=SIDE)
    small = torch.nn.functional.adaptive_avg_pool2d(pictures, SIDE)
    best, found = torch.full((len(small),), torch.inf), torch.zeros(len(small), dtype=torch.int64)
    for first in range(0, len(rows), 512):  # memory
        part = rows[first : first + 512]
        distance, index = measures.nearest(small, renderer([Scene("plain", (Item(row),)) for row in part]))
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        found = torch.where(nearer, torch.tensor(part)[index], found)
    return best, found.tolist()
