"""The claims that hold for every op: it matches its definition, rounds once, obeys torch, refuses well."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import ops
from tests.ops.cases import (
    BF16,
    CASES,
    DTYPES,
    F16,
    F32,
    F64,
    KERNELS,
    ROWS,
    SHAPES,
    TOLERANCE,
    VIDEO,
    Make,
    every_case,
    every_device,
    every_kernel,
    flatten,
    widen,
)


def assert_matches(case, make):
    args = case.inputs(make)
    expected = case.reference(*widen(args))
    tolerance = TOLERANCE[make.state]
    if case.name == "renoise":  # the reference takes Box-Muller in float64, the op in float32
        tolerance = max(tolerance, 2e-6)
    result = case.run(make.device, *args)
    assert result.dtype == make.state and result.shape == torch.Size(make.shape)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=4 * tolerance)


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_case
def test_op_matches_reference(case, shape, dtypes, device):
    assert_matches(case, Make(shape, *dtypes, device))


@every_kernel
@pytest.mark.parametrize("rows", ROWS, ids=str)
@every_case
def test_op_reads_row_scalars_of_every_shape(case, rows, device):
    assert_matches(case, Make(VIDEO, F64, F64, device, rows))


@every_kernel
@pytest.mark.parametrize("dtype", [F16, BF16])
@every_case
def test_op_rounds_once(case, dtype, device):
    # 16-bit tensors are computed in float32 and rounded at the end: to the bit.
    args = case.inputs(Make((2, 20_011), dtype, dtype, device))
    exact = case.run(device, *[_to_float32(a) for a in args])
    assert torch.equal(case.run(device, *args), exact.to(dtype))


def _to_float32(value):
    if isinstance(value, list):
        return [_to_float32(v) for v in value]
    return value.float() if value.dtype in (F16, BF16) else value


@every_device
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_storage_types_convert_as_torch_does(dtype, device):
    # Every 16-bit pattern read, and float32 values at, between and beyond the 16-bit ones written.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype).to(device)
    same = ops.linear_combination([every], [1.0])
    assert torch.equal(same.isnan(), every.isnan())
    assert torch.equal(same.nan_to_num(), every.nan_to_num())
    state = torch.zeros(len(every), device=device)
    widened = ops.affine_step(state, every, 0.0, 1.0)
    assert torch.equal(widened[~every.isnan()], every.float()[~every.isnan()])

    finite = every[every.isfinite()].float()
    step = torch.nextafter(finite, torch.full_like(finite, torch.inf))
    middle = (finite + every[every.isfinite()].float().roll(1)) / 2
    huge = torch.tensor([65519.996, 65520.0, 3.3e38, -3.4e38, 1e-45, 2.0**-25, 2.0**-24 * 1.5], device=device)
    for values in (step, middle, huge):
        # x = 0 of the 16-bit type plus 1 * a float32 row scalar: the sum is rounded once
        rounded = ops.affine_step(
            torch.zeros(len(values), dtype=dtype, device=device),
            torch.ones(len(values), dtype=dtype, device=device),
            0.0,
            values,
        )
        assert torch.equal(rounded, values.to(dtype))


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@every_case
def test_op_writes_out_and_in_place(case, dtypes, device):
    large = case.variant in ("", "-3") and device != "emulated"
    args = case.inputs(Make((3, 1_700_003) if large else (3, 1003), *dtypes, device))
    expected = case.run(device, *args)
    out = torch.full_like(expected, torch.nan)
    assert case.run(device, *args, out=out) is out
    assert torch.equal(out, expected)
    x = flatten(args)[0]
    case.run(device, *args, out=x)
    assert torch.equal(x, expected)


@every_device
@every_case
def test_op_obeys_torch(case, device):
    args = case.inputs(Make((2, 5), F64, F64, device))
    for t in flatten(args):
        if t.is_floating_point():
            t.requires_grad_()
    op = ops.OPS[case.name]
    torch.library.opcheck(op.functional, args)
    with torch.no_grad():
        plain = _detach(args)
        torch.library.opcheck(op.out_variant, (torch.empty_like(flatten(plain)[0]), *plain))


def _detach(args):
    return tuple([t.detach() for t in a] if isinstance(a, list) else a.detach() for a in args)


@every_device
@pytest.mark.parametrize("rows", [(), (2,), (2, 1, 4), (2, 3, 4, 2)], ids=str)
@every_case
def test_op_gradients_match_reference(case, rows, device):
    args = case.inputs(Make(VIDEO, F64, F64, device, rows))
    inputs = [t.requires_grad_() for t in flatten(args) if t.is_floating_point()]
    grad = torch.randn(VIDEO, dtype=F64, device=device)
    ours = torch.autograd.grad(case.op(*args), inputs, grad)
    theirs = torch.autograd.grad(case.reference(*args), inputs, grad)
    tolerance = 2e-6 if case.name == "renoise" else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 100)


@every_device
@pytest.mark.parametrize("dtypes", [(F32, BF16), (F32, F32)], ids=str)
@every_case
def test_op_gradients_keep_dtypes(case, dtypes, device):
    args = case.inputs(Make((2, 5), *dtypes, device))
    inputs = [t.requires_grad_() for t in flatten(args) if t.is_floating_point()]
    for t, grad in zip(inputs, torch.autograd.grad(case.op(*args).sum(), inputs), strict=True):
        assert grad.dtype == t.dtype and grad.shape == t.shape


@every_device
@every_case
def test_op_compiles_without_graph_breaks(case, device):
    args = case.inputs(Make((2, 5), F32, F32, device))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: case.op(*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), case.op(*args) * 2)


@every_case
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_op_matches_reference_fuzzed(case, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    depth = data.draw(st.integers(0, len(shape)))
    rows = tuple(data.draw(st.sampled_from([1, n])) for n in shape[:depth])
    dtypes = data.draw(st.sampled_from(DTYPES))
    device = data.draw(st.sampled_from(KERNELS))
    assert_matches(case, Make(shape, *dtypes, device, rows, seed=data.draw(st.integers(0, 99))))


@every_kernel
@every_case
def test_op_reads_strided_row_scalars(case, device):
    args = case.inputs(Make((4, 6), F64, F64, device))
    expected = case.run(device, *args)

    def strided(t):
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    scalars = tuple(strided(a) if isinstance(a, torch.Tensor) and a.ndim == 1 else a for a in args)
    if case.name == "linear_combination":
        scalars = (args[0], strided(args[1]))
    assert torch.equal(case.run(device, *scalars), expected)


def _refusals(case):
    """(what to change in the arguments, the message it must bring)"""
    good = case.inputs(Make((2, 6), F32, F32, "cpu"))
    x = flatten(good)[0]
    yield _with_first(good, torch.zeros(6, 2).T), "expected contiguous tensors, got f32"
    yield (
        _with_first(good, torch.zeros(2, 6, dtype=torch.complex64)),
        "expected float64, float32, float16, bfloat16",
    )
    bad_rows = [torch.zeros(3), torch.zeros(2, dtype=F64), torch.zeros(2, 6, 1)]
    for rows in bad_rows:
        if case.name == "linear_combination":
            yield (good[0], rows.expand(len(good[0]), *rows.shape)), "must be f32 on the device of x"
        else:
            at = next(i for i, a in enumerate(good) if a.ndim == 1)
            yield (*good[:at], rows, *good[at + 1 :]), "must be f32 on the device of x, its axes the leading"
    if case.has_velocity and len(flatten(good)) > 2:
        yield _with_second(good, torch.zeros(2, 7)), "shape"
        yield _with_second(good, torch.zeros(2, 6, dtype=F64)), "dtype|like uncond"
    assert x.shape == (2, 6)


def _with_first(args, t):
    return ([t, *args[0][1:]], *args[1:]) if isinstance(args[0], list) else (t, *args[1:])


def _with_second(args, t):
    if isinstance(args[0], list):
        return ([args[0][0], t, *args[0][2:]], *args[1:])
    return (
        args[0],
        t if t.ndim == args[1].ndim else t.expand(len(args[1]), *t.shape).contiguous(),
        *args[2:],
    )


REFUSALS = [
    pytest.param(case, args, message, id=f"{case}-{i}")
    for case in CASES
    if case.variant in ("", "-2", "-3")
    for i, (args, message) in enumerate(_refusals(case))
]


@pytest.mark.parametrize("case, args, message", REFUSALS)
def test_op_refuses_what_does_not_fit(case, args, message):
    with pytest.raises(ValueError, match=message):
        case.op(*args)


@every_case
def test_op_refuses_a_wrong_out(case):
    args = case.inputs(Make((2, 6), F32, F32, "cpu"))
    for out in (torch.zeros(2, 5), torch.zeros(2, 6, dtype=F64)):
        with pytest.raises(ValueError, match="out must be like"):
            case.op(*args, out=out)
    memory = torch.zeros(20)
    x, across = memory[:12].view(2, 6), memory[3:15].view(2, 6)
    with pytest.raises(ValueError, match="out must be one of the inputs or share no memory"):
        case.op(*_with_first(args, x), out=across)


@every_case
def test_op_refuses_a_gradient_through_out(case):
    args = case.inputs(Make((2, 6), F32, F32, "cpu"))
    flatten(args)[0].requires_grad_()
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        case.op(*args, out=torch.zeros(2, 6))
    with torch.no_grad():
        case.op(*args, out=torch.zeros(2, 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_case
def test_op_refuses_two_devices(case):
    args = case.inputs(Make((2, 6), F32, F32, "cpu"))
    with pytest.raises(ValueError, match=r"one device|on the device of"):
        case.op(*_with_first(args, flatten(args)[0].cuda()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_case
def test_op_is_captured_in_a_cuda_graph(case):
    args = case.inputs(Make((2, 4096), F32, BF16, "cuda"))
    expected = case.op(*args)
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.op(*args, out=out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
