"""FLUX.1: with and without guidance, batches, odd sizes, Fill, Depth and Kontext inputs."""

import torch

from rfkernels.models.flux import Flux
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 8, 12),
}


def ids(rows: int, columns: int, first: int = 0) -> torch.Tensor:
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    return torch.cat([torch.full((rows * columns, 1), first), grid.view(-1, 2)], -1).float()


def inputs(
    batch: int = 2,
    grid=(5, 7),
    text: int = 11,
    channels: int = 16,
    guided=False,
    reference=None,
    times=(0.5, 0.25),
):
    img_ids = ids(*grid) if reference is None else torch.cat([ids(*grid), ids(*reference, first=1)])
    made = {
        "hidden_states": normal(batch, len(img_ids), channels),
        "encoder_hidden_states": normal(batch, text, 40, seed=2),
        "pooled_projections": normal(batch, 20, seed=3),
        "timestep": torch.tensor(times)[:batch],  # 1000 t is a number of bfloat16
        "img_ids": img_ids,
        "txt_ids": torch.zeros(text, 3),
    }
    return made | ({"guidance": torch.tensor([4.0, 1.0])[:batch]} if guided else {})


def case(name: str, config: dict | None = None, **options) -> Case:
    config = config or {}
    return Case(name, "FluxTransformer2DModel", Flux, CONFIG | config, lambda: inputs(**options))


CASES = [
    case("flux-schnell"),
    case("flux-dev", {"guidance_embeds": True}, guided=True),
    case(
        "flux-dev, one sample, a single token", {"guidance_embeds": True}, guided=True, batch=1, grid=(1, 1)
    ),
    case("flux-dev, a time that 16 bits round", {"guidance_embeds": True}, guided=True, times=(0.875, 0.3)),
    case("flux-fill", {"in_channels": 96, "out_channels": 16}, channels=96),
    case("flux-depth", {"in_channels": 32, "out_channels": 16}, channels=32),
    case("flux-kontext", {"guidance_embeds": True}, guided=True, reference=(3, 4)),
]
