"""Linear layers: every format against float64, and what each promises."""

from dataclasses import replace

import pytest
import torch

from rfkernels import _C, ops
from rfkernels.ops._linear import ACTIVATIONS, linear_reference, run_linear
from tests.ops.cases import every_device
from tests.ops.linear_cases import (
    BF16,
    E4M3,
    F16,
    F32,
    F64,
    FORMATS,
    TOLERANCE,
    error,
    random_call,
    tokens_and_weight,
)

INSTRUCTIONS = ["generic", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"]
every_format = pytest.mark.parametrize(
    "format", FORMATS, ids=lambda f: f"{f[0]}-{f[1]}".replace("torch.", "")
)


@pytest.fixture
def instructions(request):
    there = _C.limit_instructions(request.param)
    yield request.param
    _C.limit_instructions(INSTRUCTIONS[-1])
    assert there or request.param != "generic"


every_instruction_set = pytest.mark.parametrize("instructions", INSTRUCTIONS, indirect=True)


def assert_matches(call):
    exact, result = call.exact(), call.run()
    assert result.dtype == call.dtype
    scale = exact.abs().amax().clamp_min(1)
    # a few outputs may all be near a zero of the activation: the scale of the call counts too
    difference = (result.double() - exact).norm()
    tolerance = 0.012 if call.up is not None and call.up.dtype == BF16 else TOLERANCE[call.dtype]
    assert difference <= tolerance * max(exact.norm(), scale * exact.numel() ** 0.5 / 8)


@every_device
@every_format
def test_linear_matches_float64(format, device):
    for seed in range(60):
        assert_matches(random_call(seed, *format, device))


@every_instruction_set
@every_format
def test_linear_matches_float64_with_every_instruction_set(format, instructions):
    for seed in range(100, 120):
        assert_matches(random_call(seed, *format))


@every_device
@pytest.mark.parametrize("k", [1, 3, 4, 5, 64, 77, 1536, 4608, 8192])
@pytest.mark.parametrize("m", [1, 7, 12, 128, 129])
def test_int8_sums_are_exact(m, k, device):
    # extreme codes, whose pairs of products overflow 16 bits; out float32 holds sums below 2^24
    generator = torch.Generator().manual_seed(m * k)
    x = torch.randint(0, 2, (m, k), generator=generator, dtype=torch.int8, device="cpu") * -1 - 127
    w = torch.where(torch.rand(70, k, generator=generator) < 0.5, 127, -128).to(torch.int8)
    small = torch.randint(-9, 10, (35, k), generator=generator, dtype=torch.int8)
    w[:35] = small
    one = torch.ones(1)
    result = ops.linear_int8(
        x.to(device), w.to(device), one.to(device), x_scale=one.expand(m).contiguous().to(device), dtype=F32
    )
    exact = x.long() @ w.long().T
    assert torch.equal(result.cpu(), exact.float())


@every_instruction_set
def test_int8_sums_are_the_same_bits_with_every_instruction_set(instructions):
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-128, 128, (29, 515), generator=generator, dtype=torch.int8)
    w = torch.randint(-128, 128, (67, 515), generator=generator, dtype=torch.int8)
    result = ops.linear_int8(x, w, torch.ones(1), x_scale=torch.ones(29), dtype=F32)
    assert torch.equal(result, (x.long() @ w.long().T).float())


@every_device
@pytest.mark.parametrize("format", [(BF16, BF16), (BF16, torch.int8), (torch.int8, torch.int8)], ids=str)
@pytest.mark.parametrize("m", [1, 7, 128, 129])
def test_a_16_bit_result_is_the_float32_one_rounded(m, format, device):
    call = tokens_and_weight(m, 130, 200, *format, torch.Generator().manual_seed(m)).to(device)
    wide = replace(call, dtype=F32).run()
    for dtype in (BF16, F16):
        assert torch.equal(replace(call, dtype=dtype).run(), wide.to(dtype))


@pytest.mark.parametrize(
    "shape", [(1, 1536, 1536), (7, 300, 1000), (128, 1536, 384), (129, 257, 515), (4608, 64, 96)]
)
def test_accuracy_of_bfloat16_results(shape):
    # the contract: relative L2 of 2e-3 against float64 of the dequantised operands, outliers among the tokens
    m, n, k = shape
    k -= k % 32
    generator = torch.Generator().manual_seed(k)
    for tokens, weight in [
        (torch.int8, torch.int8),
        (BF16, torch.uint8),
        (BF16, E4M3),
        (torch.int8, torch.uint8),
    ]:
        call = replace(tokens_and_weight(m, n, k, tokens, weight, generator), dtype=BF16)
        if tokens == BF16:
            call.x[:, :8] *= 20
        assert error(call.run(), call.exact()) <= 2e-3
        branch = replace(
            call,
            hidden=torch.randn(m, 24, generator=generator),
            up=torch.randn(n, 24, generator=generator).to(BF16),
        )
        assert error(branch.run(), branch.exact()) <= 2.5e-3


