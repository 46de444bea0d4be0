"""Inputs of the ops of the norm room, and how they are run."""

import pytest
import torch

from rfkernels import ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, F16, F32, F64, widen

# tokens, parameters
DTYPES = [(F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 4e-3, BF16: 3e-2}  # of values of order one to ten
NORMS = ["layer", "rms", "none"]
DEFAULTS = {
    "norm_modulate": dict(
        scale=None, shift=None, index=None, weight=None, bias=None, norm="layer", eps=1e-6, tier="fast",
    ),
    "gated_residual": dict(
        gate=None, index=None, gate_activation="none", branch_norm="none", branch_weight=None,
        eps=1e-6, tier="fast",
    ),
    "gated_residual_norm_modulate": dict(
        gate=None, scale=None, shift=None, index=None, gate_activation="none", branch_norm="none",
        branch_weight=None, weight=None, bias=None, norm="layer", eps=1e-6, tier="fast",
    ),
}  # fmt: skip
RESULTS = {"norm_modulate": 1, "gated_residual": 1, "gated_residual_norm_modulate": 2}
every_op = pytest.mark.parametrize("name", DEFAULTS)


def run(name, device, tokens, **options):
    """The op on its tokens (x, or x and y); "emulated": its CUDA kernel on the CPU."""
    if device != "emulated":
        return getattr(ops, name)(*tokens, **options)
    out = tuple(torch.full(tokens[0].shape, torch.nan, dtype=tokens[0].dtype) for _ in range(RESULTS[name]))
    getattr(load_emulator(), name)(*out, *tokens, *(DEFAULTS[name] | options).values())
    return out if len(out) > 1 else out[0]


def reference(name, tokens, **options):
    return getattr(ops, f"{name}_reference")(*widen(tokens), **{k: wide(v) for k, v in options.items()})


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Inputs:
    def __init__(self, shape, tokens, parameters, device, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.types, self.device = (
            shape,
            (tokens, parameters),
            "cpu" if device == "emulated" else device,
        )

    def draw(self, shape, dtype):
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.device, dtype)

    def tokens(self, name):
        return tuple(self.draw(self.shape, self.types[0]) for _ in range(1 if name == "norm_modulate" else 2))

    def table(self, lead):
        return self.draw((*lead, self.shape[-1]), self.types[1])

    def options(self, name, lead=(), norm="layer", affine=True, tier="fast", **other):
        made = {"tier": tier, **other}
        if name != "gated_residual":
            made |= dict(scale=self.table(lead), shift=self.table(lead), norm=norm)
            made |= dict(weight=self.table(()), bias=self.table(())) if affine else {}
        if name != "norm_modulate":
            made |= dict(gate=self.table(lead), branch_norm="rms" if norm == "rms" else "none")
            made |= dict(gate_activation="tanh", branch_weight=self.table(())) if affine else {}
        return made


def assert_close(ours, expected, dtype, tolerance=None):
    tolerance = tolerance or TOLERANCE[dtype]
    for result, wanted in zip(as_tuple(ours), as_tuple(expected), strict=True):
        assert result.dtype == dtype and result.shape == wanted.shape
        torch.testing.assert_close(result.double(), wanted, rtol=tolerance, atol=tolerance)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


# for all; per sample; per frame; per token; the frames of all samples alike
LEADS = [(), (2,), (1,), (2, 3), (2, 3, 4), (1, 3), (2, 1, 4)]
