"""Stochastic rounding: exact on the grid, neighbours beside it, the right mean, a function of its seed."""

import hashlib

import pytest
import torch

from rfkernels import _C, ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import every_device, every_kernel

BF16, F16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = [BF16, F16, E4M3, E5M2]
TYPES = [*FLOATS, torch.int8, torch.uint8]
NAMES = dict(zip(TYPES, ("bf16", "f16", "e4m3", "e5m2", "int8", "uint8"), strict=True))
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def run(x, dtype, seed, scale, device):
    """The op; "emulated": its CUDA half on the CPU."""
    if device != "emulated":
        scale = None if scale is None else scale.to(device)
        return ops.stochastic_round(x.to(device), dtype, seed=seed, scale=scale).cpu()
    out = torch.empty_like(x, dtype=dtype)
    codes = out.view(torch.uint8) if dtype in (E4M3, E5M2) else out
    load_emulator().stochastic_round(codes, x, scale, seed, NAMES[dtype])
    return out


def assert_same_bits(got, expected):
    """The signs of zeros too; NaNs have many."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, expected = got.float(), expected.float()
    same = (got == expected) & (got.signbit() == expected.signbit())
    assert (same | (got.isnan() & expected.isnan())).all()


@every_kernel
@every_type
def test_bits_of_the_definition(dtype, device):
    """Patterns of float32 of every kind, normal and subnormal numbers of the type; ragged rows."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (5, 1003), generator=generator).to(torch.int32)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 65504.0, 65519.9, 65520.0, 3.4e38]
    special += [-0.5, 127.0, 127.3, -127.3, 255.6, 448.0, 449.0, 2.0**-9, -(2.0**-10), 3.3895314e38, 3.39e38]
    normal = torch.randn(5, 1003, generator=generator)
    scale = torch.rand(5, 1, generator=generator) + 0.01
    inputs = [patterns.view(torch.float32), torch.tensor(special), 30 * normal, 2.0**-6 * normal]
    inputs += [2.0**-14 * normal, 2.0**-126 * normal, normal[:0], normal[:1, :3]]
    for seed, x in enumerate(inputs, 2**62 + 2**40):
        for c in (None, torch.tensor(0.37), *([scale] if len(x) == 5 else [])):
            if device == "emulated" and not x.numel():
                continue  # the checking half of an op ends before the launch
            expected = ops.stochastic_round_reference(x, c, dtype, seed)
            assert_same_bits(run(x, dtype, seed, c, device), expected)


@every_kernel
@pytest.mark.parametrize(("dtype", "step"), [(F16, 2.0**-24), (E4M3, 2.0**-9), (torch.int8, 1.0)], ids=str)
def test_sums_on_the_grid(dtype, step, device):
    """x / s + u is 0 or 1 to the bit, and one unit of u below: the floor is that integer, or one less."""
    u = (ops.noise.philox_words(1000, torch.tensor([[5 - 2**63, 0, 0]]))[0] >> 8).float() * 2.0**-24
    unit = torch.where((u > 0) & (u < 1), 2.0**-24, 0)
    for sum, x in ((0, -u), (1, 1 - u)):
        assert (run(step * x, dtype, 5, None, device).float() == step * sum).all()
        below = (run(step * (x - unit), dtype, 5, None, device).float() / step)[unit > 0]
        assert (below == sum - 1).all()


@every_device
def test_bits_are_the_same_everywhere(device):
    x = torch.arange(-5000, 5003, device=device) * 0.001003
    codes = ops.stochastic_round(x, E4M3, seed=2024).view(torch.uint8)
    digest = hashlib.sha256(codes.cpu().numpy().tobytes()).hexdigest()
    assert digest == "eea7614df2fc79ffc0603babc1d1f088d722e7efdb48ee964f9b06d49b57e4ff"


@every_device
@every_type
def test_obeys_torch(dtype, device):
    x, scale = torch.randn(3, 5, device=device), torch.rand(3, 1, device=device) + 0.1
    checks = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    if dtype not in (E4M3, E5M2):  # which the check itself would have to multiply
        checks.append("test_schema")
    for c in (None, scale):
        args = (x, c, dtype, 3)
        torch.library.opcheck(ops.OPS["stochastic_round"].functional, args, test_utils=checks)
        out = torch.empty_like(x, dtype=dtype)
        torch.library.opcheck(ops.OPS["stochastic_round"].out_variant, (out, *args), test_utils=checks)
    compiled = torch.compile(
        lambda x: ops.stochastic_round(x, dtype, seed=3, scale=scale), fullgraph=True, backend="aot_eager"
    )
    assert_same_bits(compiled(x), ops.stochastic_round(x, dtype, seed=3, scale=scale))


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


@every_type
def test_numbers_of_the_type_stay(dtype):
    numbers = grid(dtype)
    for seed in range(3):
        assert torch.equal(ops.stochastic_round(numbers, dtype, seed=seed).float(), numbers)
        assert torch.equal(ops.stochastic_round(numbers.double(), dtype, seed=seed).float(), numbers)


@every_type
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


@pytest.mark.parametrize("dtype", [E4M3, torch.int8], ids=str)
def test_far_below_a_step(dtype):
    """The share that goes up is that of numbers of a thousandth of a step, of both signs."""
    x = torch.full((2, 4_000_000), 1e-3 * {E4M3: 2.0**-9, torch.int8: 1.0}[dtype])
    x[1] *= -1
    codes = ops.stochastic_round(x, dtype, seed=11)
    assert codes.float().abs().unique().numel() == 2
    for row, values in zip(codes, x, strict=True):
        share = row.float().mean(dtype=torch.float64) / values[0]
        assert abs(share - 1) < 4 * (1e-3 * 4e6) ** -0.5


