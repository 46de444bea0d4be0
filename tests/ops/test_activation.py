"""What the ops of `rfkernels.ops.activation` promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU, SwiGLU
from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, F16, F32, F64, KERNELS, every_device, every_kernel

KINDS = ["gelu", "gelu_tanh", "silu", "relu2"]
TIERS = ["fast", "exact"]
# of values of order one: rounding of the result, and of float32 arithmetic
TOLERANCE = {F64: 1e-13, F32: 2e-6, F16: 1.5e-3, BF16: 1e-2}
# dtypes of tokens and biases; None: no bias
TYPES = [(F64, F64), (F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32), (F32, None), (BF16, None)]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_type = pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
# one number; a pack; a ragged width; wider than a strip; more rows; no element
SHAPES = [(1,), (3, 8), (2, 3, 13), (2, 300), (4, 1024), (0, 8), (3, 0)]


def randn(*shape, dtype, device="cpu", seed=0):
    memory = "cpu" if device == "emulated" else device
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (2 * torch.randn(shape, generator=generator, dtype=F64)).to(memory, dtype)


def run(device, name, out_like, *args):
    """The op, or its CUDA half on the CPU, on the arguments of its schema."""
    if device != "emulated":
        return ops.OPS[name](*args)
    out = torch.full_like(out_like, math.nan)
    if out.numel():
        getattr(load_emulator(), name)(out, *args)
    return out


def widen(*args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def assert_close(result, expected, dtype, roundings=1):
    assert result.dtype == dtype and result.shape == expected.shape and result.is_contiguous()
    tolerance = roundings * TOLERANCE[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@every_kernel
@every_kind
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_type
def test_activation_matches_its_definition(types, shape, tier, kind, device):
    x = randn(*shape, dtype=types[0], device=device)
    bias = randn(shape[-1], dtype=types[1], device=device) if types[1] else None
    result = run(device, "activation", x, x, bias, kind, tier)
    rounded = (x + bias).to(x.dtype) if bias is not None and tier == "exact" else None
    args = (rounded, None) if rounded is not None else (x, bias)
    assert_close(result, ops.activation_reference(*widen(*args), kind), types[0])


def gated_args(shape, types, packed, device, seed=0):
    width = shape[-1]
    if packed:
        x = randn(*shape[:-1], 2 * width, dtype=types[0], device=device, seed=seed)
        return x, None, randn(2 * width, dtype=types[1], device=device) if types[1] else None, None
    x, up = (randn(*shape, dtype=types[0], device=device, seed=seed + i) for i in (1, 2))
    biases = [randn(width, dtype=types[1], device=device, seed=i) if types[1] else None for i in (3, 4)]
    return x, up, *biases


def rounded_sums(x, up, bias, up_bias):
    """The inputs of the exact tier, with the biases added in the dtype of x."""
    add = ops.activation.__globals__["_add"]
    return add(x, bias), None if up is None else add(up, up_bias), None, None


@every_kernel
@every_kind
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("order", ["gate first", "gate last", "apart"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_type
def test_gated_activation_matches_its_definition(types, shape, order, tier, kind, device):
    args = gated_args(shape, types, order != "apart", device)
    out = torch.empty(shape, dtype=types[0], device=args[0].device)
    first = order != "gate last"
    result = run(device, "gated_activation", out, *args, kind, first, tier)
    args = rounded_sums(*args) if tier == "exact" else args
    expected = ops.gated_activation_reference(*widen(*args), kind, first)
    assert_close(result, expected, types[0], 2 if tier == "exact" else 1)  # the function is rounded too


@every_kernel
@every_kind
@pytest.mark.parametrize("types", [(F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_the_fast_tier_rounds_once(types, kind, device):
    x, _, bias, _ = gated_args((37, 300), types, True, device)
    wide, out = x.float(), torch.empty(37, 300, dtype=types[0], device=x.device)
    alone = run(device, "activation", x, x, bias, kind, "fast")
    assert torch.equal(alone, run(device, "activation", wide, wide, bias.float(), kind, "fast").to(x.dtype))
    gated = run(device, "gated_activation", out, x, None, bias, None, kind, True, "fast")
    exact = run(device, "gated_activation", out.float(), wide, None, bias.float(), None, kind, True, "fast")
    assert torch.equal(gated, exact.to(x.dtype))


# in forms that do not cancel, for float64
EXACT = {
    "gelu": lambda x: x * 0.5 * torch.special.erfc(-x / 2**0.5),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu2": lambda x: torch.relu(x) ** 2,
}


# the last bit of a subnormal f16; x / (1 + e^-x) is 0 where e^-x overflows
ABSOLUTE = {F16: 2.0**-24, BF16: 1e-36}


def exactly(kind, x):
    """The function of `kind`, rounded once."""
    return EXACT[kind](x.double()).to(x.dtype)


@every_kernel
@every_kind
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_exact_tier_has_the_bits_of_the_eager_sequence(dtype, kind, device):
    # Functions evaluated without error and rounded where eager torch rounds: a float32 result falls on the
    # other side of a tie once in a thousand times or less, and then is one unit off.
    x, _, bias, _ = gated_args((100, 1000), (dtype, dtype), True, device)
    ours = run(device, "gated_activation", x[:, 1000:].contiguous(), x, None, bias, None, kind, True, "exact")
    gate, up = (x + bias).chunk(2, -1)
    expected = exactly(kind, gate) * up
    assert (ours != expected).double().mean() <= 1e-3
    torch.testing.assert_close(ours, expected, rtol=2 * torch.finfo(dtype).eps, atol=ABSOLUTE[dtype])


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_exact_tier_has_the_bits_of_eager_torch(dtype, kind, device):
    # Where torch's own functions do not cancel: gelu below -2 loses bits in 1 + erf(x).
    x = (1.5 * torch.randn(500, 2000, dtype=F64)).clamp(min=-2).to(device, dtype)
    bias = (0.5 * torch.rand(2000, dtype=F64)).to(device, dtype)
    ours = ops.gated_activation(x, kind, bias=bias, tier="exact")
    eager = ops.gated_activation_reference(x, None, bias, None, kind)
    assert (ours != eager).double().mean() <= 1e-3
    assert torch.equal(ops.activation(x, kind, tier="fast"), ops.activation(x, kind, tier="exact"))


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_16_bit_number(dtype, kind, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits[bits.isfinite()].to(device)
    ours, expected = ops.activation(x, kind), exactly(kind, x)
    assert (ours != expected).double().mean() <= 2e-3
    torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps, atol=ABSOLUTE[dtype])


@every_kernel
def test_gelu_is_accurate_in_its_tail(device):
    x = torch.linspace(-12.5, 0, 20_001)
    y = run(device, "activation", x, x, None, "gelu", "fast").double()
    wide = x.double()
    expected = wide * 0.5 * torch.special.erfc(-wide / 2**0.5)
    assert ((y - expected).abs() <= 1.1e-6 * expected.abs()).all()


@every_kernel
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@every_kind
def test_nan_and_the_ends(kind, dtype, device):
    inf, nan = math.inf, math.nan
    x = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, 6e4, -6e4] * 3, dtype=dtype)  # packs and a tail
    y = run(device, "activation", x, x, None, kind, "fast").view(3, 8)
    for row in y:
        assert row[:2].isnan().all() and row[2] == inf and row[4:6].tolist() == [0, 0]
        assert row[7] == 0 and row[6] == (inf if kind == "relu2" and dtype == F16 else exactly(kind, x[6]))
        # minus infinity times zero, as in torch
        assert row[3] == 0 if kind == "relu2" else row[3].isnan()
        assert row[5].signbit() == (kind != "relu2")
    gated = run(device, "gated_activation", x[:12], x, None, None, None, kind, True, "fast")
    assert torch.equal(gated.isnan(), (y.flatten()[:12] * x[12:]).isnan())


@every_kernel
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_rows_may_be_strided(offset, dtype, device):
    # A slice of a fused buffer; its rows start on 16 bytes or not.
    memory = randn(3, 4, 80, dtype=dtype, device=device)
    x = memory[:, 1:3, offset : offset + 64]
    dense, like = x.contiguous(), torch.empty(3, 2, 64, dtype=dtype, device=x.device)
    bias = randn(64 + offset, dtype=dtype, device=device)[offset:]
    for kind in KINDS:
        got = run(device, "activation", like, x, bias, kind, "fast")
        assert torch.equal(got, run(device, "activation", like, dense, bias.clone(), kind, "fast"))
        halves = like[..., :32]
        got = run(device, "gated_activation", halves, x, None, bias, None, kind, True, "fast")
        split = [t.clone() for t in (*dense.chunk(2, -1), *bias.chunk(2))]
        assert torch.equal(got, run(device, "gated_activation", halves, *split, kind, True, "fast"))


@every_device
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_large_result_may_start_anywhere(dtype, offset, device):
    # Larger than 4 MiB it is stored past the caches, by instructions that need 16-byte alignment.
    x = randn(1200, 4098, dtype=dtype, device=device)
    out = torch.full((1200, 2050), math.nan, dtype=dtype, device=device)[:, offset : offset + 2049]
    assert ops.gated_activation(x, "silu", out=out) is out
    rows = [ops.gated_activation(x[i : i + 100], "silu") for i in range(0, 1200, 100)]
    assert torch.equal(out, torch.cat(rows))
    alone = torch.full((1200, 4098), math.nan, dtype=dtype, device=device)
    ops.activation(x, "gelu", out=alone)
    assert torch.equal(alone, torch.cat([ops.activation(x[i : i + 50], "gelu") for i in range(0, 1200, 50)]))


@every_device
def test_out_may_be_an_input(device):
    x, up = (randn(700, 3000, dtype=F32, device=device, seed=i) for i in (0, 1))
    expected, gated = ops.activation(x, "silu"), ops.gated_activation(x, "silu", up=up)
    assert torch.equal(ops.gated_activation(x, "silu", up=up, out=up), gated)
    assert ops.activation(x, "silu", out=x) is x and torch.equal(x, expected)


@every_device
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_modules_of_diffusers(dtype, device):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24).to(device, dtype)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == F32 else dict(rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        for approximate in ("none", "tanh"):
            module = GELU(24, 32, approximate=approximate).to(device, dtype)
            ours = ops.gelu(F.linear(x, module.proj.weight), approximate, bias=module.proj.bias)
            torch.testing.assert_close(ours, module(x), **tolerance)
        module = SwiGLU(24, 32).to(device, dtype)
        hidden = F.linear(x, module.proj.weight)
        ours = ops.gated_activation(hidden, "silu", bias=module.proj.bias, gate_first=False)
        torch.testing.assert_close(ours, module(x), **tolerance)
        torch.testing.assert_close(ops.swiglu(hidden), Flux2SwiGLU()(hidden), **tolerance)
        exact = ops.gated_activation(hidden, "silu", tier="exact")
        assert (exact != Flux2SwiGLU()(hidden)).double().mean() <= (0 if dtype == BF16 else 0.1)


@every_device
def test_thin_names(device):
    x, up = (randn(3, 8, dtype=F32, device=device, seed=i) for i in (0, 1))
    assert torch.equal(ops.gelu(x), ops.activation(x, "gelu"))
    assert torch.equal(ops.gelu(x, "tanh", up[0]), ops.activation(x, "gelu_tanh", bias=up[0]))
    assert torch.equal(ops.silu(x), ops.activation(x, "silu"))
    assert torch.equal(ops.squared_relu(x), ops.activation(x, "relu2"))
    assert torch.equal(ops.swiglu(x, up), ops.gated_activation(x, "silu", up=up))
    assert torch.equal(ops.geglu(x, gate_first=False), ops.gated_activation(x, "gelu", gate_first=False))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_gated_activation_fuzzed(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    shape = (*shape[:-1], data.draw(st.sampled_from([1, 7, 8, 16, 24, 257, 600])))
    types, kind = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from(KINDS))
    device, packed, first = (
        data.draw(st.sampled_from(KERNELS)),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    args = gated_args(shape, types, packed, device, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()) and len(shape) > 1:  # the leading axes in another order
        args = (args[0].transpose(0, -2).contiguous().transpose(0, -2), *args[1:])
    out = torch.empty(shape, dtype=types[0], device=args[0].device)
    result = run(device, "gated_activation", out, *args, kind, first, "fast")
    assert_close(result, ops.gated_activation_reference(*widen(*args), kind, first), types[0])
