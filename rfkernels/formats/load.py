"""Reading any quantised checkpoint, and putting it into a model: layer by layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rfkernels.formats import bnb, comfy, fp8, gguf, native, nunchaku, nvfp4
from rfkernels.formats.container import Checkpoint, open_checkpoint
from rfkernels.formats.native import complete, set_tensor
from rfkernels.nn import QuantLinear
from rfkernels.quantization.model import replace

__all__ = ["Part", "Rename", "load", "original_names", "read", "reader_of"]

_READERS = (native, comfy, nunchaku, nvfp4, bnb, fp8)  # fp8 has the weakest mark: the dtype of weights
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "_orig_mod.", "model.")


class Part(NamedTuple):
    """`target` takes the rows `start` to `stop` of a tensor; `swap`: their halves exchanged."""

    target: str
    start: int
    stop: int
    swap: bool = False


Rename = Callable[[str], "str | Sequence[Part]"]


def reader_of(checkpoint: Checkpoint):
    """The module of `rfkernels.formats` that reads a checkpoint; None for plain floating tensors.

    Raises:
        ValueError: tensors that are not plain, in a layout that none of them knows.
    """
    found = next((reader for reader in _READERS if reader.detect(checkpoint)), None)
    plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    odd = [n for n in checkpoint if checkpoint.dtype(n) not in plain] if found is None else []
    if odd:
        known = ", ".join(r.__name__.rpartition(".")[2] for r in _READERS)
        kinds = [f"{n} ({checkpoint.dtype(n)})" for n in odd[:6]]
        raise ValueError(f"checkpoint: a layout of {known} is required, got {len(odd)} keys like {kinds}")
    return found


def read(
    source: str | Path | Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """What a checkpoint holds, one after the other: layers by their name, other tensors by theirs.

    Weights in formats that no op multiplies (NF4, FP4) come as float32 tensors. Layers of a GGUF file have
    its blocks as they lie there, mapped: the file must stay as it is while they live.

    Args:
        source: a safetensors or GGUF file, or tensors by name; common prefixes of all names are taken off.
        dtype: of the tokens of layers that have no bias to tell it.
    """
    if isinstance(source, (str, Path)) and Path(source).is_file() and gguf.is_gguf(source):
        yield from gguf.read(source, dtype)
        return
    checkpoint = open_checkpoint(source).without_prefix(*_PREFIXES)
    reader = reader_of(checkpoint)
    yield from checkpoint.items() if reader is None else reader.read(checkpoint, dtype)


def load(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    rename: Rename | None = None,
    method: str | None = None,
    drop: Callable[[str], bool] = lambda name: False,
    **options,
) -> nn.Module:
    """Loads a checkpoint into a model, in place; the model may be on "meta".

    Args:
        rename: from a name in the file, `L.weight` for a layer L, to that in the model; or to `Part`s that
            share its rows. By default names are the model's; `original_names(model)` knows others.
        method: a format of `QuantLinear` for weights of linear layers that come as floating tensors or
            blocks of GGUF; `options` as in `QuantLinear.from_linear`. By default they stay as they come.
        drop: whether a name of the file is passed over.

    Raises:
        ValueError: names that the model does not have, or that the file lacks; shapes that do not fit.
    """
    wanted = set(model.state_dict())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.bfloat16)
    done: set[str] = set()
    for name, item in read(source, dtype):
        for target, part in () if drop(name) else _placed(name, item, rename):
            if target not in wanted:
                raise ValueError(
                    f"checkpoint: {name} becomes {target}, which the {type(model).__name__} has not"
                )
            done |= _put(model, target, part, method, options)
    if wanted - done:
        missing = sorted(wanted - done)
        raise ValueError(f"checkpoint: {len(missing)} tensors are missing, among them {missing[:4]}")
    return complete(model, "checkpoint")


def _placed(
    name: str, item: QuantLinear | Tensor, rename: Rename | None
) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    full = f"{name}.weight" if isinstance(item, QuantLinear) else name
    target = full if rename is None else rename(full)
    if isinstance(target, str):
        yield target, item
        return
    rows = item.out_features if isinstance(item, QuantLinear) else len(item)
    covered = sorted(row for part in target for row in range(part.start, part.stop))
    if covered != list(range(rows)):
        raise ValueError(f"checkpoint: {name} must have {len(covered)} rows for {list(target)}, got {rows}")
    for part in target:
        index = slice(part.start, part.stop)
        if part.swap:
            index = torch.arange(part.start, part.stop).roll((part.stop - part.start) // 2)
        yield part.target, item.take_rows(index) if isinstance(item, QuantLinear) else item[index]


def original_names(model: nn.Module) -> Rename:
    """The names of the original repository (BFL, Stability AI, Wan ..) of a model of diffusers, for
    `load`."""
    from rfkernels.adapters.names import Names

    names = Names(model)
    rows = {name: len(tensor) for name, tensor in model.state_dict().items() if tensor.ndim}

    def rename(name: str) -> str | list[Part]:
        layer, _, leaf = name.rpartition(".")
        parts, start = [], 0
        for target in () if name in rows else names.find(layer):
            known = next((n for n in (f"{target.path}.{leaf}", f"{target.path}.weight") if n in rows), None)
            if known is None:
                return name
            parts.append(Part(known, start, start := start + rows[known], target.swap))
        return parts or name

    return rename


def _put(
    model: nn.Module, target: str, item: QuantLinear | Tensor, method: str | None, options: dict
) -> set[str]:
    """Puts one item into the model: the names that it filled."""
    layer, _, leaf = target.rpartition(".")
    owner = model.get_submodule(layer)
    old = getattr(owner, leaf)
    device = "cpu" if old is None or old.is_meta else old.device
    if isinstance(item, QuantLinear) and type(owner) is nn.Linear:
        shapes = [(m.out_features, m.in_features, m.bias is not None) for m in (owner, item)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{layer} must have outputs, inputs, bias {shapes[0]}, got {shapes[1]}")
        if method is not None and item.format == "gguf":
            item = QuantLinear.from_linear(_expanded(item), method, name=layer, **options)
        replace(model, layer, item.to(device))
        return {target, f"{layer}.bias"} if item.bias is not None else {target}
    if isinstance(item, QuantLinear):  # an embedding, stored like a layer
        item = item.dequantized()
    set_tensor(model, target, item.to(device, old.dtype if item.is_floating_point() else item.dtype))
    if method is not None and leaf == "weight" and type(owner) is nn.Linear:
        replace(model, layer, QuantLinear.from_linear(owner, method, name=layer, **options))
    return {target}


def _expanded(layer: QuantLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.dequantized().to(layer.dtype)), layer.bias
    return linear
