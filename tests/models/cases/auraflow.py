"""AuraFlow: sizes, batches, blocks of one kind alone, heads of 256."""

import torch

from rfkernels.models.auraflow import AuraFlow
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 24,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "caption_projection_dim": 48,
    "pos_embed_max_size": 100,
}
WIDE = {"attention_head_dim": 256, "num_attention_heads": 1, "caption_projection_dim": 256}


def case(name: str, config: dict | None = None, size=(10, 14), batch=2, text=11) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": normal(batch, 4, *size),
            "encoder_hidden_states": normal(batch, text, 40, seed=2),
            "timestep": torch.tensor([0.5, 0.25])[:batch],
        }

    return Case(name, "AuraFlowTransformer2DModel", AuraFlow, CONFIG | (config or {}), inputs)


CASES = [
    case("auraflow"),
    case("auraflow, the whole table", size=(20, 20)),
    case("auraflow, one sample, a single token", size=(2, 2), batch=1, text=1),
    case("auraflow, two streams alone", {"num_single_dit_layers": 0, "out_channels": 3}),
    case("auraflow, one stream alone", {"num_mmdit_layers": 0}),
    case("auraflow, heads of 256", WIDE),
]
