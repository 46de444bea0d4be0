"""Every op on two devices, which must agree to the bit: the last side of a triangle.

    python -m bench.same_bits [cpu cuda]

CI runs the CUDA kernels compiled as C++ on the CPU and requires the bits of the CPU kernels (tests/emulator);
here the GPU must give them too, and so those of the emulated kernels. The inputs are those of the tests.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from rfkernels import ops
from tests.ops.cases import CASES, DTYPES, ROWS, SHAPES, VIDEO, Make

# beside those of the tests: blocks of whole packs; thousands of blocks, which the CPU writes past its cache
MORE_SHAPES = [(4, 1024), (2, 600_011)]


def main(first: str, second: str) -> int:
    """1 if an op gives other bits on `second` than on `first`."""
    differing = count = 0
    for name, op, args in calls():
        count += 1
        here, there = (op(*moved(args, device)).cpu() for device in (first, second))
        if not torch.equal(here, there):
            differing += 1
            print(f"{name}: {(here != there).sum()} of {here.numel()} elements differ")
    print(f"{differing} of {count} calls differ between {first} and {second}")
    return bool(differing)


def calls() -> Iterator[tuple[str, Callable[..., Tensor], tuple]]:
    """What a call is, its op, and its arguments on the CPU."""
    layouts = [(shape, None) for shape in (*SHAPES, *MORE_SHAPES)] + [(VIDEO, rows) for rows in ROWS]
    for (shape, rows), (state, velocity) in product(layouts, DTYPES):
        make = partial(Make, shape, state, velocity, "cpu", rows)
        where = f"{shape} {state} {velocity}, scalars {'per sample' if rows is None else rows}"
        for case in CASES:
            yield f"{case} {where}", case.op, case.inputs(make())
        yield f"philox_normal {where}", partial(ops.philox_normal, shape, dtype=state), (make().keys,)


def moved(args: tuple, device: str) -> tuple:
    return tuple([t.to(device) for t in a] if isinstance(a, list) else a.to(device) for a in args)


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ("cpu", "cuda"))))
