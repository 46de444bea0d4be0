"""Quantising forms: codes and scales against their definition, and what they promise of every row."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, F16, F32, F64, KERNELS, every_device, every_kernel

FORMATS = ["int8", "fp8"]
LIMIT = {"int8": 127, "fp8": 448}
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def quantize(device, x, format="int8", tensor_scale=None, rotation=0):
    """`ops.quantize`; "emulated": its CUDA kernel on the CPU."""
    if device != "emulated":
        return ops.quantize(x.to(device), format, tensor_scale=tensor_scale, rotation=rotation)
    op = ops.OPS["norm_modulate_quantize"]
    args = (x, None, None, None, None, None, "none", 1e-6, "fast")
    codes, scales = op.empty(*args, format, tensor_scale, rotation)
    codes.view(torch.uint8).fill_(0x55)
    load_emulator().norm_modulate_quantize(
        codes.view(torch.int8 if format == "int8" else torch.uint8), scales, *args, tensor_scale, rotation
    )
    return codes, scales if tensor_scale is None else tensor_scale


def assert_codes(ours, expected, share=1e-3):
    """Scales to the last bit or two; codes but for the ties that it moves, by one step there."""
    codes, scales = ours
    assert codes.dtype == expected[0].dtype
    torch.testing.assert_close(scales, expected[1], rtol=1e-5, atol=0, equal_nan=True)
    if not codes.numel():
        return
    mine, wanted = codes.double(), expected[0].double()
    assert torch.equal(mine.isnan(), wanted.isnan())
    mine, wanted = mine.nan_to_num(), wanted.nan_to_num()
    assert (mine != wanted).double().mean() <= share
    step = 1 if codes.dtype == torch.int8 else wanted.abs() / 7 + 2**-9
    assert ((mine - wanted).abs() <= step).all()


@every_kernel
@pytest.mark.parametrize("rotation", [0, 16, 64, 256])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("format", FORMATS)
def test_matches_definition(format, dtype, rotation, device):
    for shape in [(1, 256), (2, 3, 512), (5, 1280), (0, 256)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[..., 7] *= 20
        assert_codes(
            quantize(device, x, format, rotation=rotation),
            ops.quantize_reference(x.double(), format, None, rotation),
        )


@every_kernel
@pytest.mark.parametrize("format", FORMATS)
def test_ragged_and_strided_rows(format, device):
    for width in (1, 5, 16, 77, 1537):
        x = torch.randn(3, 2 * width + 3)[:, 2 : 2 + width]
        assert_codes(quantize(device, x, format), ops.quantize_reference(x.double(), format), 0.02)
    x = torch.randn(4, 49)[:, 1:]  # misaligned, rotated
    assert_codes(
        quantize(device, x, format, rotation=16), ops.quantize_reference(x.double(), format, None, 16), 0.01
    )


@every_kernel
@pytest.mark.parametrize("format", FORMATS)
def test_a_code_is_the_nearest(format, device):
    x = torch.randn(50, 512) * torch.logspace(-20, 20, 50)[:, None]
    codes, scales = quantize(device, x, format)
    values = codes.double() * scales.double()[:, None]
    error = (values - x).abs() / scales.double()[:, None]
    half = 0.5 if format == "int8" else (values / scales.double()[:, None]).abs() / 16 + 2**-10
    assert (error <= half * 1.0001 + 1e-5).all()
    assert codes.double().abs().amax(-1).eq(LIMIT[format]).all()


@every_kernel
def test_fp8_codes_are_torchs(device):
    finite = ALL_CODES.float()[~ALL_CODES.float().isnan()]
    x = (
        torch.cat(
            [finite, (finite + finite.roll(1)) / 2, finite * 1.03, torch.randn(1000), torch.tensor([448.0])]
        )
        + 0.0
    )
    codes, _ = quantize(device, x[None], "fp8", torch.ones(()))
    assert torch.equal(
        codes.view(torch.uint8)[0], x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    )


@every_kernel
def test_a_tensor_scale_saturates_and_keeps_nan(device):
    x = torch.tensor([[1e9, -1e9, torch.nan, torch.inf, -torch.inf, 2.0, 0.0, -0.0]])
    codes, scale = quantize(device, x, "fp8", torch.tensor(0.5))
    values = codes.float() * scale
    assert values[0, :2].tolist() == [224.0, -224.0] and values[0, 2:5].isnan().all()
    assert values[0, 5:].tolist() == [2.0, 0.0, 0.0]


@every_kernel
@pytest.mark.parametrize("format", FORMATS)
def test_zero_tiny_nan_and_infinite_rows(format, device):
    x = torch.randn(6, 64)
    x[1], x[2], x[3, 5], x[4, 6] = 0, 1e-42, torch.nan, -torch.inf
    codes, scales = quantize(device, x, format)
    values = codes.float() * scales[:, None]
    assert (
        values[[0, 1, 2, 5]].isfinite().all() and values[1].abs().max() == 0 and values[2].abs().max() < 1e-30
    )
    assert scales[[3, 4]].isnan().all() and codes[[3, 4]].float().abs().max() == 0
    assert scales[[0, 1, 2, 5]].isfinite().all() and (scales[[0, 1, 2, 5]] > 0).all()


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_the_rotation_is_its_own_inverse(group):
    h = ops.rotation_matrix(group)
    assert torch.equal(h @ h, torch.eye(group, dtype=F64)) and torch.equal(h, h.T)
    assert torch.equal(h.sum(0), torch.ones(group, dtype=F64))


@every_kernel
@pytest.mark.parametrize("format", FORMATS)
def test_rotated_codes_serve_rotated_weights(format, device):
    x, w = torch.randn(40, 512, dtype=F64), torch.randn(32, 512, dtype=F64)
    x[:, [3, 100, 300]] *= 50
    errors = []
    for rotation in (0, 256):
        codes, scales = quantize(device, x, format, rotation=rotation)
        values = codes.double() * scales.double()[:, None]
        if rotation:
            values = (values.unflatten(-1, (-1, rotation)) @ ops.rotation_matrix(rotation)).flatten(-2)
        errors.append(((values @ w.T - x @ w.T).norm() / (x @ w.T).norm()).item())
    assert errors[1] < (0.4 if format == "int8" else 2) * errors[0] and errors[1] < 0.05


def region(seed, dtype, parameters=F32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=F64)
    x, y = draw(2, 9, 320).to(dtype), draw(2, 9, 320).to(dtype)
    gate, scale, shift = (draw(2, 320).to(parameters) for _ in range(3))
    return x, y, gate, scale, shift


@every_kernel
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tier", ["fast", "exact"])
def test_norm_and_residual_quantise_what_they_compute(tier, format, dtype, device):
    x, y, gate, scale, shift = region(2, dtype, dtype)
    plain = ops.gated_residual_norm_modulate(x, y, gate, scale, shift, tier=tier)
    if tier == "fast":  # before the rounding to the dtype of the tokens
        wide = ops.norm_modulate(plain[0].double(), scale.double(), shift.double())
    else:
        wide = plain[1].double()
    expected = ops.quantize_reference(wide, format, None, 64)
    args = (x, y, gate, scale, shift, None, "none", "none", None, None, None, "layer", 1e-6, tier)
    if device == "emulated":
        op = ops.OPS["gated_residual_norm_modulate_quantize"]
        r, codes, scales = op.empty(*args, format, None, 64)
        raw = codes.view(torch.int8 if format == "int8" else torch.uint8)
        load_emulator().gated_residual_norm_modulate_quantize(r, raw, scales, *args, None, 64)
    else:
        r, codes, scales = ops.gated_residual_norm_modulate_quantize(
            x, y, gate, scale, shift, tier=tier, format=format, rotation=64
        )
    share = (r != plain[0]).double().mean()
    assert share == 0
    assert_codes((codes, scales), expected, 2e-3)
    if device != "emulated":
        again = ops.norm_modulate_quantize(r, scale, shift, tier=tier, format=format, rotation=64)
        assert torch.equal(again[0].view(torch.int8), codes.view(torch.int8)) and torch.equal(
            again[1], scales
        )


@every_device
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scaled", [False, True])
def test_obeys_torch(format, scaled, device):
    if scaled and format == "int8":
        return
    x, y, gate, scale, shift = (t.to(device) for t in region(3, F32))
    tail = (format, torch.tensor(0.1, device=device) if scaled else None, 16)
    for name, args in (
        ("norm_modulate_quantize", (x, scale, shift, None, None, None, "layer", 1e-6, "fast")),
        (
            "gated_residual_norm_modulate_quantize",
            (x, y, gate, scale, shift, None, "none", "none", *[None] * 3, "layer", 1e-6, "fast"),
        ),
    ):
        checks = (
            ("test_schema", "test_faketensor")
            if format == "fp8"
            else ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )
        torch.library.opcheck(ops.OPS[name].functional, (*args, *tail), test_utils=checks)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: ops.quantize(v, format), fullgraph=True, backend="aot_eager")
    for mine, wanted in zip(compiled(x), ops.quantize(x, format), strict=True):
        assert torch.equal(mine.float(), wanted.float())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_matches_definition_fuzzed(data):
    rows, rotation = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0, 16, 64, 256]))
    width = data.draw(st.integers(1, 5)) * rotation or data.draw(st.integers(1, 600))
    format, dtype = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from([F64, F32, F16, BF16]))
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(
        dtype
    )
    ours = quantize(data.draw(st.sampled_from(KERNELS)), x, format, rotation=rotation)
    assert_codes(ours, ops.quantize_reference(x.double(), format, None, rotation), 0.02 + 2 / x.numel())


def test_refuses_what_does_not_fit():
    x = torch.randn(2, 48)
    for options, message in (
        (dict(format="int4"), "format must be 'int8' or 'fp8', got 'int4'"),
        (
            dict(rotation=64),
            "rotation must be 0, 16, 64 or 256 and divide the width, got 64 for x f32\\[2, 48\\]",
        ),
        (dict(rotation=4), "rotation must be 0, 16, 64 or 256"),
        (
            dict(format="int8", tensor_scale=torch.ones(())),
            "tensor_scale must be one f32 number on the device of x, with e4m3",
        ),
        (dict(format="fp8", tensor_scale=torch.ones(2)), "tensor_scale must be one f32 number"),
        (dict(format="fp8", tensor_scale=torch.ones((), dtype=F64)), "tensor_scale must be one f32 number"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quantize(x, **options)
    with pytest.raises(ValueError, match="rotation_matrix: group must be a power of 4, got 32"):
        ops.rotation_matrix(32)


# --- activations ---


def activation_codes(device, name, args):
    """A quantising activation by its schema's arguments."""
    op = ops.OPS[name]
    if device != "emulated":
        return op(*args)
    codes, scales = op.empty(*args)
    *region, format, tensor_scale, rotation = args
    raw = codes.view(torch.int8 if format == "int8" else torch.uint8)
    getattr(load_emulator(), name)(raw, scales, *region, tensor_scale, rotation)
    return codes, scales


