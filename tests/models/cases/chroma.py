"""Chroma: masks of numbers and of bool, batches, a single token."""

import torch

from rfkernels.models.chroma import Chroma
from tests.models.cases.flux import ids
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "axes_dims_rope": (4, 8, 12),
    "approximator_num_channels": 32,
    "approximator_hidden_dim": 48,
    "approximator_layers": 2,
}


def case(name: str, config: dict | None = None, grid=(5, 7), batch=2, text=11, **options) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": normal(batch, grid[0] * grid[1], 16),
            "encoder_hidden_states": normal(batch, text, 40, seed=2),
            "timestep": torch.tensor([0.5, 0.25])[:batch],
            "img_ids": ids(*grid),
            "txt_ids": torch.zeros(text, 3),
        } | options

    return Case(name, "ChromaTransformer2DModel", Chroma, CONFIG | (config or {}), inputs)


def mask(*lengths: int) -> torch.Tensor:
    """Of text tokens, and all of those of the image."""
    text = torch.arange(11) < torch.tensor(lengths)[:, None]
    return torch.cat([text, torch.ones(len(lengths), 35, dtype=torch.bool)], 1)


CASES = [
    case("chroma", {"out_channels": 8}),
    case("chroma, one sample, a single token", grid=(1, 1), batch=1, text=1),
    case("chroma, a mask of numbers", attention_mask=mask(3, 11).float()),
    case("chroma, a mask of bool", attention_mask=mask(3, 11)),
]
