"""Graphs on a recorder that replays ops without Python: what is copied in, kept, refused and told."""

import pytest
import torch
from torch import nn

from rfkernels.memory import Buckets, GraphRunner
from tests.memory.recorder import RecordingCapture


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def runner(function, **options):
    return GraphRunner(function, capture=RecordingCapture(), **options)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_replays_give_the_bits_of_the_function_for_new_values():
    calls = []

    def function(x, options, scale=1.0):
        calls.append(1)
        return {"sum": x @ options["w"] * scale, "parts": [x[:, 0], options["t"] + 1], "name": "y"}

    run = runner(function)
    for seed in range(5):
        options = {"w": numbers(4, 3, seed=seed + 10), "t": torch.tensor(float(seed))}
        x = numbers(2, 4, seed=seed)
        result, expected = run(x, options, scale=2.0), function(x, options, 2.0)
        assert torch.equal(result["sum"], expected["sum"]) and result["name"] == "y"
        assert all(torch.equal(a, b) for a, b in zip(result["parts"], expected["parts"], strict=True))
    assert len(calls) == 5 + 3  # ours, and those that made the one graph
    (graph,) = run.report().graphs
    assert graph == ("float32[2, 4] float32[4, 3] float32[] 2", 5, 100 + 4 * (8 + 12 + 1))


def test_outputs_are_copies_unless_they_need_not_be():
    kept, views = runner(lambda x: x + 1), runner(lambda x: x + 1, copy_outputs=False)
    a, b = torch.zeros(2), torch.ones(2)
    first = kept(a)
    assert torch.equal(kept(b), b + 1) and torch.equal(first, a + 1)
    first = views(a)
    assert views(b) is first and torch.equal(first, b + 1)


def test_signatures():
    run = runner(lambda x, *rest, flag=None: x * 2)
    base = numbers(4, 4)
    for call in (
        lambda: run(base),
        lambda: run(base.t()),  # strides
        lambda: run(base.double()),
        lambda: run(base[:2]),
        lambda: run(base, 1),
        lambda: run(base, True),
        lambda: run(base, 0.0),
        lambda: run(base, -0.0),
        lambda: run(base, flag="a"),
    ):
        before = len(run.report().graphs)
        assert torch.equal(call(), call())
        assert len(run.report().graphs) == min(before + 1, 8)
    with torch.inference_mode():
        assert torch.equal(run(base, flag="a"), base * 2)
    assert run.report().evicted == 2


def test_strided_and_expanded_inputs():
    run = runner(lambda x: x * torch.arange(12.0).reshape(3, 4))
    for x in (numbers(4, 3).t(), numbers(3, 1).expand(3, 4), numbers(3, 8)[:, ::2]):
        for _ in range(2):
            assert torch.equal(run(x), x * torch.arange(12.0).reshape(3, 4))
    assert not run.report().eager


def test_the_graph_used_longest_ago_goes():
    run = runner(lambda x: x + 1, max_graphs=2)
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    for x in (a, b, a, c, a):  # b goes
        run(x)
    report = run.report()
    assert [g[:2] for g in report.graphs] == [("float32[3]", 1), ("float32[1]", 3)]
    assert report.evicted == 1
    assert str(report).startswith("2 graphs, 216 bytes, 1 evicted")


