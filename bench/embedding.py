"""`timestep_embedding`; patches are torch's own copies and are not timed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import DTYPES, Case, nbytes, random_tensor

# one time for a sample of a batch, for a frame, for a token of Wan 480p with 81 frames
ROWS = {"batch": 16, "frames": 2 * 21, "Wan 480p tokens": 32760}
DIM = 256


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases."""
    for label, rows in ROWS.items():
        for dtypes in ("f32", "bf16"):
            if not quick or (label == "batch" and dtypes == "bf16"):
                yield _embedding(label, rows, dtypes, device)


def _embedding(label: str, rows: int, dtypes: str, device: str) -> Case:
    from rfkernels.ops import timestep_embedding

    dtype = DTYPES[dtypes][0]

    def formula(t: Tensor) -> Tensor:
        exponent = -math.log(10000) * torch.arange(DIM // 2, dtype=torch.float32, device=t.device)
        angle = t[:, None] * torch.exp(exponent / (DIM // 2))[None]
        return torch.cat([angle.cos(), angle.sin()], -1).to(dtype)

    return Case(
        room="embedding",
        op="timestep_embedding",
        label=label,
        shape=(rows, DIM),
        dtypes=dtypes,
        bytes_moved=nbytes(rows, torch.float32) + nbytes(rows * DIM, dtype),
        inputs=lambda: (random_tensor((rows,), torch.float32, device, 3),),
        ours=lambda out, t: timestep_embedding(t, DIM, dtype=dtype),
        formula=formula,
        has_out=False,
        tolerance=1e-5 if dtypes == "f32" else 8e-3,
    )
