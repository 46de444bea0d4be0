"""Inputs of every op, so that one test of a claim serves them all."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rfkernels import ops
from tests.emulator.build import load as load_emulator

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
# "emulated": the CUDA half of an op, compiled as C++ and run on the CPU (tests/emulator)
KERNELS = [*DEVICES, "emulated"]
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# state, velocity
DTYPES = [(F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]
TOLERANCE = {F64: 1e-14, F32: 2e-6, F16: 2e-3, BF16: 1.6e-2}  # of values of order one to four
# one element; no element; a full pack; a ragged tail; several blocks; a video with unit axes
SHAPES = [(1,), (2, 0), (1, 8), (3, 13), (2, 20_011), (2, 3, 4, 1, 5)]
# shapes of row scalars for a video: for all, per sample, per frame, per token, per element
VIDEO = (2, 3, 4, 2, 5)
ROWS = [(), (2,), (1,), (2, 1, 4), (1, 3), (2, 3, 4, 2), (2, 1, 4, 1, 5), VIDEO]


@dataclass(frozen=True)
class Make:
    """Random inputs of one op call."""

    shape: tuple[int, ...]
    state: torch.dtype
    velocity: torch.dtype
    device: str
    rows: tuple[int, ...] | None = None  # shape of the row scalars; by default per sample
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.memory, dtype)

    @property
    def memory(self) -> str:
        """Where the tensors lie."""
        return "cpu" if self.device == "emulated" else self.device

    @property
    def x(self) -> Tensor:
        return self.tensor(self.shape, self.state)

    @property
    def v(self) -> Tensor:
        return self.tensor(self.shape, self.velocity)

    @property
    def scalar(self) -> Tensor:
        rows = self.shape[:1] if self.rows is None else self.rows
        return self.tensor(rows, F64 if self.state == F64 else F32)

    @property
    def keys(self) -> Tensor:
        return ops.noise_keys(12345678901, self.shape[0], step=3, device=self.memory)


@dataclass(frozen=True)
class Case:
    """An op, and how its arguments are made; args[writable] may be passed as out=."""

    name: str
    inputs: Callable[[Make], tuple]
    variant: str = ""
    op_name: str = ""
    has_velocity: bool = True

    @property
    def op(self) -> Callable[..., Tensor]:
        return getattr(ops, self.name)

    def run(self, device: str, *args, out: Tensor | None = None) -> Tensor:
        """The op on tensors of a `Make` for this device."""
        if device != "emulated":
            return self.op(*args, out=out)
        out = torch.full_like(flatten(args)[0], torch.nan) if out is None else out
        if out.numel():  # the checking half of an op ends before the launch
            getattr(load_emulator(), self.name)(out, *args)
        return out

    @property
    def reference(self) -> Callable[..., Tensor]:
        return getattr(ops, f"{self.name}_reference")

    def __str__(self) -> str:
        return f"{self.name}{self.variant}"


def _combination(k: int) -> Callable[[Make], tuple]:
    def inputs(m: Make) -> tuple:
        return [m.x, *[m.v for _ in range(k - 1)]], torch.stack([m.scalar for _ in range(k)])

    return inputs


def _taylor(order: int) -> Callable[[Make], tuple]:
    return lambda m: (m.x, m.tensor((order, *m.shape), m.velocity), m.scalar)


CASES = [
    Case("affine_step", lambda m: (m.x, m.v, m.scalar, m.scalar)),
    Case("cfg_step", lambda m: (m.x, m.v, m.v, m.scalar, m.scalar, m.scalar)),
    *[Case("linear_combination", _combination(k), f"-{k}") for k in range(1, 9)],
    *[Case("taylor_step", _taylor(order), f"-{order}") for order in range(1, 5)],
    Case("renoise", lambda m: (m.x, m.scalar, m.scalar, m.keys), has_velocity=False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_device = pytest.mark.parametrize("device", DEVICES)
every_kernel = pytest.mark.parametrize("device", KERNELS)


def widen(value):
    """The same inputs in float64; integers stay."""
    if isinstance(value, (list, tuple)):
        return type(value)(widen(v) for v in value)
    return value.double() if value.is_floating_point() else value


def flatten(args: tuple) -> list[Tensor]:
    """The tensors of an argument list."""
    return [t for a in args for t in (a if isinstance(a, list) else [a])]
