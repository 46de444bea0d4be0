"""A tiny emoji model and data set for tests: nothing is downloaded and nothing takes long."""

import numpy as np
import torch

from rfkernels.models.emoji import EmojiConfig, EmojiFlow
from rfkernels.models.text import word_key, words

CONFIG = EmojiConfig(
    size=16, patch=4, width=64, heads=1, mlp=2, double_blocks=1, single_blocks=1, table=64, embed=16
)


def tiny_model(seed: int = 0, config: EmojiConfig = CONFIG) -> EmojiFlow:
    """A model with random weights everywhere, so that no part of it is a zero that hides a fault."""
    torch.manual_seed(seed)
    model = EmojiFlow(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(p + 0.1 * torch.randn_like(p))
    known = "red blue heart circle on background noto blob flat 3d"
    model.known_words = torch.tensor([word_key(w) for w in words(known)], dtype=torch.int32)
    return model


def disc(colour: tuple[int, int, int], size: int = 16) -> np.ndarray:
    """uint8[size, size, 4]: an opaque disc on nothing, colour premultiplied."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    alpha = 255 * (x**2 + y**2 < (0.4 * size) ** 2)
    return np.stack([*(alpha * c // 255 for c in colour), alpha], -1).astype(np.uint8)
