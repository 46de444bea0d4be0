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
    steps: int = 8,
    guidance: float = 3.0,
    method: str = "ab2",
) -> Tensor:
    """Samples float32[len(prompts), 4, size, size] on the CPU; prompt i starts from the noise of seed + i."""
    c, device = model.config, model.out.weight.device
    sigmas = samplers.schedule("linear", steps)
    parts = []
    for first in range(0, len(prompts), CHUNK):
        chunk = prompts[first : first + CHUNK]
        text = model.encode([""] * len(chunk) + chunk)
        velocity = lambda x, sigma, text=text: model.guided(x, sigma, text)
        seeds = [seed + first + i for i in range(len(chunk))]
        noise = philox_normal(
            (len(chunk), c.channels, c.size, c.size), noise_keys(seeds, len(chunk), device=device)
        )
        parts.append(samplers.sample(velocity, noise, sigmas, method=method, guidance=guidance).cpu())
    return torch.cat(parts)
