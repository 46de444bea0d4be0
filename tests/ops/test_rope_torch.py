"""The rope room and torch: gradients, compilation, registration."""

import pytest
import torch

from rfkernels import ops
from tests.ops.cases import BF16, F16, F32, F64, TOLERANCE, every_device, every_kernel
from tests.ops.rope_calls import Make, arguments, memory, run_backward, widen

HEADS, KV_HEADS, D = 4, 2, 24
WIDTH = (HEADS + 2 * KV_HEADS) * D


def two_streams(dtype=F64, kernel="cpu"):
    """Leaves: text and image [2, 3 and 5, WIDTH], four weights; and the options of a call."""
    make = Make(dtype, kernel)
    leaves = [make.normal(2, 3, WIDTH), make.normal(2, 5, WIDTH), *(make.weight(D) for _ in range(4))]
    return leaves, {"rotation": make.rotation(5, d=D), "rotate_from": 3, "kv_heads": KV_HEADS}


def call(leaves, op=ops.qkv_norm_rope, **options):
    text, image, tq, iq, tk, ik = leaves
    return op([text, image], HEADS, q_weight=[tq, iq], k_weight=[tk, ik], **options)


def by_definition(qkv, heads, **options):
    return ops.qkv_norm_rope_reference(*arguments(qkv, heads, **options))


@every_device
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_gradcheck(layout, device):
    leaves, options = two_streams(kernel=device)
    options["layout"] = layout
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: call(t, **options), leaves, fast_mode=True)


