"""Attention in eight bits: what it promises, what smoothing the keys brings, where "auto" falls back."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import ops
from rfkernels.ops._attention import fallbacks
from tests.ops.attention_cases import (
    HEAD_DIMS,
    Call,
    assert_matches,
    assert_near,
    cosine_of,
    random_call,
    simple,
)
from tests.ops.cases import BF16, F16, F32, every_device

eight_bits = pytest.mark.parametrize("precision", ["int8", "fp8"])
every_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16])


def with_outliers(call: Call) -> Call:
    """Channels of the keys that are ten times as large, and what all keys have in common."""
    k = call.k.double()
    k[..., 3] *= 10
    k[..., 20] *= 10
    offset = 20 * torch.randn(k.shape[-1], generator=torch.Generator().manual_seed(7))
    return call.but(k=(k + offset.to(k)).to(call.k.dtype))


@every_device
@every_dtype
@eight_bits
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_eight_bits_match_float64_fuzzed(precision, dtype, device, data):
    pick = lambda *choices: data.draw(st.sampled_from(choices))
    assert_matches(random_call(pick, dtype, device, tame=True), precision)


@every_device
@every_dtype
@eight_bits
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_normal_data(d, precision, dtype, device):
    for rows, keys in ((33, 257), (65, 513), (1, 32)):
        assert_matches(simple((2, 4, 2, rows, keys, d), dtype, device), precision)


@every_device
@every_dtype
@eight_bits
def test_smoothing_the_keys_is_what_outliers_need(precision, dtype, device):
    call = with_outliers(simple((2, 4, 4, 200, 600, 64), dtype, device))
    zeros = torch.zeros(2, 4, 64, device=device)
    exact = call.exact()[0]
    assert_near(call.run(precision)[0], exact, cosine=0.998)
    assert_near(call.run(precision, key_mean=ops.key_mean(call.k))[0], exact, cosine=0.998)
    assert cosine_of(call.run(precision, key_mean=zeros)[0], exact) < 0.998


@every_device
@eight_bits
def test_any_vector_may_be_taken_from_the_keys(precision, device):
    call = simple((2, 4, 2, 100, 300, 64), BF16, device)
    exact, exact_lse = call.exact()
    mean = ops.key_mean(call.k)
    assert mean.shape == (2, 2, 64) and mean.dtype == F32
    torch.testing.assert_close(mean.double(), call.k.double().mean(2))
    torch.testing.assert_close(ops.key_mean(call.k.transpose(1, 2), layout="blhd"), mean)
    for vector in (mean, mean + 0.3 * torch.randn_like(mean), torch.zeros_like(mean), mean.roll(1, 0)):
        out, lse = call.run(precision, key_mean=vector)
        assert_near(out, exact, cosine=0.9995, l1=0.02)
        assert (lse - exact_lse).abs().max() < 2e-2
    # far from every key the codes are coarse, but nothing is shifted
    out, lse = call.run(precision, key_mean=mean + 5)
    assert_near(out, exact, cosine=0.99)
    assert (lse - exact_lse).mean().abs() < 2e-2


@every_device
@eight_bits
def test_a_mean_of_packed_sequences_and_of_what_is_seen(precision, device):
    lengths = (40, 0, 200)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    tokens = lambda heads: torch.randn(240, heads, 64, device=device)
    call = Call(tokens(4), tokens(2), tokens(2), {"cu_seqlens": starts})
    offset = 20 * torch.tensor([1.0, -1.0], device=device).repeat_interleave(
        torch.tensor([40, 200]).to(device)
    )
    call = call.but(k=call.k + offset[:, None, None])  # each sequence its own
    assert_near(call.run(precision)[0], call.exact()[0], cosine=0.9995, l1=0.02)
    means = torch.stack([call.k[:40].mean(0), torch.zeros(2, 64, device=device), call.k[40:].mean(0)])
    assert_near(call.run(precision, key_mean=means)[0], call.exact()[0], cosine=0.9995, l1=0.02)

    padded = simple((2, 4, 2, 50, 300, 64), F32, device)
    k = padded.k + 20
    k[0, :, 100:] = 1e4  # behind the end
    padded = padded.but(k=k, key_lengths=torch.tensor([100, 300], device=device))
    assert_near(padded.run(precision)[0], padded.exact()[0], cosine=0.9995, l1=0.02)


@every_device
@eight_bits
def test_a_bias_counts_in_eight_bits(precision, device):
    # ALiBi, as strong as the scores: without it the result is another
    i, j = torch.arange(200, device=device)[:, None], torch.arange(300, device=device)
    bias = -0.05 * (i - j).abs()[None, None].float()
    call = simple((1, 2, 2, 200, 300, 64), BF16, device)
    exact = call.but(bias=bias).exact()[0]
    assert_near(call.run(precision, bias=bias)[0], exact, cosine=0.9995, l1=0.02)
    assert cosine_of(call.run(precision)[0], exact) < 0.9


@every_device
@eight_bits
def test_values_with_an_offset_and_with_outliers(precision, device):
    call = simple((1, 2, 2, 100, 500, 64), BF16, device)
    v = call.v.clone()
    v[..., 5] *= 50  # a channel has its own steps
    v[..., 6] += 10
    call = call.but(v=v)
    out, exact = call.run(precision)[0], call.exact()[0]
    for channels in (slice(5, 6), slice(6, 7), slice(7, None), slice(0, 5)):
        assert_near(out[..., channels], exact[..., channels], cosine=0.9993, l1=0.025)


def decision() -> torch.Tensor:
    return fallbacks[-1].bool().cpu()


@every_device
@every_dtype
def test_auto_is_int8_for_usual_heads(dtype, device):
    for d in (40, 64, 128):
        call = simple((2, 4, 2, 130, 400, d), dtype, device)
        for result, int8 in zip(call.run("auto"), call.run("int8"), strict=True):
            assert torch.equal(result, int8)
        assert decision().shape == (2, 4) and not decision().any()


def mixed(call: Call, full: tuple, int8: tuple, falls: torch.Tensor) -> tuple:
    """Heads [batch or sequences, heads] that fall back have the bits of `full`, others those of `int8`."""
    result = call.run("auto")
    assert torch.equal(decision(), falls)
    for mine, a, b in zip(result, full, int8, strict=True):
        where = falls.to(mine.device).view(*falls.shape, *[1] * (mine.ndim - 2))
        assert torch.equal(mine, torch.where(where, a, b))
    return result


@every_device
@every_dtype
def test_auto_falls_back_where_eight_bits_are_too_few(dtype, device):
    call = simple((2, 4, 4, 130, 400, 64), dtype, device)
    q, k = call.q.clone(), call.k.clone()
    q[1, 2, :, 9] *= 30
    k[1, 2, :, 9] *= 30
    call = call.but(q=q, k=k)
    falls = torch.zeros(2, 4, dtype=torch.bool)
    falls[1, 2] = True
    full, int8 = call.run("full"), call.run("int8")
    result = mixed(call, full, int8, falls)
    # the queries that share a head of keys: each for itself where the queries are to blame
    shared = simple((1, 4, 2, 130, 400, 64), dtype, device)
    q = shared.q.clone()
    q[0, 2, :, 9] *= 30
    shared = shared.but(q=q)
    falls = torch.tensor([[False, False, True, False]])
    mixed(shared, shared.run("full"), shared.run("int8"), falls)

    exact = call.exact()[0]
    assert_near(result[0][1, 2], exact[1, 2], cosine=0.9999, l1=0.01)


@every_device
def test_auto_decides_for_every_packed_sequence(device):
    tokens = lambda n: torch.randn(n, 2, 64, device=device)
    q, k, v = tokens(300), tokens(300), tokens(300)
    q[100:140, 1, 5] *= 30
    k[100:140, 1, 5] *= 30
    call = Call(q, k, v, {"cu_seqlens": torch.tensor([0, 100, 100, 140, 300], device=device)})
    out, lse = call.run("auto")
    falls = torch.zeros(4, 2, dtype=torch.bool)
    falls[2, 1] = True
    assert torch.equal(decision(), falls)
    full, int8 = call.run("full"), call.run("int8")
    assert torch.equal(out[100:140, 1], full[0][100:140, 1]) and torch.equal(
        lse[1, 100:140], full[1][1, 100:140]
    )
    assert torch.equal(out[:, 0], int8[0][:, 0]) and torch.equal(out[140:], int8[0][140:])


@every_device
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_auto_falls_back_where_something_is_not_finite(value, name, device):
    call = simple((2, 2, 2, 40, 100, 64), BF16, device)
    t = getattr(call, name).clone()
    t[1, 0, 17, 3] = value
    falls = torch.tensor([[False, False], [True, False]])
    call = call.but(**{name: t})
    call.run("auto")
    assert torch.equal(decision(), falls)
    # behind the end of a sample nothing is seen
    if name != "q":
        call.run("auto", key_lengths=torch.tensor([100, 17], device=device))
        assert not decision().any()


@every_device
def test_auto_counts_the_scale_and_outliers_among_the_values(device):
    call = simple((1, 2, 2, 40, 400, 64), BF16, device)
    call.run("auto", scale=1.0)  # eight times the usual
    assert decision().all()
    v = call.v.clone()
    v[0, 1, 50] *= 300  # one token makes the steps of all
    call.but(v=v).run("auto")
    assert decision().tolist() == [[False, True]]
