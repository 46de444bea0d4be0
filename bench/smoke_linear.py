"""Linear layers in every format on awkward shapes, for `smoke`."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from bench.gguf_blocks import random_blocks
from rfkernels import ops
from rfkernels.ops.gguf import BLOCKS

# tokens, inputs, outputs: few tokens; ragged edges of tiles; several tiles; narrow; with every block of GGUF
SHAPES = ((1, 128, 40), (7, 96, 33), (131, 64, 130), (66, 160, 12), (6, 512, 24), (20, 256, 40))
# on a GPU of about 100 multiprocessors the tiles of 64 x 64 and of 128 x 128 (csrc/linear/tile.h)
GPU_SHAPES = ((1000, 64, 1500), (1100, 96, 1500))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANK = 5

Results = Iterator[tuple[str, Tensor, Tensor, float]]  # name, ours, the definition in float64, tolerance


def results(device: str) -> Results:
    """Every format with every epilogue."""
    shapes = SHAPES + GPU_SHAPES * (device != "cpu")
    for (m, k, n), dtype in product(shapes, DTYPES):
        generator = torch.Generator().manual_seed(m)

        def draw(*shape: int, dtype: torch.dtype = dtype, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        x, weight = draw(m, k), draw(n, k, dtype=torch.float32) * k**-0.5
        hidden = ops.lora_shrink(x, draw(RANK, k) * k**-0.5, draw(RANK, dtype=torch.float32))
        epilogue = {
            "bias": draw(n),
            "lora": (hidden, draw(n, RANK)),
            "activation": "gelu_tanh",
            "gate": draw(1, n),
            "residual": draw(m, n),
        }
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        for name, call, numbers, tokens in _formats(x, weight):
            yield f"{name} {(m, k, n)} {dtype}", call(**epilogue), _exact(tokens, numbers, epilogue), limit


def _formats(x: Tensor, weight: Tensor) -> Iterator[tuple]:
    """Name, the layer, the numbers of its weight and of its tokens in float64."""
    wide, plain = torch.float64, weight.to(x.dtype)
    yield "linear", lambda **e: ops.linear(x, plain, **e), plain.to(wide), x.to(wide)
    for format, layer in (("int8", ops.linear_int8), ("fp8", ops.linear_fp8)):
        codes, scale = ops.quantize(weight, format)
        tokens, tokens_scale = ops.quantize(x, format)
        numbers = codes.to(wide) * scale[:, None]
        values = tokens.to(wide) * tokens_scale[:, None]
        yield (
            f"linear_{format}",
            lambda layer=layer, codes=codes, scale=scale, t=tokens, s=tokens_scale, **e: layer(
                t, codes, scale, x_scale=s, dtype=x.dtype, **e
            ),
            numbers,
            values,
        )
        if format == "fp8":
            yield (
                "linear_fp8 beside floating tokens",
                lambda codes=codes, scale=scale, **e: ops.linear_fp8(x, codes, scale, **e),
                numbers,
                x.to(wide),
            )
        else:
            int8 = values
    four = torch.randint(0, 256, (len(weight), weight.shape[1] // 2), dtype=torch.uint8).to(x.device)
    scale = weight.abs().unflatten(1, (-1, 32)).amax(-1) / 8
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8).to(x.device)
    for name, z in (("symmetric", None), ("integer zero", zero), ("floating zero", scale * 0.3)):
        numbers = ops.dequantize_weight(four, scale, z, wide)
        yield (
            f"linear_w4a16 {name}",
            lambda z=z, **e: ops.linear_w4a16(x, four, scale, z, **e),
            numbers,
            x.to(wide),
        )
    numbers = ops.dequantize_weight(four, scale, None, wide)
    yield "linear_w4a8", lambda **e: ops.linear_w4a8(x, four, scale, **e), numbers, int8
    for kind, block in BLOCKS.items():
        if weight.shape[1] % block.numbers:
            continue
        blocks = random_blocks(kind, *weight.shape).to(x.device)
        yield (
            f"linear_gguf {kind}",
            lambda blocks=blocks, kind=kind, **e: ops.linear_gguf(x, blocks, kind, **e),
            ops.dequantize_gguf(blocks, kind, wide),
            x.to(wide),
        )


def _exact(x: Tensor, weight: Tensor, epilogue: dict) -> Tensor:
    hidden, up = (t.double() for t in epilogue["lora"])
    y = x @ weight.T + hidden @ up.T + epilogue["bias"].double()
    y = torch.nn.functional.gelu(y, approximate="tanh")
    return epilogue["residual"].double() + epilogue["gate"].double() * y
