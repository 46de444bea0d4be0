"""Files of models that `rfkernels.quantize` made: safetensors with the state dict, and each layer's
settings in the header (`rfkernels`: version, model class, layers, and names that share a tensor)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rfkernels.formats.container import Checkpoint, open_checkpoint, write_safetensors
from rfkernels.nn import QuantLinear
from rfkernels.quantization.model import replace

__all__ = ["KEY", "complete", "detect", "header", "load_quantized", "read", "save_quantized", "set_tensor"]

KEY, _VERSION = "rfkernels", 1


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Writes a model with quantised layers to a safetensors file, tensor by tensor.

    Tensors that names share are written once.
    """
    tensors: dict[str, Tensor] = {}
    aliases, seen = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key], tensors[name] = name, tensor
    layers = {
        n: m.config() for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)
    }
    write_safetensors(path, tensors.items(), header(type(model).__name__, layers, aliases))


def header(model: str, layers: dict[str, dict], aliases: dict[str, str]) -> dict[str, str]:
    """The strings of the header: class of the model, settings of layers, names that share a tensor."""
    record = {"version": _VERSION, "model": model, "layers": layers, "aliases": aliases}
    return {KEY: json.dumps(record)}


def detect(checkpoint: Checkpoint) -> bool:
    return '"layers"' in checkpoint.metadata.get(KEY, "")


def read(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, QuantLinear | Tensor]]:
    """Layers and other tensors, for `rfkernels.formats.read`; names that share a tensor have one each."""
    record = _record(checkpoint, "checkpoint")
    cut = len(checkpoint.prefix)
    layers = {layer[cut:]: config for layer, config in record["layers"].items()}
    names = {name: name for name in checkpoint} | {a[cut:]: b[cut:] for a, b in record["aliases"].items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if layer in layers:
            parts.setdefault(layer, {})[leaf] = checkpoint[names[name]]
        else:
            yield name, checkpoint[names[name]]
    for layer, config in layers.items():
        yield layer, _layer(parts.pop(layer, {}), config)


def _layer(parts: dict[str, Tensor], config: dict) -> QuantLinear:
    return QuantLinear(**parts, **{**config, "dtype": getattr(torch, config["dtype"])})


def load_quantized(
    model: nn.Module | Callable[[], nn.Module], path: str | Path, device: str | torch.device | None = None
) -> nn.Module:
    """The model with the tensors of a file of `save_quantized`, in place and tensor by tensor.

    Args:
        model: of the class that was saved, or a function that makes it, called under
            `torch.device("meta")`: then no weight is ever made at full size. A buffer that is not saved
            must not be made there.
        device: of the tensors; by default where the model is, the CPU for "meta".

    Raises:
        ValueError: a file of another kind, version or model; names or shapes that do not fit.
    """
    checkpoint = open_checkpoint(path)
    record = _record(checkpoint, path)
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    if type(model).__name__ != record["model"]:
        raise ValueError(f"{path}: a {record['model']} is required, got a {type(model).__name__}")
    made: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        origin = record["aliases"].get(name, name)
        if origin not in made:
            loaded = checkpoint[origin].to(device or _device(model))
            if origin not in record["aliases"].values():
                return loaded
            made[origin] = loaded
        return made[origin]

    names = set(checkpoint) | set(record["aliases"])
    for layer, config in record["layers"].items():
        leaves = {n for n in names if n.rpartition(".")[0] == layer}
        parts = {n.rpartition(".")[2]: tensor(n) for n in leaves}
        replace(model, layer, _layer(parts, config))
        names -= leaves
    wanted = {n for n in model.state_dict() if n.rpartition(".")[0] not in record["layers"]}
    if wanted != names:
        raise ValueError(
            f"{path}: missing {sorted(wanted - names)[:4]}, unknown {sorted(names - wanted)[:4]}"
        )
    for name in sorted(wanted):
        set_tensor(model, name, tensor(name))
    return complete(model, path)


def complete(model: nn.Module, path: object) -> nn.Module:
    """The model, if none of its tensors is left without numbers."""
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise ValueError(f"{path}: has no {left[:4]}, which the model makes itself: make it on a real device")
    return model


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer of the same shape."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    old = getattr(owner, leaf)
    if old.shape != tensor.shape:
        raise ValueError(f"{name} must be {list(old.shape)}, got {list(tensor.shape)}")
    if leaf in owner._parameters:
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    setattr(owner, leaf, tensor)


def _record(checkpoint: Checkpoint, path: str | Path) -> dict:
    if KEY not in checkpoint.metadata:
        raise ValueError(f"{path}: a file of save_quantized is required, its header has no {KEY!r}")
    record = json.loads(checkpoint.metadata[KEY])
    if record["version"] != _VERSION:
        raise ValueError(f"{path}: version {_VERSION} is required, got {record['version']}")
    return record


def _device(model: nn.Module) -> torch.device:
    first = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return torch.device("cpu") if first.type == "meta" else first
