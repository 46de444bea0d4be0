"""Wan: from text, from an image with its tokens or without, times per token and per frame; precisions."""

import torch

from rfkernels.models.wan import Wan
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 20,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 72,
    "num_layers": 3,
}
WIDE = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "rope")
IMAGE = {"image_dim": 28, "added_kv_proj_dim": 60, "in_channels": 9}


def inputs(batch=2, size=(3, 6, 10), text=11, channels=4, image=0, pictures=1, t=None):
    made = {
        "hidden_states": normal(batch, channels, *size),
        "timestep": torch.tensor([875.0, 300.5])[:batch] if t is None else t,
        "encoder_hidden_states": normal(batch, text, 24, seed=2),
    }
    of_image = {"encoder_hidden_states_image": normal(pictures * batch, image, 28, seed=3)}
    return made | (of_image if image else {})


def of_tokens(model, inputs):
    """diffusers has times of samples or of tokens: here those of two frames with 15 tokens each."""
    t = inputs["timestep"].repeat_interleave(15, 1)
    return model(**inputs | {"timestep": t}, return_dict=False)[0]


def of_index(model, inputs):
    given = dict(inputs)
    t = given["timestep"][given.pop("index")]
    return model(**given | {"timestep": t}, return_dict=False)[0]


def case(name: str, config: dict | None = None, theirs=None, wide=WIDE, **options) -> Case:
    made = lambda: inputs(**options)
    return Case(name, "WanTransformer3DModel", Wan, CONFIG | (config or {}), made, theirs, wide=wide)


FIRST = torch.where(torch.arange(45) < 15, 0.0, 875.0)  # the first of three frames is given
FRAMES = torch.tensor([[0.0, 700.5], [150.0, 999.0]])
INDEX = (torch.arange(45) >= 15).long()


def indexed():
    index = torch.stack([INDEX, 2 * INDEX])
    return inputs(t=torch.tensor([0.0, 875.0, 300.5])) | {"index": index}


CASES = [
    case("wan-t2v"),
    case("wan-t2v, integer times", t=torch.tensor([875, 300])),
    case("wan-t2v, one sample, a single token", batch=1, size=(1, 2, 2), text=1),
    case("wan-t2v, all of it in 16 bits", wide=()),
    case("wan-t2v, no norm of the cross-attention, another epsilon", {"cross_attn_norm": False, "eps": 1e-3}),
    case("wan-t2v, patches of frames", {"patch_size": (2, 2, 2)}, size=(4, 6, 10)),
    case("wan-i2v, image tokens", IMAGE, text=512, channels=9, image=7),
    case(
        "wan-flf2v, tokens of two images",
        IMAGE | {"pos_embed_seq_len": 14},
        text=512,
        channels=9,
        image=7,
        pictures=2,
    ),
    case("wan2.2-i2v", {"in_channels": 9}, channels=9),
    case("wan2.2-5b, the first frame is given", t=torch.stack([FIRST, FIRST * 0.5])),
    case("wan2.2-5b, a single frame", size=(1, 6, 10), t=torch.stack([FIRST[:15], FIRST[10:25]])),
    case("wan-pusa, times of frames", theirs=of_tokens, size=(2, 6, 10), t=FRAMES),
    Case("wan2.2-5b, by index", "WanTransformer3DModel", Wan, CONFIG, indexed, of_index, wide=WIDE),
]
