"""attention_merge: the result over a union of sets of keys, from the results over each."""

import pytest
import torch

from rfkernels import _C, ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, DEVICES, F16, F32, F64, KERNELS

INF, NAN = float("inf"), float("nan")
DTYPES = [F64, F32, F16, BF16]
SHAPES = [(1, 1), (3, 13), (2, 3, 5, 64), (2, 1, 130, 72), (4, 1024), (2, 0, 8)]
every_kernel = pytest.mark.parametrize("device", KERNELS)
every_device = pytest.mark.parametrize("device", DEVICES)


def parts(count, shape, dtype, device="cpu", seed=0):
    """Results and their logarithms, of sizes that differ by parts and rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=F64)
    memory = "cpu" if device == "emulated" else device
    wide = F64 if dtype == F64 else F32
    outs = [draw(*shape).to(memory, dtype) for _ in range(count)]
    return outs, [(5 * draw(*shape[:-1])).to(memory, wide) for _ in range(count)]


def merge(device, outs, lses):
    if device != "emulated":
        return ops.attention_merge(outs, lses)
    results = torch.full_like(outs[0], NAN), torch.full_like(lses[0], NAN)
    if results[0].numel():
        load_emulator().attention_merge(*results, outs, lses)
    return results


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_result_is_that_of_the_definition(count, shape, dtype, device):
    outs, lses = parts(count, shape, dtype, device)
    out, lse = merge(device, outs, lses)
    expected, expected_lse = ops.attention_merge_reference(
        [t.double() for t in outs], [t.double() for t in lses]
    )
    tolerance = {F64: 1e-14, F32: 1e-6, F16: 1e-3, BF16: 8e-3}[dtype]
    assert out.dtype == dtype and out.shape == torch.Size(shape) and lse.shape == torch.Size(shape[:-1])
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=2 * tolerance)
    lse_tolerance = 1e-14 if dtype == F64 else 3e-7
    torch.testing.assert_close(lse.double(), expected_lse, rtol=lse_tolerance, atol=3 * lse_tolerance)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_halves_are_the_whole(dtype, device):
    """The property that it is for: attention over two halves of the keys, merged, is attention over all."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator, dtype=F64) for n in (5, 33, 33))

    def attend(k, v):
        scores = q @ k.mT / 4
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    whole, whole_lse = attend(k, v)
    halves = [attend(k[:, :, s], v[:, :, s]) for s in (slice(20), slice(20, 33))]
    wide, memory = F64 if dtype == F64 else F32, "cpu" if device == "emulated" else device
    out, lse = merge(
        device, [o.to(memory, dtype) for o, _ in halves], [s.to(memory, wide) for _, s in halves]
    )
    tolerance = {F64: 1e-14, F32: 1e-6, F16: 1e-3, BF16: 8e-3}[dtype]
    torch.testing.assert_close(out.cpu().double(), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        lse.cpu().double(), whole_lse, rtol=max(1e-14, 1e-7 * (dtype != F64)), atol=1e-6
    )


@every_kernel
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_result_is_rounded_once(dtype, device):
    outs, lses = parts(5, (7, 1001), dtype, device)
    exact, _ = merge(device, [t.float() for t in outs], lses)
    assert torch.equal(merge(device, outs, lses)[0], exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (2, 40_011)], ids=str)
def test_emulated_kernel_gives_the_same_bits(count, shape, dtype):
    outs, lses = parts(count, shape, dtype)
    lses[-1].view(-1)[0] = -INF
    here, there = merge("cpu", outs, lses), merge("emulated", outs, lses)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b)


@every_kernel
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_a_part_without_weight_is_not_read(dtype, device):
    outs, lses = parts(3, (4, 8), dtype, device)
    alone = [t.clone() for t in outs], [t.clone() for t in lses]
    for k, row, junk in ((0, 0, NAN), (1, 0, INF), (2, 1, -INF)):
        outs[k][row], lses[k][row] = junk, -INF
    out, lse = merge(device, outs, lses)
    assert torch.equal(out[0], alone[0][2][0]) and lse[0] == alone[1][2][0]
    expected = ops.attention_merge_reference([t[1:2] for t in alone[0][:2]], [t[1:2] for t in alone[1][:2]])
    torch.testing.assert_close(out[1:2], expected[0])
    assert out.isfinite().all() and lse.isfinite().all()


