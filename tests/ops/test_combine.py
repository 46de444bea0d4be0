"""`rfkernels.ops.combine`: every guide, mask, noise and step against their definition."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import ops
from tests.ops.cases import BF16, F32, F64, KERNELS, ROWS, VIDEO
from tests.ops.combine_calls import DTYPES, SHAPES, Call

GUIDES = [None, *ops.GUIDES]
every_kernel = pytest.mark.parametrize("device", KERNELS)
every_guide = pytest.mark.parametrize("guide", GUIDES, ids=str)


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
