"""Attention at the edges of numbers: nothing to see, NaN, infinities, very large and very small scores."""

import math

import pytest
import torch

from tests.ops.attention_cases import Call, assert_as_torch, assert_near, simple
from tests.ops.cases import BF16, F16, F32, F64, every_device

every_precision = pytest.mark.parametrize("precision", ["full", "int8", "fp8", "auto"])
INF = math.inf


def assert_unseen(out, lse, rows) -> None:
    """`rows` [batch, heads, rows] and no others see nothing."""
    assert torch.equal(lse == -INF, rows.expand_as(lse)) and out.isfinite().all()
    assert (out[rows.expand_as(lse)] == 0).all()
    assert (out.abs().amax(-1)[~rows.expand_as(lse)] > 0).all()


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rows_that_see_nothing(dtype, precision, device):
    call = simple((3, 2, 2, 140, 150, 64), dtype, device)
    rows = torch.zeros(3, 2, 140, dtype=torch.bool, device=device)

    hidden = rows.clone()
    hidden[0, 1, 7] = hidden[2, :, 128:] = hidden[1, 0] = True
    bias = torch.randn(3, 2, 140, 150, device=device).masked_fill(hidden[..., None], -INF)
    assert_unseen(*call.run(precision, bias=bias), hidden)
    assert_unseen(*call.run(precision, bias=bias.to(dtype)), hidden)
    assert_unseen(*call.run(precision, bias=bias > -INF), hidden)

    hidden = rows.clone()
    hidden[1] = True
    lengths = torch.tensor([150, 0, 1], device=device)
    assert_unseen(*call.run(precision, key_lengths=lengths), hidden)

    hidden = rows.clone()
    hidden[0, 0, :128] = hidden[2, 1, 128:] = hidden[1] = True
    mask = ~torch.stack([hidden[..., 0], hidden[..., 128]], -1)[..., None].expand(3, 2, 2, 3)
    assert_unseen(*call.run(precision, block_mask=mask), hidden)

    # each option leaves keys, all together none
    half = torch.zeros(1, 1, 2, 3, dtype=torch.bool, device=device)
    half[..., 1:] = True
    few = {"block_mask": half, "key_lengths": torch.tensor([150, 64, 65], device=device)}
    hidden = rows.clone()
    hidden[1] = True
    assert_unseen(*call.run(precision, **few), hidden)
    last = torch.arange(150, device=device).view(1, 1, 1, 150) != 64
    hidden[2] = True
    assert_unseen(*call.run(precision, **few, bias=last), hidden)


@every_device
@every_precision
def test_no_keys_and_no_rows(precision, device):
    for dtype in (F32, BF16):
        q, none = torch.randn(2, 3, 5, 16, device=device).to(dtype), torch.zeros(2, 3, 0, 16, device=device)
        out, lse = Call(q, none.to(dtype), none.to(dtype)).run(precision)
        assert out.shape == q.shape and (out == 0).all() and (lse == -INF).all()
        out, lse = Call(none.to(dtype), q, q).run(precision)
        assert out.shape == (2, 3, 0, 16) and lse.shape == (2, 3, 0)
        starts = torch.tensor([0, 0, 3, 5, 5], dtype=torch.int32, device=device)
        others = torch.tensor([0, 4, 4, 5, 5], dtype=torch.int32, device=device)
        tokens = q[0].transpose(0, 1)
        out, lse = Call(tokens, tokens, tokens).run(precision, cu_seqlens=(starts, others))
        assert (out[:3] == 0).all() and (lse[:, :3] == -INF).all() and lse[:, 3:].isfinite().all()


BAD = [(name, value) for name in "qkv" for value in (math.nan, INF, -INF)]
every_bad_number = pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x))


def spoilt(call: Call, name: str, value: float, *at) -> Call:
    t = getattr(call, name).clone()
    t[at] = value
    return call.but(**{name: t})


