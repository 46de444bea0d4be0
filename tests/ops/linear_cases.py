"""Random calls of the linear op in every format, and their results in float64."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rfkernels import ops
from rfkernels.ops._linear import ACTIVATIONS, linear_reference, run_linear

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
E4M3 = torch.float8_e4m3fn
FLOATS = (F64, F32, F16, BF16)
# tokens, weight
FORMATS = [
    *[(t, t) for t in FLOATS],
    *[(t, w) for t in FLOATS for w in (torch.int8, E4M3, torch.uint8)],
    (torch.int8, torch.int8),
    (torch.int8, torch.uint8),
    (E4M3, E4M3),
]
# one rounding of the result
TOLERANCE = {F64: 1e-12, F32: 2e-5, F16: 1e-3, BF16: 4e-3}


@dataclass(frozen=True)
class Call:
    """The tensor arguments of the op, in its order."""

    x: Tensor
    x_scale: Tensor | None
    weight: Tensor
    weight_scale: Tensor | None
    weight_zero: Tensor | None = None
    bias: Tensor | None = None
    hidden: Tensor | None = None
    up: Tensor | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None
    out_scale: Tensor | None = None
    activation: str = "none"
    dtype: torch.dtype = F32

    @property
    def tensors(self) -> tuple:
        return tuple(getattr(self, name) for name in list(self.__dataclass_fields__)[:11])

    def run(self, out: Tensor | None = None) -> Tensor:
        return run_linear(*self.tensors, "as they are", 0, self.activation, self.dtype, out=out)

    def exact(self) -> Tensor:
        """The definition on the numbers that the codes stand for, in float64."""
        x = self.x.double() if self.x_scale is None else self.x.double() * self.x_scale.double()[:, None]
        weight = ops.dequantize_weight(self.weight, self.weight_scale, self.weight_zero, F64)
        others = [None if t is None else t.double() for t in self.tensors[5:]]
        return linear_reference(x, None, weight, None, None, *others, "as they are", 0, self.activation, F64)

    def to(self, device: str) -> "Call":
        moved = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def tokens_and_weight(m: int, n: int, k: int, tokens: torch.dtype, weight: torch.dtype, generator) -> Call:
    """A bare product."""

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x = random(m, k)
    x = (x * 40).round().clamp(-127, 127).to(tokens) if tokens == torch.int8 else x.to(tokens)
    x_scale = None
    if tokens not in FLOATS:
        x_scale = (torch.rand(m, generator=generator) + 0.1) / (40 if tokens == torch.int8 else 1)
    wide = F64 if tokens == F64 else F32
    largest = {torch.int8: 64, torch.uint8: 8}.get(weight, 1)
    scale = ((torch.rand(n, generator=generator) + 0.1) / largest).to(wide)
    if weight == torch.int8:
        codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    elif weight == torch.uint8:
        codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    else:
        codes = random(n, k).to(weight)
    return Call(x, x_scale, codes, scale, dtype=F64 if tokens == F64 else F32)


def random_call(seed: int, tokens: torch.dtype, weight: torch.dtype, device: str = "cpu") -> Call:
    """Shapes, parameters and epilogue drawn at random."""
    g = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    def random(*shape):
        return torch.randn(shape, generator=g)

    four = weight == torch.uint8
    m, n = pick(1, 2, 4, 5, 8, 12, 13, 40, 129), pick(1, 5, 16, 17, 32, 33, 100, 200)
    k = pick(32, 64, 128, 192, 256) if four else pick(1, 3, 8, 31, 64, 100, 256)
    wide = F64 if tokens == F64 else F32
    call = tokens_and_weight(m, n, k, tokens, weight, g)
    if four and pick(True, True, False):
        shape = (n, pick(1, k // 32, k // 16))
        call = replace(
            call, weight_scale=(random(*shape).abs() / 8 + 0.01).to(wide if wide == F64 else pick(F32, BF16))
        )
        if tokens in FLOATS:
            zeros = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8)
            call = replace(call, weight_zero=pick(None, zeros, random(*shape).to(call.weight_scale.dtype)))
    elif weight in FLOATS or weight == E4M3:
        call = replace(call, weight_scale=pick(None, call.weight_scale, call.weight_scale[:1].clone()))
    out = F64 if tokens == F64 else pick(F32, F16, BF16)
    values = {"bias": random(n), "gate": random(pick(1, m), n), "residual": random(m, n)}
    values = {name: v.to(pick(wide, out)) for name, v in values.items() if pick(True, False)}
    if rank := pick(0, 1, 16, 40):
        values["hidden"] = random(m, rank).to(wide)
        values["up"] = random(n, rank).to(wide if wide == F64 else pick(F32, F16, BF16))
    return replace(call, **values, activation=pick(*ACTIVATIONS), dtype=out).to(device)


def error(result: Tensor, exact: Tensor) -> float:
    """Relative L2."""
    return float((result.double() - exact).norm() / exact.norm().clamp_min(1e-30))
