"""The CUDA halves of `linear_gguf` and `dequantize_gguf`."""

import pytest
import torch

from bench.gguf_blocks import random_blocks
from rfkernels import ops
from rfkernels.ops.linear import linear_reference
from tests.emulator.linear_calls import AS_THEY_ARE, BF16, F16, F32, F64

every_kind = pytest.mark.parametrize("kind", ops.GGUF_KINDS)
EPSILON = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}


def check(emulated, kind, m, n, k, dtype, tolerance=1.0, **epilogue):
    """Against the definition in float64 of the weight that kernels multiply; errors relative to terms."""
    generator = torch.Generator().manual_seed(m)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)
    x, blocks = draw(m, k).to(dtype), random_blocks(kind, n, k)
    rounded = m > 8 and dtype in (BF16, F16)  # on tensor cores
    weight = ops.dequantize_gguf(blocks, kind).to(dtype if rounded else F32).double()
    wide = F64 if dtype == F64 else F32
    rank = epilogue.get("rank", 0)
    others = {
        "weight_scale": draw(n).abs().to(wide),
        "bias": draw(n).to(wide),
        "hidden": draw(m, rank).bfloat16().half().to(wide) if rank else None,
        "up": draw(n, rank).bfloat16().half().to(wide) if rank else None,
        "gate": draw(m, n).to(wide),
        "residual": draw(m, n).to(dtype),
    }
    others = {name: value if epilogue else None for name, value in others.items()}
    out = torch.full((m, n), 77, dtype=wide)
    activation = "gelu_tanh" if epilogue else "none"
    emulated.linear_gguf(out, x, blocks, *others.values(), None, None, activation, kind)
    scale, *rest = (None if t is None else t.double() for t in others.values())
    exact = linear_reference(
        x.double(), None, weight, scale, None, *rest, None, *AS_THEY_ARE, activation, F64
    )
    terms = x.double().abs() @ weight.abs().T
    if epilogue:
        terms = (terms * scale + rest[0].abs()) * rest[3].abs() + rest[4].abs()
        terms = terms + 10 * rank * rest[3].abs()
    assert ((out.double() - exact).abs() <= tolerance * 8 * k**0.5 * EPSILON[wide] * terms).all()
    return out


@every_kind
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_emulated_blocks(emulated, kind, dtype, m):
    check(emulated, kind, m, 11, 768, dtype)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("m", [5, 20])
def test_emulated_epilogue_of_blocks(emulated, kind, dtype, m):
    check(emulated, kind, m, 40, 256, dtype, rank=5)


@pytest.mark.parametrize("processors, tile", [(1, "wide"), (3, "middle"), (8, "narrow")])
def test_emulated_tiles_of_blocks(emulated, processors, tile):
    assert emulated.linear_tile(127, 122, processors, True) == tile
    emulated.set_processors(processors)
    try:
        check(emulated, "Q5_1", 127, 122, 160, BF16)
        check(emulated, "Q4_K", 127, 122, 256, F16)
    finally:
        emulated.set_processors(1)


@every_kind
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_emulated_numbers_of_blocks_to_the_bit(emulated, kind, dtype):
    blocks = random_blocks(kind, 3, 1024)
    expected = ops.dequantize_gguf(blocks, kind, dtype)
    out = torch.full_like(expected, 77)
    emulated.dequantize_gguf(out, blocks, kind)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    memory = torch.zeros(out.numel() + 1, dtype=dtype)  # off 16 bytes
    emulated.dequantize_gguf(memory[1:].view(out.shape), blocks, kind)
    assert memory[0] == 0 and torch.equal(memory[1:], expected.flatten())


@every_kind
def test_emulated_few_tokens_read_the_weight_once(emulated, kind):
    # Lanes of a load share bytes that hold numbers of both; eight tokens read no more than one.
    blocks, read = random_blocks(kind, 6, 512), []
    for m in (1, 8):
        emulated.linear_gguf(torch.zeros(m, 6), torch.ones(m, 512), blocks, *[None] * 8, "none", kind)
        read += [t.bytes_read for t in emulated.traffic() if "u8[6," in t.name]
    assert blocks.nbytes <= read[0] == read[1]