def test_independent_of_noise_of_the_same_seed():
    """Rounding of noise: no word serves both."""
    noise = ops.philox_normal((1, 400_000), ops.noise_keys(3, 1))
    error = ops.stochastic_round(noise, torch.int8, seed=3).float() - noise
    assert abs(torch.corrcoef(torch.stack((error[0], noise[0])))[0, 1]) < 4 / 400_000**0.5
    words = [ops.noise.philox_words(100, torch.tensor([[3 - high, 0, 0]])) for high in (0, 2**63)]
    assert not (words[0] == words[1]).any()


def test_function_of_the_seed_alone():
    x = torch.randn(1000)
    first = ops.stochastic_round(x, BF16, seed=7)
    assert torch.equal(first, ops.stochastic_round(x, BF16, seed=7))
    assert not torch.equal(first, ops.stochastic_round(x, BF16, seed=8))
    assert torch.equal(first[:10], ops.stochastic_round(x[:10], BF16, seed=7))
    assert torch.equal(first.view(20, 50), ops.stochastic_round(x.view(20, 50), BF16, seed=7))
    assert torch.equal(first, ops.stochastic_round(x.view(50, 20).T.contiguous().T, BF16, seed=7).view(-1))
    assert not torch.equal(first, ops.stochastic_round(x, BF16, seed=7 + 2**32))


def test_scale_gives_codes():
    x, scale = torch.randn(6, 50), torch.rand(6, 1) + 0.1
    codes = ops.stochastic_round(x, torch.int8, seed=1, scale=scale)
    assert ((codes.float() * scale - x).abs() < scale * 1.0001).all()
    assert torch.equal(codes, ops.stochastic_round(x, torch.int8, seed=1, scale=scale[:, 0]))
    assert torch.equal(
        ops.stochastic_round(x, torch.int8, seed=1, scale=0.5),
        ops.stochastic_round(2 * x, torch.int8, seed=1),
    )
    for c in (scale, scale[:, 0]):
        nearest = ops.round_to(x, torch.int8, scale=c)
        assert torch.equal(nearest, (x / scale).round().to(torch.int8))


def test_saturates_in_eight_bits():
    x = torch.tensor([1e4, -1e4, torch.inf])
    assert ops.stochastic_round(x, E4M3, seed=0).float().tolist() == [448, -448, 448]
    assert ops.stochastic_round(x, torch.int8, seed=0).tolist() == [127, -127, 127]
    assert ops.round_to(x, E4M3).float().tolist() == [448, -448, 448]
    assert ops.stochastic_round(x, torch.uint8, seed=0).tolist() == [255, 0, 255]
    assert ops.stochastic_round(x, F16, seed=0).float().tolist() == [1e4, -1e4, torch.inf]
    near = torch.tensor([65504.0, 65510.0, 65519.9, 65520.0]).repeat(100)
    assert ops.stochastic_round(near, F16, seed=0).unique().tolist() == [65504, torch.inf]
    assert torch.equal(ops.stochastic_round(near, F16, seed=0), near.half())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_nan_stays(rounding):
    x = torch.tensor([torch.nan, -torch.nan, 1.0])
    for dtype in FLOATS:
        codes = ops.round_to(x, dtype, rounding=rounding)
        assert codes.float().isnan().tolist() == [True, True, False]
    for dtype in (torch.int8, torch.uint8):
        assert ops.round_to(x, dtype, rounding=rounding).tolist() == [0, 0, 1]
        nothing = torch.tensor(torch.nan)
        assert ops.round_to(x, dtype, rounding=rounding, scale=nothing).tolist() == [0, 0, 0]


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
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=r"seed must be in 0 \.\. 2\*\*63 - 1, got"):
            ops.stochastic_round(torch.ones(3), BF16, seed=seed)
    with pytest.raises(ValueError, match="scale must be f32 on the device of x, its axes the leading axes"):
        ops.stochastic_round(torch.ones(3, 4), BF16, seed=0, scale=torch.ones(4))


@pytest.mark.parametrize(
    ("out", "x", "seed", "name", "message"),
    [
        (torch.zeros(3, dtype=BF16), torch.ones(3).double(), 0, "bf16", "x must be f32, got f64"),
        (torch.zeros(3, dtype=BF16), torch.ones(3), -1, "bf16", "seed must be in .* got -1"),
        (torch.zeros(3, dtype=BF16), torch.ones(3), 0, "int4", "grid must be bf16, .* got int4"),
        (torch.zeros(3, dtype=F16), torch.ones(3), 0, "bf16", "out must be bf16 in the shape of x"),
        (torch.zeros(4, dtype=BF16), torch.ones(3), 0, "bf16", "out must be bf16 in the shape of x"),
        (torch.zeros(6, dtype=BF16), torch.ones(12)[::2], 0, "bf16", "expected contiguous tensors"),
    ],
)
def test_kernel_refuses(out, x, seed, name, message):
    with pytest.raises(ValueError, match=message):
        _C.stochastic_round(out, x, None, seed, name)


def test_kernel_refuses_to_write_over_x():
    x = torch.ones(8)
    with pytest.raises(ValueError, match="share no memory"):
        _C.stochastic_round(x.view(BF16)[:8], x, None, 0, "bf16")