def test_more_signatures_than_graphs_is_no_use():
    run = runner(lambda x, step: x + step, max_graphs=2)
    for step in range(10):
        assert torch.equal(run(torch.zeros(2), float(step)), torch.full((2,), float(step)))
    (reason,) = run.report().eager
    assert "more signatures than max_graphs=2" in reason
    assert run._capture.recorded == 6
    assert "calls without a graph: more signatures" in str(run.report())
    run.reset()
    run(torch.zeros(2), 1.0)
    assert len(run.report().graphs) == 1 and not run.report().eager


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 3), nn.Buffer(torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize(
    "function, argument, reason",
    [
        (lambda x: x * x.sum().item(), torch.ones(3), "a branch on a tensor"),
        (lambda x: x if x.sum() > 0 else -x, torch.ones(3), "a branch on a tensor"),
        (lambda x: x.nonzero(), torch.ones(3), "a branch on a tensor"),
        (lambda x: x + torch.rand(3), torch.ones(3), "draws random numbers"),
        (lambda x: x.add_(1), torch.ones(3), "writes to its tensor argument 0"),
        (Drops(), torch.ones(3), "writes to the module"),
        (lambda x: object(), torch.ones(3), "must return tensors, numbers and strings, got object"),
        (lambda x: torch.ones(3), object(), "arguments must be tensors, numbers and strings, got object"),
        (lambda x: 1, 2.0, "CUDA device"),
    ],
)
def test_what_a_replay_would_get_wrong_runs_as_it_is(function, argument, reason):
    run = runner(function)
    torch.manual_seed(3)
    expected = [function(argument) for _ in range(2)]
    torch.manual_seed(3)
    if isinstance(argument, torch.Tensor):
        argument.fill_(1)
    results = [run(argument) for _ in range(2)]
    ((told, count),) = run.report().eager.items()
    assert reason in told and count == 2 and not run.report().graphs
    for result, wanted in zip(results, expected, strict=True):
        assert isinstance(result, type(wanted))
        assert not isinstance(result, torch.Tensor) or torch.equal(result, wanted)


def test_random_numbers_are_those_of_the_function():
    run = runner(lambda x: x + torch.rand(3))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(run(torch.zeros(3)), expected)


def test_gradients_and_autocast():
    linear = nn.Linear(3, 3)
    run = runner(linear)
    x = torch.ones(2, 3)
    with torch.enable_grad():
        run(x).sum().backward()
        run(x.clone().requires_grad_()).sum().backward()
    assert linear.weight.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(x).dtype == torch.bfloat16
    reasons = list(run.report().eager)
    assert [r.split(":")[0] for r in reasons] == ["gradients are recorded", "autocast is on"]
    assert torch.equal(run(x), linear(x)) and len(run.report().graphs) == 1


def test_gradients_of_inputs_alone():
    run = runner(lambda x: x * x)
    x = torch.tensor([3.0], requires_grad=True)
    with torch.enable_grad():
        run(x).backward()
    assert x.grad == 6 and not run.report().graphs


def test_failures_with_gradients_say_nothing_of_calls_without():
    run = runner(linear := nn.Linear(3, 3))
    with torch.enable_grad():
        for rows in range(1, 6):
            run(torch.ones(rows, 3))
    assert torch.equal(run(torch.ones(1, 3)), linear(torch.ones(1, 3))) and len(run.report().graphs) == 1


def test_a_signature_that_failed_is_not_tried_again():
    calls = []
    run = runner(lambda x: calls.append(1) or x.nonzero())
    for _ in range(5):
        run(torch.ones(3))
    assert len(calls) == 2 + 1 + 5  # warm-up, the recording that failed, and the calls


def test_parameters_that_change_are_followed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    for run in (runner(model), runner(model.forward)):
        x = torch.ones(2, 3)
        assert torch.equal(run(x), model(x))
        model[0].weight.mul_(2)  # in place: the graph reads it
        assert torch.equal(run(x), model(x)) and run._capture.recorded == 1
        model[0].weight.data = model[0].weight.data * 3  # elsewhere: a new graph
        assert torch.equal(run(x), model(x)) and run._capture.recorded == 2


def test_gives_up_after_a_few_failures():
    run = runner(lambda x: x + 1)
    run._capture.broken = "capture broke"
    for size in range(1, 7):
        assert torch.equal(run(torch.zeros(size)), torch.ones(size))
    reasons = run.report().eager
    assert list(reasons.values()) == [3, 3]
    assert any(r.startswith("given up after 3 signatures: not recorded, RuntimeError") for r in reasons)


def test_an_error_of_the_function_is_its_callers():
    run = runner(lambda x: x @ torch.ones(5))
    with pytest.raises(RuntimeError):
        run(torch.ones(3))
    assert torch.equal(run(torch.ones(2, 5)), torch.full((2,), 5.0))


def test_buckets():
    shapes = []

    def function(x, mask):
        shapes.append(tuple(x.shape))
        return (x * mask[:, None]).cumsum(0)

    def pad(bucket, x, mask):
        missing = bucket - len(x)
        pad = nn.functional.pad
        return (pad(x, (0, 0, 0, missing)), pad(mask, (0, missing))), {}

    buckets = Buckets((4, 8), size=lambda x, mask: len(x), pad=pad, crop=lambda y, size: y[:size])
    run = runner(function, buckets=buckets)
    for size in (1, 3, 4, 5, 8, 9, 2):
        x, mask = numbers(size, 2, seed=size), torch.ones(size)
        assert torch.equal(run(x, mask), x.cumsum(0))
    assert set(shapes) == {(4, 2), (8, 2), (9, 2)}
    assert sorted(g[1] for g in run.report().graphs) == [1, 2, 4]


def test_on_the_cpu_it_calls_the_function_and_says_so():
    run = GraphRunner(lambda x: x + 1)
    assert torch.equal(run(torch.zeros(2)), torch.ones(2))
    assert run.report().eager == {"tensors on one CUDA device are required, got cpu": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_graphs": 0}, "max_graphs and warmup must be at least 1, got 0 and 2"),
        ({"warmup": 0}, "got 8 and 0"),
        ({"buckets": Buckets((4, 2), len, None, None)}, r"must ascend, got \[4, 2\]"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        GraphRunner(len, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).cuda()
    run = GraphRunner(model)
    for size in (3, 5, 3, 5):
        x = torch.randn(size, 64, device="cuda")
        assert torch.equal(run(x), model(x))
    report = run.report()
    assert [g[1] for g in report.graphs] == [2, 2] and not report.eager
    waits = GraphRunner(lambda x: x * x.sum().item())
    x = torch.ones(4, device="cuda")
    assert torch.equal(waits(x), 4 * x) and torch.equal(waits(x), 4 * x)
    assert len(waits.report().eager) == 1
    assert torch.equal(run(x.expand(3, 4).repeat(1, 16)), model(x.expand(3, 4).repeat(1, 16)))
