"""What a step costs: one launch, no number from the host, nothing that waits for a device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rfkernels import ops, samplers
from rfkernels.samplers import METHODS, init, plan_for, schedule, step

STEPS = 6
GUIDES = {
    "none": None,
    "cfg": 3.0,
    "zero_star": samplers.CFGZeroStar(3.0, zero_steps=0),
    "apg": samplers.APG(3.0, eta=0.5, r=2.0, momentum=-0.5),
    "rescaled": samplers.Rescaled(3.0),
    "norm matched": samplers.NormMatched(3.0),
    "perpendicular": samplers.Perpendicular(3.0),
    "skip layer": samplers.SkipLayer(3.0),
    "interval": samplers.Interval(samplers.CFG(3.0), 0.3, 0.8),
}
PLANNED = sorted(name for name, method in METHODS.items() if not method.adaptive)
# what neither computes nor moves numbers
FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::view", "aten::select", "aten::detach"}


class Calls(TorchDispatchMode):
    """The names of the ops that were called, and how often."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def start(method, guide, device="cpu"):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(device)
    plan = plan_for(method, schedule("linear", STEPS))
    keys = ops.noise_keys(5, 2, device=device) if plan.stochastic else None
    return init(plan, x, guide=guide, keys=keys)


@torch.no_grad()
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("method", PLANNED)
def test_a_step_is_one_launch_and_nothing_of_the_host(method, guide):
    state = start(method, GUIDES[guide])
    count = 3 if GUIDES[guide] is not None and guide in ("perpendicular", "skip layer") else 2
    while not state.done:
        velocities = torch.randn(count, 2, 3, 8).unbind() if GUIDES[guide] is not None else state.x.sin()
        with Calls() as calls:
            state = step(state, velocities)
        launches = [name for name in calls.names if name not in FREE]
        assert len(launches) <= 2 and set(launches) <= {"rfkernels::combine_out"}, launches
        # a fourth result (a guided velocity and a momentum, where a method keeps two) is a launch more
        assert len(launches) == 1 or guide == "apg"
    assert state.x.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
@pytest.mark.parametrize("guide", ["none", "cfg", "zero_star", "norm matched"])
@pytest.mark.parametrize("method", PLANNED)
def test_a_whole_loop_is_captured_in_one_graph(method, guide):
    def run(state):
        while not state.done:
            v = state.x.sin()
            state = step(state, v if GUIDES[guide] is None else (0.5 * v, v))
        return state.x

    state = start(method, GUIDES[guide], "cuda")
    expected = run(state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(state)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
