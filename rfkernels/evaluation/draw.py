"""Samples of the text-to-emoji model with fixed seeds: what scores and sample sheets look at."""

import torch
from torch import Tensor

from rfkernels import samplers
from rfkernels.models.emoji import EmojiFlow
from rfkernels.ops import noise_keys, philox_normal

__all__ = ["draw"]

CHUNK = 32  # pictures sampled together


@torch.no_grad()
def draw(
    model: EmojiFlow,
    prompts: list[str],
    *,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    method: str | None = None,
    shift: float | None = None,
    path: list[Tensor] | None = None,
) -> Tensor:
    """Samples float32[len(prompts), 4, size, size] on the CPU; prompt i starts from the noise of seed + i.

    Args:
        steps, guidance, method, shift: None means the model's own (`model.config`). Guidance 1 evaluates the
            prompts only, any other also the empty prompt.
        path: a list that gets the states, noise first, like the result each.
    """
    c = model.config
    steps, method = steps or c.steps, method or c.method
    guidance = c.guidance if guidance is None else guidance
    sigmas = samplers.schedule("shift", steps, shift=c.shift if shift is None else shift)
    parts, states = [], []
    for first in range(0, len(prompts), CHUNK):
        noise = _noise(model, [seed + i for i in range(first, min(first + CHUNK, len(prompts)))])
        states.append([noise.cpu()])
        keep = None if path is None else lambda info: states[-1].append(info.x.cpu().clone()) and None
        velocity, scale = _velocity(model, prompts[first : first + CHUNK], guidance)
        x = samplers.sample(velocity, noise, sigmas, method=method, guidance=scale, callback=keep)
        parts.append(x.cpu())
    if path is not None:
        path[:] = [torch.cat(s) for s in zip(*states, strict=True)]
    return torch.cat(parts)


def _noise(model: EmojiFlow, seeds: list[int]) -> Tensor:
    c, device = model.config, model.out_offset.device
    return philox_normal(
        (len(seeds), c.channels, c.size, c.size), noise_keys(seeds, len(seeds), device=device)
    )


def _velocity(model: EmojiFlow, prompts: list[str], guidance: float):
    """The sampler's velocity and guidance."""
    if guidance == 1:
        text = model.encode(prompts)
        return lambda x, sigma: model(x, sigma, text), None
    text = model.encode([""] * len(prompts) + prompts)
    return lambda x, sigma: model.guided(x, sigma, text), guidance
