"""Stochastic rounding: exact on the grid, neighbours beside it, the right mean, a function of its seed."""

import pytest
import torch

from rfkernels import ops

BF16, F16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = [BF16, F16, E4M3, E5M2]


def grid(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a type, in order."""
    if dtype == torch.int8:
        return torch.arange(-127.0, 128.0)
    if dtype == torch.uint8:
        return torch.arange(256.0)
    bits = torch.arange(2 ** (8 * dtype.itemsize))
    numbers = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.int32).to(
        torch.uint8 if dtype.itemsize == 1 else torch.int16
    )
    numbers = numbers.view(dtype).float()
    return numbers[numbers.isfinite()].unique()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.uint8], ids=str)
def test_numbers_of_the_type_stay(dtype):
    numbers = grid(dtype)
    for seed in range(3):
        assert torch.equal(ops.stochastic_round(numbers, dtype, seed=seed).float(), numbers)
        assert torch.equal(ops.stochastic_round(numbers.double(), dtype, seed=seed).float(), numbers)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_between_neighbours_with_the_mean_of_x(dtype):
    """A share of (x - below) / step goes up, within four standard deviations."""
    numbers, draws = grid(dtype), 4000
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(numbers) - 1, (40,), generator=generator)
    below, above = numbers[picks].double(), numbers[picks + 1].double()
    share = torch.rand(40, generator=generator).double()
    x = (below + share * (above - below)).float()
    share = (x.double() - below) / (above - below)
    results = ops.stochastic_round(x.expand(draws, -1).contiguous(), dtype, seed=5).double()
    assert ((results == below) | (results == above)).all()
    went_up = (results == above).double().mean(0)
    assert ((went_up - share).abs() <= 4 * (share * (1 - share) / draws).sqrt() + 1e-6).all()


def test_function_of_the_seed_alone():
    x = torch.randn(1000)
    first = ops.stochastic_round(x, BF16, seed=7)
    assert torch.equal(first, ops.stochastic_round(x, BF16, seed=7))
    assert not torch.equal(first, ops.stochastic_round(x, BF16, seed=8))
    assert torch.equal(first[:10], ops.stochastic_round(x[:10], BF16, seed=7))


def test_scale_gives_codes():
    x, scale = torch.randn(6, 50), torch.rand(6, 1) + 0.1
    codes = ops.stochastic_round(x, torch.int8, seed=1, scale=scale)
    assert ((codes.float() * scale - x).abs() < scale * 1.0001).all()
    nearest = ops.round_to(x, torch.int8, scale=scale)
    assert torch.equal(nearest, (x / scale).round().to(torch.int8))


def test_saturates_in_eight_bits():
    x = torch.tensor([1e4, -1e4, torch.inf])
    assert ops.stochastic_round(x, E4M3, seed=0).float().tolist() == [448, -448, 448]
    assert ops.stochastic_round(x, torch.int8, seed=0).tolist() == [127, -127, 127]
    assert ops.round_to(x, E4M3).float().tolist() == [448, -448, 448]
    assert ops.stochastic_round(x, torch.uint8, seed=0).tolist() == [255, 0, 255]
    assert ops.stochastic_round(x, F16, seed=0).float().tolist() == [1e4, -1e4, torch.inf]
    assert ops.stochastic_round(torch.tensor([torch.nan]), BF16, seed=0).isnan().all()


def test_small_changes_of_a_weight_survive():
    """W + dW with |dW| far below half a step: nearest loses it, this keeps its mean."""
    weight = torch.randn(400, 400).to(BF16)
    change = 2e-4 * torch.ones(400, 400)
    total = weight.float() + change
    lost = (ops.round_to(total, BF16).float() - weight.float()).mean()
    kept = (ops.stochastic_round(total, BF16, seed=2).float() - weight.float()).mean()
    assert abs(lost - 2e-4) > 2e-5
    assert abs(kept - 2e-4) < 2e-5


def test_refusals():
    with pytest.raises(ValueError, match=r"x must be floating, got torch\.int32"):
        ops.stochastic_round(torch.ones(3, dtype=torch.int32), BF16, seed=0)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int64"):
        ops.stochastic_round(torch.ones(3), torch.int64, seed=0)
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        ops.round_to(torch.ones(3), BF16, rounding="up")
