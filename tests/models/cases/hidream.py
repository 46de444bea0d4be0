"""HiDream-I1: with experts and without, latents that are not square, E1's two pictures side by side."""

import torch

from rfkernels.models.hidream import HiDream
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "caption_channels": [20, 28],
    "text_emb_dim": 16,
    "axes_dims_rope": (12, 6, 6),
    "max_resolution": (16, 16),
    "llama_layers": [0, 2, 3, 1, 3],
    "num_routed_experts": 3,  # all of them, so that no rounding chooses others
    "num_activated_experts": 3,
}


def inputs(batch: int = 2, size=(12, 12), text=(7, 5)):
    return {
        "hidden_states": normal(batch, 4, *size),
        "timesteps": torch.tensor([875, 300])[:batch],
        "encoder_hidden_states_t5": normal(batch, text[0], 20, seed=2),
        "encoder_hidden_states_llama3": normal(4, batch, text[1], 28, seed=3),
        "pooled_embeds": normal(batch, 16, seed=4),
    }


def case(name: str, config: dict | None = None, **options) -> Case:
    config = CONFIG | (config or {})
    chooses = config["num_activated_experts"] < config["num_routed_experts"]
    made = lambda: inputs(**options)
    return Case(name, "HiDreamImageTransformer2DModel", HiDream, config, made, discrete=chooses)


CASES = [
    case("hidream"),
    case("hidream, samples of a single token", size=(2, 2), text=(1, 1)),
    case("hidream, one sample", batch=1),
    case("hidream, no experts", {"num_routed_experts": 0}),
    case("hidream, two of four experts", {"num_routed_experts": 4, "num_activated_experts": 2}),
    case("hidream, one of five experts", {"num_routed_experts": 5, "num_activated_experts": 1}),
    case("hidream, not square", size=(6, 14)),
    case("hidream, not square and no pads", size=(8, 32)),
    case("hidream, not square, one pad", {"max_resolution": (17, 4)}, size=(4, 16)),
    case("hidream-e1, twice the width", {"max_resolution": (16, 32)}, size=(12, 24)),
]
