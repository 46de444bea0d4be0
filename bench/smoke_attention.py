"""Attention in every precision with every option on awkward shapes, for `smoke`."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from rfkernels import ops

# batch, heads, heads of the keys, rows, keys, d: one of each; ragged tiles; several tiles; many channels
SHAPES = ((1, 1, 1, 1, 1, 8), (2, 4, 2, 33, 70, 64), (2, 2, 1, 131, 300, 72), (1, 2, 2, 70, 65, 256))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("full", "int8", "fp8", "auto")
LENGTHS = (5, 0, 40, 25)  # of packed sequences

Results = Iterator[tuple[str, Tensor, Tensor, float]]  # name, ours, the definition in float64, tolerance


def results(device: str) -> Results:
    """Results and logarithms of the sums."""
    for shape, dtype, precision in product(SHAPES, DTYPES, PRECISIONS):
        batch, heads, kv_heads, rows, keys, d = shape
        generator = torch.Generator().manual_seed(rows)

        def draw(*dims: int, dtype: torch.dtype = dtype, generator=generator) -> Tensor:
            return torch.randn(dims, generator=generator).to(device, dtype)

        q, k, v = draw(batch, heads, rows, d), draw(batch, kv_heads, keys, d), draw(batch, kv_heads, keys, d)
        limit = 3e-2 if precision != "full" else 1e-5 if dtype == torch.float32 else 1e-2
        for name, options in _options(shape, draw, device):
            ours = ops.attention(q, k, v, precision=precision, return_lse=True, **options)
            exact = _exact(q, k, v, options)
            for what, mine, right in zip(("", " lse"), ours, exact, strict=True):
                yield f"attention{what} {precision} {name} {shape} {dtype}", mine, right, limit
    yield from _packed(device)


def _options(shape: tuple[int, ...], draw, device: str) -> Iterator[tuple[str, dict]]:
    batch, heads, kv_heads, rows, keys, _ = shape
    blocks = torch.ones(1, heads, -(-rows // 128), -(-keys // 64), dtype=torch.bool, device=device)
    blocks[:, 0, :, 1:] = False
    yield "plain", {}
    yield "bias", {"bias": draw(batch, 1, rows, keys)}
    yield (
        "everything",
        {
            "bias": draw(1, heads, 1, keys, dtype=torch.float32),
            "factor": 1 + 0.2 * draw(heads, rows + keys - 1, dtype=torch.float32),
            "key_lengths": torch.arange(keys, keys - batch, -1, device=device),
            "block_mask": blocks,
            "head_shift": torch.arange(kv_heads, device=device),
            "frames": batch,
            "scale": 0.1,
        },
    )


def _exact(q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    wide = [t if t is None else t.double() for t in map(options.get, ("bias", "factor"))]
    return ops.attention_reference(
        *(t.double() for t in (q, k, v)),
        *wide,
        options.get("key_lengths"),
        None,
        None,
        options.get("block_mask"),
        options.get("head_shift"),
        None,
        options.get("scale", q.shape[-1] ** -0.5),
        options.get("frames", 1),
        "full",
    )


def _packed(device: str) -> Results:
    starts = torch.tensor((0, *LENGTHS), device=device).cumsum(0)
    for dtype, precision in product(DTYPES, PRECISIONS):
        generator = torch.Generator().manual_seed(7)
        q, k, v = (torch.randn(sum(LENGTHS), 2, 64, generator=generator).to(device, dtype) for _ in range(3))
        ours = ops.attention(q, k, v, cu_seqlens=starts, precision=precision)
        own = zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True)
        exact = [_exact(*(t.transpose(0, 1)[None] for t in tensors), {})[0][0] for tensors in own]
        limit = 3e-2 if precision != "full" else 1e-5 if dtype == torch.float32 else 1e-2
        yield f"attention {precision} packed {dtype}", ours, torch.cat(exact, 1).transpose(0, 1), limit
