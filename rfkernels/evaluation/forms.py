"""The model in 16 bits and in formats of `rfkernels.quantize`: bytes, milliseconds and losses, same seeds."""

import time
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

import rfkernels
from rfkernels.evaluation.draw import draw
from rfkernels.evaluation.quality import psnr
from rfkernels.models.emoji import EmojiFlow
from rfkernels.quantization.report import Report

__all__ = ["FORMS", "bytes_of", "compare_forms", "form_of", "timed_draw"]

FORMS = ("bf16", "int8", "int8-convrot", "w4a16")


def form_of(model: EmojiFlow, form: str) -> tuple[EmojiFlow, Report | None]:
    """A copy of the model in a form: "bf16", or a method of `rfkernels.quantize`, which reports."""
    copy = deepcopy(model)
    if form == "bf16":
        return copy.to(torch.bfloat16), None
    return copy, rfkernels.quantize(copy, form)


def bytes_of(model: EmojiFlow) -> int:
    """What the parameters and buffers of a model occupy."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def timed_draw(model: EmojiFlow, captions: list[str], **settings) -> tuple[Tensor, float]:
    """The pictures of `draw` and the milliseconds that each took, after a first batch that is not counted."""
    draw(model, captions[:2], **{**settings, "steps": 1})
    begun = time.perf_counter()
    pictures = draw(model, captions, **settings)
    return pictures, 1000 * (time.perf_counter() - begun) / len(captions)


def compare_forms(
    model: EmojiFlow,
    captions: list[str],
    reference: Tensor,
    score: Callable[[Tensor], float],
    forms: tuple[str, ...] = FORMS,
    **settings,
) -> dict[str, dict[str, float]]:
    """By form: `psnr` in dB against `reference`, the score `right` of the pictures, `bytes`, `ms` a picture.

    Args:
        reference: the float32 model's pictures.
        settings: of `draw`, those that made the reference.
    """
    found = {}
    for form in forms:
        other, _ = form_of(model, form)
        pictures, milliseconds = timed_draw(other, captions, **settings)
        found[form] = {
            "psnr": psnr(pictures, reference).mean().item(),
            "right": score(pictures),
            "bytes": bytes_of(other),
            "ms": milliseconds,
        }
    return found
