"""Z-Image: images and captions of any sizes in a batch, videos, omni with clean images and SigLIP tokens."""

import torch

from rfkernels.models.zimage import ZImage
from tests.models.parity import Case, normal

__all__ = ["CASES"]

CONFIG = {
    "in_channels": 4,
    "dim": 72,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 20,
    "axes_dims": [8, 8, 8],
    "axes_lens": [128, 32, 32],
}
# diffusers makes patches of images that there are not 64 wide, whatever the model has
OMNI = {"siglip_feat_dim": 12, "in_channels": 16}


def inputs(sizes=((1, 6, 10), (1, 6, 10)), texts=(11, 11), **options):
    return {
        "x": [normal(4, *size, seed=i) for i, size in enumerate(sizes)],
        "t": torch.tensor([0.875, 0.3])[: len(sizes)],
        "cap_feats": [normal(n, 20, seed=10 + i) for i, n in enumerate(texts)],
        **options,
    }


def omni(images, texts, siglip, noisy):
    """Of each sample sizes of images, lengths of captions, sizes of SigLIP tokens; 0: None."""
    made = lambda size, seed, *width: normal(*size, *width, seed=seed) if size else None
    return {
        "x": [[made(i and (16, *i), j) for j, i in enumerate(sample)] for sample in images],
        "t": torch.tensor([0.875, 0.3])[: len(images)],
        "cap_feats": [[normal(n, 20, seed=n) for n in sample] for sample in texts],
        "siglip_feats": [s and [made(i, 7 + j, 12) for j, i in enumerate(s)] for s in siglip],
        "image_noise_mask": noisy,
    }


def case(name: str, config: dict | None = None, made=inputs, **options) -> Case:
    config = CONFIG | (config or {})
    return Case(name, "ZImageTransformer2DModel", ZImage, config, lambda: made(**options))


PAIR = {"images": [[(1, 6, 10), (1, 4, 4)]], "texts": [[9, 5, 3]], "noisy": [[0, 1]]}
CASES = [
    case("z-image"),
    case("z-image, one sample, a single token", sizes=[(1, 2, 2)], texts=[1]),
    case("z-image, no padding", sizes=[(1, 8, 16)], texts=[32]),
    case("z-image, captions of two lengths", texts=(40, 7)),
    case("z-image, images of two sizes", sizes=((1, 6, 10), (1, 10, 14)), texts=(33, 7)),
    case("z-image, frames", sizes=[(3, 4, 6)], texts=[5]),
    case(
        "z-image, patches of frames",
        {"all_patch_size": (2, 2), "all_f_patch_size": (1, 2)},
        sizes=[(4, 4, 6)],
        texts=[5],
        f_patch_size=2,
    ),
    case("z-image, no norm of queries", {"qk_norm": False}),
    case("z-image, control", controlnet_block_samples={1: normal(2, 64, 72, seed=4)}),
    case("z-image-omni", OMNI, omni, **PAIR, siglip=[[(3, 5), (2, 2)]]),
    case("z-image-omni, no siglip", OMNI, omni, **PAIR, siglip=[None]),
    case(
        "z-image-omni, two samples",
        OMNI,
        omni,
        images=[[(1, 6, 10), (1, 4, 4)], [0, (1, 10, 12)]],
        texts=[[9, 5], [33, 2]],
        siglip=[[(3, 5), 0], [0, (1, 4)]],
        noisy=[[0, 1], [0, 1]],
    ),
]