@every_kernel
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "relu2"])
@pytest.mark.parametrize("format", FORMATS)
def test_activations_quantise_what_they_compute(format, kind, dtype, device):
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=F64)
    for width, rotation in ((320, 64), (77, 0)):
        x, up = draw(2, 5, 2 * width + 8).to(dtype)[..., : 2 * width], draw(2, 5, width).to(dtype)
        both, one, other = draw(2 * width).to(dtype), draw(width).to(dtype), draw(width).to(dtype)
        for name, region in (
            ("activation_quantize", (x[..., :width], one, kind)),
            ("gated_activation_quantize", (x, None, both, None, kind, True)),
            ("gated_activation_quantize", (x, None, both, None, kind, False)),
            ("gated_activation_quantize", (x[..., :width], up, one, other, kind, True)),
        ):
            for tier in ("fast", "exact"):
                ours = activation_codes(device, name, (*region, tier, format, None, rotation))
                plain = getattr(ops, name.removesuffix("_quantize") + "_reference")
                if tier == "exact":
                    wide = plain(*region).double()
                else:
                    wide = plain(*(t.double() if isinstance(t, torch.Tensor) else t for t in region))
                assert_codes(ours, ops.quantize_reference(wide, format, None, rotation), 0.01)


@every_kernel
def test_the_two_back_ends_of_activations_take_a_tensor_scale(device):
    x, scale = torch.randn(3, 64), torch.tensor(0.01)
    codes, _ = activation_codes(device, "activation_quantize", (x, None, "silu", "fast", "fp8", scale, 0))
    expected, _ = ops.quantize_reference(torch.nn.functional.silu(x.double()), "fp8", scale)
    assert_codes((codes, scale), (expected, scale))


