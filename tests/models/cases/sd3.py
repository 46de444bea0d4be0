"""SD3, SD3.5-medium (two attentions) and -large: sizes, batches, skipped layers."""

import torch

from rfkernels.models.sd3 import SD3
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
}
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


def case(name: str, config: dict | None = None, size=(10, 14), batch=2, text=11, **options) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": normal(batch, 4, *size),
            "encoder_hidden_states": normal(batch, text, 40, seed=2),
            "pooled_projections": normal(batch, 20, seed=3),
            "timestep": torch.tensor([875.5, 300.0])[:batch],
        } | options

    return Case(name, "SD3Transformer2DModel", SD3, CONFIG | (config or {}), inputs)


CASES = [
    case("sd3"),
    case("sd3, the whole table", size=(24, 24), batch=1),
    case("sd3.5-large", {"qk_norm": "rms_norm"}),
    case("sd3.5-large, one sample, a single token", {"qk_norm": "rms_norm"}, size=(2, 2), batch=1, text=1),
    case("sd3.5-medium", MEDIUM),
    case("sd3.5-medium, every layer", {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)}),
    case("sd3.5-medium, layers skipped", MEDIUM, skip_layers=[1]),
    case("sd3.5-medium, the last layer skipped", MEDIUM, skip_layers=[2]),
]
