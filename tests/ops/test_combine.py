"""`rfkernels.ops.combine` and `moments`: every guide, mask, noise and step against their definition."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import _C, ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, F16, F32, F64, KERNELS, ROWS, VIDEO

GUIDES = [None, *ops.GUIDES]
# state, and the tensors after it
DTYPES = [(F64, F64), (F32, F32), (F32, BF16), (F32, F16), (BF16, F32), (F16, F16)]
TOLERANCE = {F64: 1e-12, F32: 4e-5, F16: 4e-3, BF16: 3e-2}  # guides divide by norms of few elements
SHAPES = [(1,), (2, 0), (2, 7), (3, 5, 64), (2, 4, 9, 11), (2, 20_011), (1, 3, 4096)]
every_kernel = pytest.mark.parametrize("device", KERNELS)
every_guide = pytest.mark.parametrize("guide", GUIDES, ids=str)


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


class Call:
    """Random arguments of one call."""

    def __init__(self, shape, dtypes=(F32, F32), tensors=4, outputs=1, rows=None, seed=0, **parts):
        self.generator = torch.Generator().manual_seed(seed)
        state, other = dtypes
        accumulator = F64 if state == F64 else F32
        self.tensors = [self.draw(shape, other if k else state) for k in range(tensors)]
        guide, noisy, self.step = parts.get("guide"), parts.get("noisy"), None
        rows = shape[:1] if rows is None else rows
        lead = (3, outputs) if parts.get("stepped") else (outputs,)
        columns = tensors + (guide is not None) + bool(noisy)
        self.coefs = self.draw((*lead, columns, *rows), accumulator)
        self.inside = self.draw((*lead, columns, *rows), accumulator) if parts.get("masked") else None
        self.mask = self.draw(shape, other) if parts.get("masked") else None
        self.keys = ops.noise_keys(2**40 + 5, shape[0], step=3) if noisy else None
        self.guide, self.guidance = guide, None
        if guide:
            of = (len(ops.GUIDES[guide][1]), *([shape[0]] if parts.get("per_sample", True) else []))
            self.guidance = 0.3 + 3 * self.draw((*lead[:-1], *of), accumulator).abs()
        if parts.get("stepped"):
            self.step = torch.tensor(1)

    def draw(self, shape, dtype):
        return torch.randn(shape, generator=self.generator, dtype=F64).to(dtype)

    @property
    def keywords(self):
        names = ("guide", "guidance", "mask", "inside", "keys", "step")
        return {name: getattr(self, name) for name in names}

    def run(self, device="cpu", out=None):
        if device != "emulated":
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.keywords.items()}
            tensors = [t.to(device) for t in self.tensors]
            return [t.cpu() for t in ops.combine(tensors, self.coefs.to(device), **moved, out=out)]
        outputs = self.coefs.shape[0 if self.step is None else 1]
        outs = [torch.full_like(self.tensors[0], torch.nan) for _ in range(outputs)] if out is None else out
        x = self.tensors[0]
        workspace = torch.empty(max(16, _C.combine_workspace(x)), dtype=torch.uint8)
        rest = (self.mask, self.inside, self.keys, self.step, self.guide or "", self.guidance, workspace)
        load_emulator().combine(outs[0], list(outs[1:]), self.tensors, self.coefs, *rest)
        return outs

    def reference(self):
        keywords = {name: wide(value) for name, value in self.keywords.items()}
        return ops.combine_reference([t.double() for t in self.tensors], wide(self.coefs), **keywords)

    def check(self, device):
        state = self.tensors[0].dtype
        for got, expected in zip(self.run(device), self.reference(), strict=True):
            assert got.dtype == state
            tolerance = TOLERANCE[state]
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=4 * tolerance)


@every_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_guide
def test_combine_matches_reference(guide, shape, device):
    Call(shape, (F32, BF16), outputs=2, guide=guide).check(device)


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@every_guide
def test_combine_takes_every_dtype(guide, dtypes, device):
    Call((3, 5, 64), dtypes, outputs=2, guide=guide).check(device)


@every_kernel
@pytest.mark.parametrize("tensors, outputs", [*itertools.product((4, 7, 8), (1, 2, 3))])
@pytest.mark.parametrize("noisy, masked", [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("guide", [None, "cfg", "apg_momentum", "transport"], ids=str)
def test_combine_takes_every_number_of_tensors(guide, noisy, masked, tensors, outputs, device):
    shape = (2, 3, 33)
    parts = dict(guide=guide, noisy=noisy, masked=masked)
    Call(shape, (F32, BF16), tensors, outputs, **parts).check(device)


@every_kernel
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("guide", [None, "zero_star", "token_norm"], ids=str)
def test_combine_reads_row_scalars_of_every_shape(guide, rows, device):
    Call(VIDEO, (F64, F64), rows=rows, guide=guide, noisy=True, masked=True).check(device)


@every_kernel
@every_guide
def test_combine_reads_the_step_from_the_device(guide, device):
    call = Call((2, 5, 64), outputs=2, guide=guide, noisy=True, stepped=True)
    call.check(device)
    call.step = torch.tensor(2)
    call.check(device)


@every_kernel
@every_guide
def test_guidance_may_be_shared_by_all_samples(guide, device):
    Call((3, 5, 8), guide=guide, per_sample=False).check(device)


@every_kernel
@every_guide
def test_a_sample_depends_on_nothing_beside_it(guide, device):
    call = Call((3, 20_012), guide=guide, noisy=True)
    together = call.run(device)[0]
    for i in range(3):
        alone = Call((3, 20_012), guide=guide, noisy=True)
        alone.tensors = [t[i : i + 1] for t in call.tensors]
        alone.coefs, alone.keys = call.coefs[..., i : i + 1], call.keys[i : i + 1]
        alone.guidance = None if guide is None else call.guidance[:, i : i + 1]
        assert torch.equal(alone.run(device)[0], together[i : i + 1])


@pytest.mark.parametrize("guide", [g for g in GUIDES if g not in ("zero_star", "rescale", "apg")], ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 64), (1, 4100)], ids=str)
def test_emulated_bits_are_those_of_the_cpu(guide, shape):
    # products of a row or a sample are summed in another order: the factors made of them round to the same
    # float but for a last bit
    call = Call(shape, (F32, BF16), outputs=3, guide=guide, noisy=True, masked=True)
    for ours, theirs in zip(call.run("cpu"), call.run("emulated"), strict=True):
        if guide in (None, "cfg", "skip_layer"):
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_results_may_lie_where_the_tensors_did(dtypes, device):
    call = Call((2, 1003), dtypes, outputs=1, noisy=True, guide="apg")
    expected = call.run(device)
    if device == "cuda":
        return
    target = call.tensors[0]
    assert call.run(device, out=[target])[0].data_ptr() == target.data_ptr()
    assert torch.equal(target, expected[0])


def test_two_results_may_lie_where_two_tensors_did():
    call = Call((2, 300_007), outputs=2)
    expected = call.run()
    call.run(out=[call.tensors[1], call.tensors[0]])
    assert torch.equal(call.tensors[1], expected[0]) and torch.equal(call.tensors[0], expected[1])


def test_large_results_are_written_past_the_cache():
    call = Call((3, 500_003), tensors=2, outputs=2, noisy=True)
    for got, expected in zip(call.run(), call.reference(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@every_guide
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_combine_matches_reference_fuzzed(guide, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    depth = data.draw(st.integers(0, len(shape)))
    rows = tuple(data.draw(st.sampled_from([1, n])) for n in shape[:depth])
    tensors, outputs = data.draw(st.integers(4, 8)), data.draw(st.integers(1, 3))
    noisy, masked, stepped = (data.draw(st.booleans()) for _ in range(3))
    parts = dict(guide=guide, noisy=noisy, masked=masked, stepped=stepped)
    call = Call(shape, data.draw(st.sampled_from(DTYPES)), tensors, outputs, rows, **parts)
    call.check(data.draw(st.sampled_from(KERNELS)))


# x, u, c, y, w = 4: computed once in numpy
I = torch.arange(8, dtype=F64)  # noqa: E741
U, C = torch.cos(0.7 * I + 0.3), torch.cos(0.7 * I + 0.5) + 0.1 * I / 8
GOLDEN = {
    "zero_star": ((4.0,), [0.832481361, -0.015059368, -0.832001660, -1.210609008]),
    "apg": ((4.0, 0.5, 0.2), [0.828922231, 0.275443371, -0.398222315, -0.865880832]),
    "rescale": ((4.0, 0.7), [0.538959117, -0.101611721, -0.674722584, -0.891160081]),
    "token_norm": ((4.0,), [0.559568537, -0.105497283, -0.700523503, -0.925237419]),
    "cfg": ((4.0,), [0.644320780, -0.121475900, -0.806624785, -1.065373867]),
}


@every_kernel
@pytest.mark.parametrize("guide", GOLDEN)
def test_guides_match_the_golden_vectors(guide, device):
    guidance, expected = GOLDEN[guide]
    call = Call((1, 2, 4), (F64, F64), 3, guide=guide)
    call.tensors = [torch.zeros(1, 2, 4, dtype=F64), U.view(1, 2, 4), C.view(1, 2, 4)]
    call.coefs, call.guidance = torch.tensor([[0.0, 0, 0, 1]], dtype=F64), torch.tensor(guidance, dtype=F64)
    got = call.run(device)[0].flatten()[:4]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)


def test_guides_that_do_nothing_are_classifier_free_guidance():
    call = Call((2, 6, 9), (F64, F64), guide="cfg")
    expected = call.run()[0]
    w = call.guidance[0]
    for guide, extra in {
        "apg": (1.0, torch.inf),
        "rescale": (0.0,),
        "apg_momentum": (1.0, torch.inf, 0),
    }.items():
        rows = [w, *(torch.full_like(w, e) for e in extra)]
        call.guide, call.guidance = guide, torch.stack(rows)
        torch.testing.assert_close(call.run()[0], expected, rtol=1e-13, atol=1e-13)


def test_guidance_one_is_the_conditional_velocity_to_the_bit():
    call = Call((2, 33), tensors=3, guide="cfg")
    call.coefs = torch.tensor([[0.0, 0, 0, 1]])
    call.guidance = torch.tensor([1.0])
    assert torch.equal(call.run()[0], call.tensors[2])


@every_guide
def test_zeros_give_no_nan(guide):
    call = Call((2, 5, 8), guide=guide)
    call.tensors = [torch.zeros_like(t) for t in call.tensors]
    assert torch.equal(call.run()[0], call.tensors[0])


@every_guide
def test_gradients_match_reference(guide):
    call = Call((2, 3, 4), (F64, F64), outputs=2, guide=guide, masked=True)
    inputs = [*call.tensors, call.coefs, call.mask, call.inside] + ([call.guidance] if guide else [])
    for t in inputs:
        t.requires_grad_()
    ours, theirs = ops.combine(call.tensors, call.coefs, **call.keywords), call.reference()
    pull = [torch.randn_like(t) for t in ours]
    grads = torch.autograd.grad(ours, inputs, pull)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs, inputs, pull), rtol=1e-11, atol=1e-11)
    (grad,) = torch.autograd.grad(
        ops.combine(call.tensors, call.coefs, **call.keywords)[1], [call.mask], pull[1]
    )
    assert grad.abs().sum() > 0


def test_a_gradient_goes_through_noise():
    call = Call((2, 3), (F32, BF16), tensors=2, noisy=True)
    x, coefs = call.tensors[0].requires_grad_(), call.coefs.requires_grad_()
    (out,) = ops.combine(call.tensors, coefs, keys=call.keys)
    grad, of_coefs = torch.autograd.grad(out.sum(), [x, coefs])
    torch.testing.assert_close(grad, coefs[0, 0, :, None].expand(2, 3))
    z = ops.philox_normal((2, 3), call.keys)
    torch.testing.assert_close(of_coefs[0, 2], z.sum(1))


@pytest.mark.parametrize("guide", [None, "apg"], ids=str)
def test_combine_obeys_torch(guide):
    call = Call((2, 5), (F64, F64), 3, 2, guide=guide)
    for t in (*call.tensors, call.coefs):
        t.requires_grad_()
    args = (call.tensors, call.coefs, None, None, None, None, guide, call.guidance)
    torch.library.opcheck(ops.OPS["combine"].functional, args)
    coefs = call.coefs[:1, [0, 1, 2, 0]].detach()
    plain = [t.detach() for t in call.tensors], coefs, ops.noise_keys(0, 2)
    torch.library.opcheck(ops.OPS["stochastic_step"].functional, plain)
    torch.library.opcheck(ops.OPS["moments"].functional, (call.tensors, call.coefs[:, :3].detach()))


def test_combine_compiles_without_graph_breaks():
    call = Call((2, 5), guide="cfg", noisy=True, outputs=2)
    torch._dynamo.reset()

    def run(*tensors):
        return [2 * t for t in ops.combine(tensors, call.coefs, **call.keywords)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*call.tensors), run(*call.tensors), strict=True):
        assert torch.equal(ours, expected)


def _moments(device, tensors, coefs):
    if device != "emulated":
        return ops.moments([t.to(device) for t in tensors], coefs.to(device)).cpu()
    count = len(coefs)
    out = torch.full((len(tensors[0]), count + count * (count + 1) // 2), torch.nan, dtype=F64)
    workspace = torch.empty(max(16, _C.combine_workspace(tensors[0])), dtype=torch.uint8)
    load_emulator().moments(out, tensors, coefs, workspace)
    return out


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "count, shape", [(1, (1,)), (3, (2, 7)), (2, (3, 5, 64)), (1, (2, 4, 9, 11)), (3, (2, 20_011))]
)
def test_moments_match_reference(count, shape, dtypes, device):
    call = Call(shape, dtypes, tensors=4, outputs=count)
    got = _moments(device, call.tensors, call.coefs)
    expected = ops.moments_reference([t.double() for t in call.tensors], call.coefs.double())
    size = torch.Size(shape[1:]).numel()
    scale = ops.moments_reference([t.double().abs() for t in call.tensors], call.coefs.double().abs()) + size
    tolerance = 1e-13 if dtypes[0] == F64 else 1e-6
    assert ((got - expected).abs() <= tolerance * scale).all()
    assert torch.equal(got, _moments(device, call.tensors, call.coefs))


def test_moments_of_nothing_are_zero():
    assert torch.equal(ops.moments([torch.zeros(3, 0)], torch.ones(1, 1)), torch.zeros(3, 2, dtype=F64))


def test_moments_have_gradients():
    call = Call((2, 3, 4), (F64, F64), tensors=3, outputs=2)
    for t in (*call.tensors, call.coefs):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, *t: ops.moments(t, c), (call.coefs, *call.tensors))


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 7), (3, 5, 64), (2, 20_011), (2, 4, 4096)], ids=str)
def test_stochastic_step_leaves_the_moments_of_what_it_stored(shape, dtypes, device):
    call = Call(shape, dtypes, tensors=2, noisy=True)
    (expected,) = call.run(device)
    rows = torch.cat([-call.coefs[:, :2], torch.ones_like(call.coefs[:, :1])], 1)
    if device == "emulated":
        x = call.tensors[0]
        out, sums = torch.full_like(x, torch.nan), torch.full((len(x), 2), torch.nan, dtype=F64)
        workspace = torch.empty(max(16, _C.combine_workspace(x)), dtype=torch.uint8)
        load_emulator().stochastic_step(out, sums, call.tensors, call.coefs, call.keys, workspace)
    else:
        args = [t.to(device) for t in call.tensors], call.coefs.to(device), call.keys.to(device)
        out, sums = (t.cpu() for t in ops.stochastic_step(*args))
    assert torch.equal(out, expected)
    assert torch.equal(sums, _moments(device, [*call.tensors, out], rows))
    _, reference = ops.stochastic_step_reference(
        [t.double() for t in call.tensors], call.coefs.double(), call.keys
    )
    if dtypes[0] in (F64, F32):
        torch.testing.assert_close(
            sums, reference, rtol=1e-4, atol=1e-4 * torch.Size(shape[1:]).numel() ** 0.5
        )


def test_stochastic_step_refuses_what_does_not_fit():
    x, keys = torch.zeros(2, 6), ops.noise_keys(0, 2)
    for tensors, coefs, message in (
        ([x], torch.zeros(1, 3), "1 outputs and 2 columns"),
        ([x] * 9, torch.zeros(1, 10), "1..8 tensors"),
        ([x, torch.zeros(2, 5)], torch.zeros(1, 3), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.stochastic_step(tensors, coefs, keys)
    with pytest.raises(ValueError, match="keys must be"):
        ops.stochastic_step([x], torch.zeros(1, 2), keys[:1])


def _refusals():
    x, c = torch.zeros(2, 6), torch.zeros(1, 2, 2)
    yield [], c, {}, "expected 1..8 tensors"
    yield [x] * 9, torch.zeros(1, 9), {}, "expected 1..8 tensors, got 9"
    yield [x, torch.zeros(2, 7)], c, {}, r"shape of tensors\[0\]"
    yield [x, x.double()], c, {}, "f32, f16 or bf16"
    yield [x, torch.zeros(6, 2).T], c, {}, "contiguous"
    yield [x, x], torch.zeros(4, 2), {}, "1..3 outputs"
    yield [x, x], torch.zeros(1, 3), {}, "1 outputs and 2 columns"
    yield [x, x], torch.zeros(1, 2, dtype=F64), {}, "must be f32 on the device of x"
    yield [x, x], torch.zeros(1, 2, 3), {}, "the leading axes of x"
    yield [x, x], c, dict(mask=x), "mask and inside go together"
    yield [x, x], c, dict(mask=torch.zeros(2, 1), inside=c), "mask must have the shape"
    yield (
        [x, x],
        torch.zeros(1, 3),
        dict(keys=torch.zeros(3, 3, dtype=torch.int64)),
        r"keys must be i64\[2, 3\]",
    )
    yield [x, x], c[0], dict(step=torch.tensor(0)), "steps, outputs, columns"
    yield [x, x], c[None], dict(step=torch.tensor(0.0)), r"step must be i64\[\]"
    yield [x, x, x], torch.zeros(1, 4), dict(guide="cgf", guidance=torch.ones(1)), "guide must be one of cfg"
    yield [x, x], torch.zeros(1, 3), dict(guide="cfg", guidance=torch.ones(1)), "combines 2 tensors after the"
    yield [x, x, x], torch.zeros(1, 4), dict(guide="cfg"), r"guidance of cfg must be f32\[1\]"
    yield [x, x, x], torch.zeros(1, 4), dict(guide="apg", guidance=torch.ones(2)), r"must be f32\[3\]"
    yield [x, x], c, dict(guidance=torch.ones(1)), "guidance needs a guide"
    yield [x, x], c, dict(out=[torch.zeros(2, 7)]), "every out must be like"
    memory = torch.zeros(20)
    yield [memory[:12].view(2, 6)], torch.ones(1, 1), dict(out=[memory[3:15].view(2, 6)]), "share no memory"
    yield [x, x], torch.zeros(2, 2), dict(out=[x, x]), "share no memory|must not share"


@pytest.mark.parametrize("tensors, coefs, keywords, message", [*_refusals()])
def test_combine_refuses_what_does_not_fit(tensors, coefs, keywords, message):
    with pytest.raises(ValueError, match=message):
        ops.combine(tensors, coefs, **keywords)


def test_moments_refuses_what_does_not_fit():
    x = torch.zeros(2, 6)
    for tensors, coefs, message in (
        ([x, x], torch.zeros(1, 3), "2 columns"),
        ([x, x], torch.zeros(4, 2), "1..3"),
        ([], torch.zeros(1, 1), "1..8"),
        ([x, torch.zeros(2, 5)], torch.zeros(1, 2), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.moments(tensors, coefs)