def test_activations_refuse_what_does_not_fit():
    x = torch.randn(2, 48)
    with pytest.raises(ValueError, match="kind must be gelu, gelu_tanh, silu or relu2, got relu"):
        ops.activation_quantize(x, "relu")
    with pytest.raises(ValueError, match="rotation must be 0, 16, 64 or 256 and divide the width, got 16"):
        ops.gated_activation_quantize(x, "silu", rotation=16)
    with pytest.raises(ValueError, match="must hold two halves"):
        ops.gated_activation_quantize(torch.randn(2, 3), "silu")
    with pytest.raises(ValueError, match="bias must be a tuple"):
        ops.gated_activation_quantize(x, "silu", up=x, bias=torch.zeros(48))
    codes, scales = ops.gated_activation_quantize(x, "silu", up=x, bias=(None, torch.zeros(48)))
    assert codes.shape == x.shape and scales.shape == (2,)


@every_device
@pytest.mark.parametrize("format", FORMATS)
def test_activations_obey_torch(format, device):
    x = torch.randn(3, 32, device=device)
    checks = ("test_schema", "test_faketensor")
    args = (x, None, "silu", "fast", format, None, 16)
    torch.library.opcheck(ops.OPS["activation_quantize"].functional, args, test_utils=checks)
    args = (x, None, None, None, "silu", True, "fast", format, None, 16)
    torch.library.opcheck(ops.OPS["gated_activation_quantize"].functional, args, test_utils=checks)
