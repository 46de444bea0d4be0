"""FLUX.3: text alone, references, flow maps, batches, a single token."""

import torch

from rfkernels.models.flux3 import Flux3
from tests.models.cases.flux2 import ids
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 16,
    "cond_in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "timestep_channels": 32,
    "axes_dims_rope": (4, 4, 8, 8),
}


def case(
    name: str, config: dict | None = None, grid=(5, 7), batch=2, text=11, referred=False, jump=False
) -> Case:
    def inputs() -> dict:
        txt_ids = torch.zeros(text, 4, dtype=torch.int64)
        txt_ids[:, 3] = torch.arange(text)
        made = {
            "hidden_states": normal(batch, grid[0] * grid[1], 16),
            "encoder_hidden_states": normal(batch, text, 40, seed=2),
            "timestep": torch.tensor([0.5, 0.25])[:batch],
            "img_ids": ids(*grid),
            "txt_ids": txt_ids,
        }
        if referred:
            made["image_cond_ids"] = torch.cat([ids(3, 4, 10), ids(2, 3, 20)])
            made["image_cond_hidden_states"] = normal(batch, 18, 12, seed=3)
        return made | ({"target_timestep": torch.tensor([0.25, 0.0])[:batch]} if jump else {})

    wide = ("norm_q", "norm_k")
    return Case(name, "Flux3Transformer2DModel", Flux3, CONFIG | (config or {}), inputs, wide=wide)


CASES = [
    case("flux3"),
    case("flux3, one sample, a single token", grid=(1, 1), batch=1, text=1),
    case("flux3, references", referred=True),
    case("flux3, a flow map", {"flow_map": True}, jump=True),
    case("flux3, a flow map, references", {"flow_map": True}, jump=True, referred=True),
    case("flux3, another epsilon and MLP", {"eps": 1e-2, "mlp_ratio": 2.5, "rope_theta": 500}),
]
