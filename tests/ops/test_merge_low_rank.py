"""Low-rank changes merged into weights: the float64 product rounded once, or with its mean."""

import pytest
import torch

from rfkernels import ops

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def factors(out: int, inputs: int, rank: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((out, inputs), (rank, inputs), (out, rank))
    weight, down, up = (torch.randn(*shape, dtype=F64, generator=generator).to(dtype) for shape in shapes)
    return weight, down, up, torch.randn(rank, dtype=F64, generator=generator)


def exact(weight, down, up, scale):
    return weight.double() + up.double() @ (scale.double()[:, None] * down.double())


@pytest.mark.parametrize(("out", "inputs", "rank"), [(7, 5, 3), (64, 96, 16), (33, 130, 1), (4, 6, 0)])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_nearest_is_the_sum_rounded_once(dtype, out, inputs, rank):
    weight, down, up, scale = factors(out, inputs, rank, dtype)
    before = weight.clone()
    merged = ops.merge_low_rank(weight, down, up, scale)
    wanted = exact(weight, down, up, scale)
    assert merged.dtype == dtype and merged.shape == weight.shape and torch.equal(weight, before)
    half = {F64: 1e-15, F32: 2.0**-23, F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    error = {F64: 1e-15, F32: 1e-6, F16: 1e-6, BF16: 1e-6}[dtype] * (1 + rank)
    assert ((merged.double() - wanted).abs() <= half * wanted.abs() + error).all()
    if dtype in (F64, F32):
        assert torch.equal(merged, ops.merge_low_rank(weight, down, up, scale, rounding="stochastic"))


def test_scales():
    weight, down, up, _ = factors(6, 8, 4, F32)
    plain = ops.merge_low_rank(weight, down, up)
    torch.testing.assert_close(plain, weight + up @ down, rtol=1e-6, atol=1e-6)
    for scale in (0.5, torch.tensor(0.5), torch.full((4,), 0.5, dtype=F64)):
        merged = ops.merge_low_rank(weight, down, up, scale)
        torch.testing.assert_close(merged, weight + 0.5 * up @ down, rtol=1e-6, atol=1e-6)
    assert torch.equal(ops.merge_low_rank(weight, down, up, 0.0), weight)


def test_factors_of_another_dtype_are_not_rounded_to_the_weight():
    """A and B in float32 beside a bfloat16 weight: nothing but the result has 8 bits."""
    _, down, up, scale = factors(32, 48, 8, F32)
    weight = torch.zeros(32, 48, dtype=BF16)
    merged = ops.merge_low_rank(weight, down, up, scale)
    wanted = exact(weight, down, up, scale)
    assert ((merged.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_merged_layer_is_the_layer_with_its_branch(dtype):
    """The rounding of the weight is all that is between x W'^T and the branch beside x W^T."""
    weight, down, up, scale = factors(40, 64, 8, dtype)
    x = torch.randn(5, 64, dtype=F64)
    beside = x @ weight.double().T + (x @ down.double().T * scale) @ up.double().T
    merged = x @ ops.merge_low_rank(weight, down, up, scale).double().T
    unit = {F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    limit = unit * x.abs() @ exact(weight, down, up, scale).abs().T
    assert ((merged - beside).abs() <= limit + 1e-4).all() and not torch.equal(merged, beside)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_stochastic_has_the_mean(dtype):
    """E = W + dW over seeds, with dW so small that rounding to nearest keeps nothing of it."""
    weight, down, up, _ = factors(24, 32, 4, dtype)
    scale, draws = {F16: 2e-6, BF16: 2e-5}[dtype], 300
    change = scale * up.double() @ down.double()
    nearest = ops.merge_low_rank(weight, down, up, scale).double() - weight.double()
    assert (nearest * change).sum() < 0.2 * change.square().sum()
    merged = [
        ops.merge_low_rank(weight, down, up, scale, rounding="stochastic", seed=s) for s in range(draws)
    ]
    assert torch.equal(merged[5], ops.merge_low_rank(weight, down, up, scale, rounding="stochastic", seed=5))
    mean = torch.stack(merged).double().mean(0) - weight.double()
    spread = torch.stack(merged).double().std(0).norm() / draws**0.5
    share = (mean * change).sum() / change.square().sum()
    assert abs(share - 1) < 4 * spread / change.norm() / change.numel() ** 0.5 + 1e-3
    assert spread / change.norm() / change.numel() ** 0.5 < 0.1  # the check above has teeth


def test_refusals():
    weight, down, up, scale = factors(6, 8, 4, F32)
    bad = [
        (weight, down.T, up, scale),
        (weight, down, up.T, scale),
        (weight, down[:, :7], up, scale),
        (weight, down, up, scale[:3]),
        (weight[0], down, up, scale),
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match=r"weight \[out, in\], down \[rank, in\], up .* required, got"):
            ops.merge_low_rank(*arguments)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"weight must be float64, .* got torch\.\w+8"):
            ops.merge_low_rank(weight.to(dtype), down, up, scale)
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        ops.merge_low_rank(weight, down, up, scale, rounding="up")