def assert_spoilt(call: Call, bad: Call, rows: torch.Tensor, name: str, precision: str) -> None:
    """NaN in `rows` [.., heads, rows] of the result and in no other; v: in one channel of theirs at least."""
    (out, lse), (exact, _) = bad.run(precision), call.exact()
    out, exact = call.heads_first(out), call.heads_first(exact)
    rows = rows.expand_as(lse)
    nans = out.isnan()
    assert torch.equal(nans.any(-1) if name == "v" else nans.all(-1), rows)
    assert (~nans | rows[..., None]).all() and out[~rows].isfinite().all()
    if name != "v":
        assert torch.equal(lse.isnan(), rows)
    if not rows.all():
        good = out[~rows], exact[~rows]
        if precision == "full":
            assert_as_torch(*good, call.heads_first(call.peer())[~rows])
        else:
            assert_near(*good, cosine=0.9993, l1=0.03)


def skip_infinity(value: float, precision: str, device: str) -> None:
    if device == "cuda" and math.isinf(value) and precision in ("full", "auto"):
        pytest.skip("in full precision on CUDA an infinity follows the rules of IEEE 754")


@every_device
@every_precision
@every_bad_number
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_what_is_not_finite_reaches_the_rows_that_see_it(dtype, name, value, precision, device):
    skip_infinity(value, precision, device)
    call = simple((2, 4, 2, 70, 300, 64), dtype, device)
    for token in (0, 69):
        bad = spoilt(call, name, value, 1, 1, token, 5)
        rows = torch.zeros(2, 4, 70, dtype=torch.bool, device=device)
        if name == "q":
            rows[1, 1, token] = True
        else:
            rows[1, 2:] = True  # the queries of kv head 1
        assert_spoilt(call, bad, rows, name, precision)


@every_device
@every_precision
@every_bad_number
@pytest.mark.parametrize("d", [1, 64])
def test_an_infinity_is_not_a_mask(d, name, value, precision, device):
    # scores of -infinity alone are those of a query that sees nothing: not here
    skip_infinity(value, precision, device)
    for sign in (1, -1):
        q, k, v = torch.ones(1, 1, 2, d), sign * torch.ones(1, 1, 3, d), torch.randn(1, 1, 3, d)
        call = Call(*(t.to(device, BF16) for t in (q, k, v)))
        for at in ((0, 0, 1, 0), (0, 0, 1)):
            out, lse = spoilt(call, name, value, *at).run(precision)
            rows = slice(1, 2) if name == "q" else slice(None)
            assert out[0, 0, rows, 0].isnan().all()
            assert name == "v" or lse[0, 0, rows].isnan().all()


@every_device
@every_precision
@every_bad_number
def test_what_is_not_finite_and_not_seen(name, value, precision, device):
    skip_infinity(value, precision, device)
    call = simple((3, 2, 2, 140, 300, 64), BF16, device)
    nobody = torch.zeros(3, 2, 140, dtype=torch.bool, device=device)
    lengths = torch.tensor([300, 200, 70], device=device)
    if name != "q":
        padded = call.but(key_lengths=lengths)
        bad = spoilt(padded, name, value, 1, slice(None), slice(200, 300))
        bad = spoilt(bad, name, value, 2, slice(None), slice(70, 300))
        assert_spoilt(padded, bad, nobody, name, precision)

        mask = torch.ones(1, 1, 2, 5, dtype=torch.bool, device=device)
        mask[..., 1] = False
        blocked = call.but(block_mask=mask)
        assert_spoilt(blocked, spoilt(blocked, name, value, 0, 0, 100), nobody, name, precision)
        mask = mask.clone()
        mask[..., 1, 1] = True  # the rows from 128 on see it
        some = nobody.clone()
        some[0, 0, 128:] = True
        blocked = call.but(block_mask=mask)
        assert_spoilt(blocked, spoilt(blocked, name, value, 0, 0, 100), some, name, precision)

    q, k, v = (t[0].transpose(0, 1) for t in (call.q, call.k, call.v))
    starts = [torch.tensor(s, device=device) for s in ([0, 30, 30, 90, 140], [0, 100, 150, 200, 300])]
    packed = Call(q, k, v, {"cu_seqlens": tuple(starts)})
    rows = torch.zeros(2, 140, dtype=torch.bool, device=device)
    if name == "q":
        rows[1, 40] = True
        assert_spoilt(packed, spoilt(packed, name, value, 40, 1), rows, name, precision)
    else:
        assert_spoilt(packed, spoilt(packed, name, value, 120, 1), rows, name, precision)  # nobody's
        rows[1, 30:90] = True
        assert_spoilt(packed, spoilt(packed, name, value, 150, 1), rows, name, precision)


