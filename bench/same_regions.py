"""Calls of the regions of a block for `same_bits`: where two devices must agree to the bit, and where not.

Elementwise arithmetic, activations, the largest magnitude of a row and its codes have one result. A sum over
a row, in a norm or a gradient, is added up in the order of the device, and a tanh is the device's library's:
there the last bits differ, and with them a rounding.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from rfkernels import ops
from rfkernels.ops._register import Op

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)]  # tokens, parameters
SHAPES = [(3, 13), (2, 5, 64), (2, 3, 3072)]
# of |difference| / (1 + |value|): a few float32 roundings, then one of the tokens
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}
STEP = {"int8": 0.1, "fp8": 0.15}  # a code may be the next one where a norm stands before
HEADS = 2

Call = tuple[
    str, Op, tuple, float
]  # what it is, the op, its arguments on the CPU, the tolerance (0: to the bit)


def calls() -> Iterator[Call]:
    for shape, (tokens, parameters) in product(SHAPES, DTYPES):
        where = f"{shape} {tokens} {parameters}"
        for name, args, exact in _calls(Draw(shape, tokens, parameters)):
            limit = 0.0 if exact else TOLERANCE[tokens]
            step = next((STEP[a] for a in args if isinstance(a, str) and a in STEP), 0.0)
            yield f"{name} {where}", ops.OPS[name], args, max(limit, 0.0 if exact else step)


class Draw:
    """Random inputs on the CPU."""

    def __init__(self, shape: tuple[int, ...], tokens: torch.dtype, parameters: torch.dtype):
        self.shape, self.tokens, self.parameters = shape, tokens, parameters
        self.generator = torch.Generator().manual_seed(0)

    def x(self, *shape: int) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=F64)
        return values.to(self.tokens)

    def row(self, *shape: int) -> Tensor:
        values = torch.randn(shape or self.shape[-1:], generator=self.generator, dtype=F64)
        return values.to(self.parameters)


def _calls(m: Draw) -> Iterator[tuple[str, tuple, bool]]:
    """Name, arguments, whether to the bit."""
    tables = (m.row(m.shape[0], m.shape[-1]), m.row(m.shape[0], m.shape[-1]), None)
    gate, weight, bias = m.row(), m.row(), m.row()
    x, y = m.x(), m.x()
    for norm, tier in product(("none", "layer", "rms"), ("fast", "exact")):
        exact, affine = norm == "none", (weight, bias, norm, 1e-6, tier)
        branch = ("none", norm, None if exact else weight)
        yield "norm_modulate", (x, *tables, *affine), exact
        yield "gated_residual", (x, y, gate, None, *branch, 1e-6, tier), exact
        yield "gated_residual_norm_modulate", (x, y, gate, *tables, *branch, *affine), exact
        for format, rotation in (("int8", 0), ("fp8", 16 if m.shape[-1] % 16 == 0 else 0)):
            coding = (format, None, rotation)
            yield "norm_modulate_quantize", (x, *tables, *affine, *coding), exact
            region = (x, y, gate, *tables, *branch, *affine)
            yield "gated_residual_norm_modulate_quantize", (*region, *coding), exact
    yield "gated_residual", (x, y, gate, None, "tanh", "none", None, 1e-6, "fast"), False
    sums = (None, None, None, 1, 1, True)
    yield "ada_norm_backward", (x, y, m.x(), weight, gate, *sums, "layer", "one_plus", 1e-6), False
    if (
        m.tokens != F64
    ):  # whose embedding is of float32 angles too; torch makes the frequencies, on the device
        yield "timestep_embedding", (10 * m.x(5).float(), 64, 1.0, 1e4, 0.0, True, m.tokens), False
    yield from _activations(m)
    yield from _heads(m)


def _activations(m: Draw) -> Iterator[tuple[str, tuple, bool]]:
    x, both, bias, grad = m.x(), m.x(*m.shape[:-1], 2 * m.shape[-1]), m.row(), m.x()
    for kind in ("gelu", "gelu_tanh", "silu", "relu2"):
        gated = (both, None, None, None, kind, True)
        for tier in ("fast", "exact"):
            yield "activation", (x, bias, kind, tier), True
            yield "gated_activation", (*gated, tier), True
            yield "activation_quantize", (x, bias, kind, tier, "int8", None, 0), True
            yield "gated_activation_quantize", (*gated, tier, "fp8", None, 0), True
        yield "activation_backward", (grad, x, bias, kind), True
        yield "gated_activation_backward", (grad, *gated), True


def _heads(m: Draw) -> Iterator[tuple[str, tuple, bool]]:
    d = m.shape[-1] // 2 * 2 if m.shape[-1] < 128 else 128
    streams = [m.x(2, length, 3 * HEADS * d) for length in (3, 5)]
    dtype = F64 if m.tokens == F64 else F32
    table = ops.rotary_table(torch.arange(7)[:, None], (d,), dtype=dtype)
    for weights, tier in (([], "fast"), ([m.row(d) for _ in range(4)], "exact")):
        numbers = (1, HEADS, HEADS, 1, 1e-6, "blhd", tier, True)
        yield "qkv_norm_rope", (streams, weights, table, *numbers), not weights
    grads = [m.x(2, 8, HEADS, d) for _ in range(3)]
    numbers = (1, HEADS, HEADS, 3, 1, 1e-6, "blhd")  # the second stream
    yield "qkv_norm_rope_backward", (*grads, streams[1:], weights[2:], table, *numbers), False


def differing(here: tuple[Tensor, ...], there: tuple[Tensor, ...], tolerance: float) -> int:
    """How many elements of the results differ by more than that; codes count as what they stand for."""
    count = 0
    for a, b in zip(valued(here), valued(there), strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        count += int((~same & ~((a - b).abs() <= tolerance * (1 + a.abs()))).sum())
    return count


def valued(results: tuple[Tensor, ...]) -> list[Tensor]:
    """The results in float64, codes times their scales."""
    *tokens, last = (t.double() for t in results)
    if len(results) > 1 and results[-1].shape == results[-2].shape[:-1]:
        return [*tokens[:-1], tokens[-1] * last[..., None], last]
    return [*tokens, last]
