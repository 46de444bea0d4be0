"""Quantisers of weights: codes and scales against their formulas, and the errors that they promise."""

import math

import pytest
import torch

from rfkernels import ops
from rfkernels.ops.linear import dequantize_weight, unpack_int4
from rfkernels.ops.quantize import rotate
from rfkernels.quantization import (
    check_finite,
    largest_rotation,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    quantize_svdq,
    quantize_weight,
    truncated_svd,
)


def weights(out=48, width=256, seed=0, dtype=torch.float32):
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    w[3] = 0
    w[5, 64:128] = 0
    return w.to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("rotation", [0, 16, 64, 256])
def test_int8_is_within_half_a_step(rotation):
    w = weights()
    codes, scale = quantize_int8(w, rotation)
    turned = rotate(w.double(), rotation)
    torch.testing.assert_close(scale.double(), turned.abs().amax(1).clamp_min(1e-28) / 127)
    error = (codes.double() * scale.double()[:, None] - turned).abs()
    assert (error <= scale.double()[:, None] * 0.5 * (1 + 1e-4)).all()
    assert codes.abs().max() == 127 and (codes[3] == 0).all()


@pytest.mark.parametrize("group", [16, 64, 256])
def test_rotation_is_an_involution_and_keeps_products(group):
    w, x = weights().double(), torch.randn(7, 256, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(w, group), group), w, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotate(x, group) @ rotate(w, group).T, x @ w.T, atol=1e-11, rtol=0)
    ones = torch.ones(1, 256, dtype=torch.float64)  # all row sums are equal: no output collects the mean
    torch.testing.assert_close(rotate(ones, group), ones, atol=1e-12, rtol=0)
    assert rotate(w, 0) is w


def test_largest_rotation():
    assert [largest_rotation(n) for n in (3072, 192, 48, 40)] == [256, 64, 16, 0]


def test_fp8_rows_and_tensor():
    w = weights()
    w[:, 0] *= 30
    codes, scale = quantize_fp8(w)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (48,)
    assert relative(codes.float() * scale[:, None], w) < 0.04
    top = w.abs().max() / 448
    codes, scale = quantize_fp8(w, top)
    assert scale.shape == () and codes.float().abs().max() == 448
    torch.testing.assert_close(codes.float(), (w * (1 / top)).to(torch.float8_e4m3fn).float(), atol=0, rtol=0)


def test_fp8_codes_are_the_formats():
    for code in range(256):
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        value = (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7) * (-1) ** sign
        got = torch.tensor([[code]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        number = dequantize_weight(got, torch.tensor(2.0)).item()
        assert math.isnan(number) if code & 127 == 127 else number == 2 * value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
def test_int4_is_within_half_a_step_of_the_stored_scale(group, zero, dtype):
    w = weights(dtype=dtype)
    codes, scale, zeros = quantize_int4(w, group, zero, dtype)
    groups = 256 // (group or 256)
    assert codes.shape == (48, 128) and scale.dtype == dtype
    assert scale.shape == ((48, groups) if group else (48,))
    assert (zeros is None) == (zero == "none") and (zeros is None or zeros.shape == (48, groups))
    stored = dequantize_weight(codes, scale, zeros, torch.float64)
    error = (stored - w.double()).abs().unflatten(1, (groups, -1))
    step = scale.double().reshape(48, groups, 1)
    slack = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.09}[dtype]  # ends moved by rounding
    assert (error <= step * (0.5 + slack)).all()
    assert torch.equal(stored[3], torch.zeros(256, dtype=torch.float64))
    if zero == "none":
        assert unpack_int4(codes).amin() >= 1  # -8 is never made


def test_int4_codes_use_the_rounded_scale():
    w = torch.linspace(-7, 7, 4096)[None] * 1.003  # 7.021 / 7 is 1.003, in bfloat16 1.0
    codes, scale, _ = quantize_int4(w, 0, scale_dtype=torch.bfloat16)
    assert scale.item() == 1 and not torch.equal((w / 1.003).round(), w.round())
    assert torch.equal(unpack_int4(codes).float() - 8, w.round().clamp(-7, 7))


def test_int4_zero_of_a_constant_group():
    w = torch.full((2, 64), 3.25)
    for zero, exact in (("float", True), ("integer", True), ("none", True)):
        stored = dequantize_weight(*quantize_int4(w, 32, zero))
        assert exact == torch.allclose(stored, w, atol=1e-6)


def test_int4_search_lowers_the_error():
    torch.manual_seed(0)
    w = torch.distributions.StudentT(3.0).sample((32, 256))
    for zero in ("none", "integer", "float"):
        plain, searched = (dequantize_weight(*quantize_int4(w, 64, zero, search=n)) for n in (1, 12))
        if zero == "none":
            assert unpack_int4(quantize_int4(w, 64, search=12)[0]).amin() == 1  # -8 is never made
        assert relative(searched, w) < 0.99 * relative(plain, w)
        per_group = lambda a: (a - w).unflatten(1, (-1, 64)).norm(dim=-1)
        assert (per_group(searched) <= per_group(plain)).all()


def test_int4_round_trip_of_all_codes():
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 2)
    assert torch.equal(unpack_int4(ops.pack_int4(codes)), codes)
    packed = ops.pack_int4(codes)
    assert packed[0, 1] == (2 | 3 << 4)  # the even column in the low bits


