r"""Linear layers beside the blocks of GGUF files, as they lie there.

    y = residual + gate * act(x W^T + hidden up^T + bias)

W is decoded within the product, a few rows at a time, and is never in memory as numbers. Its float32 numbers
are what is multiplied; where products are 16-bit (bfloat16 on CPUs that have it, more than eight rows of
16-bit tokens on CUDA), they are rounded to the dtype of the tokens, as in a weight that has been expanded.
"""

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._gguf import BLOCKS, block_of, dequantize_gguf_reference
from rfkernels.ops._linear import linear_backward, linear_reference
from rfkernels.ops._register import define
from rfkernels.ops._workspace import workspace_of
from rfkernels.ops.linear import call_on_rows

__all__ = [
    "GGUF_KINDS",
    "dequantize_gguf",
    "dequantize_gguf_reference",
    "linear_gguf",
    "linear_gguf_reference",
]

GGUF_KINDS = tuple(BLOCKS)


def dequantize_gguf(blocks: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers `[*lead, n]` of blocks, made in float32 to the bits of the gguf package and rounded once.

    Args:
        blocks: uint8 `[*lead, bytes]`, whole blocks of `kind`.
        kind: one of `GGUF_KINDS`.
        dtype: of the result.

    Raises:
        ValueError: an unknown kind, bytes that are no whole number of blocks, memory that is not aligned.
    """
    rows = blocks.reshape(-1, blocks.shape[-1]) if blocks.ndim else blocks
    numbers = _dequantize(rows.contiguous(), kind, dtype)
    return numbers.view(*blocks.shape[:-1], numbers.shape[-1])


def linear_gguf(
    x: Tensor,
    blocks: Tensor,
    kind: str,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` with a weight in the blocks of a GGUF file.

    Args:
        x: `[*lead, in]`, floating.
        blocks: uint8 `[out, bytes]`, contiguous; a row has the blocks of `in` numbers. A mapped file will do.
        kind: one of `GGUF_KINDS`.
        weight_scale: float32 `[out]`, multiplies the columns of `x W^T` (DoRA).

    Others as in `linear`. Gradients reach all but the blocks.

    Raises:
        ValueError: an unknown kind, blocks that do not fit `in`, or what `linear` refuses.
    """
    return call_on_rows(
        lambda rows, *parameters: _linear(rows, blocks, kind, weight_scale, *parameters),
        x,
        bias,
        lora,
        activation,
        gate,
        residual,
        out_scale,
        dtype,
    )


# --- registration ---


def _empty_numbers(blocks: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    block = block_of(kind)
    if blocks.ndim != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % block.bytes:
        raise ValueError(
            f"gguf: blocks of {kind} must be uint8 [rows, a multiple of {block.bytes}], got {blocks.dtype} "
            f"{list(blocks.shape)}"
        )
    width = blocks.shape[1] // block.bytes * block.numbers
    return blocks.new_empty((blocks.shape[0], width), dtype=dtype)


_dequantize = define(
    "dequantize_gguf",
    "Tensor blocks, str kind, ScalarType dtype",
    lambda out, blocks, kind, dtype: _C.dequantize_gguf(out, blocks, kind),
    _empty_numbers,
    dequantize_gguf_reference,
)


def linear_gguf_reference(x, blocks, kind, weight_scale, bias, hidden, up, gate, residual, out_scale, *how):
    """The definition of `linear_gguf` in plain torch; `how`: activation, dtype of the result."""
    weight = dequantize_gguf_reference(blocks, kind, torch.float32).to(x.dtype)
    others = (weight_scale, None, bias, hidden, up, gate, residual, out_scale)
    return linear_reference(x, None, weight, *others, "as they are", 0, *how)


def _kernel(out, x, blocks, kind, weight_scale, bias, hidden, up, *others):
    *epilogue, activation, _ = others
    workspace = None
    if x.device.type == "cpu":
        workspace = workspace_of(_C.linear_workspace(x, blocks, weight_scale, None, up), x.device)
    _C.linear_gguf(out, x, blocks, weight_scale, bias, hidden, up, *epilogue, workspace, activation, kind)


def _backward(grad, needs, x, blocks, kind, weight_scale, *others):
    weight = _dequantize(blocks, kind, x.dtype)
    needs = (needs[0], False, False, needs[3], False, *needs[4:9], False, False, False, False, False)
    saved = (x, None, weight, weight_scale, None, *others[:6], "as they are", 0, *others[6:])
    grads = linear_backward(grad, needs, *saved)
    return grads[0], None, None, grads[3], *grads[5:10], None, None, None


_linear = define(
    "linear_gguf",
    "Tensor x, Tensor blocks, str kind, Tensor? weight_scale, Tensor? bias, Tensor? hidden, Tensor? up, "
    "Tensor? gate, Tensor? residual, Tensor? out_scale, str activation, ScalarType dtype",
    _kernel,
    lambda x, blocks, *others: x.new_empty((x.shape[0], blocks.shape[0]), dtype=others[-1]),
    linear_gguf_reference,
    _backward,
)
