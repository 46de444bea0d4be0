"""How few steps suffice: pictures of 1, 2, 4, 8 steps against those of 25 from the same noise, and why."""

from collections.abc import Callable

from torch import Tensor

from rfkernels import samplers
from rfkernels.evaluation.draw import draw
from rfkernels.evaluation.quality import psnr, ssim
from rfkernels.models.emoji import EmojiFlow
from rfkernels.objectives import path_straightness

__all__ = ["STEPS", "compare_steps", "reference_of", "straightness_of"]

STEPS, MANY = (1, 2, 4, 8), 25


def reference_of(model: EmojiFlow, captions: list[str], **settings) -> tuple[Tensor, float]:
    """Pictures of 25 steps, and the mean straightness of their trajectories.

    Straightness is the mean square difference of a trajectory's velocity from its mean (0 is straight, one
    step then suffices), per element, rfpp's measure on 25 Euler steps of the linear schedule.
    """
    return draw(model, captions, **{**settings, "steps": MANY}), straightness_of(model, captions, **settings)


def straightness_of(model: EmojiFlow, captions: list[str], **settings) -> float:
    """The mean of `path_straightness` over captions."""
    path: list[Tensor] = []
    draw(model, captions, path=path, **{**settings, "steps": MANY, "method": "euler", "shift": 1.0})
    return path_straightness(path, samplers.schedule("linear", MANY)).mean().item()


def compare_steps(
    model: EmojiFlow,
    captions: list[str],
    reference: Tensor,
    score: Callable[[Tensor], float],
    **settings,
) -> dict[int, dict[str, float]]:
    """By number of steps: `psnr` in dB and `ssim` against the reference, and the pictures' score `right`."""
    found = {}
    for steps in STEPS:
        pictures = draw(model, captions, **{**settings, "steps": steps})
        found[steps] = {
            "psnr": psnr(pictures, reference).mean().item(),
            "ssim": ssim(pictures, reference).mean().item(),
            "right": score(pictures),
        }
    return found
