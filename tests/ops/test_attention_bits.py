"""The bits of attention: the same in every run, on any number of threads, beside any other samples."""

import pytest
import torch

from rfkernels import ops
from tests.ops.attention_cases import Call, chooser, random_call, simple
from tests.ops.cases import BF16, F16, F32, F64, every_device

every_precision = pytest.mark.parametrize("precision", ["full", "int8", "fp8", "auto"])
LENGTHS = (300, 1, 0, 77, 256, 13)


def assert_same(a: tuple, b: tuple) -> None:
    for mine, other in zip(a, b, strict=True):
        assert torch.equal(mine, other)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_runs_and_threads_give_the_same_bits(dtype, precision, device, threads):
    calls = [random_call(chooser(seed), dtype, device) for seed in range(25)]
    calls.append(simple((1, 1, 1, 40, 2000, 64), dtype, device))
    calls.append(simple((1, 5, 1, 700, 300, 64), dtype, device))
    first = [call.run(precision) for call in calls]
    for count in (1, 2, 3, 3):
        threads(count)
        for call, expected in zip(calls, first, strict=True):
            assert_same(call.run(precision), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_float64_on_any_number_of_threads(count, threads):
    calls = [random_call(chooser(seed), F64) for seed in range(25)]
    first = [call.run() for call in calls]
    threads(count)
    for call, expected in zip(calls, first, strict=True):
        assert_same(call.run(), expected)


@every_device
@every_precision
@pytest.mark.parametrize("d", [40, 128])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_sample_alone_batched_padded_and_packed(dtype, d, precision, device):
    make = lambda heads: [torch.randn(n, heads, d, device=device).to(dtype) for n in LENGTHS]
    q, k, v = make(4), make(2), make(2)
    alone = [Call(*(t[None] for t in own), {"layout": "blhd"}) for own in zip(q, k, v, strict=True)]
    alone = [call.run(precision) for call in alone]

    starts = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    packed = Call(*(torch.cat(t) for t in (q, k, v)), {"cu_seqlens": starts})
    out, lse = packed.run(precision)
    ends = starts.tolist()
    for i, expected in enumerate(alone):
        at = slice(ends[i], ends[i + 1])
        assert_same((out[at], lse[:, at]), (expected[0][0], expected[1][0]))

    # keys and values behind the end of a sample are NaN, and may be
    def pad(parts, value):
        padded = torch.full((len(parts), 333, *parts[0].shape[1:]), value, device=device, dtype=dtype)
        for row, t in zip(padded, parts, strict=True):
            row[: len(t)] = t
        return padded

    lengths = torch.tensor(LENGTHS, device=device)
    values = (0.5, torch.nan, torch.nan)
    options = {"layout": "blhd", "key_lengths": lengths}
    padded = Call(*(pad(t, value) for t, value in zip((q, k, v), values, strict=True)), options)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 0, 2], [4]):
        tensors = {name: getattr(padded, name)[order] for name in "qkv"}
        out, lse = padded.but(**tensors, key_lengths=lengths[order]).run(precision)
        for i, sample in enumerate(order):
            n = LENGTHS[sample]
            assert_same((out[i, :n], lse[i, :, :n]), (alone[sample][0][0], alone[sample][1][0]))


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_query_alone_and_among_others(dtype, precision, device):
    call = simple((1, 2, 2, 300, 270, 64), dtype, device)
    mean = {"key_mean": ops.key_mean(call.k)}
    out, lse = call.run(precision="full" if precision == "auto" else precision, **mean)
    for rows in (slice(0, 1), slice(7, 20), slice(299, 300), slice(100, 229)):
        some = call.but(q=call.q[:, :, rows]).run("full" if precision == "auto" else precision, **mean)
        assert_same(some, (out[:, :, rows], lse[:, :, rows]))


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_shared_heads_are_repeated_heads(dtype, precision, device):
    for heads, kv_heads, rows, keys in ((6, 2, 33, 257), (4, 1, 1, 300), (3, 3, 140, 20)):
        call = simple((2, heads, kv_heads, rows, keys, 72), dtype, device)
        repeated = {name: getattr(call, name).repeat_interleave(heads // kv_heads, 1) for name in "kv"}
        assert_same(call.run(precision), call.but(**repeated).run(precision))
        lengths = torch.tensor([keys, keys // 2], device=device)
        both = {"key_lengths": lengths}
        assert_same(call.run(precision, **both), call.but(**repeated).run(precision, **both))


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_options_that_change_nothing_change_no_bit(dtype, precision, device):
    batch, rows, keys, d = 2, 150, 200, 64
    call = simple((batch, 2, 2, rows, keys, d), dtype, device)
    expected = call.run(precision)
    ones = torch.ones(1, rows + keys - 1, device=device)
    nothing = {
        "key_lengths": torch.full((batch,), keys, device=device),
        "block_mask": torch.ones(1, 1, 2, 4, dtype=torch.bool, device=device),
        "head_shift": torch.zeros(2, dtype=torch.int64, device=device),
        "scale": d**-0.5,
    }
    for name, value in nothing.items():
        assert_same(call.run(precision, **{name: value}), expected)
    if precision == "full":  # eight bits multiply weights and factor as 16-bit numbers
        assert_same(call.run(precision, factor=ones), expected)
    shifted = {"head_shift": torch.tensor([1, -1], device=device), "frames": 1}
    assert_same(call.run(precision, **shifted), expected)


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_shifted_heads_are_gathered_heads(dtype, precision, device):
    call = simple((4, 4, 2, 70, 90, 40), dtype, device)
    # heads 0 of frames 0 .. 3 from frames 1, 2, 3 and its own; heads 1 from its own, 0, 1, 2
    moved = {}
    for name in "kv":
        t = getattr(call, name)
        moved[name] = torch.stack([t[[1, 2, 3, 3], 0], t[[0, 0, 1, 2], 1]], 1)
    shift = {"head_shift": torch.tensor([1, -1], device=device), "frames": 4}
    assert_same(call.run(precision, **shift), call.but(**moved).run(precision))


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_masked_blocks_are_keys_that_are_not_there(dtype, precision, device):
    call = simple((1, 2, 2, 100, 256, 64), dtype, device)
    mean = {"key_mean": ops.key_mean(call.k)}
    mask = torch.tensor([True, True, False, False], device=device).view(1, 1, 1, 4)
    short = call.but(k=call.k[:, :, :128], v=call.v[:, :, :128])
    if precision == "full":
        assert_same(call.run(block_mask=mask), short.run())
        return
    lengths = torch.tensor([128], device=device)
    for a, b in zip(
        call.run(precision, block_mask=mask, **mean),
        call.run(precision, key_lengths=lengths, **mean),
        strict=True,
    ):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)
