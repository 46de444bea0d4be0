"""Calls of `qkv_norm_rope` and of its backward, on any kernel."""

import torch
from torch import Tensor

from rfkernels import ops
from rfkernels.ops import rope
from tests.emulator.build import load as load_emulator
from tests.ops.cases import F32, F64

DEFAULTS = {
    "kv_heads": None,
    "q_weight": None,
    "k_weight": None,
    "rotation": None,
    "rotate_from": 0,
    "eps": 1e-6,
    "layout": "blhd",
    "tier": "fast",
}
_POISON = {True: torch.nan, False: -1}


def arguments(qkv, heads: int, **options) -> tuple:
    """The arguments of the registered op."""
    return rope._arguments(qkv, heads, **(DEFAULTS | options))


def memory(kernel: str) -> str:
    return "cpu" if kernel == "emulated" else kernel


def run(kernel: str, qkv, heads: int, out=None, with_v=True, **options) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; an emulated kernel writes over NaN."""
    if kernel != "emulated" and with_v:
        return ops.qkv_norm_rope(qkv, heads, out=out, **options)
    args = (*arguments(qkv, heads, **options)[:-1], with_v)
    if kernel != "emulated":
        return ops.OPS["qkv_norm_rope"](*args, out=out)
    out = tuple(t.fill_(_POISON[t.is_floating_point()]) for t in rope._empty(*args)) if out is None else out
    load_emulator().qkv_norm_rope(*out, *args)
    return out


def run_backward(kernel: str, *args) -> tuple[Tensor, Tensor]:
    """d_tokens and the sum of d_weights."""
    if kernel == "emulated":
        out = tuple(torch.full_like(t, torch.nan) for t in rope._empty_backward(*args))
        load_emulator().qkv_norm_rope_backward(*out, *args)
    else:
        out = torch.ops.rfkernels.qkv_norm_rope_backward(*args)
    return out[0], out[1].sum(0)


def widen(value):
    """The same arguments in float64."""
    if isinstance(value, (list, tuple)):
        return type(value)(widen(v) for v in value)
    return value.double() if isinstance(value, Tensor) else value


def reference(qkv, heads: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in float64."""
    return ops.qkv_norm_rope_reference(*widen(arguments(qkv, heads, **options)))


class Make:
    """Random inputs."""

    def __init__(self, dtype: torch.dtype, kernel: str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, memory(kernel)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=F64)
        return values.to(self.device, dtype or self.dtype)

    def weight(self, d: int, dtype: torch.dtype | None = None) -> Tensor:
        values = 0.5 + torch.rand(d, generator=self.generator, dtype=F64)
        return values.to(self.device, dtype or self.dtype)

    def rotation(self, *lead: int, d: int) -> Tensor:
        angle = 7 * torch.randn(*lead, d // 2, generator=self.generator, dtype=F64)
        table = torch.stack([angle.cos(), angle.sin()], -1)
        return table.to(self.device, F64 if self.dtype == F64 else F32)
