"""Attention in full precision against float64: options alone and together, and where the result lies."""

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import _C, ops
from rfkernels.ops._attention import run_attention
from rfkernels.ops.attention import delegates
from tests.ops.attention_cases import (
    FLOATS,
    HEAD_DIMS,
    LENGTHS,
    Call,
    assert_matches,
    random_call,
    simple,
    stored,
)
from tests.ops.cases import BF16, F16, F32, F64, every_device

every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: str(t).removeprefix("torch."))


def test_definition_is_the_formula():
    batch, heads, kv_heads, rows, keys = 4, 4, 2, 130, 66
    call = simple((batch, heads, kv_heads, rows, keys, 3), F64, "cpu")
    bias, factor = torch.randn(1, heads, rows, keys).double(), torch.randn(heads, rows + keys - 1).double()
    lengths, frames, shift = [66, 0, 65, 3], 2, [1, -1]
    seen = torch.ones(batch, heads, 2, 2, dtype=torch.bool)
    seen[2, 1, 0, 1] = seen[3, 3, 1] = False
    options = {"bias": bias, "factor": factor, "key_lengths": torch.tensor(lengths), "block_mask": seen}
    options |= {"head_shift": torch.tensor(shift), "frames": frames, "scale": -0.7}
    out, lse = call.but(**options).exact()
    for b, h, i in product(range(batch), range(heads), range(0, rows, 3)):
        kv = h // (heads // kv_heads)
        frame = b % frames + shift[kv]
        source = b + shift[kv] if 0 <= frame < frames else b
        total, result = 0.0, torch.zeros(3, dtype=F64)
        for j in range(lengths[source]):
            if seen[b, h, i // 128, j // 64]:
                score = -0.7 * float(call.q[b, h, i] @ call.k[source, kv, j]) + float(bias[0, h, i, j])
                total += math.exp(score)
                result += math.exp(score) * float(factor[h, j - i + rows - 1]) * call.v[source, kv, j]
        assert abs(float(lse[b, h, i]) - math.log(total)) < 1e-12 if total else lse[b, h, i] == -math.inf
        torch.testing.assert_close(out[b, h, i], result / total if total else result, rtol=1e-12, atol=1e-12)


@every_device
@every_dtype
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_attention_matches_float64_fuzzed(dtype, device, data):
    pick = lambda *choices: data.draw(st.sampled_from(choices))
    assert_matches(random_call(pick, dtype, device))


@every_device
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_pair_of_lengths(dtype, device):
    for rows, keys in product(LENGTHS, LENGTHS):
        assert_matches(simple((1, 1, 1, rows, keys, 40), dtype, device))


@every_device
@every_dtype
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_every_head_dim(d, dtype, device):
    assert_matches(simple((2, 4, 2, 33, 257, d), dtype, device))


@every_device
@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_more_heads_and_keys_than_fit_at_once(precision, device):
    # on the CPU 16 MiB of panels, or 512 heads, are made at a time
    for shape in ((300, 2, 2, 3, 5, 8), (4, 16, 16, 3, 1024, 64), (1, 2, 1, 5, 40_000, 64)):
        call = simple(shape, BF16, device)
        assert_matches(call, precision)
        lengths = torch.arange(shape[0], device=device) * 7 % shape[4]
        assert_matches(call.but(key_lengths=lengths), precision)
    starts = torch.arange(0, 1801, 3, device=device)  # 600 sequences
    tokens = torch.randn(1800, 2, 64, device=device)
    assert_matches(Call(tokens, tokens, tokens.flip(0), {"cu_seqlens": starts}), precision)


@every_device
@every_dtype
def test_every_shape_and_dtype_of_a_bias(dtype, device):
    batch, heads, rows, keys = 2, 3, 37, 129
    call = simple((batch, heads, 1, rows, keys, 16), dtype, device)
    wide = F64 if dtype == F64 else F32
    for b, h, r in product((1, batch), (1, heads), (1, rows)):
        bias = torch.randn(b, h, r, keys, device=device)
        for form in (bias.to(wide), bias.to(dtype), bias > -1):
            assert_matches(call.but(bias=form))
            assert_matches(call.but(bias=form.expand(batch, heads, rows, keys)))
        apart = torch.full((b, h, r, keys + 9), torch.nan, device=device, dtype=wide)
        apart[..., 4:-5] = bias
        for view in (apart[..., 4:-5], bias.to(wide).mT.contiguous().mT):
            assert_matches(call.but(bias=view))


@every_device
@every_dtype
@pytest.mark.parametrize("heads", [1, 4])
def test_a_relative_factor(heads, dtype, device):
    for rows, keys in ((1, 1), (1, 300), (300, 1), (33, 257), (140, 70)):
        factor = torch.randn(heads, rows + keys - 1, device=device).to(F64 if dtype == F64 else F32)
        call = simple((2, 4, 2, rows, keys, 24), dtype, device, factor=factor)
        assert_matches(call)
        # it is not normalised again: twice the factor, twice the result, to the bit
        assert dtype == F16 or torch.equal(call.but(factor=2 * factor).run()[0], 2 * call.run()[0])


@every_device
@every_dtype
def test_padding_blocks_and_shifted_heads(dtype, device):
    call = simple((6, 4, 2, 150, 200, 32), dtype, device)
    lengths = torch.tensor([200, 1, 0, 64, 65, 199], device=device)
    mask = torch.rand(6, 4, 2, 4, device=device) > 0.4
    mask[1], mask[2, :, 0], mask[3, :, :, 0] = False, False, False
    shift = torch.tensor([1, -1], device=device)
    shifts = [{"head_shift": s, "frames": f} for s, f in ((shift, 2), (-2 * shift, 6), (shift, 1))]
    masks = [{"block_mask": m} for m in (mask, mask[:1], mask[:, :1].expand(6, 4, 2, 4), mask[:1, :1])]
    for options in (*shifts, *masks):
        assert_matches(call.but(**options))
        assert_matches(call.but(key_lengths=lengths, **options))
    assert_matches(call.but(key_lengths=lengths, **shifts[0], **masks[0]))


@every_device
@every_dtype
def test_packed_sequences(dtype, device):
    starts = torch.tensor([0, 0, 5, 5, 300, 301, 301], dtype=torch.int32, device=device)
    others = torch.tensor([0, 7, 7, 70, 400, 401, 401], dtype=torch.int32, device=device)
    tokens = lambda n, heads: torch.randn(n, heads, 40, device=device).to(dtype)
    for heads, kv_heads in ((2, 2), (6, 2)):
        for k_starts in (starts, others):
            n = int(k_starts[-1])
            own = Call(tokens(301, heads), tokens(n, kv_heads), tokens(n, kv_heads))
            assert_matches(own.but(cu_seqlens=(starts, k_starts)))
    assert_matches(own.but(k=own.k[:301], v=own.v[:301], cu_seqlens=starts.long()))


@every_device
@every_dtype
@pytest.mark.parametrize("form", ["as it is", "heads first", "wide", "odd"])
def test_memory_of_the_tokens_does_not_matter(form, dtype, device):
    q, k, v = (torch.randn(2, 40, 3, 24, device=device).to(dtype) for _ in range(3))
    expected = Call(q, k, v, {"layout": "blhd"}).run()
    views = [stored(t, form) for t in (q, k, v)]
    for result, other in zip(Call(*views, {"layout": "blhd"}).run(), expected, strict=True):
        assert torch.equal(result, other)
    turned = Call(*(t.transpose(1, 2) for t in views)).run()
    assert torch.equal(turned[0].transpose(1, 2), expected[0]) and torch.equal(turned[1], expected[1])
    across = torch.stack([torch.stack([t, t], -1) for t in (q, k, v)], 1)  # neighbours along d apart
    apart = Call(*(across[:, i, ..., 0] for i in range(3)), {"layout": "blhd"}).run()
    assert torch.equal(apart[0], expected[0])
    repeated = Call(q, k[:, :, :1].expand_as(k), v[:1].expand_as(v), {"layout": "blhd"})
    plain = repeated.but(k=repeated.k.contiguous(), v=repeated.v.contiguous())
    assert torch.equal(repeated.run()[0], plain.run()[0])


@every_device
def test_the_result_lies_as_the_queries_do(device):
    q, k, v = (torch.randn(2, 5, 3, 8, device=device) for _ in range(3))
    assert ops.attention(q, k, v).is_contiguous() and ops.attention(q, k, v, layout="blhd").is_contiguous()
    fused = torch.randn(2, 5, 9, 8, device=device)
    out = ops.attention(*fused.split(3, 2), layout="blhd")
    assert out.is_contiguous() and out.shape == (2, 5, 3, 8)
    assert ops.attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).is_contiguous()
    starts = torch.tensor([0, 4, 5], device=device)
    assert ops.attention(q[0], k[0], v[0], cu_seqlens=starts).is_contiguous()


