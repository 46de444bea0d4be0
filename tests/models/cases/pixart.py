"""PixArt-Sigma and -alpha (with sizes): masks, sizes that were not trained, batches."""

import torch

from rfkernels.models.pixart import PixArt
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 2,
    "cross_attention_dim": 48,
    "sample_size": 10,
    "caption_channels": 40,
}
SIZES = {
    "resolution": torch.tensor([[512.0, 768.0], [1024.0, 1024.0]]),
    "aspect_ratio": torch.tensor([[0.6], [1.0]]),
}


def case(
    name: str, config: dict | None = None, size=(10, 14), batch=2, text=11, channels=40, **options
) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": normal(batch, 4, *size),
            "encoder_hidden_states": normal(batch, text, channels, seed=2),
            "timestep": torch.tensor([871.0, 3.0])[:batch],
        } | options

    return Case(name, "PixArtTransformer2DModel", PixArt, CONFIG | (config or {}), inputs)


def mask(*lengths: int) -> torch.Tensor:
    return (torch.arange(11) < torch.tensor(lengths)[:, None]).float()


CASES = [
    case("pixart-sigma"),
    case("pixart-sigma, the trained size", {"interpolation_scale": 2, "norm_eps": 1e-2}, size=(10, 10)),
    case("pixart-sigma, masked", encoder_attention_mask=mask(11, 4)),
    case("pixart-sigma, a bias", encoder_attention_mask=(mask(3, 4)[:, None] - 1) * 3),
    case("pixart-sigma, one sample, a single token", size=(2, 2), batch=1, text=1),
    case(
        "pixart-sigma, no projection of the text", {"caption_channels": None, "out_channels": 4}, channels=48
    ),
    case("pixart-alpha", {"use_additional_conditions": True}, added_cond_kwargs=SIZES),
    case(
        "pixart-alpha, of 1024 pixels",
        {"sample_size": 128},
        size=(12, 6),
        added_cond_kwargs=SIZES,
        encoder_attention_mask=mask(2, 9),
    ),
]