@every_device
def test_few_tokens_of_four_bits_equal_many(device):
    generator = torch.Generator().manual_seed(3)
    for groups in (1, 2, 4, 8, 16):  # of 256 inputs
        call = replace(tokens_and_weight(16, 70, 256, BF16, torch.uint8, generator), dtype=F32)
        scale = torch.rand(70, groups, generator=generator)
        for zero in (None, torch.randint(0, 16, scale.shape, dtype=torch.uint8), torch.randn_like(scale)):
            many = replace(call, weight_scale=scale, weight_zero=zero).to(device)
            together = many.run()
            for m in range(1, 9):
                few = replace(many, x=many.x[:m]).run()
                torch.testing.assert_close(few, together[:m], rtol=1e-5, atol=1e-4)


def test_rotation_of_both_sides_changes_nothing_but_the_error():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 512, generator=generator)
    x[:, torch.randperm(512, generator=generator)[:4]] *= 20  # outlier channels
    weight = torch.randn(96, 512, generator=generator)
    exact = x.double() @ weight.double().T
    errors = {}
    for rotation in (0, 16, 64, 256):
        turned = weight
        if rotation:
            matrix = ops.rotation_matrix(rotation, dtype=F32)
            turned = (weight.unflatten(-1, (-1, rotation)) @ matrix).flatten(-2)
        codes, scale = ops.quantize(turned)
        errors[rotation] = error(ops.linear_int8(x, codes, scale, rotation=rotation), exact)
    assert errors[0] > 0.03 and errors[256] < 0.015 and errors[256] < errors[64] < errors[16] < errors[0]


@every_device
def test_low_rank_branch_is_the_unfused_one(device):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 20, 96, generator=generator).to(device)
    weight, bias = torch.randn(50, 96, generator=generator).to(device), torch.randn(50).to(device)
    for rank in (1, 3, 16, 64, 512):
        down, up = torch.randn(rank, 96).to(device), torch.randn(50, rank).to(device)
        scale = torch.randn(rank, device=device)
        hidden = ops.lora_shrink(x, down, scale)
        result = ops.linear(x, weight, bias, lora=(hidden, up))
        exact = (
            x.double() @ (weight.double() + up.double() * scale.double() @ down.double()).T + bias.double()
        )
        assert hidden.shape == (3, 20, rank) and error(result, exact) < 2e-6


@every_device
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_sample_has_its_own_adapters(dtype, device):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 5, 64, generator=generator).to(device, dtype)
    codes = torch.randint(-127, 128, (40, 64), generator=generator, dtype=torch.int8).to(device)
    scale = torch.rand(40, device=device) / 50
    down, up = torch.randn(12, 64).to(device, dtype), torch.randn(40, 12).to(device, dtype)
    strengths = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]]).repeat_interleave(6, 1)[:, None].to(device)
    together = ops.linear_int8(x, codes, scale, lora=(ops.lora_shrink(x, down, strengths), up))
    for sample in range(3):
        hidden = ops.lora_shrink(x[sample], down, strengths[sample, 0])
        alone = ops.linear_int8(x[sample], codes, scale, lora=(hidden, up))
        assert torch.equal(together[sample], alone)
    assert torch.equal(together[2], ops.linear_int8(x[2], codes, scale))  # switched off: to the bit


@every_device
def test_gates_of_every_shape(device):
    x, weight = torch.randn(2, 3, 4, 8, device=device), torch.randn(6, 8, device=device)
    plain, residual = ops.linear(x, weight), torch.randn(2, 3, 4, 6, device=device)
    for shape in [(6,), (1, 6), (2, 1, 1, 6), (2, 3, 1, 6), (2, 3, 4, 6), (1, 3, 1, 6), (1, 1, 4, 6)]:
        gate = torch.randn(shape, device=device)
        result = ops.linear(x, weight, gate=gate, residual=residual)
        torch.testing.assert_close(result, residual + gate * plain)
    with pytest.raises(ValueError, match="gate must be"):
        ops.linear(x, weight, gate=torch.randn(3, 1, 1, 6))


@every_device
def test_strided_tokens_residuals_and_results(device):
    wide = torch.randn(10, 80, device=device)
    weight, residual = torch.randn(24, 40, device=device), torch.randn(10, 60, device=device)[:, 7:31]
    memory = torch.full((10, 60), torch.nan, device=device)
    for x in (wide[:, :40], wide[:, 3:43], wide[:, ::2], wide[::2, 40:].repeat(2, 1)):
        expected = ops.linear(x.contiguous(), weight, residual=residual.contiguous())
        assert torch.equal(ops.linear(x, weight, residual=residual), expected)
        if x.stride(1) == 1:
            args = (x, None, weight, *[None] * 6, residual, None, "as they are", 0, "none", F32)
            run_linear(*args, out=memory[:, 5:29])
            assert torch.equal(memory[:, 5:29], expected)
    assert memory[:, :5].isnan().all() and memory[:, 29:].isnan().all()


