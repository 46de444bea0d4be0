"""Mixtures of experts: the layer of HiDream-I1, beside a loop over experts in torch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, random_tensor

# rows, inputs, hidden of an expert, hidden of the shared one; four experts, top 2
SHAPES = {
    "HiDream-I1, 1024 tokens": (1024, 2560, 6912, 3584),
    "HiDream-I1, 4096 tokens": (4096, 2560, 6912, 3584),
    "small": (256, 128, 320, 192),
}
FULL, QUICK = tuple(SHAPES), ("small",)
EXPERTS, TOP_K = 4, 2


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases; bfloat16."""
    for label in QUICK if quick else FULL:
        yield _layer(label, *SHAPES[label], device)


def _layer(label: str, rows: int, width: int, hidden: int, shared: int, device: str) -> Case:
    from rfkernels import ops

    # gate; w1, w3, w2 of every expert, then of the shared one
    of_expert = lambda hidden: [(hidden, width), (hidden, width), (width, hidden)]
    shapes = [(EXPERTS, width), *(EXPERTS * of_expert(hidden)), *of_expert(shared)]

    def inputs() -> tuple[Tensor, ...]:
        weights = [random_tensor(s, torch.float32, device, i) * s[1] ** -0.5 for i, s in enumerate(shapes)]
        return random_tensor((rows, width), torch.bfloat16, device, 99), *(w.bfloat16() for w in weights)

    def ours(out: None, x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        w1, w3, w2 = (weights[i:-3:3] for i in range(3))
        return ops.moe(x, gate, w1, w3, w2, TOP_K, shared=weights[-3:])

    def loop(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        """One product after the other on the rows of an expert, whose number the host waits for."""
        expert = lambda x, w1, w3, w2: F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
        probs, experts = F.linear(x, gate).float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        y = expert(x, *weights[-3:])
        for e in range(EXPERTS):
            row, choice = (experts[:, :TOP_K] == e).nonzero(as_tuple=True)
            share = probs[row, choice, None].to(x.dtype)
            y.index_add_(0, row, share * expert(x[row], *weights[3 * e : 3 * e + 3]))
        return y

    elements = sum(a * b for a, b in shapes) + 2 * rows * width
    return Case(
        room="moe",
        op="moe",
        label=label,
        shape=(rows, width),
        dtypes="bf16",
        bytes_moved=2 * elements,
        inputs=inputs,
        ours=ours,
        formula=loop,
        has_out=False,
        operations=6 * rows * width * (TOP_K * hidden + shared),
        product="bf16",
        tolerance=0.1,  # of values of order one: the loop rounds in between
    )
