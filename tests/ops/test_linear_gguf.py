"""Linear layers beside blocks of GGUF: every type against its numbers, and what a call promises."""

import pytest
import torch

from bench.gguf_blocks import random_blocks
from rfkernels import _C, ops
from rfkernels.ops._linear import ACTIVATIONS
from tests.ops.cases import every_device
from tests.ops.linear_cases import BF16, F16, F32, F64, TOLERANCE, error

every_kind = pytest.mark.parametrize("kind", ops.GGUF_KINDS)
INSTRUCTIONS = ["generic", "avx2", "avx512", "avx512_bf16"]


def exact(x, blocks, kind, bias, scale, lora, activation, gate, residual):
    """In float64 of the numbers of the blocks."""
    y = x.double() @ ops.dequantize_gguf(blocks, kind, F64).T
    y = y * scale.double() + lora[0].double() @ lora[1].double().T + bias.double()
    return residual.double() + gate.double() * ACTIVATIONS[activation](y)


def epilogue(x, n, seed=0):
    """weight_scale, bias, lora, gate and residual for tokens."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=F64).to(x.device)
    wide = F64 if x.dtype == F64 else F32
    lora = (draw(*x.shape[:-1], 3).to(wide), draw(n, 3).to(wide))
    tables = {"weight_scale": draw(n).abs().to(wide), "bias": draw(n).to(x.dtype), "lora": lora}
    return tables | {"gate": draw(1, n).to(x.dtype), "residual": draw(*x.shape[:-1], n).to(x.dtype)}


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_numbers_of_blocks_to_the_bit(kind, dtype, device):
    blocks = random_blocks(kind, 40, 2048).to(device)
    ours = ops.dequantize_gguf(blocks, kind, dtype)
    theirs = ops.dequantize_gguf_reference(blocks.cpu(), kind, dtype)
    assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(ops.dequantize_gguf(blocks.view(4, 10, -1), kind, dtype), ours.view(4, 10, -1))


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_linear_gguf_matches_float64(kind, dtype, device):
    blocks = random_blocks(kind, 37, 512).to(device)
    for m in (1, 5, 40):
        x = torch.randn(m, 512, generator=torch.Generator().manual_seed(m)).to(device, dtype)
        y = ops.linear_gguf(x, blocks, kind)
        true = x.double() @ ops.dequantize_gguf(blocks, kind, F64).T
        assert y.dtype == dtype and error(y, true) < 1.5 * TOLERANCE[dtype]  # two roundings of 16 bits


@pytest.mark.parametrize("name", INSTRUCTIONS)
@every_kind
def test_linear_gguf_with_every_instruction_set(kind, name):
    blocks, x = random_blocks(kind, 50, 256), torch.randn(30, 256, generator=torch.Generator().manual_seed(0))
    true = x.bfloat16().double() @ ops.dequantize_gguf(blocks, kind, F64).T
    try:
        _C.limit_instructions(name)
        assert error(ops.linear_gguf(x.bfloat16(), blocks, kind), true) < 1.5 * TOLERANCE[BF16]
    finally:
        _C.limit_instructions("avx512_bf16")


@every_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_of_blocks(activation, device):
    x = torch.randn(2, 11, 256, generator=torch.Generator().manual_seed(1)).to(device)
    for kind in ("Q4_K", "Q8_0"):
        blocks = random_blocks(kind, 35, 256).to(device)
        call = epilogue(x, 35)
        y = ops.linear_gguf(x, blocks, kind, activation=activation, **call)
        true = exact(
            x,
            blocks,
            kind,
            call["bias"],
            call["weight_scale"],
            call["lora"],
            activation,
            call["gate"],
            call["residual"],
        )
        assert error(y, true) < 2e-5


@every_device
@pytest.mark.parametrize("seed", range(60))
def test_linear_gguf_fuzzed(seed, device):
    g = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (1,), generator=g))]
    kind, dtype, activation = pick(*ops.GGUF_KINDS), pick(F64, F32, F16, BF16), pick(*ACTIVATIONS)
    m, n = pick(1, 2, 4, 5, 8, 12, 13, 40, 129), pick(1, 5, 16, 17, 32, 33, 100, 200)
    k = pick(256, 512, 1024) if kind.endswith(("_K", "_XS")) else pick(32, 96, 256, 416)
    x = torch.randn(m, k, generator=g).to(device, dtype)
    blocks, call = random_blocks(kind, n, k, seed).to(device), epilogue(x, n, seed)
    y = ops.linear_gguf(x, blocks, kind, activation=activation, **call)
    parts = (call["bias"], call["weight_scale"], call["lora"], activation, call["gate"], call["residual"])
    true = exact(x, blocks, kind, *parts)
    terms = true.abs().amax().clamp_min(1) * true.numel() ** 0.5 / 4
    assert (y.double() - true).norm() < 4 * TOLERANCE[dtype] * max(true.norm(), terms)


@every_device
def test_empty_calls_of_blocks(device):
    blocks = random_blocks("Q4_K", 6, 256).to(device)
    assert ops.linear_gguf(torch.zeros(0, 256, device=device), blocks, "Q4_K").shape == (0, 6)
    assert ops.linear_gguf(torch.zeros(3, 256, device=device), blocks[:0], "Q4_K").shape == (3, 0)
    bias = torch.randn(6, device=device)
    y = ops.linear_gguf(torch.zeros(2, 0, device=device), blocks[:, :0].contiguous(), "Q8_0", bias)
    assert torch.equal(y, bias.expand(2, 6))
    assert ops.dequantize_gguf(blocks[:0], "Q4_K").shape == (0, 256)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_gradients_beside_blocks(kind):
    torch.manual_seed(0)
    blocks = random_blocks(kind, 9, 256)
    x = torch.randn(2, 3, 256, dtype=F64)
    call = epilogue(x, 9)
    inputs = [x, call["bias"], call["weight_scale"], *call["lora"], call["gate"], call["residual"]]
    inputs = [t.requires_grad_() for t in inputs]
    grad = torch.randn(2, 3, 9, dtype=F64)
    ours = torch.autograd.grad(ops.linear_gguf(x, blocks, kind, activation="silu", **call), inputs, grad)
    true = exact(x, blocks, kind, inputs[1], inputs[2], inputs[3:5], "silu", inputs[5], inputs[6])
    for a, b in zip(ours, torch.autograd.grad(true, inputs, grad), strict=True):
        assert error(a, b) < 1e-12
    tokens = torch.randn(4, 256, dtype=BF16).requires_grad_()
    ops.linear_gguf(tokens, blocks, kind).sum().backward()
    assert tokens.grad.dtype == BF16 and tokens.grad.abs().sum() > 0


@every_device
def test_linear_gguf_obeys_torch(device):
    x, blocks = torch.randn(5, 256, device=device), random_blocks("Q5_K", 7, 256).to(device)
    call = epilogue(x, 7)
    tables = (call["weight_scale"], call["bias"], *call["lora"], call["gate"], call["residual"])
    args = (x, blocks, "Q5_K", *tables, None, "gelu", F32)
    torch.library.opcheck(torch.ops.rfkernels.linear_gguf.default, args)
    torch.library.opcheck(torch.ops.rfkernels.linear_gguf.default, (x.requires_grad_(), *args[1:]))
    out = torch.empty(5, 7, device=device)
    torch.library.opcheck(torch.ops.rfkernels.linear_gguf_out.default, (out, x.detach(), *args[1:]))
    torch.library.opcheck(torch.ops.rfkernels.dequantize_gguf.default, (blocks, "Q5_K", BF16))
    out = torch.empty(7, 256, device=device)
    torch.library.opcheck(torch.ops.rfkernels.dequantize_gguf_out.default, (out, blocks, "Q5_K", F32))


@every_device
def test_linear_gguf_compiles_without_graph_breaks(device):
    blocks = random_blocks("Q4_K", 7, 256).to(device)
    f = lambda x: ops.linear_gguf(x, blocks, "Q4_K", activation="silu") * 2
    torch._dynamo.reset()
    x = torch.randn(2, 5, 256, device=device, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, f(x))
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (compiled, f(x))))


X, Q4 = torch.zeros(6, 256), random_blocks("Q4_K", 10, 256)


@pytest.mark.parametrize(
    "f, message",
    [
        (lambda: ops.linear_gguf(X, Q4, "Q4_X"), "kind must be Q4_0, .* or IQ4_XS, got Q4_X"),
        (
            lambda: ops.linear_gguf(X, Q4[:, :-2].contiguous(), "Q4_K"),
            r"u8\[out, 144\], 144 bytes for every 256 of 256 inputs, got u8\[10, 142\]",
        ),
        (lambda: ops.linear_gguf(X[:, :-32].contiguous(), Q4, "Q4_K"), "144 bytes for every 256 of 224"),
        (lambda: ops.linear_gguf(X, Q4, "Q8_0"), r"u8\[out, 272\]"),
        (lambda: ops.linear_gguf(X, Q4.to(torch.int32), "Q4_K"), "blocks must be contiguous u8"),
        (lambda: ops.linear_gguf(X, Q4.T.contiguous().T, "Q4_K"), "blocks must be contiguous"),
        (lambda: ops.linear_gguf(X, Q4[0], "Q4_K"), "x and blocks must have two axes"),
        (lambda: ops.linear_gguf(X.to(torch.int8), Q4, "Q4_K"), "x must be floating"),
        (lambda: ops.linear_gguf(torch.tensor(1.0), Q4, "Q4_K"), "got a number"),
        (lambda: ops.linear_gguf(X, Q4, "Q4_K", torch.zeros(9)), r"bias must be contiguous \[10\]"),
        (
            lambda: ops.linear_gguf(X, Q4, "Q4_K", weight_scale=torch.ones(10, 2)),
            "weight_scale must be floating, contiguous, one number or one per output 10",
        ),
        (lambda: ops.linear_gguf(X, Q4, "Q4_K", activation="swish"), "activation must be one of none"),
        (
            lambda: ops.linear_gguf(X, torch.zeros(1441, dtype=torch.uint8)[1:].view(10, 144), "Q4_K"),
            "blocks must begin at a multiple of 4 bytes",
        ),
        (lambda: ops.dequantize_gguf(Q4, "F32"), "kind must be one of Q4_0, .*, got 'F32'"),
        (lambda: ops.dequantize_gguf(Q4[:, 1:], "Q4_K"), r"a multiple of 144\], got torch.uint8 \[10, 143\]"),
        (lambda: ops.dequantize_gguf(Q4.to(torch.int32), "Q4_K"), "must be uint8"),
        (lambda: ops.dequantize_gguf(Q4.sum(), "Q4_K"), "must be uint8"),
        (lambda: ops.dequantize_gguf(Q4, "Q4_K", torch.int32), "out must be contiguous floating"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(f, message):
    with pytest.raises(ValueError, match=message):
        f()


def test_results_over_blocks_are_refused():
    memory = torch.zeros(10 * 144, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no memory"):
        ops.gguf._dequantize(memory.view(10, 144)[:1], "Q4_K", F32, out=memory[:1024].view(F32).view(1, 256))


def test_codes_beside_blocks_have_no_gradient():
    x = torch.randn(6, 256, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"codes have no gradient|does not require grad"):
        ops.linear_gguf(x, Q4, "Q4_K", out_scale=torch.ones(1)).sum().backward()
