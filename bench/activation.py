"""Activations of feed-forward layers: `activation`, `gated_activation`, its backward, codes of both."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, STEP, Case, nbytes, quantize, random_tensor, values

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}
# rows, width of the result, by the models whose hidden layers they are
LAYERS = {
    "FLUX.1 MLP": (4608, 12288),
    "FLUX.2 klein MLP": (4608, 9216),
    "4608 x 6144": (4608, 6144),
    "Wan 14B image MLP": (257, 1280),
    "small": (64, 1536),
}
FULL = [
    ("gated_activation", "silu", "4608 x 6144"),
    ("gated_activation", "silu", "FLUX.2 klein MLP"),
    ("gated_activation", "gelu", "4608 x 6144"),
    ("gated_activation", "silu", "small"),
    ("activation", "gelu_tanh", "FLUX.1 MLP"),
    ("activation", "silu", "4608 x 6144"),
    ("activation", "relu2", "4608 x 6144"),
    ("activation", "gelu", "Wan 14B image MLP"),
    ("gated_activation_backward", "silu", "4608 x 6144"),
    ("gated_activation_quantize", "silu", "4608 x 6144"),
    ("gated_activation_quantize", "silu", "small"),
    ("activation_quantize", "gelu_tanh", "FLUX.1 MLP"),
]
QUICK = [
    ("gated_activation", "silu", "small"),
    ("gated_activation_quantize", "silu", "small"),
    ("activation", "gelu_tanh", "Wan 14B image MLP"),
]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases: the bias is in the linear layer before, as in eager models."""
    make = {
        "activation": _activation,
        "gated_activation": _gated,
        "gated_activation_backward": _gated_backward,
        "activation_quantize": _codes,
        "gated_activation_quantize": _gated_codes,
    }
    for op, kind, label in QUICK if quick else FULL:
        for dtypes in ("f32", "bf16"):
            yield make[op](kind, label, LAYERS[label], dtypes, device)


def _tolerance(dtypes: str) -> float:
    return 1e-5 if dtypes == "f32" else 3e-2


def _activation(kind: str, label: str, shape: tuple[int, int], dtypes: str, device: str) -> Case:
    from rfkernels.ops import activation

    dtype = DTYPES[dtypes][0]
    return Case(
        room="activation",
        op=f"activation {kind}",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=2 * nbytes(torch.Size(shape).numel(), dtype),
        inputs=lambda: (random_tensor(shape, dtype, device, 3),),
        ours=lambda out, x: activation(x, kind, out=out),
        formula=FUNCTIONS[kind],
        tolerance=_tolerance(dtypes),
    )


def _gated(kind: str, label: str, shape: tuple[int, int], dtypes: str, device: str) -> Case:
    from rfkernels.ops import gated_activation

    dtype = DTYPES[dtypes][0]
    rows, width = shape

    def formula(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return FUNCTIONS[kind](gate) * up

    return Case(
        room="activation",
        op=f"gated_activation {kind}",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=3 * nbytes(rows * width, dtype),  # gate, up -> out
        inputs=lambda: (random_tensor((rows, 2 * width), dtype, device, 3),),
        ours=lambda out, x: gated_activation(x, kind, out=out),
        formula=formula,
        formula_out=lambda out, x: torch.mul(FUNCTIONS[kind](x[:, :width]), x[:, width:], out=out),
        tolerance=_tolerance(dtypes),
    )


def _gated_backward(kind: str, label: str, shape: tuple[int, int], dtypes: str, device: str) -> Case:
    from rfkernels.ops import OPS

    dtype = DTYPES[dtypes][0]
    rows, width = shape

    def formula(grad: Tensor, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        s = torch.sigmoid(gate)
        return torch.cat([grad * up * s * (1 + gate * (1 - s)), grad * gate * s], -1)

    return Case(
        room="activation",
        op=f"gated_activation_backward {kind}",
        label=label,
        shape=(rows, 2 * width),
        dtypes=dtypes,
        bytes_moved=5 * nbytes(rows * width, dtype),  # grad, gate, up -> both gradients
        inputs=lambda: (
            random_tensor(shape, dtype, device, 3),
            random_tensor((rows, 2 * width), dtype, device, 4),
        ),
        ours=lambda out, grad, x: OPS["gated_activation_backward"](
            grad, x, None, None, None, kind, True, out=out
        ),
        formula=formula,
        tolerance=_tolerance(dtypes),
    )


def _codes(kind: str, label: str, shape: tuple[int, int], dtypes: str, device: str) -> Case:
    from rfkernels.ops import activation_quantize

    return _to_codes(
        f"activation_quantize {kind} int8",
        label,
        shape,
        dtypes,
        shape,
        device,
        lambda out, x: activation_quantize(x, kind),
        lambda x: quantize(FUNCTIONS[kind](x), "int8"),
    )


def _gated_codes(kind: str, label: str, shape: tuple[int, int], dtypes: str, device: str) -> Case:
    from rfkernels.ops import gated_activation_quantize

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, -1)
        return quantize(FUNCTIONS[kind](gate) * up, "int8")

    return _to_codes(
        f"gated_activation_quantize {kind} int8",
        label,
        shape,
        dtypes,
        (shape[0], 2 * shape[1]),
        device,
        lambda out, x: gated_activation_quantize(x, kind),
        formula,
    )


def _to_codes(
    op: str,
    label: str,
    shape: tuple[int, int],
    dtypes: str,
    input_shape: tuple[int, int],
    device: str,
    ours: Callable[..., tuple[Tensor, Tensor]],
    formula: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Case:
    """int8 codes [rows, width] and a float32 scale per row."""
    dtype, (rows, width) = DTYPES[dtypes][0], shape
    return Case(
        room="activation",
        op=op,
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(input_shape).numel(), dtype) + rows * (width + 4),
        inputs=lambda: (random_tensor(input_shape, dtype, device, 3),),
        ours=ours,
        formula=formula,
        has_out=False,
        value=values,
        tolerance=STEP["int8"],
    )
