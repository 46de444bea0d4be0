"""Mixtures of experts on awkward shapes, for `smoke`."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from rfkernels import ops

# rows, inputs, outputs, experts, top_k: one of each; ragged segments; tiles of 128 rows, and no room for some
SHAPES = ((1, 1, 1, 1, 1), (37, 24, 33, 5, 3), (700, 72, 130, 2, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Results = Iterator[tuple[str, Tensor, Tensor, float]]  # name, ours, the definition in float64, tolerance


def results(device: str) -> Results:
    """Every op, with all that it takes."""
    for shape, dtype in product(SHAPES, DTYPES):
        rows, k, n, experts, top_k = shape
        generator = torch.Generator().manual_seed(rows)

        def draw(*shape: int, dtype: torch.dtype = dtype, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        what, limit = f"{shape} {dtype}", 1e-4 if dtype == torch.float32 else 3e-2
        logits, options = draw(rows, experts), (rows // 2 + 1, True, 0.9)
        routing = ops.moe_route(logits, top_k, capacity=options[0], normalize=True, threshold=options[2])
        exact = ops.moe_route_reference(logits.double(), top_k, *options)
        for name, got, expected in zip(routing._fields, routing, exact, strict=True):
            yield f"moe_route {name} {what}", got, expected.double(), 1e-5

        x, weights, up = draw(rows, k), draw(2, experts, n, k) * k**-0.5, draw(2, experts, n)
        index = routing.order // top_k
        given = {"index": index, "up": weights[1], "bias": up[0], "up_bias": up[1]}
        y = ops.grouped_linear(x, weights[0], routing.offsets, activation="swiglu", **given)
        wide = [list(t.double()) for t in (*weights, *up)]
        expected = ops.grouped_linear_reference(x.double(), wide[0], routing.offsets, index, *wide[1:])
        yield f"grouped_linear {what}", y, expected, limit

        residual = draw(rows, n)
        got = ops.moe_combine(y, routing, residual=residual)
        args = (routing.weights.double(), routing.slots, routing.offsets, residual.double())
        yield f"moe_combine {what}", got, ops.moe_combine_reference(y.double(), *args), limit
