"""`qkv_norm_rope` with a norm over all heads of a token, as Wan and HiDream have it."""

import pytest
import torch

from rfkernels import ops
from tests.ops.cases import BF16, F16, F32, F64, TOLERANCE, every_device, every_kernel
from tests.ops.rope_calls import Make, arguments, reference, run, run_backward, widen
from tests.ops.test_rope import assert_close, assert_same_bits

# heads, kv_heads, d: one pair; ragged lanes; those of models; more than the registers of a block hold
HEADS = [(2, 1, 2), (3, 3, 6), (6, 2, 18), (5, 5, 72), (12, 12, 128), (20, 4, 64), (70, 1, 256)]


def inputs(make, batch, tokens, heads, kv_heads, d):
    weights = {"q_weight": make.weight(heads * d), "k_weight": make.weight(kv_heads * d)}
    return make.normal(batch, tokens, (heads + 2 * kv_heads) * d), {"kv_heads": kv_heads, **weights}


@every_kernel
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("heads, kv_heads, d", HEADS)
def test_matches_reference(heads, kv_heads, d, dtype, layout, device):
    make = Make(dtype, device)
    qkv, options = inputs(make, 2, 3, heads, kv_heads, d)
    qkv = qkv * torch.logspace(-3, 0, 6, 10).view(2, 3, 1).to(qkv)  # the epsilon matters
    options |= {"rotation": make.rotation(2, d=d), "rotate_from": 1, "layout": layout}
    assert_close(run(device, qkv, heads, **options), reference(qkv, heads, **options), dtype)


def test_the_reference_norms_the_full_width():
    make, heads, d = Make(F64), 3, 8
    qkv, options = inputs(make, 2, 5, heads, heads, d)
    q, k, v = qkv.chunk(3, -1)
    q, k = (
        torch.nn.functional.rms_norm(x, (heads * d,), options[f"{n}_weight"], 1e-6)
        for n, x in zip("qk", (q, k), strict=True)
    )
    rotation = make.rotation(5, d=d)
    assert_close(
        reference(qkv, heads, rotation=rotation, **options),
        reference((q, k, v), heads, rotation=rotation),
        F64,
    )


