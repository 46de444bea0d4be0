"""What blocks of transformers share: regions of `rfkernels.ops` over layers of any kind.

A layer is an `nn.Linear`, a `QuantLinear`, one of these with adapters, or any module of one tensor (an
adapter of peft). Modules hold the weights under the names of diffusers; ours and those of diffusers serve
alike.

`Codes` are tokens that were quantised once, where they were made, for all the layers that read them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.nn import QuantLinear

__all__ = [
    "Codes",
    "attend",
    "beside",
    "bounded",
    "embed_time",
    "finish",
    "gated_residual_norm_modulate",
    "gelu_linear",
    "gelu_mlp",
    "is_plain",
    "joint",
    "norm_modulate",
    "project",
    "swiglu_mlp",
    "weight_of",
]


class Codes(NamedTuple):
    """Quantised tokens `[*lead, width]`, their scales `[*lead]`, and the dtype that they had."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


def norm_modulate(x: Tensor, scale=None, shift=None, *, to: tuple[nn.Module, ...] = (), **options):
    """`ops.norm_modulate`; as `Codes` where all layers `to` take the same ones and no gradient is taken."""
    if coding := _coding(to, x, scale, shift, *options.values()):
        return Codes(*ops.norm_modulate_quantize(x, scale, shift, **options, **coding), x.dtype)
    return ops.norm_modulate(x, scale, shift, **options)


def gated_residual_norm_modulate(
    x: Tensor, y: Tensor, gate=None, scale=None, shift=None, *, to: tuple[nn.Module, ...] = (), **options
):
    """`ops.gated_residual_norm_modulate`: (residual, tokens or `Codes`); float16 residuals are `bounded`."""
    if x.dtype == torch.float16:  # the norm reads what was bounded
        branch = {
            k: options.pop(k) for k in ("gate_activation", "branch_norm", "branch_weight") if k in options
        }
        branch |= {"eps": options["eps"]} if branch and "eps" in options else {}
        index = options.pop("index", None)
        x = bounded(ops.gated_residual(x, y, gate, index=None if gate is None else index, **branch))
        options |= {} if scale is None and shift is None else {"index": index}
        return x, norm_modulate(x, scale, shift, to=to, **options)
    if coding := _coding(to, x, y, gate, scale, shift, *options.values()):
        region = ops.gated_residual_norm_modulate_quantize
        x, codes, scales = region(x, y, gate, scale, shift, **options, **coding)
        return x, Codes(codes, scales, x.dtype)
    return ops.gated_residual_norm_modulate(x, y, gate, scale, shift, **options)


def finish(x: Tensor, tokens: Tensor, layer: nn.Module, gate: Tensor, **options) -> Tensor:
    """The end of a branch, `x + gate * layer(tokens)`: the epilogue of a quantised layer, else a region."""
    if not options and gate.ndim == 2 and is_plain(layer, QuantLinear) and not _recorded(x, tokens, gate):
        gate = gate if gate.dtype in (x.dtype, torch.float32) else gate.to(x.dtype)
        return bounded(layer.run(tokens, gate=gate.unsqueeze(1), residual=x))
    return bounded(ops.gated_residual(x, layer(tokens), gate, **options))