@every_device
@every_precision
@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_bias_that_is_not_a_number(value, precision, device):
    call = simple((1, 2, 2, 40, 70, 64), F32, device)
    bias = torch.zeros(1, 2, 40, 70, device=device)
    bias[0, 1, 17, 33] = value
    out, lse = call.run(precision, bias=bias)
    rows = torch.zeros_like(lse, dtype=torch.bool)
    rows[0, 1, 17] = True
    assert torch.equal(out.isnan().all(-1), rows) and torch.equal(lse.isfinite(), ~rows)
    assert out[~rows].isfinite().all()


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_large_scores_do_not_overflow(dtype, precision, device):
    call = simple((1, 2, 2, 40, 300, 64), dtype, device)
    for scale in (1e3, -1e3, 1e30):  # the largest scores: about 1e4 and more
        out, lse = call.run(precision, scale=scale)
        assert out.isfinite().all() and not lse.isnan().any()
        if precision == "full" and abs(scale) == 1e3:
            exact, exact_lse = call.but(scale=scale).exact()
            torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
            assert (out.double() - exact).abs().max() < 0.05
    bias = torch.full((1, 1, 1, 300), -1e30, device=device)
    bias[..., 5] = 1e30
    out, lse = call.run(precision, bias=bias)
    torch.testing.assert_close(out, call.v[:, :, 5:6].expand_as(out), rtol=0.01, atol=0.05)
    shifted = call.run(precision, bias=torch.full_like(bias, -3e4))  # no weight may become 0 / 0
    plain = call.run(precision)
    torch.testing.assert_close(shifted[0].float(), plain[0].float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(shifted[1] + 3e4, plain[1], rtol=0, atol=0.02)


@every_device
@every_precision
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_zeros_and_very_small_numbers(dtype, precision, device):
    call = simple((1, 2, 1, 30, 100, 64), dtype, device)
    zero = {name: torch.zeros_like(getattr(call, name)) for name in "qkv"}
    for names in ("q", "k", "qk"):
        out, lse = call.but(**{n: zero[n] for n in names}).run(precision)
        mean = call.v.float().mean(2, keepdim=True).expand_as(out)
        torch.testing.assert_close(out.float(), mean, rtol=0.02, atol=4e-3)
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(100)))
    assert (call.but(v=zero["v"]).run(precision)[0] == 0).all()
    tiny = torch.finfo(dtype).smallest_normal / 4  # subnormal
    for name in "qk":
        out, lse = call.but(**{name: torch.full_like(getattr(call, name), tiny)}).run(precision)
        assert out.isfinite().all() and lse.isfinite().all()
    out, _ = call.but(v=torch.full_like(call.v, tiny)).run(precision)
    assert out.isfinite().all() and out.abs().max() <= 2 * tiny
    if dtype == F32 and precision == "full":
        torch.testing.assert_close(out, torch.full_like(out, tiny), rtol=1e-5, atol=0)


@every_device
def test_float64_at_the_edges(device):
    call = simple((1, 2, 2, 40, 70, 16), F64, device)
    assert call.run(scale=1e300)[0].isfinite().all()
    out, lse = spoilt(call, "k", math.nan, 0, 1, 69, 15).run()
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all() and out[0, 0].isfinite().all()
    bias = torch.zeros(1, 1, 40, 70, device=device, dtype=F64)
    bias[0, 0, 3] = -INF
    out, lse = call.run(bias=bias)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -INF).all() and lse[:, :, 4].isfinite().all()
