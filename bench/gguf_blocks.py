"""Random blocks of GGUF."""

import torch
from torch import Tensor

from rfkernels.ops.gguf import BLOCKS

# Where a block has its 16-bit numbers, if not in front; the power of two of what multiplies them at most.
_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
_HALVES |= {"Q6_K": (208,)}
_POWER = {"Q4_0": 3, "Q4_1": 4, "Q5_0": 4, "Q5_1": 5, "Q8_0": 7, "Q2_K": 6, "Q3_K": 7, "Q4_K": 10, "Q5_K": 11}
_POWER |= {"Q6_K": 12, "IQ4_NL": 7, "IQ4_XS": 12}


def random_blocks(kind: str, rows: int, numbers: int, seed: int = 0) -> Tensor:
    """uint8 `[rows, bytes]` of any bits, but for scales of both signs that keep numbers below 1/4."""
    block = BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed)
    shape = (rows * numbers // block.numbers, block.bytes)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    for at in _HALVES.get(kind, (0,)):
        raw[:, at + 1] = raw[:, at + 1] & 0x83 | (12 - _POWER[kind]) << 2  # the exponent of float16
    return raw.view(rows, -1)
