"""Every op on two devices, which must agree to the bit (where a row is summed up, within rounding): the last
side of a triangle.

    python -m bench.same_bits [cpu cuda]

CI runs the CUDA kernels compiled as C++ on the CPU and requires the bits of the CPU kernels (tests/emulator);
here the GPU must give them too, and so those of the emulated kernels. The inputs are those of the tests.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product

import torch
from torch import Tensor

from bench import same_regions
from rfkernels import ops
from tests.ops.cases import CASES, DTYPES, ROWS, SHAPES, VIDEO, Make

# beside those of the tests: blocks of whole packs; thousands of blocks, which the CPU writes past its cache
MORE_SHAPES = [(4, 1024), (2, 600_011)]


def main(first: str, second: str) -> int:
    """1 if an op gives other results on `second` than on `first`."""
    wrong = count = 0
    for name, op, args, tolerance in chain(calls(), same_regions.calls()):
        count += 1
        here, there = (as_tuple(op(*moved(args, device))) for device in (first, second))
        here, there = (tuple(t.cpu() for t in results) for results in (here, there))
        if differing := same_regions.differing(here, there, tolerance):
            wrong += 1
            print(f"{name}: {differing} of {sum(t.numel() for t in here)} elements differ (by {tolerance})")
    print(f"{wrong} of {count} calls differ between {first} and {second}")
    return bool(wrong)


def calls() -> Iterator[tuple[str, Callable[..., Tensor], tuple, float]]:
    """What a call is, its op, its arguments on the CPU, its tolerance."""
    layouts = [(shape, None) for shape in (*SHAPES, *MORE_SHAPES)] + [(VIDEO, rows) for rows in ROWS]
    for (shape, rows), (state, velocity) in product(layouts, DTYPES):
        make = partial(Make, shape, state, velocity, "cpu", rows)
        where = f"{shape} {state} {velocity}, scalars {'per sample' if rows is None else rows}"
        for case in CASES:
            yield f"{case} {where}", case.op, case.inputs(make()), 0.0
        yield f"philox_normal {where}", partial(ops.philox_normal, shape, dtype=state), (make().keys,), 0.0
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn):
        x = Make((3, 10_007), torch.float32, torch.float32, "cpu").x * 50
        yield f"stochastic_round {dtype}", partial(_rounded, dtype), (x,), 0.0


def _rounded(dtype: torch.dtype, x: Tensor) -> Tensor:
    return ops.stochastic_round(x, dtype, seed=5).float()


def moved(value, device: str):
    """The arguments with their tensors on the device."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ("cpu", "cuda"))))
