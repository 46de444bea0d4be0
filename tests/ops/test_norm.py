"""Norm, modulation and gated residual: against their definition, eager torch, each other."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.cases import BF16, F16, F32, F64, KERNELS, every_device, every_kernel
from tests.ops.norm_cases import (
    DTYPES,
    LEADS,
    NORMS,
    RESULTS,
    TOLERANCE,
    Inputs,
    as_tuple,
    assert_close,
    every_op,
    reference,
    run,
)

# one token; no token; less than a pack; a ragged tail; several packs a thread; wider than a warp's; video
SHAPES = [(1, 8), (0, 16), (2, 3, 5), (3, 4, 77), (2, 5, 1536), (1, 3, 4104), (2, 2, 3, 40)]


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_op
def test_matches_definition(name, shape, dtypes, device):
    for norm, affine in itertools.product(NORMS, [False, True]):
        inputs = Inputs(shape, *dtypes, device)
        tokens, options = inputs.tokens(name), inputs.options(name, shape[:1], norm, affine)
        assert_close(run(name, device, tokens, **options), reference(name, tokens, **options), dtypes[0])


@every_kernel
@pytest.mark.parametrize("lead", LEADS, ids=str)
@every_op
def test_reads_tables_of_every_shape(name, lead, device):
    inputs = Inputs((2, 3, 4, 24), F64, F64, device)
    tokens, options = inputs.tokens(name), inputs.options(name, lead)
    expected = reference(name, tokens, **options)
    assert_close(run(name, device, tokens, **options), expected, F64)
    # chunks of one projection: rows with a stride
    names = [n for n in ("scale", "shift", "gate") if n in options]
    joint = torch.cat([options[n] for n in names], -1)
    chunks = dict(zip(names, joint.chunk(len(names), -1), strict=True))
    assert_close(run(name, device, tokens, **options | chunks), expected, F64)


@every_kernel
@pytest.mark.parametrize("index", ["per token", "per sample", "frames", "int32"])
@every_op
def test_an_index_selects_the_rows(name, index, device):
    inputs = Inputs((2, 3, 4, 24), F64, F64, device)
    lead, groups = {"per sample": (2,), "frames": (1, 3)}.get(index, (2, 3, 4)), 5
    rows = torch.randint(groups, lead, generator=inputs.generator).to(inputs.device)
    tokens, options = inputs.tokens(name), inputs.options(name, (groups,))
    expected = reference(name, tokens, index=rows, **options)
    given = rows.int() if index == "int32" else rows
    assert_close(run(name, device, tokens, index=given, **options), expected, F64)


@every_kernel
@every_op
def test_reads_and_writes_slices(name, device):
    inputs = Inputs((2, 9, 3 * 24), F32, F32, device)
    tokens = tuple(t[:, 2:7, 24:48] for t in inputs.tokens(name))
    inputs.shape = (2, 5, 24)
    options = inputs.options(name, (2,))
    expected = reference(name, tokens, **options)
    assert_close(run(name, device, tokens, **options), expected, F32)
    if device == "emulated":
        return
    room = torch.full((2, 9, 72), torch.nan, device=inputs.device)
    slots = tuple(room[:, 1:6, 24 * i : 24 * i + 24] for i in range(RESULTS[name]))
    with torch.no_grad():
        run(name, device, tokens, **options, out=slots if len(slots) > 1 else slots[0])
    assert_close(slots if len(slots) > 1 else slots[0], expected, F32)
    assert room.isnan().sum() == room.numel() - len(slots) * 2 * 5 * 24


@every_kernel
@pytest.mark.parametrize("dtype", [F16, BF16])
@every_op
def test_fast_rounds_once(name, dtype, device):
    inputs = Inputs((2, 50, 1024), dtype, F32, device)
    tokens, options = inputs.tokens(name), inputs.options(name, (2,))
    wide = run(name, device, tuple(t.float() for t in tokens), **options)
    narrow = run(name, device, tokens, **options)
    if name == "gated_residual_norm_modulate":  # the norm reads the residual as it is stored
        options = {k: options[k] for k in ("scale", "shift", "weight", "bias", "norm")}
        wide = (wide[0], run("norm_modulate", device, (narrow[0].float(),), **options))
    for result, expected in zip(as_tuple(narrow), as_tuple(wide), strict=True):
        assert torch.equal(result, expected.to(dtype))


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("tier", ["fast", "exact", "exact_before_weight"])
def test_fused_is_to_the_bit_one_after_the_other(dtypes, tier, device):
    inputs = Inputs((2, 7, 136), *dtypes, device)
    x, y = inputs.tokens("gated_residual")
    gate, scale, shift = (inputs.table((2,)) for _ in range(3))
    branch = dict(
        gate=gate, branch_norm="rms", branch_weight=inputs.table(()), gate_activation="tanh", tier=tier
    )
    modulation = dict(scale=scale, shift=shift, norm="layer", tier=tier)
    fused = run("gated_residual_norm_modulate", device, (x, y), **branch | modulation)
    r = run("gated_residual", device, (x, y), **branch)
    assert torch.equal(fused[0], r)
    assert torch.equal(fused[1], run("norm_modulate", device, (r,), **modulation))


def eager(kind, x, y, scale, shift, gate, weight):
    """As models write it, in the dtype of the tokens."""
    from diffusers.models.normalization import RMSNorm

    def rms(v):
        return F.rms_norm(v, v.shape[-1:], weight, 1e-6)

    def rms_before(v):
        module = RMSNorm(v.shape[-1], 1e-6).to(v.dtype)
        module.weight.data = weight
        return module(v)

    match kind:
        case "modulate":
            return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        case "rms":
            return rms(x) * (1 + scale[:, None])
        case "rms before weight":
            return rms_before(x) * (1 + scale[:, None])
        case "residual":
            return x + gate[:, None] * y
        case "sandwich":
            return x + gate[:, None].tanh() * rms_before(y)


@every_kernel
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", ["modulate", "rms", "rms before weight", "residual", "sandwich"])
def test_exact_has_the_bits_of_eager_torch(kind, dtype, device):
    inputs = Inputs((2, 200, 512), dtype, dtype, device)
    (x, y), weight = inputs.tokens("gated_residual"), inputs.table(())
    scale, shift, gate = (inputs.table((2,)) for _ in range(3))
    expected = eager(kind, x, y, scale, shift, gate, weight)
    tier = "exact_before_weight" if kind in ("rms before weight", "sandwich") else "exact"
    if kind in ("residual", "sandwich"):
        options = dict(gate=gate)
        if kind == "sandwich":
            options |= dict(gate_activation="tanh", branch_norm="rms", branch_weight=weight)
        ours = run("gated_residual", device, (x, y), tier=tier, **options)
    else:
        options = (
            dict(scale=scale, shift=shift)
            if kind == "modulate"
            else dict(scale=scale, weight=weight, norm="rms")
        )
        ours = run("norm_modulate", device, (x,), tier=tier, **options)
    # The last float32 bit of a mean is free: where it stands before a rounding, one in thousands may differ.
    share = (ours != expected).double().mean().item()
    assert share <= (0 if kind == "residual" else 1e-3), share
    fast = run("gated_residual", device, (x, y), **options) if kind in ("residual", "sandwich") else None
    if fast is not None and kind == "sandwich":
        assert (fast != expected).double().mean() > 0.01  # the tiers are two


@every_kernel
@every_op
def test_nan_and_infinity_stay_in_their_row(name, device):
    inputs = Inputs((1, 4, 40), F32, F32, device)
    tokens, options = inputs.tokens(name), inputs.options(name, (), "layer", False)
    tokens[0][0, 1, 3], tokens[0][0, 2, 7] = torch.nan, torch.inf
    for result in as_tuple(run(name, device, tokens, **options)):
        assert result[0, [0, 3]].isfinite().all() and not result[0, 1].isfinite().all()
        assert not result[0, 2].isfinite().all()
    last = as_tuple(run(name, device, tokens, **options))[-1]
    if name != "gated_residual":
        assert last[0, [1, 2]].isnan().all()


@every_kernel
def test_a_constant_row_normalises_to_zero(device):
    x = torch.full((2, 3, 100), 1e4)
    assert run("norm_modulate", device, (x,)).abs().max() == 0
    zero = torch.zeros(1, 8, 16)
    for norm in NORMS:
        assert run("norm_modulate", device, (zero,), norm=norm).abs().max() == 0


@every_kernel
def test_large_means_do_not_cancel(device):
    x = torch.randn(4, 3072, dtype=F64) + 1000
    expected = F.layer_norm(x.float().double(), (3072,), eps=1e-6)
    ours = run("norm_modulate", device, (x.float(),))
    assert (ours.double() - expected).abs().max() < 5e-3  # without SIMD a sum of 3072 thousands is off by 4


def test_emulated_cuda_makes_nan_of_an_index_out_of_range():
    x, scale = torch.randn(3, 16), torch.randn(2, 16)
    index = torch.tensor([0, 2, -1])
    for name, tokens, table in (("norm_modulate", (x,), "scale"), ("gated_residual", (x, x), "gate")):
        result = run(name, "emulated", tokens, index=index, **{table: scale})
        assert result[0].isfinite().all() and result[1:].isnan().all()


@every_op
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_matches_definition_fuzzed(name, data):
    lead = tuple(data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    width = data.draw(st.sampled_from([1, 2, 7, 8, 31, 64, 255, 256, 300, 2056]))
    depth = data.draw(st.integers(0, len(lead)))
    table = tuple(data.draw(st.sampled_from([1, n])) for n in lead[:depth])
    dtypes, device = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(KERNELS))
    norm, tier = data.draw(st.sampled_from(NORMS)), data.draw(st.sampled_from(["fast", "exact"]))
    inputs = Inputs((*lead, width), *dtypes, device, seed=data.draw(st.integers(0, 99)))
    tokens, options = inputs.tokens(name), inputs.options(name, table, norm, data.draw(st.booleans()), tier)
    step = data.draw(st.integers(1, 3))
    if lead and step > 1:  # rows with gaps
        tokens = tuple(torch.cat([t] * step, -1)[..., :width] for t in tokens)
    tolerance = TOLERANCE[dtypes[0]] * (1 if tier == "fast" else 4) * (1 if width > 8 else 20)
    assert_close(
        run(name, device, tokens, **options), reference(name, tokens, **options), dtypes[0], tolerance
    )


def _refusals():
    x, row = torch.randn(2, 5, 16), torch.randn(16)
    f64 = row.double()
    yield (
        "norm_modulate",
        (x,),
        dict(scale=f64),
        "parameters of the dtype of x, or f32 beside f16 or bf16, got f64",
    )
    yield (
        "norm_modulate",
        (x,),
        dict(scale=row, shift=row.bfloat16()),
        "shift must be f32 with a last axis of 16",
    )
    yield (
        "norm_modulate",
        (x.bfloat16(),),
        dict(scale=row, weight=row.bfloat16()),
        "weight must be f32\\[16\\]",
    )
    yield (
        "norm_modulate",
        (x,),
        dict(scale=torch.randn(3, 16)),
        "scale must lie on the device of x, its axes before",
    )
    yield "norm_modulate", (x,), dict(scale=torch.randn(2, 8)), "scale must be f32 with a last axis of 16"
    yield (
        "norm_modulate",
        (x,),
        dict(weight=torch.randn(8)),
        "weight must be f32\\[16\\] on the device of x, got f32\\[8\\]",
    )
    yield "norm_modulate", (x,), dict(weight=torch.randn(32)[::2]), "weight must be f32\\[16\\]"
    yield (
        "norm_modulate",
        (x.transpose(1, 2),),
        {},
        "x must have no gaps along its last axis, got f32\\[2, 16, 5\\]",
    )
    yield "norm_modulate", (x.to(torch.complex64),), {}, "expected float64"
    yield "norm_modulate", (x.int(),), {}, "expected a floating dtype, got i32"
    yield "norm_modulate", (x,), dict(norm="batch"), "norm must be 'layer', 'rms' or 'none', got 'batch'"
    yield (
        "norm_modulate",
        (x,),
        dict(tier="best"),
        "tier must be 'fast', 'exact' or 'exact_before_weight', got 'best'",
    )
    yield "norm_modulate", (x,), dict(eps=-1.0), "eps must be finite and not negative, got -1"
    yield "norm_modulate", (x,), dict(eps=float("nan")), "eps must be finite"


def _refusals_of_index():
    x, row = torch.randn(2, 5, 16), torch.randn(16)
    index = torch.zeros(2, 5, dtype=torch.int64)
    yield "norm_modulate", (x,), dict(index=index), "index needs a scale, a shift or a gate"
    yield "norm_modulate", (x,), dict(index=index.float(), scale=x[0]), "index must be i64 or i32"
    yield "norm_modulate", (x,), dict(index=index, scale=row), "scale must be \\[groups, 16\\]"
    yield (
        "norm_modulate",
        (x,),
        dict(index=index[:, :3], scale=x[0]),
        "index must lie on the device of x, its axes the",
    )
    yield "norm_modulate", (x,), dict(index=index + 5, scale=x[0]), "index must be in 0..4, got 5 for token 0"
    yield "norm_modulate", (x,), dict(index=index - 1, scale=x[0]), "index must be in 0..4, got -1"
    yield "norm_modulate", (x,), dict(index=index, scale=x[0], shift=x[0, :3]), "tables of as many rows"


def _refusals_of_two():
    x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    yield "gated_residual", (x, y[:, :4]), {}, "y must be like x f32\\[2, 5, 16\\] cpu, got f32\\[2, 4, 16\\]"
    yield "gated_residual", (x, y.bfloat16()), {}, "y must be like x"
    yield "gated_residual", (x, y), dict(gate_activation="relu"), "gate_activation must be 'none' or 'tanh'"
    yield "gated_residual", (x, y), dict(branch_norm="batch"), "branch_norm must be"
    yield "norm_modulate", (x,), dict(out=torch.zeros(2, 5, 8)), "out must be like x"
    yield "norm_modulate", (torch.tensor(1.0),), {}, "expected x \\[\\*lead, width\\]"
    both = torch.zeros(2, 5, 16)
    yield "gated_residual_norm_modulate", (x, y), dict(out=(both, both)), "results that share no memory"
    joint = torch.zeros(2 * 5 * 16 + 8)
    shifted = joint[8:].view(2, 5, 16)
    yield (
        "norm_modulate",
        (joint[:-8].view(2, 5, 16),),
        dict(out=shifted),
        "out must be one of the inputs or share no",
    )


@pytest.mark.parametrize(
    "name, tokens, options, message", [*_refusals(), *_refusals_of_index(), *_refusals_of_two()]
)
def test_refuses_what_does_not_fit(name, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        run(name, "cpu", tokens, **options)


@every_device
@every_op
def test_writes_in_place(name, device):
    inputs = Inputs((2, 33, 512), BF16, BF16, device)
    tokens, options = inputs.tokens(name), inputs.options(name, (2,))
    expected = as_tuple(run(name, device, tokens, **options))
    other = torch.empty_like(tokens[0])
    out = tokens[0] if len(expected) == 1 else (tokens[0], other)
    run(name, device, tokens, **options, out=out)
    for result, wanted in zip(as_tuple(out), expected, strict=True):
        assert torch.equal(result, wanted)


@every_device
@every_op
def test_large_results_are_written_past_the_cache(name, device):
    inputs = Inputs((1, 700, 2056), F32, F32, device)  # 5.7 MB
    tokens, options = inputs.tokens(name), inputs.options(name)
    assert_close(run(name, device, tokens, **options), reference(name, tokens, **options), F32, 5e-5)


@every_kernel
def test_offsets_pass_2_31_elements(device):
    rows, gap = 3, 2**30 + 8  # the third row begins beyond 2^31 elements
    memory = torch.empty(2 * gap + 64, dtype=torch.bfloat16)  # touched in three places alone
    x = memory.as_strided((rows, 64), (gap, 1))
    x.copy_(torch.randn(rows, 64))
    expected = run("norm_modulate", device, (x.contiguous(),))
    assert torch.equal(run("norm_modulate", device, (x,)), expected)
