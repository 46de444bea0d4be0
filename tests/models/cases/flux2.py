"""FLUX.2: dev with guidance, klein without, references, odd sizes."""

import torch

from rfkernels.models.flux2 import Flux2
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 8, 8),
}
KLEIN = {"guidance_embeds": False}


def ids(rows: int, columns: int, time: int = 0) -> torch.Tensor:
    axes = (torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.tensor([0]))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 4)


def case(
    name: str, config: dict | None = None, images=((5, 7, 0),), batch=2, text=11, guided=False, batched=False
) -> Case:
    def inputs() -> dict:
        img_ids, txt_ids = (
            torch.cat([ids(*image) for image in images]),
            torch.zeros(text, 4, dtype=torch.int64),
        )
        txt_ids[:, 3] = torch.arange(text)
        return {
            "hidden_states": normal(batch, len(img_ids), 16),
            "encoder_hidden_states": normal(batch, text, 40, seed=2),
            "timestep": torch.tensor([0.5, 0.25])[:batch],
            "img_ids": img_ids.expand(batch, -1, -1) if batched else img_ids,
            "txt_ids": txt_ids.expand(batch, -1, -1) if batched else txt_ids,
            "guidance": torch.tensor([4.0, 1.0])[:batch] if guided else None,
        }

    return Case(name, "Flux2Transformer2DModel", Flux2, CONFIG | (config or {}), inputs)


CASES = [
    case("flux2-dev", guided=True),
    case("flux2-dev, one sample, a single token", images=((1, 1, 0),), batch=1, text=1, guided=True),
    case(
        "flux2-dev, ids of a batch, references",
        guided=True,
        images=((5, 7, 0), (3, 4, 10), (2, 3, 20)),
        batched=True,
    ),
    case("flux2-klein", KLEIN),
    case("flux2-klein, guidance not read", KLEIN, guided=True),
    case(
        "flux2, another epsilon, MLP and output",
        {"eps": 1e-2, "mlp_ratio": 2.5, "out_channels": 8, "rope_theta": 500},
        guided=True,
    ),
]