@every_device
@pytest.mark.parametrize("used", ["qkv", "q", "k", "v", "qv"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_gradients_match_reference(dtype, used, device):
    leaves, options = two_streams(dtype, device)
    weigh = [torch.randn_like(t) for t in call(leaves, **options)]

    def gradients(leaves, op, options, weigh):
        leaves = [t.detach().requires_grad_() for t in leaves]
        results = dict(zip("qkv", zip(call(leaves, op, **options), weigh, strict=True), strict=True))
        total = sum((results[name][0] * results[name][1]).sum() for name in used)
        return torch.autograd.grad(total, leaves, allow_unused=True)

    ours = gradients(leaves, ops.qkv_norm_rope, options, weigh)
    wide = options | {"rotation": options["rotation"].double()}
    theirs = gradients(widen(leaves), by_definition, wide, widen(weigh))
    tolerance = TOLERANCE[dtype]
    for t, mine, other in zip(leaves, ours, theirs, strict=True):
        other = torch.zeros_like(t).double() if other is None else other
        assert mine.dtype == t.dtype
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine.double(), other, rtol=4 * tolerance, atol=4 * tolerance * scale)


@every_kernel
@pytest.mark.parametrize("d", [2, 18, 64, 72, 128, 256])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("per_stream", [1, 3])
def test_backward_kernel_matches_reference(per_stream, dtype, d, device):
    # Of the middle one of three streams, in a joint sequence of which half is rotated.
    make, heads, kv_heads, joint, start, length = Make(dtype, device), 3, 1, 30, 6, 19
    parts = [make.normal(2, length, n * d) for n in (heads, kv_heads, kv_heads)]
    grads = [make.normal(2, n, joint, d) for n in (heads, kv_heads, kv_heads)]
    args = (
        [torch.cat(parts, -1)] if per_stream == 1 else parts,
        [make.weight(d), make.weight(d)],
        make.rotation(15, d=d),
        *(per_stream, heads, kv_heads, start, 8, 1e-6, "bhld"),
    )
    for mine in (grads, [grads[0], None, None], [None, grads[1], None], [None, None, grads[2]]):
        d_tokens, d_weights = run_backward(device, *mine, *args)
        expected, sums = ops.qkv_norm_rope_backward_reference(*widen(mine), *widen(args))
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(d_tokens.double(), expected, rtol=tolerance, atol=8 * tolerance)
        accumulated = 1e-13 if dtype == F64 else 1e-5
        torch.testing.assert_close(d_weights.double(), sums[0], rtol=accumulated, atol=100 * accumulated)


@every_kernel
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_weights_in_float32_get_gradients_in_float32(dtype, device):
    make, d = Make(dtype, device), 64
    q_weight, k_weight = make.weight(d, F32), make.weight(d, F32)
    grads = [make.normal(1, 2, 9, d) for _ in range(3)]
    args = ([make.normal(1, 9, 6 * d)], [q_weight, k_weight], None, 1, 2, 2, 0, 0, 1e-6, "bhld")
    d_tokens, d_weights = run_backward(device, *grads, *args)
    expected, sums = ops.qkv_norm_rope_backward_reference(*widen(grads), *widen(args))
    torch.testing.assert_close(d_weights.double(), sums[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(d_tokens.double(), expected, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    assert d_tokens.dtype == dtype and d_weights.dtype == F32


@every_kernel
def test_gradients_come_through_strides(device):
    # As attention returns them: [batch, tokens, heads, d] seen as [batch, heads, tokens, d], or expanded.
    make, d, heads = Make(F32, device), 32, 2
    args = (
        [make.normal(2, 7, 6 * d)],
        [make.weight(d)] * 2,
        make.rotation(7, d=d),
        1,
        heads,
        heads,
        0,
        0,
        1e-6,
    )
    grads = [make.normal(2, 7, heads, d).transpose(1, 2) for _ in range(2)]
    grads.append(make.normal(1, heads, 1, d).expand(2, heads, 7, d))
    dense = run_backward(device, *(g.contiguous() for g in grads), *args, "bhld")
    for mine, other in zip(run_backward(device, *grads, *args, "bhld"), dense, strict=True):
        assert torch.equal(mine, other)


@every_device
def test_the_fused_projection_gets_one_dense_gradient(device):
    leaves, _ = two_streams(F32, device)
    image = leaves[1].requires_grad_()
    projection = torch.nn.Linear(WIDTH, WIDTH + 8, device=memory(device))
    wide = projection(image)
    q, k, v = ops.qkv_norm_rope(wide[..., 4:-4], HEADS, kv_heads=KV_HEADS, q_weight=leaves[2])
    (grad,) = torch.autograd.grad(q.sum() + k.sum() + 2 * v.sum(), wide)
    assert (grad[..., :4] == 0).all() and (grad[..., -4:] == 0).all()
    assert (grad[..., 4 + HEADS * D : -4 - KV_HEADS * D] == 1).all()
    assert (grad[..., -4 - KV_HEADS * D : -4] == 2).all()


@every_device
def test_gradients_are_deterministic(device):
    make = Make(F32, device)
    qkv, weight = make.normal(1, 3000, 3 * 2 * 64), make.weight(64).requires_grad_()
    weigh = make.normal(1, 3000, 2, 64)
    grads = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        q = ops.qkv_norm_rope(qkv, 2, q_weight=weight, k_weight=weight)[0]
        grads += torch.autograd.grad(q, weight, weigh)
        torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[1], grads[2])


@every_device
def test_saves_nothing_but_its_inputs(device):
    leaves, options = two_streams(F32, device)
    leaves = [t.requires_grad_() for t in leaves]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(leaves, **options)
    inputs = {t.data_ptr() for t in [*leaves, options["rotation"]]}
    assert {t.data_ptr() for t in saved} == inputs


@every_device
@pytest.mark.parametrize("form", ["fused", "apart", "no norm", "no v"])
def test_ops_obey_torch(form, device):
    leaves, options = two_streams(kernel=device)
    leaves = [t.requires_grad_() for t in leaves]
    text, image, tq, _, _, ik = leaves
    streams, weights = [text, image], {"q_weight": [tq, None], "k_weight": ik}
    if form == "apart":
        parts = [s.detach().split([HEADS * D, KV_HEADS * D, KV_HEADS * D], -1) for s in streams]
        streams = [tuple(t.requires_grad_() for t in stream) for stream in parts]
    args = arguments(streams, HEADS, **options, **({} if form == "no norm" else weights))
    if form == "no v":
        args = (*args[:-1], False)
    torch.library.opcheck(ops.OPS["qkv_norm_rope"].functional, args)
    detached = tuple([t.detach() for t in a] if isinstance(a, list) else a for a in args)
    results = ops.OPS["qkv_norm_rope"].functional(*detached)
    with torch.no_grad():
        out = tuple(torch.empty_like(t) for t in results)
        torch.library.opcheck(ops.OPS["qkv_norm_rope"].out_variant, (*out, *detached))
        per_stream = detached[3]
        dv = None if form == "no v" else results[2]
        backward = (results[0], None, dv, detached[0][:per_stream], detached[1][:2], *detached[2:6])
        backward += (0, *detached[6:9])
        torch.library.opcheck(ops.OPS["qkv_norm_rope_backward"].functional, backward)
        out = tuple(torch.empty_like(t) for t in ops.OPS["qkv_norm_rope_backward"].empty(*backward))
        torch.library.opcheck(ops.OPS["qkv_norm_rope_backward"].out_variant, (*out, *backward))


@every_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic, device):
    leaves, options = two_streams(F32, device)
    leaves = [t.requires_grad_() for t in leaves]
    torch._dynamo.reset()

    def attend(*leaves):
        q, k, v = (t.transpose(1, 2) for t in call(leaves, **options))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = torch.autograd.grad(attend(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)
    if dynamic:  # another length
        leaves[0] = torch.randn(2, 4, WIDTH, device=leaves[0].device, requires_grad=True)
        options["rotate_from"] = 4
        torch.testing.assert_close(compiled(*leaves), attend(*leaves))