def test_errors_of_the_published_schemes():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(256, 1024, generator=g), torch.randn(256, 1024, generator=g)
    outliers = x.clone()
    outliers[:, torch.randperm(1024, generator=g)[:8]] *= 20

    def of(x, format, **options):
        tensors = quantize_weight(w, format, **options)
        from rfkernels.nn import QuantLinear

        return relative(QuantLinear(format, **tensors)(x), x @ w.T)

    expected = [
        (of(x, "int8"), 0.011),
        (of(outliers, "int8"), 0.042),
        (of(outliers, "int8-convrot"), 0.011),
        (of(x, "fp8", quantize_input=True), 0.0373),
        (of(x, "fp8", scale="tensor", quantize_input=True), 0.0373),
        (of(x, "w4a16", group=128, zero="none"), 0.118),
        (of(x, "w4a16", group=64, zero="float"), 0.090),
        (of(x, "w4a16", group=64, zero="integer"), 0.090),
    ]
    for ours, published in expected:
        assert ours == pytest.approx(published, rel=0.3)
    assert of(outliers, "w4a8", rotation=256) < of(x, "w4a8", group=0, rotation=256)


def test_truncated_svd_is_the_nearest():
    w = torch.randn(60, 90, dtype=torch.float64)
    up, down = truncated_svd(w, 8)
    s = torch.linalg.svdvals(w)
    assert up.shape == (60, 8) and down.shape == (8, 90)
    torch.testing.assert_close((w - up @ down).norm(), s[8:].square().sum().sqrt())


def test_truncated_svd_of_large_matrices():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1100, 1030, generator=g, dtype=torch.float64)
    w += (
        4
        * torch.randn(1100, 4, generator=g, dtype=torch.float64)
        @ torch.randn(4, 1030, generator=g, dtype=torch.float64)
    )
    up, down = truncated_svd(w, 8)
    best = torch.linalg.svdvals(w)[8:].square().sum().sqrt()
    assert best <= (w - up @ down).norm() < 1.01 * best


def outlier_weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(96, 256, generator=g)
    return w + 3 * torch.randn(96, 4, generator=g) @ torch.randn(4, 256, generator=g)


def test_svdq_beats_plain_int4_where_there_is_structure():
    w = outlier_weights()
    split = quantize_svdq(w, rank=16)
    stored = dequantize_weight(split["weight"], split["weight_scale"]) / split["smooth"]
    ours = relative(stored + split["proj_up"] @ split["proj_down"], w)
    assert ours < 0.5 * relative(dequantize_weight(*quantize_int4(w, 64)), w)


def test_svdq_parts_add_up_without_the_quantiser(monkeypatch):
    """(x / λ) (Ŵ - L)^T + x D^T U^T = x W^T, and with tokens shifted by c the bias loses c (R / λ) 1."""
    w, x = outlier_weights().double(), torch.randn(5, 256, dtype=torch.float64)
    split = quantize_svdq(w, rank=16, input_max=torch.rand(256) + 0.1)
    smooth, up, down = split["smooth"], split["proj_up"], split["proj_down"]
    assert smooth.std() > 0  # maxima of the tokens are used
    residual = w * smooth - (up @ down) * smooth
    branch = (x @ down.T) @ up.T
    torch.testing.assert_close((x / smooth) @ residual.T + branch, x @ w.T, atol=1e-10, rtol=0)
    shift = 0.171875
    shifted = ((x + shift) / smooth) @ residual.T + branch - shift * (residual / smooth).sum(1)
    torch.testing.assert_close(shifted, x @ w.T, atol=1e-10, rtol=0)


def test_svdq_smoothing_follows_the_tokens():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    top = torch.ones(256)
    top[7] = 60
    smooth = quantize_svdq(w, input_max=top)["smooth"]
    assert smooth[7] > 3 * smooth.median()


def test_svdq_iterations_do_not_raise_the_error():
    w = outlier_weights(1)
    of = lambda n: quantize_svdq(w, rank=8, iterations=n)
    error = lambda s: relative(
        dequantize_weight(s["weight"], s["weight_scale"]) / s["smooth"] + s["proj_up"] @ s["proj_down"], w
    )
    assert error(of(6)) < error(of(0))


def test_refusals():
    w = weights()
    with pytest.raises(ValueError, match="zero must be one of none, integer, float, got 'half'"):
        quantize_int4(w, zero="half")
    with pytest.raises(ValueError, match=r"even groups must divide \[out, in\], got 96 of \(48, 256\)"):
        quantize_int4(w, 96)
    with pytest.raises(ValueError, match=r"must be one of int8, int8-convrot.*got 'int3'"):
        quantize_weight(w, "int3")
    with pytest.raises(ValueError, match="must divide the inputs"):
        quantize_weight(torch.randn(8, 40), "int8-convrot")
    with pytest.raises(ValueError, match="scale of fp8 must be 'row' or 'tensor', got 'block'"):
        quantize_weight(w, "fp8", scale="block")
    for bad in (math.nan, math.inf):
        w[7, 9] = bad
        with pytest.raises(ValueError, match=r"weight of blocks.0.to_q \(48, 256\) must be finite, got 1"):
            check_finite(w, "blocks.0.to_q")
