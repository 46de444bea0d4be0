"""Solver steps: `affine_step`, `linear_combination`, `taylor_step`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import DTYPES, MODELS, SIZES, Case, for_peers, nbytes, random_tensor, row_values, tolerance

# op, its parameter (linear_combination: arrays, taylor_step: order), shapes by name, dtypes, leading
# dimensions of the coefficients (1: a sample has its own, 2: a token has)
FULL = [
    ("affine_step", 0, SIZES, tuple(DTYPES), 1),
    ("linear_combination", 3, SIZES, tuple(DTYPES), 1),  # AB2: x, v, the velocity before
    ("linear_combination", 5, SIZES, tuple(DTYPES), 1),  # RK4: x and four velocities
    ("taylor_step", 1, {"16M": SIZES["16M"]}, tuple(DTYPES)[:2], 1),
    ("taylor_step", 3, {"16M": SIZES["16M"]}, tuple(DTYPES)[:2], 1),
    ("affine_step", 0, MODELS, ("f32+bf16",), 1),
    ("affine_step", 0, {"FLUX 1024x1024": MODELS["FLUX 1024x1024"]}, ("f32+bf16",), 2),  # a sigma per token
    ("linear_combination", 3, MODELS, ("f32+bf16",), 1),
    ("taylor_step", 2, {"FLUX 1024x1024": MODELS["FLUX 1024x1024"]}, ("f32", "bf16"), 1),
]
QUICK = [
    ("affine_step", 0, {"1M": SIZES["1M"]}, ("f32", "bf16"), 1),
    ("linear_combination", 3, {"1M": SIZES["1M"]}, ("f32+bf16",), 1),
    ("taylor_step", 2, {"FLUX 1024x1024": MODELS["FLUX 1024x1024"]}, ("f32",), 1),
]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases, smallest first within an op."""
    make = {"affine_step": _affine, "linear_combination": _combination, "taylor_step": _taylor}
    for op, parameter, shapes, dtypes, lead in QUICK if quick else FULL:
        for label, shape in shapes.items():
            for dtype in dtypes:
                per_token = "" if lead == 1 else ", coefficients per token"
                yield make[op](label + per_token, shape, dtype, device, parameter, lead)


def _affine(label: str, shape: tuple[int, ...], dtypes: str, device: str, _: int, lead: int) -> Case:
    from rfkernels.ops import affine_step

    state, velocity = DTYPES[dtypes]
    a, b = (row_values(shape[:lead], device, seed) for seed in (1, 2))
    pa, pb = (for_peers(c, len(shape), state) for c in (a, b))
    return Case(
        room="solver",
        op="affine_step" if lead == 1 else "affine_step per token",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(shape).numel(), state, velocity, state),  # x, v -> out
        inputs=lambda: (random_tensor(shape, state, device, 3), random_tensor(shape, velocity, device, 4)),
        ours=lambda out, x, v: affine_step(x, v, a, b, out=out),
        formula=lambda x, v: pa * x + pb * v,
        formula_out=lambda out, x, v: torch.mul(x, pa, out=out).addcmul_(v, pb),
        tolerance=tolerance(dtypes),
    )


def _combination(label: str, shape: tuple[int, ...], dtypes: str, device: str, k: int, lead: int) -> Case:
    from rfkernels.ops import linear_combination

    state, velocity = DTYPES[dtypes]
    coefs = row_values((k, *shape[:lead]), device, seed=1)
    peers = [for_peers(c, len(shape), state) for c in coefs]
    kinds = [state] + [velocity] * (k - 1)

    def formula(*tensors: Tensor) -> Tensor:
        return sum((c * t for c, t in zip(peers[1:], tensors[1:], strict=True)), peers[0] * tensors[0])

    def formula_out(out: Tensor, *tensors: Tensor) -> Tensor:
        torch.mul(tensors[0], peers[0], out=out)
        for c, t in zip(peers[1:], tensors[1:], strict=True):
            out.addcmul_(t, c)
        return out

    return Case(
        room="solver",
        op=f"linear_combination k={k}",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(shape).numel(), *kinds, state),  # k arrays -> out
        inputs=lambda: tuple(random_tensor(shape, kind, device, 3 + i) for i, kind in enumerate(kinds)),
        ours=lambda out, *tensors: linear_combination(tensors, coefs, out=out),
        formula=formula,
        formula_out=formula_out,
        tolerance=tolerance(dtypes),
    )


def _taylor(label: str, shape: tuple[int, ...], dtypes: str, device: str, order: int, lead: int) -> Case:
    from rfkernels.ops import taylor_step

    state, velocity = DTYPES[dtypes]
    dt = row_values(shape[:lead], device, seed=1)
    peer = for_peers(dt, len(shape), state)
    weights = [peer]
    for k in range(2, order + 1):
        weights.append(weights[-1] * peer / k)

    def formula(x: Tensor, d: Tensor) -> Tensor:
        return sum((w * d[k] for k, w in enumerate(weights)), x)

    def formula_out(out: Tensor, x: Tensor, d: Tensor) -> Tensor:
        torch.addcmul(x, d[0], weights[0], out=out)
        for k in range(1, order):
            out.addcmul_(d[k], weights[k])
        return out

    return Case(
        room="solver",
        op=f"taylor_step order={order}",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(shape).numel(), state, *[velocity] * order, state),  # x, d -> out
        inputs=lambda: (
            random_tensor(shape, state, device, 3),
            random_tensor((order, *shape), velocity, device, 4),
        ),
        ours=lambda out, x, d: taylor_step(x, d, dt, out=out),
        formula=formula,
        formula_out=formula_out,
        tolerance=tolerance(dtypes),
    )
