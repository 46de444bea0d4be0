"""Mixtures of experts: where rows go, the sum of what comes back, and the layer."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import ops
from rfkernels.ops.moe import _route_empty
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, DEVICES, F16, F32, F64, KERNELS

NAN, INF = float("nan"), float("inf")
DTYPES = [F64, F32, F16, BF16]
SHAPES = [
    (1, 1, 1),
    (0, 4, 2),
    (5, 4, 2),
    (300, 4, 2),
    (23, 64, 8),
    (31, 7, 7),
    (1000, 3, 1),
]  # rows, experts, k
OPTIONS = [
    {},
    {"normalize": True},
    {"threshold": 0.6},
    {"capacity": 3},
    {"capacity": 0},
    {"capacity": 40, "normalize": True, "threshold": 0.7},
]
every_kernel = pytest.mark.parametrize("device", KERNELS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(*shape, dtype=F64, device="cpu", seed=0):
    memory = "cpu" if device == "emulated" else device
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(memory, dtype)


def route(device, logits, top_k, capacity=None, normalize=False, threshold=None):
    if device != "emulated":
        return ops.moe_route(logits, top_k, capacity=capacity, normalize=normalize, threshold=threshold)
    outs = ops.Routing(*(t.fill_(77) for t in _route_empty(logits, top_k, capacity, normalize, threshold)))
    load_emulator().moe_route(*outs, logits, capacity, normalize, threshold)
    return outs


def combine(device, y, routing, residual=None):
    if device != "emulated":
        return ops.moe_combine(y, routing, residual=residual)
    out = y.new_full((routing.slots.shape[0], y.shape[1]), NAN)
    if out.numel():
        args = y, routing.weights, routing.slots, routing.offsets, residual
        load_emulator().moe_combine(out, *args)
    return out


def assert_routes(device, logits, top_k, options):
    got = route(device, logits, top_k, **options)
    args = {"capacity": None, "normalize": False, "threshold": None} | options
    wanted = ops.moe_route_reference(logits.double(), top_k, *args.values())
    assert got.weights.dtype == (F64 if logits.dtype == F64 else F32)
    torch.testing.assert_close(
        got.weights.double(), wanted.weights, rtol=1e-12 if logits.dtype == F64 else 5e-6, atol=1e-12
    )
    for name, a, b in zip(ops.Routing._fields[1:], got[1:], wanted[1:], strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b), name


@every_device
@every_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing_is_that_of_the_definition(shape, options, dtype, device):
    rows, experts, top_k = shape
    assert_routes(device, draw(rows, experts, dtype=dtype, device=device), top_k, options)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_routing_fuzzed(data):
    rows, experts = data.draw(st.integers(0, 80)), data.draw(st.integers(1, 64))
    options = {
        "capacity": data.draw(st.sampled_from([None, 0, 1, 7])),
        "normalize": data.draw(st.booleans()),
        "threshold": data.draw(st.sampled_from([None, 0.31234, 0.91234])),
    }
    gap, dtype = data.draw(st.sampled_from([0, 3])), data.draw(st.sampled_from(DTYPES))
    logits = draw(rows, experts + gap, dtype=dtype, seed=data.draw(st.integers(0, 99)))[:, :experts]
    top_k = data.draw(st.integers(1, experts))
    # the emulator takes its time for the block of every expert
    device = data.draw(st.sampled_from(KERNELS if experts <= 6 else DEVICES))
    assert_routes(device, logits, top_k, options)


@every_kernel
def test_slots_are_sorted_by_expert_then_row(device):
    got = route(device, draw(500, 5, device=device), 3, capacity=170)
    kept, at = got.experts.flatten() >= 0, got.offsets.tolist()
    assert torch.equal(got.order.sort().values, torch.arange(1500, dtype=torch.int32))
    assert torch.equal(got.order[got.slots.flatten().long()], torch.arange(1500, dtype=torch.int32))
    assert at[0] == 0 and at[-1] == kept.sum() < 1500
    for e in range(5):
        mine = got.order[at[e] : at[e + 1]].long()
        assert len(mine) <= 170 and (mine.diff() > 0).all()
        assert (got.experts.flatten()[mine] == e).all()


@every_kernel
def test_the_lowest_of_equal_experts_comes_first(device):
    logits = torch.tensor([[1.0, 2, 2, 1], [0, 0, 0, 0], [-0.0, 0, -INF, 0]])
    got = route(device, logits, 3)
    assert got.experts.tolist() == [[1, 2, 0], [0, 1, 2], [0, 1, 3]]


@every_kernel
def test_a_threshold_keeps_what_adds_up_to_it(device):
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.01, 0.01, 0.97, 0.01]]).log()
    got = route(device, logits, 3, threshold=0.7)
    assert got.experts.tolist() == [[1, 3, -1], [2, -1, -1]]
    assert got.offsets.tolist() == [0, 0, 1, 2, 3]
    torch.testing.assert_close(got.weights, torch.tensor([[0.5, 0.3, 0], [0.97, 0, 0]]))
    normal = route(device, logits, 3, threshold=0.7, normalize=True).weights
    torch.testing.assert_close(normal, torch.tensor([[0.625, 0.375, 0], [1, 0, 0]]))


@every_kernel
def test_capacity_prefers_first_choices(device):
    # Three rows choose (0, 1), the last (1, 0). Expert 0 has room for three: not for the second choice of the
    # last; expert 1 takes the first choice of the last, and refuses a second choice of an earlier row.
    logits = torch.tensor([[2.0, 1], [2, 1], [2, 1], [1, 2]])
    got = route(device, logits, 2, capacity=3)
    assert got.experts.tolist() == [[0, 1], [0, 1], [0, -1], [1, -1]]
    assert got.offsets.tolist() == [0, 3, 6]
    assert got.order.tolist() == [0, 2, 4, 1, 3, 6, 5, 7]
    whole = route(device, logits, 2).weights
    assert torch.equal(got.weights, whole.where(got.experts >= 0, 0))  # not renormalised


@every_kernel
def test_nan_and_infinite_logits_stay_in_their_row(device):
    logits = torch.tensor([[NAN, 1, 2], [1, 2, 3], [0, INF, 1], [-INF, -INF, -INF], [1, -INF, 0]])
    got = route(device, logits, 2, normalize=True)
    assert got.weights.isnan().all(1).tolist() == [True, False, True, True, False]
    assert all(len(set(row)) == 2 and min(row) >= 0 for row in got.experts.tolist())
    assert got.offsets[-1] == 10


def call_of_combine(dtype, device="cpu", rows=37, width=1001, top_k=2, gap=0):
    memory = "cpu" if device == "emulated" else device
    y = draw(rows * top_k, width + gap, dtype=dtype, device=device, seed=1)[:, :width]
    routing = ops.moe_route(
        draw(rows, 4, dtype=F64 if dtype == F64 else F32, device=memory), top_k, capacity=15
    )
    y[routing.offsets[-1] :] = NAN  # dropped slots hold anything
    residual = draw(rows, width + gap, dtype=dtype, device=device, seed=2)[:, :width]
    return y, routing, residual


@every_kernel
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 1001, 2), (64, 64, 3), (3, 2560, 4), (0, 8, 2)], ids=str)
@pytest.mark.parametrize("gap", [0, 8])
def test_combined_rows_are_those_of_the_definition(shape, gap, dtype, device):
    rows, width, top_k = shape
    y, routing, residual = call_of_combine(dtype, device, rows, width, top_k, gap)
    tolerance = {F64: 1e-14, F32: 1e-6, F16: 2e-3, BF16: 1.6e-2}[dtype]
    for r in (None, residual):
        got = combine(device, y, routing, r)
        wide = None if r is None else r.double()
        args = y.double(), routing.weights.double(), routing.slots, routing.offsets, wide
        expected = ops.moe_combine_reference(*args)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@every_kernel
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_combined_rows_are_rounded_once(dtype, device):
    y, routing, residual = call_of_combine(dtype, device)
    exact = combine(device, y.float(), routing, residual.float())
    assert torch.equal(combine(device, y, routing, residual), exact.to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_routing_gives_the_bits_of_the_cpu(shape):
    rows, experts, top_k = shape
    for i, options in enumerate(OPTIONS if experts < 9 else OPTIONS[-1:]):  # a block of the kernels each
        logits = draw(rows, experts, dtype=DTYPES[i % 4])
        here, there = (route(device, logits, top_k, **options) for device in ("cpu", "emulated"))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True)), options


@every_dtype
def test_emulated_sums_have_the_bits_of_the_cpu(dtype):
    for gap in (0, 8, 3):
        y, routing, residual = call_of_combine(dtype, gap=gap, width=1024)
        for r in (None, residual):
            assert torch.equal(combine("cpu", y, routing, r), combine("emulated", y, routing, r))


@every_kernel
def test_wrong_slots_are_not_read(device):
    y, routing, _ = call_of_combine(F32, device)
    wrong = routing._replace(slots=routing.slots.clone())
    wrong.slots[0] = torch.tensor([-5, 1 << 30])
    got = combine(device, y, wrong)
    assert (got[0] == 0).all() and torch.equal(got[1:], combine(device, y, routing)[1:])


def layer(dtype=F64, rows=(2, 19), width=24, hidden=40, experts=4, device="cpu"):
    make = lambda *shape, seed: draw(*shape, seed=seed).mul(shape[-1] ** -0.5).to(device, dtype)
    x = draw(*rows, width, dtype=dtype, device=device)
    expert = lambda e: (
        *(make(hidden, width, seed=10 * e + i) for i in (1, 2)),
        make(width, hidden, seed=10 * e + 3),
    )
    w1, w3, w2 = zip(*map(expert, range(experts)), strict=True)
    return {
        "x": x,
        "gate": 3 * make(experts, width, seed=5),
        "w1": w1,
        "w3": w3,
        "w2": w2,
        "shared": expert(9),
    }


@every_device
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_dtype
def test_layer_is_the_dense_loop(dtype, options, device):
    args = layer(dtype, device=device)
    for part in (args, args | {"shared": None}):
        got = ops.moe(**part, top_k=2, **options)
        wide = {k: _double(v) for k, v in part.items()}
        # the experts of the rounded logits
        wide["gate"], logits = None, torch.nn.functional.linear(part["x"], part["gate"])
        expected = _with_logits(wide, logits.double(), options)
        tolerance = {F64: 1e-12, F32: 1e-5, F16: 5e-3, BF16: 4e-2}[dtype]
        assert got.dtype == dtype and got.shape == part["x"].shape
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else value and [_double(v) for v in value]


def _with_logits(args, logits, options):
    """The layer for logits that are there: x with a column for each of them, which the experts do not see."""
    widen = lambda w: torch.nn.functional.pad(w, (0, logits.shape[-1]))
    x, gate = torch.cat([args["x"], logits], -1), torch.eye(logits.shape[-1], dtype=F64, device=logits.device)
    gate = torch.nn.functional.pad(gate, (args["x"].shape[-1], 0))
    lists = {k: [widen(w) for w in args[k]] for k in ("w1", "w3")}
    w2 = [torch.nn.functional.pad(w, (0, 0, 0, logits.shape[-1])) for w in args["w2"]]
    shared = args["shared"]
    if shared is not None:
        last = torch.nn.functional.pad(shared[2], (0, 0, 0, logits.shape[-1]))
        shared = widen(shared[0]), widen(shared[1]), last
    y = ops.moe_reference(x, gate, **lists, w2=w2, top_k=2, shared=shared, **options)
    return y[..., : args["x"].shape[-1]]


@every_device
def test_layer_does_not_depend_on_the_order_of_experts(device):
    args = layer(F32, rows=(50,), device=device)
    order = [2, 0, 3, 1]
    moved = {k: tuple(args[k][e] for e in order) for k in ("w1", "w3", "w2")}
    moved |= {"gate": args["gate"][order].contiguous()}
    torch.testing.assert_close(ops.moe(**args), ops.moe(**args | moved), rtol=1e-5, atol=1e-6)


@every_device
def test_layer_takes_stacked_weights(device):
    args = layer(F32, device=device)
    stacked = {k: torch.stack(args[k]) for k in ("w1", "w3", "w2")}
    assert torch.equal(ops.moe(**args), ops.moe(**args | stacked))


def test_layer_is_that_of_hidream():
    module = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")
    torch.manual_seed(0)
    theirs = module.MOEFeedForwardSwiGLU(32, 96, num_routed_experts=4, num_activated_experts=2).eval()
    torch.nn.init.normal_(theirs.gate.weight)
    weights = lambda e: (e.w1.weight, e.w3.weight, e.w2.weight)
    w1, w3, w2 = zip(*map(weights, theirs.experts), strict=True)
    x = torch.randn(2, 33, 32)
    with torch.no_grad():
        got = ops.moe(x, theirs.gate.weight, w1, w3, w2, 2, shared=weights(theirs.shared_experts))
        torch.testing.assert_close(got, theirs(x), rtol=1e-5, atol=1e-6)


@every_device
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_gradients(options, device):
    args = layer(rows=(11,), width=6, hidden=5, device=device)
    flat = [args["x"], args["gate"], *args["w1"], *args["w3"], *args["w2"], *args["shared"]]

    def run(x, gate, *weights):
        w1, w3, w2, shared = (weights[i : i + 4] for i in (0, 4, 8, 12))
        return ops.moe(x, gate, w1, w3, w2, 2, shared=shared, **options)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in flat], fast_mode=True)


@every_device
def test_gradients_keep_dtypes_and_drop_with_their_rows(device):
    y, routing, residual = (t for t in call_of_combine(BF16, device))
    weights = routing.weights.requires_grad_()
    y.requires_grad_(), residual.requires_grad_()
    ops.moe_combine(y, routing._replace(weights=weights), residual=residual).float().sum().backward()
    assert y.grad.dtype == residual.grad.dtype == BF16 and weights.grad.dtype == F32
    dropped = routing.experts < 0
    assert dropped.any() and (weights.grad[dropped] == 0).all() and weights.grad[~dropped].isfinite().all()
    assert (y.grad[routing.offsets[-1] :] == 0).all()


@every_device
def test_ops_obey_torch(device):
    logits = draw(9, 4, device=device).requires_grad_()
    torch.library.opcheck(ops.OPS["moe_route"].functional, (logits, 2, 3, True, 0.9))
    y, routing, residual = call_of_combine(F64, device, width=5)
    y = y.nan_to_num().requires_grad_()
    args = y, routing.weights.requires_grad_(), routing.slots, routing.offsets, residual
    torch.library.opcheck(ops.OPS["moe_combine"].functional, args)
    with torch.no_grad():
        plain = tuple(t.detach() for t in args)
        torch.library.opcheck(ops.OPS["moe_combine"].out_variant, (torch.empty_like(residual), *plain))
        outs = ops.moe_route(logits, 2)
        torch.library.opcheck(
            ops.OPS["moe_route"].out_variant, (*outs, logits.detach(), 2, None, False, None)
        )


@every_device
def test_layer_compiles_without_graph_breaks(device):
    args = layer(F32, device=device)
    args["x"].requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(
        lambda a: ops.moe(**a, capacity=9, threshold=0.9), fullgraph=True, backend="aot_eager"
    )
    expected = ops.moe(**args, capacity=9, threshold=0.9)
    got = run(args)
    assert torch.equal(got, expected)
    grads = [torch.autograd.grad(y.sum(), args["x"])[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


L = torch.zeros(6, 4)
REFUSALS = [
    (
        lambda: ops.moe_route(torch.zeros(4), 1),
        r"top_k of 1..experts, got \[4\]",
    ),
    (lambda: ops.moe_route(L, 5), r"got \[6, 4\] and 5"),
    (lambda: ops.moe_route(L, 0), r"got \[6, 4\] and 0"),
    (lambda: ops.moe_route(torch.zeros(2, 65), 1), "1..64 experts"),
    (lambda: ops.moe_route(L.long(), 1), "logits must be floating"),
    (lambda: ops.moe_route(torch.zeros(4, 6).T, 1), "adjacent along the last axis"),
    (lambda: ops.moe_route(L, 1, capacity=-1), "capacity must be at least 0, got -1"),
    (lambda: ops.moe_route(L, 1, threshold=0.0), r"threshold must be in \(0, 1\], got 0"),
    (lambda: ops.moe_route(L, 1, threshold=NAN), r"threshold must be in \(0, 1\], got nan"),
]
R = ops.moe_route(L, 2)
Y = torch.zeros(12, 8)
REFUSALS += [
    (lambda: ops.moe_combine(Y[:11], R), r"slots must be i32\[rows, top_k\], one for each row of y"),
    (lambda: ops.moe_combine(Y.double(), R), "weights must be f64"),
    (lambda: ops.moe_combine(Y.T.contiguous().T, R), "adjacent along the last axis"),
    (lambda: ops.moe_combine(Y, R._replace(slots=R.slots.long())), "slots must be i32"),
    (lambda: ops.moe_combine(Y, R._replace(weights=R.weights[:5])), "weights must be f32 like slots"),
    (
        lambda: ops.moe_combine(Y, R._replace(offsets=R.offsets.long())),
        "offsets must be i32",
    ),
    (lambda: ops.moe_combine(Y, R, residual=Y), "residual must be like the result"),
    (lambda: ops.moe_combine(Y.long(), R), "y must be floating"),
]


@pytest.mark.parametrize("call, message", REFUSALS, ids=[m[:40] for _, m in REFUSALS])
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layer_is_captured_in_a_cuda_graph():
    args = layer(BF16, rows=(512,), width=256, hidden=384, device="cuda")
    with torch.no_grad():
        ops.moe(**args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.moe(**args)
        args["x"].copy_(args["x"].flip(0) * 2)  # other counts
        graph.replay()
        assert torch.equal(y, ops.moe(**args))