@every_device
def test_codes_as_results(device):
    x, weight = torch.randn(9, 64, device=device), torch.randn(33, 64, device=device)
    scale = torch.tensor(0.11, device=device)
    codes = ops.linear(x, weight, activation="silu", out_scale=scale)
    exact = torch.nn.functional.silu(x.double() @ weight.double().T) / 0.11
    assert codes.dtype == torch.int8 and codes.min() >= -127 and codes.max() == 127
    assert (codes - exact.clamp(-127, 127)).abs().max() <= 0.5001


@every_device
def test_a_row_that_is_not_finite_stays_alone(device):
    x = torch.randn(40, 64, device=device).to(BF16)
    x[3, 5], x[17, 60] = torch.nan, torch.inf
    weight = torch.randn(70, 64, device=device)
    codes, scale = ops.quantize(weight)
    for result in (ops.linear(x, weight.to(BF16)), ops.linear_int8(x, codes, scale)):
        bad = ~result.isfinite().all(-1)
        assert bad.nonzero().flatten().tolist() == [3, 17] and (~result[bad].isfinite()).all()
    zero = torch.zeros(5, 64, device=device)
    assert torch.equal(ops.linear_int8(zero, codes, scale), torch.zeros(5, 70, device=device))


@every_device
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)], ids=str)
def test_empty_tensors(shape, device):
    m, n, k = shape
    bias = torch.randn(n, device=device)
    result = ops.linear(torch.randn(m, k, device=device), torch.randn(n, k, device=device), bias)
    assert torch.equal(result, bias.expand(m, n))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    torch.manual_seed(0)
    shapes = [(2, 3, 16), (9, 16), (9,), (9,), (2, 3, 4), (9, 4), (2, 1, 9), (2, 3, 9)]
    inputs = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]

    def f(x, weight, bias, scale, hidden, up, gate, residual):
        return ops.linear(
            x,
            weight,
            bias,
            weight_scale=scale,
            lora=(hidden, up),
            gate=gate,
            residual=residual,
            activation=activation,
        )

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_gradients_pass_straight_through_quantised_tokens(format):
    torch.manual_seed(1)
    weight = (
        torch.randint(-127, 128, (20, 64), dtype=torch.int8)
        if format == "int8"
        else torch.randn(20, 64).to(E4M3)
    )
    x, bias = torch.randn(6, 64, requires_grad=True), torch.randn(20, requires_grad=True)
    args = (x, None, weight, torch.rand(20), None, bias, *[None] * 5, format, 16, "gelu", F32)
    grad = torch.randn(6, 20)
    ours = torch.autograd.grad(run_linear(*args), (x, bias), grad)
    theirs = torch.autograd.grad(linear_reference(*args), (x, bias), grad)
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b.double()) < 1e-4
    assert ours[0].abs().sum() > 0


@every_device
def test_low_rank_training_on_a_quantised_base(device):
    torch.manual_seed(2)
    codes, scale = ops.quantize(torch.randn(24, 32, device=device))
    x = torch.randn(40, 32, device=device)
    target = x @ torch.randn(32, 24, device=device)
    down = torch.randn(8, 32, device=device).div(6).requires_grad_()
    up = torch.zeros(24, 8, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([down, up], 3e-2)
    losses = []
    for _ in range(60):
        y = ops.linear_int8(x, codes, scale, lora=(ops.lora_shrink(x, down), up))
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@every_device
def test_linear_obeys_torch(device):
    for seed, (tokens, weight) in enumerate(FORMATS):
        if E4M3 in (tokens, weight):  # opcheck multiplies arguments, which torch has not for this type
            continue
        call = random_call(seed, tokens, weight, device)
        args = (*call.tensors, "as they are", 0, call.activation, call.dtype)
        torch.library.opcheck(torch.ops.rfkernels.linear.default, args)
        torch.library.opcheck(torch.ops.rfkernels.linear_out.default, (torch.empty_like(call.run()), *args))


@every_device
def test_linear_compiles_without_graph_breaks(device):
    codes, scale = ops.quantize(torch.randn(24, 32, device=device))
    down, up = torch.randn(4, 32, device=device), torch.randn(24, 4, device=device)

    def f(x, strength):
        return ops.linear_int8(x, codes, scale, lora=(ops.lora_shrink(x, down, strength), up)) * 2

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x, strength = torch.randn(2, 5, 32, device=device), torch.rand(4, device=device)
    assert torch.equal(compiled(x, strength), f(x, strength))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_new_strengths():
    codes, scale = ops.quantize(torch.randn(256, 128, device="cuda"))
    down, up = torch.randn(16, 128, device="cuda"), torch.randn(256, 16, device="cuda")
    x, strength = torch.randn(2, 64, 128, device="cuda"), torch.ones(16, device="cuda")

    def run():
        return ops.linear_int8(x, codes, scale, lora=(ops.lora_shrink(x, down, strength), up))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    strength.fill_(0.25)
    graph.replay()
    assert torch.equal(out, run())
