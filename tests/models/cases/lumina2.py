"""Lumina-Image 2.0: captions of one length and of several, grouped queries, sizes."""

import torch

from rfkernels.models.lumina2 import Lumina2
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 4,
    "hidden_size": 72,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "axes_dim_rope": (4, 4, 4),
    "axes_lens": (64, 32, 32),
    "cap_feat_dim": 20,
}


def inputs(lengths=(11, 11), words: int = 11, size=(6, 10), mask=True):
    batch, lengths = len(lengths), torch.tensor(lengths)
    return {
        "hidden_states": normal(batch, 4, *size),
        "timestep": torch.tensor([0.875, 0.3, 0.5])[:batch],
        "encoder_hidden_states": normal(batch, words, 20, seed=2),
        "encoder_attention_mask": (torch.arange(words) < lengths[:, None]).long() if mask else None,
    }


def unmasked(model, inputs):
    ones = torch.ones(inputs["encoder_hidden_states"].shape[:2], dtype=torch.long)
    return model(**inputs | {"encoder_attention_mask": ones}, return_dict=False)[0]


def case(name: str, config: dict | None = None, theirs=None, **options) -> Case:
    config = CONFIG | (config or {})
    return Case(name, "Lumina2Transformer2DModel", Lumina2, config, lambda: inputs(**options), theirs)


CASES = [
    case("lumina2"),
    case("lumina2, no mask", theirs=unmasked, mask=False),
    case("lumina2, captions of several lengths", lengths=(4, 11, 1)),
    case("lumina2, captions of one length in more places", lengths=(5, 5)),
    case("lumina2, one sample, a single token and word", lengths=(1,), words=1, size=(2, 2)),
    case("lumina2, a wider feed-forward, other channels", {"ffn_dim_multiplier": 1.3, "out_channels": 3}),
]