@every_kernel
@pytest.mark.parametrize("weights", ["own dtype", F32], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("tier", ["exact", "exact_before_weight"])
def test_exact_is_a_norm_before(tier, dtype, weights, device):
    # torch.nn.RMSNorm of q and k, then the rotation alone. All but one in a thousand to the bit: the last bit
    # of the mean square depends on the order of its sum.
    make, heads, d = Make(dtype, device), 6, 64
    qkv, options = inputs(make, 1, 40, heads, heads, d)
    if weights == F32:
        options |= {name: options[name].float() for name in ("q_weight", "k_weight")}
    options |= {"rotation": make.rotation(40, d=d), "tier": tier}
    eager = ops.qkv_norm_rope_reference(*arguments(qkv, heads, **options))
    if tier == "exact" and weights != F32:
        q, k, v = qkv.chunk(3, -1)
        norm = lambda x, w: torch.nn.functional.rms_norm(x, (heads * d,), w, 1e-6)
        q, k = norm(q, options["q_weight"]), norm(k, options["k_weight"])
        normed = run(device, (q, k, v), heads, rotation=options["rotation"])
        for x, y in zip(eager, normed, strict=True):
            assert (x != y).double().mean() <= 1e-3
    ours = run(device, qkv, heads, **options)
    fast = run(device, qkv, heads, **(options | {"tier": "fast"}))
    for x, y, z in zip(ours[:2], eager, fast, strict=False):
        assert (x != y).double().mean() <= 1e-3
        if tier == "exact" or weights != F32:
            assert (x != z).double().mean() > 0.05  # fast is another function


@every_kernel
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_fast_rounds_once(dtype, device):
    # float32 tokens of the same values give the result before its rounding: to the bit.
    make, heads, d = Make(dtype, device), 3, 64
    qkv, options = inputs(make, 1, 7, heads, heads, d)
    options["rotation"] = make.rotation(7, d=d)
    wide = options | {name: options[name].float() for name in ("q_weight", "k_weight")}
    rounded = [t.to(dtype) for t in run(device, qkv.float(), heads, **wide)]
    assert_same_bits(run(device, qkv, heads, **options), rounded)


@every_kernel
def test_streams_have_norms_of_their_own(device):
    make, heads, d = Make(F32, device), 4, 16
    image, options = inputs(make, 2, 9, heads, 1, d)
    text, others = inputs(make, 2, 4, heads, 1, d)
    weights = {"q_weight": [None, options["q_weight"]], "k_weight": [others["k_weight"], None]}
    rotation = make.rotation(13, d=d)
    for given in ([text, image], [tuple(text.split([heads * d, d, d], -1)), image]):
        joint = run(device, given, heads, kv_heads=1, rotation=rotation, **weights)
        assert_close(joint, reference([text, image], heads, kv_heads=1, rotation=rotation, **weights), F32)
    alone = run(device, image, heads, kv_heads=1, q_weight=options["q_weight"], rotation=rotation[4:])
    assert_same_bits([t[:, 4:] for t in joint], alone)


@every_kernel
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_memory_may_lie_anywhere(offset, device):
    make, heads, d = Make(BF16, device), 3, 32
    wide = make.normal(2, 12, offset + 3 * heads * d + 40)
    qkv = wide[:, 1::2, offset : offset + 3 * heads * d]
    _, options = inputs(make, 1, 1, heads, heads, d)
    options |= {"rotation": make.rotation(6, d=d)}
    expected = run(device, qkv.contiguous(), heads, **options)
    for name in ("q_weight", "k_weight"):
        options[name] = torch.cat([options[name].new_zeros(offset), options[name]])[offset:]
    assert_same_bits(run(device, qkv, heads, **options), expected)


@every_kernel
@pytest.mark.parametrize(
    "heads, kv_heads, d", [(2, 1, 2), (6, 2, 18), (5, 5, 72), (12, 12, 128), (40, 1, 256)]
)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("per_stream", [1, 3])
def test_backward_kernel_matches_reference(per_stream, dtype, heads, kv_heads, d, device):
    # Of the middle one of three streams, in a joint sequence of which half is rotated.
    make, joint, start, length = Make(dtype, device), 16, 3, 9
    parts = [make.normal(2, length, n * d) for n in (heads, kv_heads, kv_heads)]
    grads = [make.normal(2, joint, n, d) for n in (heads, kv_heads, kv_heads)]
    args = (
        [torch.cat(parts, -1)] if per_stream == 1 else parts,
        [make.weight(heads * d), make.weight(kv_heads * d)],
        make.rotation(8, d=d),
        *(per_stream, heads, kv_heads, start, 7, 1e-2, "blhd"),
    )
    for mine in (grads, [grads[0], None, None], [None, grads[1], grads[2]]):
        d_tokens, d_weights = run_backward(device, *mine, *args)
        expected, sums = ops.qkv_norm_rope_backward_reference(*widen(mine), *widen(args))
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(d_tokens.double(), expected, rtol=tolerance, atol=8 * tolerance)
        accumulated = 1e-13 if dtype == F64 else 1e-5
        torch.testing.assert_close(d_weights.double(), sums[0], rtol=accumulated, atol=100 * accumulated)


@every_kernel
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("absent", ["q", "k"])
def test_one_norm_may_be_absent_in_the_backward(absent, rotated, device):
    make, heads, d = Make(F64, device), 4, 24
    qkv, options = inputs(make, 2, 20, heads, 2, d)
    grads = [make.normal(2, 20, n, d) for n in (heads, 2, 2)]
    weights = [make.weight(0 if n == absent else options[f"{n}_weight"].numel()) for n in "qk"]
    args = ([qkv], weights, make.rotation(20, d=d) if rotated else None, 1, heads, 2, 0, 0, 1e-6, "blhd")
    d_tokens, d_weights = run_backward(device, *grads, *args)
    expected, sums = ops.qkv_norm_rope_backward_reference(*grads, *args)
    torch.testing.assert_close(d_tokens, expected)
    torch.testing.assert_close(d_weights, sums[0])
    assert (sums != 0).sum() == (2 * d if absent == "q" else heads * d)


def two_streams(dtype, device):
    make, heads, d = Make(dtype, device), 4, 6
    leaves = [make.normal(2, n, 8 * d) for n in (3, 5)] + [make.weight(n * d) for n in (4, 4, 2, 2)]
    options = {"rotation": make.rotation(5, d=d), "rotate_from": 3, "kv_heads": 2}

    def call(*leaves, op=ops.qkv_norm_rope):
        text, image, tq, iq, tk, ik = leaves
        return op([text, image], heads, q_weight=[tq, iq], k_weight=[tk, ik], **options)

    return [t.requires_grad_() for t in leaves], call


@every_device
def test_gradcheck(device):
    leaves, call = two_streams(F64, device)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@every_device
def test_obeys_torch(device):
    leaves, call = two_streams(F64, device)
    args = call(*leaves, op=arguments)
    torch.library.opcheck(ops.OPS["qkv_norm_rope"].functional, args)
    detached = tuple([t.detach() for t in a] if isinstance(a, list) else a for a in args)
    results = ops.OPS["qkv_norm_rope"].functional(*detached)
    backward = (*results, detached[0][:1], detached[1][:2], *detached[2:6], 0, *detached[6:9])
    torch.library.opcheck(ops.OPS["qkv_norm_rope_backward"].functional, backward)
    total = lambda *leaves: sum(t.square().sum() for t in call(*leaves)[:2])
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(total(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@every_device
def test_gradients_are_deterministic(device):
    make = Make(F32, device)
    qkv, options = inputs(make, 1, 1000, 4, 4, 64)
    weight = options["q_weight"].requires_grad_()
    weigh = make.normal(1, 1000, 4, 64)
    grads = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        grads += torch.autograd.grad(ops.qkv_norm_rope(qkv, 4, **options)[0], weight, weigh)
        torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[1], grads[2])


@pytest.mark.parametrize("kernel", ["cpu", "emulated"])
def test_refuses_what_does_not_fit(kernel):
    qkv, per_head, full_q, full_k = torch.zeros(2, 5, 8 * 24), torch.ones(24), torch.ones(96), torch.ones(48)
    for q_weight, k_weight, message in [
        (
            full_q,
            per_head,
            r"k_weight must be \[24\] or, as all weights of the call, \[48\] .* got f32\[24\]",
        ),
        (
            per_head,
            full_k,
            r"q_weight must be \[24\] or, as all weights of the call, \[96\] .* got f32\[24\]",
        ),
        (full_q, full_q, r"k_weight must be .* got f32\[96\]"),
        (full_k, full_k, r"q_weight must be .* got f32\[48\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(kernel, qkv, 4, kv_heads=2, q_weight=q_weight, k_weight=k_weight)


def test_emulated_cuda_refuses_the_gradient_of_very_many_columns():
    make, heads, d = Make(F64, "emulated"), 49, 256
    grads = [make.normal(1, 1, n, d) for n in (heads, 1, 1)]
    args = ([make.normal(1, 1, 51 * d)], [make.weight(heads * d), make.weight(d)])
    with pytest.raises(ValueError, match=r"expected at most 12288 columns of q on CUDA, got 49 \* 256"):
        run_backward("emulated", *grads, *args, None, 1, heads, 1, 0, 0, 1e-6, "blhd")
