"""Every op once on small awkward shapes against its definition: the program that a memory checker runs.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.smoke cuda
"""

import sys
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from bench import smoke_attention, smoke_linear, smoke_moe, smoke_regions
from rfkernels import ops

# batch, *rest: one element, a ragged tail, several blocks, frames of a video
SHAPES = ((1, 1), (3, 13), (2, 10_007), (2, 4, 3, 8, 8))
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))


def main(device: str) -> int:
    """1 if a result is off by more than rounding explains."""
    failures = 0
    for name, got, expected, limit in everything(device):
        error = ((got.double() - expected).abs() / (1 + expected.abs())).max().item()
        if not (got.isfinite().all() and error <= limit):
            failures += 1
            print(f"{name}: off by {error:.2e}, at most {limit:.0e}")
    print(
        f"{failures} of the results are wrong on {device}" if failures else f"all ops are right on {device}"
    )
    return 1 if failures else 0


def everything(device: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Name, ours, the definition in float64, and the tolerance."""
    for shape, (state, velocity) in product(SHAPES, DTYPES):
        limit = 1e-5 if state == torch.float32 else 1e-2
        for name, (got, expected) in results(shape, state, velocity, device).items():
            yield f"{name} {tuple(shape)} {state} {velocity}", got, expected, limit
    for shape, dtypes in product(smoke_regions.SHAPES, smoke_regions.DTYPES):
        for name, *rest in smoke_regions.results(shape, *dtypes, device):
            yield f"{name} {tuple(shape)} {dtypes[0]} {dtypes[1]}", *rest
    yield from smoke_linear.results(device)
    yield from smoke_attention.results(device)
    yield from smoke_moe.results(device)


def results(
    shape: tuple[int, ...], state: torch.dtype, velocity: torch.dtype, device: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Ours and the definition in float64, by op."""
    generator = torch.Generator().manual_seed(0)

    def draw(dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(dims, generator=generator).to(device, dtype)

    x, u, c = draw(shape, state), draw(shape, velocity), draw(shape, velocity)
    derivatives = draw((3, *shape), velocity)
    a, b, w = (draw(shape[:1], torch.float32) for _ in range(3))
    coefs = draw((3, shape[0]), torch.float32)
    keys = ops.noise_keys(7, shape[0], step=3, device=device)
    z = ops.philox_normal_reference(shape, keys, torch.float64)
    outs, lses = (
        [draw(shape, state) for _ in range(3)],
        [4 * draw(shape[:-1], torch.float32) for _ in range(3)],
    )
    merged = ops.attention_merge(outs, lses)
    wide_merged = ops.attention_merge_reference([t.double() for t in outs], [t.double() for t in lses])
    d = {name: t.double() for name, t in dict(x=x, u=u, c=c, a=a, b=b, w=w, k=coefs, d=derivatives).items()}
    return {
        "affine_step": (
            ops.affine_step(x, u, a, b),
            ops.affine_step_reference(d["x"], d["u"], d["a"], d["b"]),
        ),
        "linear_combination": (
            ops.linear_combination([x, u, c], coefs),
            ops.linear_combination_reference([d["x"], d["u"], d["c"]], d["k"]),
        ),
        "taylor_step": (
            ops.taylor_step(x, derivatives, a),
            ops.taylor_step_reference(d["x"], d["d"], d["a"]),
        ),
        "cfg_step": (
            ops.cfg_step(x, u, c, w, a, b),
            ops.cfg_step_reference(d["x"], d["u"], d["c"], d["w"], d["a"], d["b"]),
        ),
        **_combined(x, u, c, a, keys),
        "attention_merge": (merged[0], wide_merged[0]),
        "attention_merge lse": (merged[1], wide_merged[1]),
        "philox_normal": (ops.philox_normal(shape, keys, dtype=state), z),
        "renoise": (ops.renoise(x, a, b, keys), _rows(d["a"], x) * d["x"] + _rows(d["b"], x) * z),
        **{
            f"stochastic_round to {dtype}": (
                ops.stochastic_round(x, dtype, seed=7, scale=0.01 + a.abs()).float(),
                ops.stochastic_round_reference(x.float(), 0.01 + a.abs(), dtype, 7).double(),
            )
            for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
        },
    }


def _combined(x: Tensor, u: Tensor, c: Tensor, a: Tensor, keys: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Two results of three tensors under every guide that takes them; sums of the same combinations."""
    made = {}
    tensors, wide = [x, u, c, u], [t.double() for t in (x, u, c, u)]
    for guide, (_, names) in ops.GUIDES.items():
        coefs = torch.stack([a, -a, a / 2, a, 1 - a, a / 3]).expand(2, -1, -1).contiguous()
        guidance = torch.full((len(names),), 1.5, device=x.device)
        got = ops.combine(tensors, coefs, guide=guide, guidance=guidance, keys=keys)
        expected = ops.combine_reference(
            wide, coefs.double(), None, None, keys, None, guide, guidance.double()
        )
        made[f"combine {guide}"] = torch.stack(got), torch.stack(expected)
    rows = coefs[:, :4]
    sums, wide_sums = ops.moments(tensors, rows), ops.moments_reference(wide, rows.double())
    made["moments"] = sums / x[0].numel(), wide_sums / x[0].numel()
    args = ([x, u], torch.stack([a, -a, a / 2])[None], keys)
    drawn, sums = ops.stochastic_step(*args)
    expected, _ = ops.stochastic_step_reference([t.double() for t in args[0]], args[1].double(), keys)
    made["stochastic_step"] = drawn, expected
    again = ops.moments([x, u, drawn], torch.stack([-a, a, torch.ones_like(a)])[None])
    made["stochastic_step sums"] = sums, again
    return made


def _rows(scalar: Tensor, x: Tensor) -> Tensor:
    return scalar.view(-1, *[1] * (x.ndim - 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