@every_kernel
def test_rows_without_a_key_are_zero(device):
    outs, lses = parts(3, (4, 8), F32, device)
    for o, s in zip(outs, lses, strict=True):
        o[2], s[2] = NAN, -INF
    out, lse = merge(device, outs, lses)
    assert out[2].eq(0).all() and lse[2] == -INF and out.isfinite().all()
    assert lse[[0, 1, 3]].isfinite().all()


@every_kernel
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_what_is_no_number_stays_in_its_row(dtype, device):
    outs, lses = parts(3, (5, 8), dtype, device)
    outs[1][0, 3] = NAN
    lses[0][1] = NAN
    lses[2][1] = -INF
    lses[2][2] = NAN
    lses[1][3] = INF
    outs[1][4, 2], lses[1][4] = NAN, -2000.0  # a weight that rounds to 0 is one
    out, lse = merge(device, outs, lses)
    expected, expected_lse = ops.attention_merge_reference(outs, lses)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    assert out.isnan().sum().item() == 2 + 3 * 8 and lse.isnan().tolist() == [False, True, True, False, False]
    assert lse[3] == INF


@every_kernel
def test_logarithms_of_any_size_do_not_overflow(device):
    outs, lses = parts(2, (3, 8), F32, device)
    lses[0].copy_(torch.tensor([1e4, -1e4, 300.0]))
    lses[1].copy_(torch.tensor([1e4, -1e4, -300.0]))
    out, lse = merge(device, outs, lses)
    torch.testing.assert_close(out[:2], (outs[0][:2] + outs[1][:2]) / 2)
    assert torch.equal(out[2], outs[0][2]) and lse[2] == 300
    torch.testing.assert_close(lse[:2].cpu(), torch.tensor([1e4, -1e4]) + 0.6931472)


@every_device
def test_one_part_is_itself(device):
    outs, lses = parts(1, (3, 8), BF16, device)
    lses[0][1] = -INF
    out, lse = ops.attention_merge(outs, lses)
    assert torch.equal(lse, lses[0]) and torch.equal(out[::2], outs[0][::2]) and out[1].eq(0).all()


@every_device
def test_results_may_lie_where_a_part_lies(device):
    outs, lses = parts(3, (2, 3, 40, 64), F32, device)
    out, lse = ops.attention_merge(outs, lses)
    with torch.no_grad():
        written = ops.attention_merge(outs, lses, out=(outs[1], lses[1]))
    assert written[0] is outs[1] and torch.equal(outs[1], out) and torch.equal(lses[1], lse)


@every_device
def test_tensors_with_gaps_are_taken(device):
    outs, lses = parts(2, (2, 5, 3, 8), F32, device)  # the layout blhd, with lse [batch, heads, rows]
    lses = [s.transpose(1, 2).contiguous() for s in lses]
    out, lse = ops.attention_merge([o.transpose(1, 2) for o in outs], lses)
    again, lse_again = ops.attention_merge(outs, [s.transpose(1, 2) for s in lses])
    assert torch.equal(out, again.transpose(1, 2)) and torch.equal(lse, lse_again.transpose(1, 2))


@every_device
def test_op_obeys_torch(device):
    outs, lses = parts(3, (2, 4), F64, device)
    for t in (*outs, *lses):
        t.requires_grad_()
    op = ops.OPS["attention_merge"]
    torch.library.opcheck(op.functional, (outs, lses))
    with torch.no_grad():
        plain = [t.detach() for t in outs], [t.detach() for t in lses]
        torch.library.opcheck(op.out_variant, (plain[0][0].clone(), plain[1][0].clone(), *plain))


@every_device
@pytest.mark.parametrize("used", ["out", "lse", "both"])
def test_gradient_is_that_of_the_definition(used, device):
    outs, lses = parts(3, (2, 3, 4), F64, device)
    with torch.no_grad():
        lses[1][0, 1], outs[1][0, 1] = -INF, NAN  # a part without weight
        for s in lses:
            s[1, 2] = -INF
    inputs = [t.requires_grad_() for t in (*outs, *lses)]
    pick = {"out": slice(0, 1), "lse": slice(1, 2), "both": slice(0, 2)}[used]
    results = ops.attention_merge(outs, lses)[pick]
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(t.shape, generator=generator, dtype=F64).to(device) for t in results]
    ours = torch.autograd.grad(results, inputs, directions, allow_unused=used == "lse")
    seen = torch.ones(2, 3, dtype=torch.bool)
    seen[1, 2] = False  # logsumexp has no gradient where nothing is summed up; ours is 0
    for o, s in zip(ours[3:], lses, strict=True):
        assert o[1, 2] == 0 and s[1, 2] == -INF
    theirs = torch.autograd.grad(
        ops.attention_merge_reference(outs, lses)[pick], inputs, directions, allow_unused=used == "lse"
    )
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert used == "lse" and (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a[seen], b[seen], rtol=1e-12, atol=1e-12)


