"""DiT as diffusers and as the original has it, SiT; batches, sizes that were not trained."""

import torch
from torch import Tensor, nn

from rfkernels.models.dit import DiT, SiT, from_diffusers
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 2,
    "sample_size": 10,
    "num_embeds_ada_norm": 7,
}


def one_embedding(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All blocks of diffusers' model get the embeddings of the first, as in published weights."""
    for name, value in state.items():
        first = "transformer_blocks.0.norm1.emb." + name.partition(".norm1.emb.")[2]
        if first in state:
            value.copy_(state[first])
    return from_diffusers(state)


def original(model: nn.Module, inputs: dict) -> Tensor:
    """diffusers' model with the conventions of facebookresearch/DiT."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return model(**inputs, return_dict=False)[0]


def case(name: str, ours=DiT, config=None, size: int = 10, batch=2, t=(871.0, 3.0), **options) -> Case:
    def inputs() -> dict:
        return {
            "hidden_states": normal(batch, 4, size, size),
            "timestep": torch.tensor(t)[:batch],
            "class_labels": torch.tensor([7, 2])[:batch],
        }

    config = CONFIG | (config or {})
    return Case(name, "DiTTransformer2DModel", ours, config, inputs, ours_state=one_embedding, **options)


CASES = [
    case("dit"),
    case("dit, learned variances", config={"out_channels": 8}),
    case("dit, another size and epsilon", config={"norm_eps": 1e-2}, size=14),
    case("dit, one sample, a single token", size=2, batch=1),
    case("dit, no biases of attention, whole t", config={"attention_bias": False}, t=(871, 3)),
    case(
        "dit of the original",
        theirs=original,
        ours_config={"downscale_freq_shift": 0.0},
        config={"norm_eps": 1e-6},
    ),
    case("sit", SiT, theirs=original, t=(0.875, 0.3)),
    case(
        "sit, learned variances",
        SiT,
        {"out_channels": 8},
        theirs=lambda model, inputs: original(model, inputs)[:, :4],
        t=(0.875, 0.3),
    ),
]
