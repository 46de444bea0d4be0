"""The cost of a call, on tensors so small that the work is nothing.

A sample is the mean of a block of calls; the sides take turns. What is claimed: the direct call of the
compiled module with four tensors, and the call through torch's dispatcher.
"""

from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Plan, interleave, time_cpu
from bench.stats import Stats, summarise

SHAPE = (1, 64)


def measure(device: str, quick: bool = False) -> dict[str, Stats]:
    """Seconds of one call, by side. On CUDA it is the time until the host goes on, without the GPU's."""
    calls = 200 if quick else 1000
    plan = Plan(seconds=1.0 if quick else 4.0, min_rounds=11, max_rounds=60, burst=1)
    with torch.no_grad():
        blocks = {name: partial(block, call, calls, device) for name, call in sides(device).items()}
        seconds = interleave(blocks, time_cpu, plan)
    return {name: summarise([s / calls for s in samples]) for name, samples in seconds.items()}


def sides(device: str) -> dict[str, Callable[[], object]]:
    """The calls to be timed: ours at each layer, then torch."""
    from rfkernels import _C, ops

    x, v = (torch.randn(SHAPE, device=device) for _ in range(2))
    out = torch.empty_like(x)
    derivatives = v[None].clone()
    dt, a, b = (torch.full(SHAPE[:1], value, device=device) for value in (0.5, 0.9, 0.1))
    pa, pb = a[:, None], b[:, None]
    taylor, taylor_out = torch.ops.rfkernels.taylor_step.default, torch.ops.rfkernels.taylor_step_out.default
    return {
        "_C.taylor_step, 4 tensors": partial(_C.taylor_step, out, x, derivatives, dt),
        "_C.affine_step, 5 tensors": partial(_C.affine_step, out, x, v, a, b),
        "torch.ops.rfkernels.taylor_step_out": partial(taylor_out, out, x, derivatives, dt),
        "torch.ops.rfkernels.taylor_step, new result": partial(taylor, x, derivatives, dt),
        "ops.taylor_step(out=)": partial(ops.taylor_step, x, derivatives, dt, out=out),
        "ops.taylor_step, new result": partial(ops.taylor_step, x, derivatives, dt),
        "ops.affine_step(out=)": partial(ops.affine_step, x, v, a, b, out=out),
        "ops.affine_step(out=), coefficients as numbers": partial(ops.affine_step, x, v, 0.9, 0.1, out=out),
        "torch.add(out=)": partial(torch.add, x, v, out=out),
        "torch.add, new result": partial(torch.add, x, v),
        "a*x + b*v in torch": lambda: pa * x + pb * v,
        "a*x + b*v in torch, numbers": lambda: 0.9 * x + 0.1 * v,
    }


def block(call: Callable[[], object], count: int, device: str, turn: int) -> None:
    """`count` calls in a row; the GPU's queue is emptied before, so that it does not fill up."""
    if device == "cuda":
        torch.cuda.synchronize()
    for _ in range(count):
        call()