@every_device
@pytest.mark.parametrize("precision", ["full", "int8", "fp8", "auto"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_results_go_where_out_says(dtype, precision, device):
    call = simple((2, 3, 3, 29, 70, 40), dtype, device)
    out, lse = call.run(precision)
    memory = torch.full((2, 29, 3, 52), torch.nan, device=device, dtype=dtype)
    other = torch.full_like(lse, torch.nan)
    view = memory[..., 5:45].transpose(1, 2)
    run_attention(call.q, call.k, call.v, *[None] * 8, 40**-0.5, 1, precision, out=(view, other))
    assert torch.equal(view, out) and torch.equal(other, lse)
    assert memory[..., :5].isnan().all() and memory[..., 45:].isnan().all()


@every_device
def test_precision_bf16_is_that_of_rounded_tensors(device):
    for dtype in FLOATS:
        call = simple((1, 2, 2, 33, 65, 32), dtype, device)
        bias = torch.randn(1, 1, 33, 65, device=device).to(dtype)
        for options in ({}, {"bias": bias}):
            out, lse = call.run("bf16", **options)
            rounded = call.but(**{name: getattr(call, name).bfloat16() for name in "qkv"})
            if options:
                rounded = rounded.but(bias=bias.to(BF16 if dtype == BF16 else F32))
            expected, expected_lse = rounded.run()
            assert (
                out.dtype == dtype and torch.equal(out, expected.to(dtype)) and torch.equal(lse, expected_lse)
            )


@every_device
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_plain_calls_are_right_whoever_runs_them(dtype, device):
    call = simple((2, 8, 2, 200, 300, 64), dtype, device)
    out = ops.attention(call.q, call.k, call.v)
    torch.testing.assert_close(out.double(), call.exact()[0], rtol=0, atol=8e-3)
    assert delegates(call.q) == (device == "cuda" and torch.cuda.get_device_capability() >= (9, 0))
    assert not delegates(call.q, (torch.zeros(1),)) and not delegates(call.q.float())


@every_device
@every_dtype
def test_scales(dtype, device):
    call = simple((1, 2, 2, 33, 70, 16), dtype, device)
    for scale in (0.0, -0.25, 1e-30, 3.0):
        assert_matches(call.but(scale=scale))
    out, lse = call.run(scale=0.0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(70)))
    torch.testing.assert_close(out, call.v.mean(2, keepdim=True).expand_as(out), rtol=1e-2, atol=1e-2)


@every_device
@pytest.mark.parametrize("precision", ["full", "int8", "fp8", "auto"])
def test_workspace_has_no_matrix_of_scores(precision, device):
    for shape in ((1, 2, 2, 8192, 8192, 64), (1, 1, 1, 16384, 16384, 64)):
        heads, length = shape[1], shape[3]
        q = torch.empty(1, heads, length, 64, device=device, dtype=BF16)
        size = _C.attention_workspace(q, q, None, precision)
        # as much as q, k and v in float32, and 4 MiB for every thread
        assert size <= 12 * q.numel() + 4 * 2**20 * torch.get_num_threads()
        assert size < heads * length**2 // 8
