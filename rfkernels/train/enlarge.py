"""The same model for larger pictures: larger patches, the same tokens, so that training goes on."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels.models.blocks import sinusoid
from rfkernels.models.emoji import EmojiFlow

__all__ = ["enlarge", "level_of_means"]


def level_of_means(sigma: Tensor, factor: int) -> Tensor:
    """The noise level that means over `factor` x `factor` pixels of x_sigma have.

    They are (1 - sigma) x0 + sigma / factor eps, so that sigma' = s / (1 - sigma + s) with s = sigma / factor
    (Hoogeboom et al., "simple diffusion", 2023).
    """
    s = sigma / factor
    return s / (1 - sigma + s)


def enlarge(model: EmojiFlow, factor: int, *, steps: int = 1000) -> EmojiFlow:
    """A model of pictures and patches `factor` times as large, which does on means what `model` does.

    It sees the means over `factor` x `factor` pixels, at the noise level that these have, and predicts each
    pixel of such a square alike. Noisy means are smaller than what the model knows, by 1 to 1 / factor: they
    are raised by sqrt(factor), the rest is left to the layer norms. The network of the time is fitted by
    `steps` steps of Adam.

    Raises:
        ValueError: a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"enlarge: the factor must be at least 1, got {factor}")
    c = replace(model.config, size=model.config.size * factor, patch=model.config.patch * factor)
    larger = EmojiFlow(c)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    squares = (c.channels, model.config.patch, model.config.patch)
    into = weights["image_in.weight"].unflatten(1, squares) / factor**1.5
    weights["image_in.weight"] = _repeat(into, factor).flatten(1)
    for name in ("out.weight", "out.bias"):
        w = weights[name].unflatten(0, squares).movedim((0, 1, 2), (-3, -2, -1))
        weights[name] = _repeat(w, factor).movedim((-3, -2, -1), (0, 1, 2)).flatten(0, 2)
    larger.known_words = weights["known_words"]
    larger.load_state_dict(weights)
    _fit_time(larger, model, factor, steps)
    return larger


def _repeat(w: Tensor, factor: int) -> Tensor:
    return w.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _fit_time(larger: EmojiFlow, model: EmojiFlow, factor: int, steps: int) -> None:
    """Trains `larger.time` until it says at sigma what `model.time` says at the level of the means."""
    sigma = torch.linspace(0, 1, 201)
    width = model.config.width
    with torch.no_grad():
        target = model.time(sinusoid(level_of_means(sigma, factor), width))
    features = sinusoid(sigma, width)
    for p in larger.time.parameters():
        p.requires_grad_(True)
    adam = torch.optim.Adam(larger.time.parameters(), lr=2e-3)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss = F.mse_loss(larger.time(features), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