def project(x: Tensor | Codes, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of several layers of one input."""
    if isinstance(x, Codes):
        return tuple(layer.run(x.codes, x_scale=x.scales, dtype=x.dtype) for layer in layers)
    return tuple(layer(x) for layer in layers)


def attend(
    attn: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v as `[batch, tokens, heads d]`; q, k, v `[batch, tokens, heads, d]`.

    In the precision `attn.precision` of `ops.attention`, where the module has one. Keys of a sample from
    `key_lengths` `[batch]` on are padding.
    """
    options = {"bias": bias, "key_lengths": key_lengths, "precision": getattr(attn, "precision", "full")}
    return ops.attention(q, k, v, layout="blhd", **options).flatten(2)


def gelu_mlp(x: Tensor | Codes, ff: nn.Module) -> tuple[Tensor, nn.Module]:
    """The hidden side of diffusers' FeedForward with the tanh GELU, and the layer that reads it."""
    return gelu_linear(x, ff.net[0].proj), ff.net[2]


def gelu_linear(x: Tensor | Codes, up: nn.Module) -> Tensor:
    """The tanh GELU of a layer."""
    if isinstance(x, Codes):
        return up.run(x.codes, x_scale=x.scales, dtype=x.dtype, activation="gelu_tanh")
    if is_plain(up, QuantLinear) and not _recorded(x):
        return up.run(x, activation="gelu_tanh")
    if is_plain(up, nn.Linear):  # the bias is added where the GELU reads
        return ops.gelu(F.linear(x, up.weight), "tanh", up.bias)
    return ops.gelu(up(x), "tanh")


def swiglu_mlp(x: Tensor | Codes, gate: nn.Module, up: nn.Module | None = None) -> Tensor:
    """silu(gate(x)) * up(x); one layer has the outputs of both, those of the gate first."""
    if up is None:
        return ops.swiglu(*project(x, gate))
    return ops.swiglu(*project(x, gate, up))


def beside(first: Tensor, activate: Callable[..., Tensor], *hidden: Tensor) -> Tensor:
    """`[first, activate(*hidden)]` along the channels; without a gradient written where it belongs."""
    if _recorded(first, *hidden) or torch.compiler.is_compiling():
        return torch.cat([first, activate(*hidden)], -1)
    width = first.shape[-1]
    both = first.new_empty(*first.shape[:-1], width + hidden[0].shape[-1])
    both[..., :width] = first
    activate(*hidden, out=both[..., width:])
    return both


def embed_time(embedder: nn.Module, t: Tensor, dtype: torch.dtype, **options) -> Tensor:
    """`linear_2(silu(linear_1(sinusoids)))` of t `[batch]`, the sinusoids as `ops.timestep_embedding`."""
    width = embedder.linear_1.in_features
    sinusoids = ops.timestep_embedding(t, width, **options, dtype=dtype)
    return embedder.linear_2(ops.silu(embedder.linear_1(sinusoids)))


def joint(first: Tensor, second: Tensor) -> Tensor:
    """Both along the tokens; no copy where they are neighbours in memory, as parts of one tensor are."""
    if not _recorded(first, second) and not torch.compiler.is_compiling() and _adjacent(first, second):
        length = first.shape[1] + second.shape[1]
        return first.as_strided((len(first), length, first.shape[2]), first.stride())
    return torch.cat([first, second], 1)


def bounded(x: Tensor) -> Tensor:
    """float16 clipped to its largest finite numbers, as diffusers clips residuals; others as they are."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def weight_of(norm: nn.Module | None) -> Tensor | None:
    """The weight of a norm that a model may not have."""
    return None if norm is None else norm.weight


def _adjacent(first: Tensor, second: Tensor) -> bool:
    together = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    behind = first.storage_offset() + first.shape[1] * first.stride(1) == second.storage_offset()
    return together and behind and first.stride() == second.stride() and first.dtype == second.dtype


def _coding(layers: tuple[nn.Module, ...], *inputs: Tensor | None) -> dict | None:
    """What quantises tokens once for all layers: arguments of an op; None where that is not possible."""
    if not layers or not all(is_plain(layer, QuantLinear) for layer in layers) or _recorded(*inputs):
        return None
    codings = [layer.coding for layer in layers]
    return codings[0] if all(c == codings[0] for c in codings) else None


def is_plain(layer: nn.Module, kind: type) -> bool:
    """A layer of exactly that class whose call is its forward, without hooks."""
    hooked = layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__
    return type(layer) is kind and not hooked


def _recorded(*tensors: Tensor | Codes | None) -> bool:
    """Whether a gradient is recorded."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
