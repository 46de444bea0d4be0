"""Qwen-Image, -Edit (several images, references at t = 0) and -Layered: masks, batches, odd sizes."""

from math import prod

import torch

from rfkernels.models.qwen import QwenImage
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "axes_dims_rope": (4, 8, 12),
}
LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}
EDITED = [(1, 5, 7), (1, 4, 6), (1, 3, 3)]


def case(name: str, config: dict | None = None, images=((1, 5, 7),), batch=2, text=11, **options) -> Case:
    def inputs() -> dict:
        made = {
            "hidden_states": normal(batch, sum(map(prod, images)), 16),
            "encoder_hidden_states": normal(batch, text, 40, seed=2),
            "timestep": torch.tensor([0.5, 0.25])[:batch],
            "img_shapes": [list(images)] * batch,
        }
        return made | options

    return Case(name, "QwenImageTransformer2DModel", QwenImage, CONFIG | (config or {}), inputs)


def mask(*visible: list[int]) -> torch.Tensor:
    seen = torch.zeros(len(visible), 11, dtype=torch.int64)
    for row, columns in zip(seen, visible, strict=True):
        row[columns] = 1
    return seen


CASES = [
    case("qwen-image"),
    case("qwen-image, one sample, a single token", images=((1, 1, 1),), batch=1, text=1),
    case("qwen-image, a shape per sample", img_shapes=[(1, 5, 7)] * 2),
    case("qwen-image, masked", encoder_hidden_states_mask=mask([*range(11)], [*range(6)])),
    case("qwen-image, a mask with holes", encoder_hidden_states_mask=mask([0, 2, 3, 10], [4, 5])),
    case("qwen-image, all seen", encoder_hidden_states_mask=torch.ones(2, 11)),
    case("qwen-image-edit", images=EDITED),
    case("qwen-image-edit, several frames", images=[(1, 5, 7), (3, 2, 3)], batch=1),
    case("qwen-image-edit-2511", {"zero_cond_t": True}, images=EDITED),
    case(
        "qwen-image-edit-2511, masked",
        {"zero_cond_t": True},
        images=EDITED,
        encoder_hidden_states_mask=mask([*range(11)], [*range(3)]),
    ),
    case("qwen-image-layered", LAYERED, images=EDITED, additional_t_cond=torch.tensor([1, 0])),
    case(
        "qwen-image-layered, small",
        LAYERED,
        images=[(1, 2, 2)] * 4,
        additional_t_cond=torch.tensor([0, 1]),
    ),
]
