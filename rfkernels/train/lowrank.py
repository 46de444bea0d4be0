"""Training of low-rank adapters beside frozen weights, and the files that `rfkernels.load_lora` takes."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.models.checkpoint import ADAPTER, LICENCE
from rfkernels.models.emoji import DEFAULT_WEIGHTS, EmojiFlow
from rfkernels.train import loop
from rfkernels.train.pairs import digest_of

__all__ = ["LowRank", "adapt", "largest_rank", "targets", "write_lora"]

NAMES = 512  # bytes of a file that name a layer's three tensors, at most


class LowRank(nn.Linear):
    """A frozen layer and its branch: x W^T + b + (x A^T) B^T, A [r, in], B [out, r].

    Unlike a product with W + s B A, its backward pass needs no gradient of W's shape.
    """

    def __init__(self, base: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        weight = base.weight
        self.lora_A = nn.Parameter(torch.randn(rank, self.in_features).to(weight) * self.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def targets(model: EmojiFlow) -> dict[str, nn.Linear]:
    """The layers that get adapters: the hidden ones of all blocks, and the last."""
    named = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return {n: m for n, m in named if n == "out" or n.startswith(("double_blocks.", "single_blocks."))}


def largest_rank(model: EmojiFlow, size: int, most: int) -> int:
    """The largest rank up to `most` whose file of 16-bit numbers has at most `size` bytes.

    Raises:
        ValueError: not even rank 1 fits.
    """
    layers = targets(model).values()
    each = 2 * sum(m.in_features + m.out_features for m in layers)
    room = (size - NAMES * len(layers)) // each
    if room < 1:
        raise ValueError(f"a file of rank 1 needs {each + NAMES * len(layers)} bytes, got a limit of {size}")
    return min(most, room)


def adapt(model: EmojiFlow, rank: int) -> EmojiFlow:
    """Freezes the model, gives its layers (`targets`) branches of that rank, and returns it.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, got {rank}")
    model.requires_grad_(False)
    for name, layer in targets(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LowRank(layer, rank))
    return model


def write_lora(state: loop.State, path: Path, start: str | Path | None, **metadata: str) -> Path:
    """Writes the averaged branches as float16 under PEFT's names, with `.alpha` the rank, and returns `path`.

    start: the weights file that they belong to, whose sha256 is noted beside licence and record of the run.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, layer in state.ema.named_modules():
        if isinstance(layer, LowRank):
            tensors[f"{name}.lora_A.weight"] = layer.lora_A.detach().half().cpu().contiguous()
            tensors[f"{name}.lora_B.weight"] = layer.lora_B.detach().half().cpu().contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(len(layer.lora_A), dtype=torch.float16)
    record = {"format": ADAPTER, "base": f"sha256:{digest_of(start or DEFAULT_WEIGHTS)}"}
    training = json.dumps({**asdict(state.recipe), "started_from": None, "steps_done": state.step})
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {**record, "licence": LICENCE, **metadata, "training": training})
    partial.replace(path)
    return path