@every_device
def test_gradient_keeps_dtypes(device):
    outs, lses = parts(2, (3, 8), BF16, device)
    inputs = [t.requires_grad_() for t in (*outs, *lses)]
    out, lse = ops.attention_merge(outs, lses)
    grads = torch.autograd.grad(out.float().sum() + lse.sum(), inputs)
    assert [g.dtype for g in grads] == [BF16, BF16, F32, F32]
    wide = [t.detach().float().requires_grad_() for t in inputs]
    out, lse = ops.attention_merge_reference(wide[:2], wide[2:])
    expected = torch.autograd.grad(out.sum() + lse.sum(), wide)
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g.float(), e, rtol=1e-2, atol=1e-2)


@every_device
def test_gradient_is_right_by_differences(device):
    outs, lses = parts(2, (2, 3), F64, device)
    inputs = [t.requires_grad_() for t in (*outs, *lses)]
    assert torch.autograd.gradcheck(lambda *t: ops.attention_merge(t[:2], t[2:]), inputs)


@every_device
def test_op_compiles_without_a_break(device):
    outs, lses = parts(3, (2, 16), F32, device)
    compiled = torch.compile(lambda a, b: ops.attention_merge(a, b), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(outs, lses), ops.attention_merge(outs, lses), strict=True):
        assert torch.equal(a, b)


def refuses(message, outs, lses, **options):
    with pytest.raises(ValueError, match=message):
        ops.attention_merge(outs, lses, **options)


def test_wrong_calls_are_refused():
    outs, lses = parts(9, (2, 4), F32)
    refuses("expected an lse for each of 0 parts, got 0", [], [])
    refuses(r"expected 1\.\.8 parts, got 9", outs, lses)
    refuses("expected an lse for each of 2 parts, got 3", outs[:2], lses[:3])
    refuses(r"outs\[1\] must be like outs\[0\] f32\[2, 4\]", [outs[0], outs[1].double()], lses[:2])
    refuses(r"outs\[1\] must be like outs\[0\]", [outs[0], outs[1][:, :3]], lses[:2])
    refuses(r"lses\[1\] must be f32, one for each row", outs[:2], [lses[0], lses[1].double()])
    refuses(
        r"lses\[1\] must be f32, one for each row of outs\[0\] f32\[2, 4\]", outs[:2], [lses[0], lses[1][:1]]
    )
    refuses(r"lse must be like lses\[0\] bf16\[2\]", [outs[0].bfloat16()], [lses[0].bfloat16()])
    refuses(r"outs must be \[..., rows, d\], got f32\[\]", [torch.tensor(1.0)], [torch.tensor(1.0)])
    refuses(r"outs must be \[..., rows, d\], got f32\[2, 0\]", [torch.ones(2, 0)], [lses[0]])
    with pytest.raises(ValueError, match="got i32"):
        ops.attention_merge([outs[0].int()], [lses[0]])


def test_results_that_share_memory_are_refused():
    outs, lses = parts(2, (2, 4), F32)
    memory = torch.empty(64)
    with torch.no_grad():
        out, lse = memory[:8].view(2, 4), memory[8:10]
        refuses("share no memory", outs, lses, out=(out, memory[6:8]))
        refuses("share no memory", [out, outs[1]], lses, out=(memory[4:12].view(2, 4), lse + 0))
        refuses("share no memory", outs, [memory[7:9], lses[1]], out=(out, lse + 0))
        refuses("share no memory", [out, outs[1]], lses, out=(outs[1].clone(), memory[7:9]))
        refuses("out must be like outs", outs, lses, out=(out.bfloat16(), lse))
        refuses("lse must be like", outs, lses, out=(out, memory[8:11]))
        refuses("contiguous", outs, lses, out=(torch.empty(4, 2).T, lse))


def test_bindings_refuse_gaps():
    outs, lses = parts(2, (4, 4), F32)
    with pytest.raises(ValueError, match="contiguous"):
        _C.attention_merge(torch.empty(4, 4), torch.empty(4), [outs[0], outs[1].T], lses)
