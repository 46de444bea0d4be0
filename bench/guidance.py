"""Classifier-free guidance folded into the step: `cfg_step`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import DTYPES, MODELS, SIZES, Case, for_peers, nbytes, random_tensor, row_values

# shapes by name, dtypes
FULL = [(SIZES, tuple(DTYPES)), (MODELS, ("f32+bf16",))]
QUICK = [({"1M": SIZES["1M"]}, ("f32", "f32+bf16"))]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """`a*x + b*(uncond + guidance*(cond - uncond))` on plain sizes and on the latents of models."""
    for shapes, dtypes in QUICK if quick else FULL:
        for label, shape in shapes.items():
            for dtype in dtypes:
                yield _cfg(label, shape, dtype, device)


def _cfg(label: str, shape: tuple[int, ...], dtypes: str, device: str) -> Case:
    from rfkernels.ops import cfg_step

    state, velocity = DTYPES[dtypes]
    scale, a, b = (row_values(shape[:1], device, seed) for seed in (1, 2, 3))
    ps, pa, pb = (for_peers(c, len(shape), state) for c in (scale, a, b))

    def inputs() -> tuple[Tensor, ...]:
        kinds = (state, velocity, velocity)
        return tuple(random_tensor(shape, kind, device, 4 + i) for i, kind in enumerate(kinds))

    def formula_out(out: Tensor, x: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
        torch.sub(cond, uncond, out=out)
        return out.mul_(ps).add_(uncond).mul_(pb).addcmul_(x, pa)

    return Case(
        room="guidance",
        op="cfg_step",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(
            torch.Size(shape).numel(), state, velocity, velocity, state
        ),  # x, uncond, cond -> out
        inputs=inputs,
        ours=lambda out, x, uncond, cond: cfg_step(x, uncond, cond, scale, a, b, out=out),
        formula=lambda x, uncond, cond: pa * x + pb * (uncond + ps * (cond - uncond)),
        formula_out=formula_out,
        tolerance=1e-5 if dtypes == "f32" else 0.1,  # eager rounds cond - uncond to 16 bits
    )
