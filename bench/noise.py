"""Noise: `philox_normal` against `torch.randn`, `renoise` and `stochastic_round` against the formulas."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import DTYPES, MODELS, SIZES, Case, for_peers, nbytes, random_tensor, row_values

# op, shapes by name, dtypes. A generator computes more than it moves: far below the roof is expected.
FULL = [
    ("philox_normal", {k: SIZES[k] for k in ("1M", "16M")}, ("f32", "bf16")),
    ("philox_normal", MODELS, ("f32",)),
    ("renoise", {k: SIZES[k] for k in ("1M", "16M")}, ("f32", "bf16")),
    ("renoise", {"FLUX 1024x1024": MODELS["FLUX 1024x1024"]}, ("f32",)),
    ("stochastic_round", {k: SIZES[k] for k in ("1M", "16M")}, ("bf16",)),
]
QUICK = [("philox_normal", {"1M": SIZES["1M"]}, ("f32",)), ("renoise", {"1M": SIZES["1M"]}, ("f32",))]
QUICK += [("stochastic_round", {"1M": SIZES["1M"]}, ("bf16",))]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases; the sides draw different noise, so their results are not compared."""
    make = {"philox_normal": _philox, "renoise": _renoise, "stochastic_round": _stochastic_round}
    for op, shapes, dtypes in QUICK if quick else FULL:
        for label, shape in shapes.items():
            for dtype in dtypes:
                yield make[op](label, shape, dtype, device)


def _philox(label: str, shape: tuple[int, ...], dtypes: str, device: str) -> Case:
    from rfkernels.ops import noise_keys, philox_normal

    dtype = DTYPES[dtypes][0]
    keys = noise_keys(0, shape[0], device=device)
    return Case(
        room="noise",
        op="philox_normal",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(shape).numel(), dtype),  # -> out
        inputs=lambda: (),
        ours=lambda out: philox_normal(shape, keys, dtype=dtype),
        formula=lambda: torch.randn(shape, dtype=dtype, device=device),
        has_out=False,
        tolerance=0.0,
    )


def _renoise(label: str, shape: tuple[int, ...], dtypes: str, device: str) -> Case:
    from rfkernels.ops import noise_keys, renoise

    dtype = DTYPES[dtypes][0]
    keys = noise_keys(0, shape[0], device=device)
    k, c = (row_values(shape[:1], device, seed) for seed in (1, 2))
    pk, pc = (for_peers(value, len(shape), dtype) for value in (k, c))

    def formula_out(out: Tensor, x: Tensor) -> Tensor:
        return out.normal_().mul_(pc).addcmul_(x, pk)

    return Case(
        room="noise",
        op="renoise",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(shape).numel(), dtype, dtype),  # x -> out
        inputs=lambda: (random_tensor(shape, dtype, device, 3),),
        ours=lambda out, x: renoise(x, k, c, keys, out=out),
        formula=lambda x: pk * x + pc * torch.randn_like(x),
        formula_out=formula_out,
        tolerance=0.0,
    )


def _stochastic_round(label: str, shape: tuple[int, ...], dtypes: str, device: str) -> Case:
    from rfkernels.ops import stochastic_round

    def formula(x: Tensor) -> Tensor:  # a carry out of the digits that bfloat16 drops rounds up
        noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
        return noise.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)

    return Case(
        room="noise",
        op="stochastic_round",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(shape).numel(), torch.float32, torch.bfloat16),  # x -> out
        inputs=lambda: (random_tensor(shape, torch.float32, device, 3),),
        ours=lambda out, x: stochastic_round(x, torch.bfloat16, seed=0),
        formula=formula,
        has_out=False,
        tolerance=0.0,
    )
